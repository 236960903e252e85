"""Pruning at initialisation: masks chosen on an untrained network, which is then trained with them fixed.

After Gollini Navarrete et al., "What Scalable Second-Order Information Knows for Pruning at Initialization": the
statistics of batch norms are those of no data until they are warmed up, and criteria that read data see a network that
is not the one to be trained.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from ..adapters.base import Chain
from ..adapters.outputs import logits_of
from ..adapters.widths import Width
from ..data.images import CHUNK, ImageSource, check_labels, drawn, labelled_batches, open_images
from ..data.names import Name, short_name
from ..errors import ConfigError
from ..hub.create import create
from ..hub.load import Checkpoint
from ..hub.save import claim
from ..masks.choices import fit_criterion
from ..masks.choose import choose, split_by_fit
from ..masks.collapse import find_collapse
from ..masks.evidence import Evidence
from ..method.augment import augmented
from ..patterns import Full, Masks, Pattern, split_structures
from ..patterns.plan import at_initialisation
from ..reports.describe import describe_data, share_of_zeros
from ..runtime.device import describe_hardware
from ..runtime.distributed import processes
from ..runtime.run import Progress, Run
from ..runtime.version import __version__, versions
from ..settings import PruneConfig, TrainConfig
from .calibration import class_labels
from .measure import check_classifier, measure, measuring, open_labelled
from .prune import PruneResult, save
from .request import check_request, check_training
from .smaller import units_to_keep
from .structure import cut_units
from .subject import Subject, copy_of, weights_of
from .training import fixed, seed_of, sgd, train_epoch


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
    allow_custom: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> PruneResult:
    """Builds an untrained network, chooses its masks, and trains it with the masks fixed.

    Args:
        source: a name that timm knows (``resnet20_cifar``), or the folder or Hub id of a checkpoint, of which only the
            configuration is used.
        data: labelled images, all of which are held in memory.
        pattern: ``"0.9"`` or ``"2:4"``; ``"mlp:0.5"`` and other structures, by the scores of the mask criterion summed
            over each unit, which leave a smaller network; None trains the dense network.
        eval_data: labelled images on which accuracy is measured at the end; None measures nothing.
        **settings: by the names of :class:`~snows_hf.settings.TrainConfig`.
        others: as for :func:`snows_hf.prune`.

    Raises:
        SnowsError: bad settings, source, data or output; a loss that is not finite; see snows_hf.errors.
    """
    started = time.perf_counter()
    config = check_training(pattern, settings)
    check_request(data, data_split, eval_data, eval_split, output, device)
    chosen_pattern = at_initialisation(pattern, config) if pattern is not None else None
    run = Run.begin(device, reproducible=True, on_stage=on_stage, on_progress=on_progress)
    images_source = open_images(data, data_split)
    check_labels(images_source, "training")
    evaluation = open_labelled(eval_data, eval_split)

    run.say(f"Building {source}, untrained")
    checkpoint = create(source, images_source.class_names, config.seed, revision)
    check_classifier(checkpoint, "training")
    network = checkpoint.model.to(run.device)
    chain = build_chain(network)
    if chosen_pattern is not None:
        split_by_fit(weights_of(chain), chosen_pattern)
    subject = subject_of(checkpoint, chain, pattern or "dense", config)
    keep = units_to_keep(subject, split_structures(pattern or "")[0], allow_custom)
    run.say(f"Reading the images of {data} ({data_split})")
    images, labels = read_examples(run, images_source, checkpoint, config)
    if config.warm_up_bn:
        run.say(f"Warming up batch norms on {config.warm_up_bn} batches")
        if not warm_up(network, images[: config.warm_up_bn * config.batch_size].split(config.batch_size), run.device):
            run.say("The network has no batch norm: there is nothing to warm up")
    subject = subject.for_images(images[:1])
    units: dict[str, Any] = {}
    if keep:
        subject, units = cut_at_random(run, subject, keep, images, labels, config, allow_custom)
        checkpoint, network = subject.checkpoint, subject.network
    masks, facts = choose_masks(run, subject.chain, chosen_pattern, config, images, labels)
    run.say(f"Training on {len(labels)} images")
    begun = time.perf_counter()
    losses = fit(run, network, images, labels, masks, config)
    training_seconds = time.perf_counter() - begun
    accuracy = measure(run, "trained", measuring(network, checkpoint, evaluation), evaluation)
    network.to("cpu")

    title = pattern if keep else str(chosen_pattern)
    report = (
        describe(checkpoint, masks, facts, config)
        | units
        | {
            "source": short_name(source),
            "pattern": title if chosen_pattern is not None else None,
            "images": len(labels),
            "data": describe_data(data, data_split),
            "eval_data": describe_data(eval_data, eval_split),
            "accuracy": accuracy,
            "losses": losses,
            "training_seconds": training_seconds,
            "seconds": time.perf_counter() - started,
            "hardware": describe_hardware(run.device),
        }
    )
    claims = claim(str(title), report["sparsity"], masks.values()) if masks else {"version": __version__}
    folder = Path(output) if output is not None else None
    if folder is not None:  # a licence of the configuration's is not one of these weights
        checkpoint = replace(checkpoint, folder=folder)
    return save(run, checkpoint, folder, report, claims)


def subject_of(checkpoint: Checkpoint, chain: Chain, pattern: str, config: TrainConfig) -> Subject:
    """An untrained network as what units are cut out of: by the mask criterion, and without a repair, since random
    weights make nothing that is worth keeping."""
    settings = PruneConfig(pattern, mask=config.mask, units=config.mask, repair=False, seed=config.seed)
    layers = [group for _, group in chain.groups()]
    return Subject(checkpoint, chain, settings, layers, copy_of(checkpoint.model))


def cut_at_random(
    run: Run,
    subject: Subject,
    keep: Mapping[Width, int],
    images: Tensor,
    labels: Tensor,
    config: TrainConfig,
    allow_custom: bool,
) -> tuple[Subject, dict[str, Any]]:
    """The smaller network, untrained, and what the report says of it."""
    dense = sum(parameter.numel() for parameter in subject.network.parameters())
    subject = replace(subject, original=copy_of(subject.network))  # with the batch norms' statistics as they are now
    some = slice(0, config.criterion_samples)
    cut = cut_units(run, subject, keep, images[some], labels[some], allow_custom)
    total = sum(parameter.numel() for parameter in cut.subject.network.parameters())
    parameters = {"dense": dense, "total": total}
    return cut.subject, {"units": cut.units, "custom": cut.subject.checkpoint.custom, "parameters": parameters}


def choose_masks(
    run: Run, chain: Chain, pattern: Pattern | None, config: TrainConfig, images: Tensor, labels: Tensor
) -> tuple[Masks, dict[str, Any]]:
    """Masks of an untrained network by parameter name, empty for a dense one; for the report, what the criterion says
    of them, which layers they have cut off and why, and whether the logits still depend on the images."""
    if pattern is None:
        return {}, {"criterion": {}, "collapse": {"layers": {}, "connected": True}}
    if not isinstance(pattern, Full):
        run.say(f"Choosing masks by {Path(config.mask).name}")
    settings = PruneConfig(str(pattern), mask=config.mask, seed=config.seed)
    some = slice(0, config.criterion_samples)
    evidence = Evidence(weights_of(chain), pattern, settings, chain, images[some], labels[some], run)
    choice = choose(fit_criterion(evidence))
    cut, connected = find_collapse(chain, choice.masks, images[:1].to(run.device))
    for name, reason in cut.items():
        run.say(f"Layer collapse: {name}: {reason}")
    if not connected:
        run.say("The logits no longer depend on the images: training can only learn how frequent classes are")
    return choice.masks, {"criterion": dict(choice.facts), "collapse": {"layers": cut, "connected": connected}}


def describe(checkpoint: Checkpoint, masks: Masks, facts: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What the report says of the network and its masks."""
    return {
        "library": checkpoint.library,
        "architecture": type(checkpoint.model).__name__,
        "sparsity": share_of_zeros(map(checkpoint.model.get_parameter, masks)) if masks else 0.0,
        "settings": config.to_dict() | {"mask": Path(config.mask).name},
        **facts,
        "layers": [
            {"name": name, "shape": list(mask.shape), "sparsity": 1 - float(mask.double().mean())}
            for name, mask in masks.items()
        ],
        "versions": versions(torch, timm, transformers, accelerate),
        "seed": config.seed,
    }


def read_examples(run: Run, source: ImageSource, checkpoint: Checkpoint, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Preprocessed images (n, 3, h, w) on the CPU, in random order, and the model's class of each (n,).

    Raises:
        ConfigError: fewer than two images.
        DataError: unreadable images, or labels that do not match the model's classes.
    """
    count = config.samples or source.size
    if count is None:
        raise ConfigError(f"{source.name} is streamed, and how many images to keep is not said.", "Give --samples.")
    batches = labelled_batches(drawn(source, count, config.seed), checkpoint.preprocess)
    tracked = run.track(batches, "Reading images, in chunks", -(-count // CHUNK))
    images, labels = map(torch.cat, zip(*tracked, strict=True))
    if len(images) < 2:
        raise ConfigError(f"{source.name} ({source.split}) has one image.", "Training needs two at least.")
    with torch.no_grad():
        classes = logits_of(checkpoint.model, images[:2].to(run.device)).shape[1]
    labels = class_labels(labels, source, checkpoint, classes)
    return images.contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def warm_up(network: nn.Module, batches: Iterable[Tensor], device: torch.device) -> bool:
    """Sets the running statistics of all batch norms to the average over batches, weights unchanged; returns whether
    there is a batch norm."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return False
    momenta, training = [norm.momentum for norm in norms], network.training
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
    run: Run, network: nn.Module, images: Tensor, labels: Tensor, masks: Masks, config: TrainConfig
) -> list[float]:
    """SGD with momentum on cross-entropy, in place; weights that the masks leave out are zero and stay zero.

    Args:
        network: in float32, on the run's device; left in evaluation mode.
        images: preprocessed (n, 3, h, w), with classes ``labels`` (n,).

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
            accelerator = accelerate.Accelerator(cpu=run.device.type == "cpu")
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        steps = max(1, len(loader))

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for step, (batch, classes) in enumerate(loader, epoch * steps):
                batch = batch.to(run.device)
                batch = augmented(batch, seed_of(config.seed, step)) if config.augment else batch
                yield batch, classes.to(run.device)

        def loss_of(batch: Tensor, classes: Tensor) -> Tensor:
            return F.cross_entropy(logits_of(model, batch), classes)

        def rate(step: int) -> float:
            return config.lr * factor(step, config.epochs * steps, config.schedule)

        losses = []
        network.train()
        for epoch in range(config.epochs):
            losses.append(train_epoch(run, batches(epoch), steps, loss_of, optimizer, rate, epoch, config.epochs))
            run.say(f"Epoch {epoch + 1}/{config.epochs}: loss {losses[-1]:.4f}")
        network.eval()
    return losses


def factor(step: int, steps: int, kind: str) -> float:
    """The learning rate's factor: half a cosine down to zero, or a tenth of what it was after half and after three
    quarters of the steps."""
    done = step / max(1, steps)
    if kind == "step":
        return float(0.1 ** ((done >= 0.5) + (done >= 0.75)))
    return (1 + math.cos(math.pi * done)) / 2
