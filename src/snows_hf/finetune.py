"""Retraining what pruning made, with its zeros held (the paper's Table 5 and A.3.4)."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import transforms

from .adapters import build_chain
from .config import FinetuneConfig
from .data import ImageSource, drawn_labelled, label_map, open_images, pictures, to_classes
from .errors import ConfigError, LoadError, NumericsError, SaveError, one_line
from .evaluate import evaluate, logits_of
from .hub.card import write_card
from .hub.load import Checkpoint, load, short_name
from .hub.save import check_output, read_report, save_checkpoint, whole_folder
from .prune import PruneResult, check_apart, describe_data, describe_hardware, find_device
from .version import __version__


STATE_FILE = "state.safetensors"
"""Weights and momentum after the last whole epoch, in the hidden folder of an unfinished run."""


def finetune(
    model: str,
    data: str,
    *,
    output: str | Path,
    data_split: str = "train",
    eval_data: str | None = None,
    eval_split: str = "test",
    teacher: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    **settings: Any,
) -> PruneResult:
    """Retrains a pruned checkpoint on labelled images; weights that are zero stay zero.

    After each epoch the state goes to a hidden folder beside ``output``. The same call, made again after an
    interruption, goes on from there, and ends with the same weights as a run without one. (With ``minutes`` the number
    of epochs depends on the machine.)

    Args:
        model: Hub id or folder of what ``prune`` wrote.
        data: labelled images: Hub data set, image folder or folder of parquet.
        output: folder to save to, absent or empty.
        data_split: of ``data``.
        eval_data: labelled images on which accuracy is measured before and after; None measures nothing.
        eval_split: of ``eval_data``.
        teacher: Hub id or folder of a model with the same classes and preprocessing, the dense one say, whose logits
            the student learns from too.
        device: ``auto`` (what accelerate finds), ``cpu`` or ``cuda``.
        revision: of the model on the Hub.
        on_stage: called with a line of text when a new stage begins, and after each epoch.
        **settings: by the names of FinetuneConfig.

    Raises:
        SnowsError: bad settings, model, data or output; a loss that is not finite.
    """
    known = [field.name for field in fields(FinetuneConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"Unknown setting {name!r}.", f"Known: {', '.join(known)}.")
    config = FinetuneConfig(**settings)
    target, output = find_device(device), Path(output)
    if eval_data is not None:
        check_apart(data, data_split, eval_data, eval_split, "Give --data-split or --eval-split")
    check_output(output, size=0)

    on_stage(f"Loading {model}")
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
    network.to(target)
    before = after = None
    if evaluation is not None:
        on_stage(f"Measuring it on {eval_data} ({eval_split})")
        before = evaluate(network, evaluation, checkpoint.preprocess, checkpoint.class_names)
    labels = match(checkpoint, tutor, source, labels, target)

    run = {
        "settings": config.to_dict(),
        "data": [data, data_split, len(labels)],
        "model": digest(network),
        "teacher": digest(tutor.model) if tutor else None,
    }
    network.to(torch.float32)
    trained = train(
        Student(checkpoint, zeros, tutor, source, labels, target), config, unfinished(output), run, on_stage
    )
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(dtypes[name])
            if not tensor.isfinite().all():
                raise NumericsError(
                    f"Weight {name} has become NaN or infinite.",
                    f"Remove {unfinished(output)}, and give a smaller --lr.",
                )
    if evaluation is not None:
        on_stage(f"Measuring it on {eval_data} ({eval_split})")
        after = evaluate(network, evaluation, checkpoint.preprocess, checkpoint.class_names)
    network.to("cpu")

    report = pruning | {
        "name": output.resolve().name,
        "finetune": {
            "model": short_name(model),
            "teacher": short_name(teacher) if teacher is not None else None,
            "data": describe_data(data, data_split),
            "images": len(labels),
            "eval_data": describe_data(eval_data, eval_split) if eval_data is not None else None,
            "before": before.to_dict() if before else None,
            "after": after.to_dict() if after else None,
            **trained,
            "mask_unchanged": all(torch.equal(chain.weight(name) == 0, zero) for name, zero in zeros.items()),
            "settings": config.to_dict(),
            "device": str(target),
            "hardware": describe_hardware(target),
            "versions": {"snows-hf": __version__, "torch": torch.__version__},
        },
    }
    on_stage(f"Saving to {output}")
    summary = {**checkpoint.config.get("snows", {}), "version": __version__, "finetuned_epochs": trained["epochs"]}
    with whole_folder(output) as folder:
        save_checkpoint(checkpoint, folder, summary, report)
        write_card(checkpoint, folder, report)
    shutil.rmtree(unfinished(output), ignore_errors=True)
    return PruneResult(network, output, {"output": str(output), **report})


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


def unfinished(output: Path) -> Path:
    """The hidden folder beside the output that holds the state of an unfinished run."""
    output = output.resolve()
    return output.parent / f".{output.name}.finetune"


def digest(model: nn.Module) -> str:
    """A checksum of all weights and buffers, by which an unfinished run knows its model again."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


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
    names = label_map(source.class_names, checkpoint.class_names, classes, source.name)
    return to_classes(labels, names, source)


def train(
    student: Student,
    config: FinetuneConfig,
    folder: Path,
    run: dict[str, Any],
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """SGD with momentum until the epochs, or the minutes, are over; the model is left in evaluation mode.

    Args:
        student: its model is changed in place.
        config: settings.
        folder: where the state goes after each epoch; a state that is there is gone on from.
        run: what the state must belong to.
        on_stage: called with a line of text after each epoch.

    Returns:
        ``epochs`` run, ``planned``, ``seconds`` of training, ``losses`` by epoch (means over the training images).

    Raises:
        ConfigError: the folder holds the state of another run.
        NumericsError: the loss is not finite.
        SaveError: the state cannot be written.
    """
    model = student.checkpoint.model
    optimizer = torch.optim.SGD(
        model.requires_grad_(True).parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    # A weight at zero without a gradient has no momentum and no decay either: it stays, bit for bit.
    hooks = [
        model.get_parameter(name).register_hook(partial(torch.masked_fill, mask=zero.to(student.device), value=0))
        for name, zero in student.zeros.items()
    ]
    done: dict[str, Any] = {"epochs": 0, "planned": config.epochs, "seconds": 0.0, "losses": []}
    if (folder / STATE_FILE).exists():
        done = read_state(folder, run, model, optimizer)
        on_stage(f"Going on after epoch {done['epochs']} of {done['planned']}")
    try:
        while done["epochs"] < done["planned"]:
            latest = done["seconds"] / max(1, done["epochs"])
            if config.minutes and done["seconds"] + latest > 60 * config.minutes and done["epochs"]:
                break
            started = time.perf_counter()
            lr = learning_rate(config, done["epochs"], done["planned"])
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = train_epoch(student, optimizer, config, done["epochs"])
            done["epochs"] += 1
            done["losses"].append(loss)
            done["seconds"] += time.perf_counter() - started
            if config.minutes and done["epochs"] == 1:  # the decay is spread over as many as there is time for
                done["planned"] = min(config.epochs, max(1, int(60 * config.minutes / done["seconds"])))
            write_state(folder, run | {"done": done}, model, optimizer)
            on_stage(
                f"Epoch {done['epochs']}/{done['planned']}: learning rate {lr:.3g}, loss {loss:.4f}, "
                f"{done['seconds']:.0f} s"
            )
    finally:
        for hook in hooks:
            hook.remove()
        model.eval()
    return done


def learning_rate(config: FinetuneConfig, epoch: int, planned: int) -> float:
    """Of epoch ``epoch`` (from 0) of ``planned``."""
    every = config.decay_every or math.ceil(planned / 3)
    return config.lr * config.decay ** (epoch // every)


def train_epoch(student: Student, optimizer: torch.optim.SGD, config: FinetuneConfig, epoch: int) -> float:
    """One pass over the training images, the last incomplete batch left out; returns the mean loss.

    Order, augmentation and dropout depend on the seed and the epoch alone, so that no generator's state needs keeping.

    Raises:
        NumericsError: the loss is not finite.
    """
    model, preprocess = student.checkpoint.model.train(), student.checkpoint.preprocess
    losses = []
    with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
        torch.manual_seed((1_000_003 * config.seed + epoch) % 2**63)
        batches = torch.randperm(len(student.labels)).split(config.batch_size)
        if len(batches) > 1 and len(batches[-1]) < config.batch_size:
            batches = batches[:-1]
        for batch in batches:
            images = [augmented(image, config) for image in pictures(student.source, batch.tolist())]
            pixels = preprocess(images).to(student.device, memory_format=torch.channels_last)
            logits = logits_of(model, pixels)
            loss = F.cross_entropy(logits, student.labels[batch].to(student.device))
            if student.teacher is not None:
                with torch.no_grad():
                    taught = logits_of(student.teacher.model, pixels)
                soft = distillation(logits, taught, config.temperature)
                loss = (1 - config.distillation) * loss + config.distillation * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NumericsError(
                    f"The training loss became {losses[-1]} in epoch {epoch + 1}.",
                    "Give a smaller --lr, and remove the hidden .finetune folder beside the output.",
                )
    return sum(losses) / len(losses)


def augmented(image: Any, config: FinetuneConfig) -> Any:
    """A picture padded with black, cropped at random to its own size, and mirrored in half of the cases."""
    width, height = image.size
    padding = (round(config.crop * width), round(config.crop * height))
    if any(padding):
        image = transforms.RandomCrop((height, width), padding)(image)
    return transforms.RandomHorizontalFlip()(image) if config.flip else image


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(taught/T) ‖ softmax(logits/T)), the mean over images, for logits (n, classes) of both models."""
    ours, theirs = (F.log_softmax(x / temperature, dim=1) for x in (logits, taught))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def write_state(folder: Path, run: dict[str, Any], model: nn.Module, optimizer: torch.optim.SGD) -> None:
    """Puts the state after an epoch in the place of the one before: either is there, and whole.

    Raises:
        SaveError: the disk is full or refuses.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    partial = folder / f"{STATE_FILE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Cloned: safetensors takes no tensors that share memory.
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(copies, partial, metadata={"run": json.dumps(run)})
        partial.replace(folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"The state of the run cannot be written to {folder}: {one_line(error)}.",
            "Free some space, and repeat the command: it goes on after the last whole epoch.",
        ) from error


@torch.no_grad()
def read_state(folder: Path, run: dict[str, Any], model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Any]:
    """Puts a stored state into model and optimizer, and returns how far it had come.

    Raises:
        ConfigError: it belongs to another run.
        LoadError: it is corrupt.
    """
    path = folder / STATE_FILE
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {})["run"])
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise LoadError(f"{path} is corrupt: {one_line(error)}", f"Remove {folder} to begin anew.") from error
    done: dict[str, Any] = stored.pop("done")
    other = [key for key in run if stored.get(key) != json.loads(json.dumps(run[key]))]
    if other:
        raise ConfigError(
            f"{folder} holds an unfinished run with other {', '.join(other)}.",
            "Repeat the command that began it, or remove that folder to begin anew.",
        )
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensors[f"model.{name}"])
    for name, parameter in model.named_parameters():
        if f"momentum.{name}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                tensors[f"momentum.{name}"]
            )
    return done
