"""Retraining what pruning made, with its zeros held (the paper's Table 5 and A.3.4)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import fspath
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import build_chain
from ..adapters.base import logits_of
from ..data.images import ImageSource, drawn_labelled, open_images, pictures
from ..data.names import Name, short_name
from ..errors import ConfigError, NumericsError
from ..hub.card import write_card
from ..hub.load import Checkpoint, buffers_follow_weights, load
from ..hub.save import read_report, retrainings, save_checkpoint
from ..method.augment import augmented
from ..reports.describe import describe_data
from ..runtime.device import describe_hardware
from ..runtime.files import check_output, whole_folder
from ..runtime.journal import digest_of
from ..runtime.run import Progress, Run
from ..runtime.version import __version__, versions
from ..settings import FinetuneConfig
from .calibration import class_labels
from .measure import measure
from .prune import PruneResult
from .request import check_request
from .training import fixed, seed_of, set_rate, sgd, train_epoch


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
    """Retrains a pruned checkpoint on labelled images; weights that are zero stay zero.

    After each epoch the state is kept beside ``output`` (journal.py). The same call, made again after an interruption,
    goes on from there, and ends with the same weights as a run without one. (With ``minutes`` the number of epochs
    depends on the machine.)

    Args:
        model: Hub id or folder of what ``prune`` wrote.
        data: labelled images: Hub data set, image folder or folder of parquet.
        output: folder to save to, absent or empty.
        data_split: of ``data``.
        eval_data: labelled images on which accuracy is measured before and after; None measures nothing.
        eval_split: of ``eval_data``.
        teacher: Hub id or folder of a model with the same classes and preprocessing, the dense one say, whose logits
            the student learns from too.
        device: ``auto`` (CUDA where torch finds it), ``cpu`` or ``cuda``.
        revision: of the model on the Hub.
        restart: begin anew where an earlier call was broken off.
        on_stage: called with a line of text when a new stage begins, and after each epoch.
        on_progress: called with a :class:`~snows_hf.runtime.run.Progress` as a stage goes on.
        **settings: by the names of FinetuneConfig.

    Raises:
        SnowsError: bad settings, model, data or output; a loss that is not finite.
    """
    config, output = FinetuneConfig().updated(**settings), Path(output)
    check_request(data, data_split, eval_data, eval_split, output, device)
    run = Run.begin(device, reproducible=True, on_stage=on_stage, on_progress=on_progress)

    run.say(f"Loading {model}")
    checkpoint = load(model, revision)
    pruning = read_report(checkpoint.folder)
    network = checkpoint.model
    dtypes = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    chain = build_chain(network)
    zeros = {name: chain.weight(name).detach() == 0 for _, group in chain.groups() for name in group.parameters}
    # Weights, momentum and a second copy of both while they are replaced.
    check_output(output, 4 * sum(tensor.numel() * 4 for tensor in network.state_dict().values()))
    tutor = load(teacher) if teacher is not None else None
    source, labels = drawn_labelled(open_images(data, data_split), config.samples, config.seed)
    if len(labels) < 2:
        raise ConfigError(f"{data} ({data_split}) has one image.", "Retraining needs at least two.")
    evaluation = open_images(eval_data, eval_split) if eval_data is not None else None
    description = {
        "settings": config.to_dict(),
        "data": [fspath(data), data_split, len(labels)],
        "model": digest_of(network.state_dict()),
        "teacher": digest_of(tutor.model.state_dict()) if tutor else None,
    }

    with run.recorded(output, description, restart) as run:
        check_output(output, size=0)  # another run may have been here until a moment ago
        network.to(run.device)
        before = measure(run, "pruned", network, checkpoint, evaluation)
        labels = match(checkpoint, tutor, source, labels, run.device)
        network.to(torch.float32)
        trained = train(run, Student(checkpoint, zeros, tutor, source, labels, run.device), config)
        cast_back(network, dtypes)
        after = measure(run, "retrained", network, checkpoint, evaluation)
        network.to("cpu")
        retraining = trained | {
            "model": short_name(model),
            "teacher": short_name(teacher) if teacher is not None else None,
            "data": describe_data(data, data_split),
            "images": len(labels),
            "eval_data": describe_data(eval_data, eval_split),
            "before": before,
            "after": after,
            "mask_unchanged": all(torch.equal(chain.weight(name) == 0, zero) for name, zero in zeros.items()),
            "settings": config.to_dict(),
            "device": str(run.device),
            "hardware": describe_hardware(run.device),
            "versions": versions(torch),
        }
        run.say(f"Saving to {output}")
        return PruneResult(network, output, save(run, checkpoint, output, pruning, retraining))


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


def save(
    run: Run, checkpoint: Checkpoint, output: Path, pruning: dict[str, Any], retraining: dict[str, Any]
) -> dict[str, Any]:
    """Writes the retrained model with its card and report; gives the report.

    Raises:
        SaveError: the disk is full or refuses.
    """
    report = pruning | {
        "name": output.resolve().name,
        "earlier_finetunes": retrainings(pruning),
        "finetune": retraining,
    }
    epochs = sum(made["epochs"] for made in retrainings(report))
    summary = {**checkpoint.config.get("snows", {}), "version": __version__, "finetuned_epochs": epochs}
    with whole_folder(output, run.journal.folder) as folder:
        save_checkpoint(checkpoint, folder, summary, report)
        write_card(checkpoint, folder, report)
    return {"output": str(output), **report}


@dataclass(frozen=True)
class Student:
    """What is trained, and on what.

    Attributes:
        checkpoint: its model in float32 on ``device``.
        zeros: by parameter name, true where a weight is held at zero.
        teacher: or None.
        source: training images, to be read by number.
        labels: their classes by the model's numbers (n,).
        device: of both models.
    """

    checkpoint: Checkpoint
    zeros: dict[str, Tensor]
    teacher: Checkpoint | None
    source: ImageSource
    labels: Tensor
    device: torch.device


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
        if not torch.equal(teacher.preprocess(some), pixels):
            raise ConfigError(
                f"The teacher {teacher.source} prepares images in another way than {checkpoint.source}.",
                "Both see the same pixels: give one with the same preprocessing, such as the dense model.",
            )
        teacher.model.to(device, torch.float32).requires_grad_(False)
        taught = logits_of(teacher.model, pixels.to(device)).shape[1]
        same_names = None in (teacher.class_names, checkpoint.class_names) or (
            teacher.class_names == checkpoint.class_names
        )
        if taught != classes or not same_names:
            raise ConfigError(
                f"The teacher {teacher.source} has other classes ({taught}) than {checkpoint.source} ({classes}).",
                "Give one with the same classes in the same order, such as the dense model.",
            )
    return class_labels(labels, source, checkpoint, classes)


def train(run: Run, student: Student, config: FinetuneConfig) -> dict[str, Any]:
    """SGD with momentum until the epochs, or the minutes, are over; the model is left in evaluation mode.

    Args:
        run: is told; its journal keeps the state after each epoch, and from one that is there the training goes on.
        student: its model is changed in place.
        config: settings.

    Returns:
        ``epochs`` run, ``planned``, ``seconds`` of training, ``losses`` by epoch (means over the training images).

    Raises:
        NumericsError: the loss is not finite.
        SaveError: the state cannot be written.
    """
    model = student.checkpoint.model
    optimizer = sgd(model, config)
    done: dict[str, Any] = {"epochs": 0, "planned": config.epochs, "seconds": 0.0, "losses": []}
    with fixed(model, student.zeros):
        if (record := run.journal.get("epoch")) is not None:
            put_state(record.tensors, model, optimizer)
            done = record.facts
            run.say(f"Going on after epoch {done['epochs']} of {done['planned']}")
        while done["epochs"] < done["planned"]:
            latest = done["seconds"] / max(1, done["epochs"])
            if config.minutes and done["seconds"] + latest > 60 * config.minutes and done["epochs"]:
                break
            started = time.perf_counter()
            lr = learning_rate(config, done["epochs"], done["planned"])
            set_rate(optimizer, lr)
            # Order, augmentation and dropout depend on the seed and the epoch alone.
            with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
                torch.manual_seed(seed_of(config.seed, done["epochs"]))
                model.train()
                batches = run.track(
                    batches_of(student, config, done["epochs"]),
                    f"Batches of epoch {done['epochs'] + 1}/{done['planned']}",
                    max(1, len(student.labels) // config.batch_size),
                )
                loss = train_epoch(batches, partial(loss_of, student, config), optimizer, done["epochs"] + 1)
            done["epochs"] += 1
            done["losses"].append(loss)
            done["seconds"] += time.perf_counter() - started
            if config.minutes and done["epochs"] == 1:  # the decay is spread over as many as there is time for
                done["planned"] = min(config.epochs, max(1, int(60 * config.minutes / done["seconds"])))
            run.journal.put("epoch", state_of(model, optimizer), **done)
            run.say(
                f"Epoch {done['epochs']}/{done['planned']}: learning rate {lr:.3g}, loss {loss:.4f}, "
                f"{done['seconds']:.0f} s"
            )
    model.eval()
    return done


def learning_rate(config: FinetuneConfig, epoch: int, planned: int) -> float:
    """Of epoch ``epoch`` (from 0) of ``planned``."""
    every = config.decay_every or math.ceil(planned / 3)
    return config.lr * config.decay ** (epoch // every)


def batches_of(student: Student, config: FinetuneConfig, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in an order of torch's generator, as pixels (b, 3, h, w) and classes (b,), the last
    incomplete batch left out."""
    batches = torch.randperm(len(student.labels)).split(config.batch_size)
    if len(batches) > 1 and len(batches[-1]) < config.batch_size:
        batches = batches[:-1]
    for step, batch in enumerate(batches, epoch * len(batches)):
        pixels = student.checkpoint.preprocess(pictures(student.source, batch.tolist())).to(student.device)
        seed = seed_of(config.seed, step)
        yield augmented(pixels, seed, crop=config.crop, flip=config.flip), student.labels[batch].to(student.device)


def loss_of(student: Student, config: FinetuneConfig, pixels: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy, with the teacher's share where there is one."""
    logits = logits_of(student.checkpoint.model, pixels)
    loss = F.cross_entropy(logits, classes)
    if student.teacher is None:
        return loss
    with torch.no_grad():
        taught = logits_of(student.teacher.model, pixels)
    soft = distillation(logits, taught, config.temperature)
    return (1 - config.distillation) * loss + config.distillation * soft


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(taught/T) ‖ softmax(logits/T)), the mean over images, for logits (n, classes) of both models."""
    ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (logits, taught))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def state_of(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """Weights, buffers and momentum, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    return tensors


@torch.no_grad()
def put_state(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.SGD) -> None:
    """:func:`state_of` undone."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        if (buffer := tensors.get(f"momentum.{name}")) is not None:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
