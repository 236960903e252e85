"""Pruning at initialisation: masks chosen on an untrained network, which is then trained with them fixed.

After Gollini Navarrete et al., "What Scalable Second-Order Information Knows for Pruning at Initialization": the
statistics of batch norms are those of no data until they are warmed up, and criteria that read data see a network that
is not the one to be trained.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..adapters import build_chain
from ..adapters.base import logits_of
from ..data.accuracy import accuracy_of
from ..data.images import ImageSource, calibration_examples, check_labels, open_images
from ..data.names import Name, short_name
from ..errors import ConfigError
from ..hub.card import write_training_card
from ..hub.create import create
from ..hub.load import Checkpoint
from ..hub.save import claim, save_checkpoint
from ..masks import Evidence, choose, split_by_fit
from ..masks.choices import fit_criterion
from ..masks.collapse import find_collapse
from ..method.augment import augmented
from ..patterns import Masks, Pattern, Unstructured, parse_pattern
from ..reports.describe import describe_data
from ..runtime.device import describe_hardware, find_reproducible
from ..runtime.distributed import processes
from ..runtime.files import check_output, whole_folder
from ..runtime.version import __version__, versions
from ..settings import PruneConfig, TrainConfig
from .calibration import class_labels
from .prune import PruneResult
from .request import check_apart, check_mask
from .training import fixed, seed_of, set_rate, sgd, train_epoch


def train(
    source: Name,
    data: Name,
    pattern: str | None = None,
    *,
    output: str | Path | None = None,
    data_split: str = "train",
    eval_data: Name | None = None,
    eval_split: str = "test",
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    **settings: Any,
) -> PruneResult:
    """Builds an untrained network, chooses its masks, and trains it with the masks fixed.

    Args:
        source: a name that timm knows (``resnet20_cifar``), or the folder or Hub id of a checkpoint, of which only the
            configuration is used.
        data: labelled images: Hub data set, image folder or folder of parquet. All of them are held in memory.
        pattern: ``"0.9"`` or ``"2:4"``, as for :func:`snows_hf.prune`; None trains the dense network.
        output: folder to save to, absent or empty; None saves nothing.
        data_split: split of ``data``.
        eval_data: labelled images on which accuracy is measured at the end; None measures nothing.
        eval_split: split of ``eval_data``.
        device: ``auto`` (CUDA where torch finds it), ``cpu`` or ``cuda``.
        revision: of ``source`` on the Hub.
        on_stage: called with a line of text when a new stage begins, after each epoch, and for each collapsed layer.
        **settings: by the names of :class:`~snows_hf.settings.TrainConfig`.

    Raises:
        SnowsError: bad settings, source, data or output; a loss that is not finite; see snows_hf.errors.
    """
    started = time.perf_counter()
    config = TrainConfig().updated(**settings)
    chosen_pattern = at_initialisation(pattern, config) if pattern is not None else None
    check_mask(config.mask)
    target = find_reproducible(device)
    check_apart(data, data_split, eval_data, eval_split, "Give --data-split or --eval-split")
    if output is not None:
        check_output(Path(output), size=0)
    images_source = open_images(data, data_split)
    check_labels(images_source, "training")
    evaluation = open_images(eval_data, eval_split) if eval_data is not None else None

    on_stage(f"Building {source}, untrained")
    checkpoint = create(source, images_source.class_names, config.seed, revision)
    network = checkpoint.model.to(target)
    chain = build_chain(network)
    weights = {name: chain.weight(name).detach() for _, group in chain.groups() for name in group.parameters}
    if chosen_pattern is not None:
        split_by_fit(weights, chosen_pattern)
    on_stage(f"Reading the images of {data} ({data_split})")
    images, labels = read_examples(images_source, checkpoint, config, target)

    if config.warm_up_bn:
        on_stage(f"Warming up batch norms on {config.warm_up_bn} batches")
        if not warm_up(network, images[: config.warm_up_bn * config.batch_size].split(config.batch_size), target):
            on_stage("The network has no batch norm: there is nothing to warm up")
    masks: Masks = {}
    facts: dict[str, Any] = {}
    cut: dict[str, str] = {}
    connected = True
    if chosen_pattern is not None:
        on_stage(f"Choosing masks by {Path(config.mask).name}")
        some = slice(0, config.criterion_samples)
        settings_of_masks = PruneConfig(str(chosen_pattern), mask=config.mask, seed=config.seed)
        evidence = Evidence(weights, chosen_pattern, settings_of_masks, chain, images[some], labels[some])
        choice = choose(fit_criterion(evidence, None, on_stage))
        masks, facts = choice.masks, dict(choice.facts)
        cut, connected = find_collapse(chain, masks, images[:1].to(target))
        for name, reason in cut.items():
            on_stage(f"Layer collapse: {name}: {reason}")
        if not connected:
            on_stage("The logits no longer depend on the images: training can only learn how frequent classes are")

    def on_epoch(epoch: int, loss: float) -> None:
        on_stage(f"Epoch {epoch}/{config.epochs}: loss {loss:.4f}")

    on_stage(f"Training on {len(labels)} images")
    training = time.perf_counter()
    losses = fit(network, images, labels, masks, config, target, on_epoch)
    training_seconds = time.perf_counter() - training
    accuracy = None
    if evaluation is not None:
        on_stage(f"Measuring it on {eval_data} ({eval_split})")
        accuracy = accuracy_of(network, evaluation, checkpoint.preprocess, checkpoint.class_names)
    network.to("cpu")

    zeros = sum(int((chain.weight(name) == 0).sum()) for name in masks)
    report: dict[str, Any] = {
        "source": short_name(source),
        "library": checkpoint.library,
        "architecture": type(network).__name__,
        "pattern": str(chosen_pattern) if chosen_pattern is not None else None,
        "sparsity": zeros / sum(mask.numel() for mask in masks.values()) if masks else 0.0,
        "settings": config.to_dict() | {"mask": Path(config.mask).name},
        "criterion": facts,
        "collapse": {"layers": cut, "connected": connected},
        "layers": [
            {"name": name, "shape": list(mask.shape), "sparsity": 1 - float(mask.double().mean())}
            for name, mask in masks.items()
        ],
        "images": len(labels),
        "data": describe_data(data, data_split),
        "eval_data": describe_data(eval_data, eval_split),
        "accuracy": accuracy.to_dict() if accuracy else None,
        "losses": losses,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - started,
        "hardware": describe_hardware(target),
        "versions": versions(torch, timm, transformers, accelerate),
        "seed": config.seed,
    }
    if output is None:
        return PruneResult(network, None, {"output": None, **report})
    on_stage(f"Saving to {output}")
    report["name"] = Path(output).resolve().name
    summary = claim(str(chosen_pattern), report["sparsity"], masks.values()) if masks else {"version": __version__}
    with whole_folder(Path(output)) as folder:
        saved = replace(checkpoint, folder=folder)  # a licence of the configuration's is not one of these weights
        save_checkpoint(saved, folder, summary, report)
        write_training_card(saved, folder, report)
    return PruneResult(network, Path(output), {"output": str(output), **report})


def at_initialisation(pattern: str, config: TrainConfig) -> Pattern:
    """The pattern, unstructured with all layers ranked together as the paper has it, up to the layer cap.

    Raises:
        PatternError: no pattern, or a cap below its sparsity.
    """
    chosen = parse_pattern(pattern)
    if not isinstance(chosen, Unstructured):
        return chosen
    if config.allocation == "uniform":
        return replace(chosen, scope="layer")
    return replace(chosen, layer_cap=config.layer_cap)


def read_examples(
    source: ImageSource, checkpoint: Checkpoint, config: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Preprocessed images (n, 3, h, w) on the CPU, in random order, and the model's class of each (n,).

    Raises:
        ConfigError: fewer than two images.
        DataError: unreadable images, or labels that do not match the model's classes.
    """
    count = config.samples or source.size
    if count is None:
        raise ConfigError(f"{source.name} is streamed, and how many images to keep is not said.", "Give --samples.")
    images, labels = calibration_examples(source, count, config.seed, checkpoint.preprocess)
    if len(images) < 2:
        raise ConfigError(f"{source.name} ({source.split}) has one image.", "Training needs two at least.")
    with torch.no_grad():
        classes = logits_of(checkpoint.model, images[:2].to(device)).shape[1]
    labels = class_labels(labels, source, checkpoint, classes)
    return images.contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def warm_up(network: nn.Module, batches: Iterator[Tensor] | tuple[Tensor, ...], device: torch.device) -> bool:
    """Sets the running statistics of all batch norms to the average over batches, weights unchanged.

    Returns:
        Whether there is a batch norm.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return False
    momenta = [norm.momentum for norm in norms]
    training = network.training
    network.eval()  # dropout stays off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    for batch in batches:
        network(batch.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(training)
    return True


def fit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Masks,
    config: TrainConfig,
    device: torch.device,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> list[float]:
    """SGD with momentum on cross-entropy, in place; weights that the masks leave out are zero and stay zero.

    Args:
        network: in float32 on ``device``; left in evaluation mode.
        images: preprocessed (n, 3, h, w).
        labels: classes (n,).
        masks: by parameter name, true where a weight stays.
        config: epochs, learning rate and its schedule, batch size, momentum, weight decay, augmentation, seed.
        device: where the network is.
        on_epoch: called after each epoch with its number, from 1, and its mean loss.

    Returns:
        The mean loss of each epoch.

    Raises:
        NumericsError: a loss is not finite.
    """
    examples = torch.utils.data.TensorDataset(images, labels)
    with torch.random.fork_rng(), fixed(network, {name: ~mask for name, mask in masks.items()}):
        torch.manual_seed(config.seed)
        # A last batch of one image is more than batch norm can do.
        loader: Any = torch.utils.data.DataLoader(
            examples, config.batch_size, shuffle=True, drop_last=len(examples) % config.batch_size == 1
        )
        model, optimizer = network, sgd(network, config)
        if processes() > 1:
            accelerator = accelerate.Accelerator(cpu=device.type == "cpu")
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        each = max(1, len(loader))

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for step, (batch, classes) in enumerate(loader, epoch * each):
                batch, classes = batch.to(device), classes.to(device)
                set_rate(optimizer, config.lr * factor(step, config.epochs * each, config.schedule))
                yield augmented(batch, seed_of(config.seed, step)) if config.augment else batch, classes

        def loss_of(batch: Tensor, classes: Tensor) -> Tensor:
            return F.cross_entropy(logits_of(model, batch), classes)

        losses = []
        network.train()
        for epoch in range(config.epochs):
            losses.append(train_epoch(batches(epoch), loss_of, optimizer, epoch + 1))
            on_epoch(epoch + 1, losses[-1])
        network.eval()
    return losses


def factor(step: int, steps: int, kind: str) -> float:
    """The learning rate's factor: half a cosine down to zero, or a tenth of what it was after half and after three
    quarters of the steps."""
    done = step / max(1, steps)
    if kind == "step":
        return float(0.1 ** ((done >= 0.5) + (done >= 0.75)))
    return (1 + math.cos(math.pi * done)) / 2
