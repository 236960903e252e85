"""Retraining with labels, the zeros of what was pruned held (the paper's Table 5 and A.3.4)."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from os import fspath
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Chain, build_chain
from ..adapters.outputs import logits_of
from ..data.images import ImageSource, Preprocess, drawn_labelled, open_images, pictures
from ..data.names import Name, short_name
from ..errors import ConfigError, NumericsError
from ..hub.load import Checkpoint, buffers_follow_weights, load
from ..hub.save import claims_of, find_report, retrainings
from ..method.augment import augmented
from ..reports.describe import describe_data
from ..runtime.device import describe_hardware
from ..runtime.files import check_output
from ..runtime.journal import digest_of
from ..runtime.run import Progress, Run
from ..runtime.version import __version__, versions
from ..settings import FinetuneConfig
from .calibration import class_labels
from .inspect import SPARSE
from .measure import check_classifier, measure, measuring, open_labelled
from .prune import PruneResult, save
from .request import check_request
from .subject import load_told, weights_of
from .training import fixed, seed_of, sgd, train_epoch


def finetune(
    model: Name,
    data: Name,
    *,
    output: str | Path,
    data_split: str = "train",
    eval_data: Name | None = None,
    eval_split: str = "test",
    teacher: Name | None = None,
    device: str = "auto",
    revision: str | None = None,
    restart: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> PruneResult:
    """Retrains a checkpoint on labelled images; what pruning made zero stays zero, and of a dense model nothing does.

    After each epoch the state is kept beside ``output`` (journal.py). The same call, made again after an interruption,
    goes on from there, and ends with the same weights as a run without one. (With ``minutes`` the number of epochs
    depends on the machine.)

    Args:
        model: Hub id or folder, of what ``prune``, ``train`` or this function wrote, or of any other checkpoint.
        data: labelled images.
        eval_data: labelled images on which accuracy is measured before and after; None measures nothing.
        teacher: Hub id or folder of a model with the same classes and preprocessing, the dense one say, whose logits
            the student learns from too.
        **settings: by the names of FinetuneConfig.
        others: as for :func:`snows_hf.prune`.

    Raises:
        SnowsError: bad settings, model, data or output; a loss that is not finite.
    """
    config, output = FinetuneConfig().updated(**settings), Path(output)
    check_request(data, data_split, eval_data, eval_split, output, device)
    run = Run.begin(device, reproducible=True, on_stage=on_stage, on_progress=on_progress)

    checkpoint = load_told(run, model, revision)
    check_classifier(checkpoint, "retraining")
    network = checkpoint.model
    known = find_report(checkpoint.folder) or begin_report(checkpoint)
    zeros = zeros_to_hold(checkpoint, build_chain(network), known)
    held = sum(int(zero.sum()) for zero in zeros.values())
    run.say(f"Holding {held} zeros" if held else "The model is dense: no weight is held at zero")
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    # Weights, momentum and a second copy of both while they are replaced.
    check_output(output, 4 * sum(tensor.numel() * 4 for tensor in network.state_dict().values()))
    tutor = load_teacher(run, teacher)
    source, labels = drawn_labelled(open_images(data, data_split), config.samples, config.seed)
    if len(labels) < 2:
        raise ConfigError(f"{data} ({data_split}) has one image.", "Retraining needs at least two.")
    evaluation = open_labelled(eval_data, eval_split)
    measured = measuring(network, checkpoint, evaluation)
    description = {
        "settings": config.to_dict(),
        "data": [fspath(data), data_split, len(labels)],
        "model": digest_of(network.state_dict()),
        "teacher": digest_of(tutor.model.state_dict()) if tutor else None,
    }

    with run.recorded(output, description, restart) as run:
        check_output(output, size=0)  # another run may have been here until a moment ago
        network.to(run.device)
        before = measure(run, "pruned" if held else "dense", measured, evaluation)
        labels = match(checkpoint, tutor, source, labels, run.device)
        network.to(torch.float32)
        batches = partial(batches_of, checkpoint.preprocess, source, labels, config, run.device)
        loss = partial(loss_of, network, tutor.model if tutor else None, config)
        trained = train(run, network, zeros, batches, max(1, len(labels) // config.batch_size), loss, config)
        cast_back(network, dtypes)
        after = measure(run, "retrained", measured, evaluation)
        network.to("cpu")
        retraining = trained | {
            "model": short_name(model),
            "teacher": short_name(teacher) if teacher is not None else None,
            "data": describe_data(data, data_split),
            "images": len(labels),
            "eval_data": describe_data(eval_data, eval_split),
            "before": before,
            "after": after,
            "zeros": held,
            "mask_unchanged": all(torch.equal(network.get_parameter(name) == 0, zero) for name, zero in zeros.items()),
            "settings": config.to_dict(),
            "device": str(run.device),
            "hardware": describe_hardware(run.device),
            "versions": versions(torch),
        }
        earlier = retrainings(known)
        claims = claims_of(checkpoint.config) if held else {}  # a claim without a zero is none
        epochs = sum(made["epochs"] for made in (*earlier, retraining))
        report = known | {"earlier_finetunes": earlier, "finetune": retraining}
        return save(run, checkpoint, output, report, claims | {"version": __version__, "finetuned_epochs": epochs})


def load_teacher(run: Run, teacher: Name | None) -> Checkpoint | None:
    """
    Raises:
        SnowsError: no such model, or it is no classifier.
    """
    if teacher is None:
        return None
    tutor = load(teacher, run=run)
    check_classifier(tutor, "a teacher")
    return tutor


def begin_report(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a report says of a model that had none."""
    return {
        "source": short_name(checkpoint.source),
        "library": checkpoint.library,
        "architecture": type(checkpoint.model).__name__,
        "pattern": None,
        "layers": [],
        "versions": versions(torch),
    }


def zeros_to_hold(checkpoint: Checkpoint, chain: Chain, report: dict[str, Any]) -> dict[str, Tensor]:
    """Where prunable weights of a pruned model are zero, by name; empty for a dense one.

    Of a model that does not say that it was pruned, only layers that ``inspect`` counts as sparse have any.
    """
    zeros = {name: weight == 0 for name, weight in weights_of(chain).items()}
    says_so = report.get("pattern") is not None or claims_of(checkpoint.config).get("pattern") is not None
    return {name: zero for name, zero in zeros.items() if says_so or float(zero.double().mean()) >= SPARSE}


@torch.no_grad()
def cast_back(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Every tensor in the type that its checkpoint has it in.

    Raises:
        NumericsError: one is not finite.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes[name])
        if not tensor.isfinite().all():
            raise NumericsError(f"Weight {name} has become NaN or infinite.", "Lower --lr, and give --restart.")
    buffers_follow_weights(network)


@torch.no_grad()
def match(
    checkpoint: Checkpoint, teacher: Checkpoint | None, source: ImageSource, labels: Tensor, device: torch.device
) -> Tensor:
    """The model's classes of the training labels (n,); makes sure that the teacher fits, and puts it on the device.

    Raises:
        ConfigError: a teacher with other classes or other preprocessing.
        DataError: labels that do not match the model's classes.
    """
    some = pictures(source, range(min(2, len(labels))))
    pixels = checkpoint.preprocess(some)
    dtype = next(checkpoint.model.parameters()).dtype
    classes = logits_of(checkpoint.model, pixels.to(device, dtype)).shape[1]
    if teacher is not None:
        teacher.model.to(device, torch.float32).requires_grad_(False)
        names = {teacher.class_names, checkpoint.class_names} - {None}
        if not torch.equal(teacher.preprocess(some), pixels):
            raise ConfigError(
                f"The teacher {teacher.source} prepares images in another way than {checkpoint.source}.",
                "Both see the same pixels: give one with the same preprocessing, such as the dense model.",
            )
        taught = logits_of(teacher.model, pixels.to(device)).shape[1]
        if taught != classes or len(names) > 1:
            raise ConfigError(
                f"The teacher {teacher.source} has other classes ({taught}) than {checkpoint.source} ({classes}).",
                "Give one with the same classes in the same order, such as the dense model.",
            )
    return class_labels(labels, source, checkpoint, classes)


def train(
    run: Run,
    network: nn.Module,
    zeros: dict[str, Tensor],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    steps: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    config: FinetuneConfig,
) -> dict[str, Any]:
    """SGD with momentum until the epochs, or the minutes, are over; the journal keeps the state after each epoch, and
    from one that is there the training goes on.

    The network, in float32 on the run's device, is changed in place, and left in evaluation mode. An epoch (from 0)
    has as many ``steps`` as ``batches``, of images (b, 3, h, w) and classes (b,).

    Returns:
        ``epochs`` run, ``planned``, ``seconds`` of training, ``losses`` by epoch (means over the training images).

    Raises:
        NumericsError: the loss is not finite.
        SaveError: the state cannot be written.
    """
    optimizer = sgd(network, config)
    done: dict[str, Any] = {"epochs": 0, "planned": config.epochs, "seconds": 0.0, "losses": []}

    def rate(step: int) -> float:
        return learning_rate(config, step // steps, done["planned"])

    with fixed(network, zeros):
        if (record := run.journal.get("epoch")) is not None:
            put_state(record.tensors, network, optimizer)
            done = record.facts
            run.say(f"Going on after epoch {done['epochs']} of {done['planned']}")
        while (epoch := done["epochs"]) < done["planned"]:
            latest = done["seconds"] / max(1, epoch)
            if config.minutes and done["seconds"] + latest > 60 * config.minutes and epoch:
                break
            started = time.perf_counter()
            # Order, augmentation and dropout depend on the seed and the epoch alone.
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                torch.manual_seed(seed_of(config.seed, epoch))
                network.train()
                loss = train_epoch(run, batches(epoch), steps, loss_of, optimizer, rate, epoch, done["planned"])
            done["epochs"] += 1
            done["losses"].append(loss)
            done["seconds"] += time.perf_counter() - started
            if config.minutes and done["epochs"] == 1:  # the decay is spread over as many as there is time for
                done["planned"] = min(config.epochs, max(1, int(60 * config.minutes / done["seconds"])))
            run.journal.put("epoch", state_of(network, optimizer), **done)
            lr = optimizer.param_groups[0]["lr"]
            of = f"Epoch {done['epochs']}/{done['planned']}"
            run.say(f"{of}: learning rate {lr:.3g}, loss {loss:.4f}, {done['seconds']:.0f} s")
    network.eval()
    return done


def learning_rate(config: FinetuneConfig, epoch: int, planned: int) -> float:
    """Of epoch ``epoch`` (from 0) of ``planned``."""
    every = config.decay_every or math.ceil(planned / 3)
    return config.lr * config.decay ** (epoch // every)


def batches_of(
    preprocess: Preprocess,
    source: ImageSource,
    labels: Tensor,
    config: FinetuneConfig,
    device: torch.device,
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in an order of torch's generator, as pixels (b, 3, h, w) and classes (b,), the last
    incomplete batch left out."""
    batches = torch.randperm(len(labels)).split(config.batch_size)
    if len(batches) > 1 and len(batches[-1]) < config.batch_size:
        batches = batches[:-1]
    for step, batch in enumerate(batches, epoch * len(batches)):
        pixels = preprocess(pictures(source, batch.tolist())).to(device)
        pixels = augmented(pixels, seed_of(config.seed, step), crop=config.crop, flip=config.flip)
        yield pixels, labels[batch].to(device)


def loss_of(
    student: nn.Module, teacher: nn.Module | None, config: FinetuneConfig, pixels: Tensor, classes: Tensor
) -> Tensor:
    """Cross-entropy, with the teacher's share where there is one."""
    logits = logits_of(student, pixels)
    loss = F.cross_entropy(logits, classes)
    if teacher is None:
        return loss
    with torch.no_grad():
        taught = logits_of(teacher, pixels)
    return (1 - config.distillation) * loss + config.distillation * distillation(logits, taught, config.temperature)


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(taught/T) ‖ softmax(logits/T)), the mean over images, for logits (n, classes) of both models."""
    ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (logits, taught))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def state_of(network: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """Weights, buffers and momentum, by name."""
    momenta = {name: optimizer.state[weight].get("momentum_buffer") for name, weight in network.named_parameters()}
    return {f"model.{name}": tensor for name, tensor in network.state_dict().items()} | {
        f"momentum.{name}": momentum for name, momentum in momenta.items() if momentum is not None
    }


@torch.no_grad()
def put_state(tensors: dict[str, Tensor], network: nn.Module, optimizer: torch.optim.SGD) -> None:
    """:func:`state_of` undone."""
    for name, tensor in network.state_dict().items():
        tensor.copy_(tensors[f"model.{name}"])
    for name, weight in network.named_parameters():
        if (momentum := tensors.get(f"momentum.{name}")) is not None:
            optimizer.state[weight]["momentum_buffer"] = torch.empty_like(weight).copy_(momentum)
