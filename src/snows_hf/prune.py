"""The main job: load, choose masks, cascade, measure, save."""

import fnmatch
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import datasets
import psutil
import safetensors
import timm
import torch
import transformers
from accelerate import InitProcessGroupKwargs
from torch import Tensor, nn

from .adapters import Chain, Group, build_chain, frozen
from .allocation import Candidate, allocate, by_sensitivity, candidates_of, layer_sensitivities
from .cascade import LayerReport, Progress, bytes_per_image, prune_chain
from .config import PruneConfig
from .config import preset as preset_for
from .data import (
    ImageSource,
    calibration_chunks,
    calibration_examples,
    check_labels,
    label_map,
    open_images,
    split_revision,
    to_classes,
)
from .distributed import from_main, local_processes, processes
from .errors import AdapterError, ConfigError, DataError, MaskError
from .evaluate import Accuracy, evaluate, logits_of
from .flops import count_flops
from .hub.card import write_card
from .hub.load import Checkpoint, load, short_name
from .hub.repack import pack_into
from .hub.save import check_output, save_checkpoint, whole_folder
from .journal import Digest, Journal, Record, checksum, open_journal
from .masks import (
    NM,
    Choice,
    Evidence,
    Masks,
    Pattern,
    PerLayer,
    Unstructured,
    choose,
    choose_masks,
    load_masks,
    parse_pattern,
    split_by_fit,
)
from .masks.scores import criterion, needs_labels
from .memory import Images, Shelf, room
from .preconditioner import factor_bytes
from .version import __version__


DEFAULT_DATA = "timm/mini-imagenet"
"""Calibration images where none are named: 50,000 images of ImageNet's training set, openly on the Hub."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


FORMATS = ("safetensors", "packed")


@dataclass(frozen=True)
class PruneResult:
    """The pruned model (on the CPU, in its checkpoint's own dtype), where it was saved, and the report."""

    model: nn.Module
    output: Path | None
    report: dict[str, Any]


def prune(
    model: str,
    pattern: str,
    *,
    data: str | None = None,
    data_split: str = "train",
    eval_data: str | None = None,
    eval_split: str = "test",
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    memory: float | None = None,
    preset: str = "default",
    update: bool = True,
    restart: bool = False,
    format: str = "safetensors",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    **settings: Any,
) -> PruneResult:
    """Prunes a checkpoint one-shot, and saves the result as an ordinary checkpoint, or packed.

    With an ``output``, every finished layer is kept beside it (journal.py) until the result is whole: the same call
    goes on where an earlier one was broken off, and gives the same bits.

    Args:
        model: Hub id or folder, of transformers or timm.
        pattern: ``"2:4"``, ``"1:4"``, any ``"N:M"`` (N kept of M), a fraction of zeros such as ``"0.7"``, or a set of
            which each layer gets one, such as ``"1:4,2:4,dense"``, with ``sparsity`` for all together.
        data: calibration images: Hub data set (``@REVISION`` may follow), image folder or folder of parquet. Labels
            are read only if the mask criterion needs them.
        data_split: split of ``data``.
        eval_data: labelled images on which dense, masked and pruned accuracy are measured; None measures nothing.
        eval_split: split of ``eval_data``.
        output: folder to save to, absent or empty; None saves nothing.
        device: ``auto`` (what accelerate finds), ``cpu`` or ``cuda``.
        dtype: in which the solver computes; the result is saved in the checkpoint's own dtypes.
        revision: of the model on the Hub.
        memory: budget of main memory for this process, in GB. Batches are made small enough for it, and activations
            beyond a quarter of it rest on disk. None: half of what is free for each of the two.
        preset: ``default``, or ``paper`` for the paper's own settings.
        update: whether SNOWS re-optimises the kept weights; without it they are the dense ones, or what a criterion
            with an update of its own (sparsegpt, obc) makes of them.
        restart: begin anew where an earlier call was broken off.
        format: of the result: ``safetensors``, or ``packed``, which leaves out the zeros (see :func:`snows_hf.pack`).
        on_progress: called as the cascade goes on.
        on_stage: called with a line of text when a new stage begins.
        **settings: changes to the preset, by the names of PruneConfig and SolverConfig.

    Raises:
        SnowsError: bad settings, model, data or output; see snows_hf.errors.
    """
    started = time.perf_counter()
    asked = preset_for(preset, "", pattern).updated(**settings)  # bad settings, before anything is loaded
    by_layer = by_sensitivity(asked)
    candidates: list[Candidate] = candidates_of(asked) if by_layer else [one_pattern(asked)]
    check_mask(asked.mask)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if format not in FORMATS:
        raise ConfigError(f"Format {format!r}: expected one of {', '.join(FORMATS)}.")
    target_device = find_device(device)
    calibration_name = data or DEFAULT_DATA
    if eval_data is not None:
        check_apart(calibration_name, data_split, eval_data, eval_split, "Give --data-split or --eval-split")
    if output is not None:
        check_output(Path(output), size=0)

    on_stage(f"Loading {model}")
    checkpoint = load(model, revision)
    network = checkpoint.model
    original = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    chain = build_chain(network)
    config = preset_for(preset, chain.family, pattern).updated(**settings)
    if output is not None:
        # The result, and what is kept on the way: masks, weights of layers, two states of the joint solve.
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        check_output(Path(output), size * (3 if config.joint_steps else 2))
    layers = select_layers(chain, config.layers)
    weights = {name: original[name] for group in layers for name in group.parameters}
    for candidate in candidates:
        if candidate is not None:
            split_by_fit(weights, candidate)
    if config.mask.endswith(".safetensors"):  # its faults, too, are better known before images are read
        load_masks(Path(config.mask), weights, one_pattern(config))

    on_stage(f"Reading {config.samples} calibration images of {calibration_name}")
    source = open_images(calibration_name, data_split)
    evaluation = open_images(eval_data, eval_split) if eval_data is not None else None
    left = room(memory)
    shelf = Shelf(psutil.virtual_memory().available / 2 / local_processes() if left is None else left / 4)
    images, labels, digest = read_calibration(source, config, checkpoint, DTYPES[dtype], shelf)
    if len(images) < config.samples:
        on_stage(f"{calibration_name} ({data_split}) has only {len(images)} images: all of them are used")

    run = describe_run(checkpoint, original, config, digest, labels)
    run |= {"dtype": dtype, "device": target_device.type, "update": update, "processes": processes()}
    with open_journal(Path(output) if output is not None else None, run, restart, on_stage) as journal:
        if output is not None:
            from_main(lambda: check_output(Path(output), size=0))  # another run may have been here until a moment ago

        resumed = len(journal.names()) > 1  # the description of the run is always there

        def measure(what: str) -> Accuracy | None:
            if evaluation is None:
                return None
            name = f"accuracy-{what}-{hashlib.sha256(repr((eval_data, eval_split)).encode()).hexdigest()[:8]}"
            if (known := journal.get(name)) is not None:
                return Accuracy(**known.facts)
            on_stage(f"Measuring the {what} model on {eval_data} ({eval_split})")
            found = from_main(lambda: evaluate(network, evaluation, checkpoint.preprocess, checkpoint.class_names))
            journal.put(name, **found.to_dict())
            return found

        network.to(target_device)
        dense = measure("dense")
        network.to(DTYPES[dtype])
        check_chain(chain, images[:2].to(target_device))
        with frozen(network):  # counting hooks every module's inputs, and fails where one needs a gradient
            flops = count_flops(network, images[:1].to(target_device))
        with torch.no_grad():
            classes = chain.logits(images[:1].to(target_device)).shape[1]
        labels = class_labels(labels, source, checkpoint, classes)
        on_device = {name: weight.to(target_device) for name, weight in weights.items()}
        first = next(candidate for candidate in candidates if candidate is not None)
        evidence = Evidence(on_device, first, config, chain, images, labels)
        allocation: dict[str, Any] = {"kind": "uniform" if isinstance(first, NM) else config.allocation}
        if by_layer:
            evidence, allocation = find_allocation(journal, evidence, candidates, flops, left, on_stage)
        sparsity_pattern = evidence.pattern
        choice, criterion_seconds = find_choice(journal, evidence, on_stage)
        masks = choice.masks

        masked = pruned = None
        reports: list[LayerReport] = []
        if evaluation is not None or not update:
            chain.put(alone(choice, original))
            restore_untouched(network, original, masks)
            masked = pruned = measure("masked")
        if update:
            chain.put({name: original[name] for name in masks})
            network.to(DTYPES[dtype])
            config = find_batches(journal, chain, images[:2], masks, config, target_device, memory, left, on_stage)
            on_stage(f"Pruning {len(layers)} layers to {pattern}")
            reports = prune_chain(
                chain, images, masks, config, target_device, on_progress, shelf, choice.weights, journal
            )
            for name in restore_untouched(network, original, masks):
                on_stage(f"{name}: weights beyond the range of {original[name].dtype} became its largest number")
            pruned = measure("pruned")
        network.to("cpu")

        report = make_report(checkpoint, chain, layers, masks, sparsity_pattern, config, reports)
        report |= describe_size(network, masks, flops) | {
            "update": update,
            "allocation": allocation,
            "criterion": {
                "seconds": criterion_seconds,
                "labels": labels is not None,
                "own_update": bool(choice.weights),
                **choice.facts,
            },
            "samples": len(images),
            "calibration_data": describe_data(calibration_name, data_split),
            "eval_data": describe_data(eval_data, eval_split) if eval_data is not None else None,
            "dense": dense.to_dict() if dense else None,
            "masked": masked.to_dict() if masked else None,
            "pruned": pruned.to_dict() if pruned else None,
            "device": str(target_device),
            "dtype": dtype,
            "hardware": describe_hardware(target_device),
            "processes": processes(),
            "resumed": resumed,
            "seconds": time.perf_counter() - started,
        }
        report = finite(report)
        if output is None:
            return PruneResult(network, None, {"output": None, **report})
        on_stage(f"Saving to {output}")
        report["name"] = Path(output).resolve().name
        from_main(lambda: save(checkpoint, Path(output), journal.folder, report, packed=format == "packed"))
        return PruneResult(network, Path(output), {"output": str(output), **report})


def one_pattern(config: PruneConfig) -> NM | Unstructured:
    """The pattern of all layers, where it is one; unstructured, as the allocation wants it shared out."""
    pattern = parse_pattern(config.pattern)
    scope = "layer" if config.allocation == "uniform" else "global"
    return replace(pattern, scope=scope) if isinstance(pattern, Unstructured) else pattern


def read_calibration(
    source: ImageSource, config: PruneConfig, checkpoint: Checkpoint, dtype: torch.dtype, shelf: Shelf
) -> tuple[Images, Tensor | None, Digest]:
    """The calibration images, the data's own labels (n,) if the mask criterion needs them, and the images' digest.

    Raises:
        DataError: no image, an unreadable one, or no labels where there must be.
    """
    images, labels, digest = Images(shelf), None, Digest()
    chunks: Iterable[Tensor] = calibration_chunks(source, config.samples, config.seed, checkpoint.preprocess)
    if needs_labels(config.mask):
        check_labels(source, f"the mask criterion {config.mask!r}")
        examples, labels = calibration_examples(source, config.samples, config.seed, checkpoint.preprocess)
        chunks = [examples]
    for chunk in chunks:
        # Channels last, which convolutions hand on: on CPUs their backward passes run up to three times faster so.
        images.append(chunk.to(dtype, memory_format=torch.channels_last))
        digest.add(chunk)
    return images, labels, digest


def class_labels(labels: Tensor | None, source: ImageSource, checkpoint: Checkpoint, classes: int) -> Tensor | None:
    """The model's class of each label of the data (n,); None stays None.

    Raises:
        DataError: the classes cannot be matched.
    """
    if labels is None:
        return None
    return to_classes(labels, label_map(source.class_names, checkpoint.class_names, classes, source.name), source)


def find_allocation(
    journal: Journal,
    evidence: Evidence,
    candidates: Sequence[Candidate],
    flops: Mapping[str, int],
    left: int | None,
    on_stage: Callable[[str], None],
) -> tuple[Evidence, dict[str, Any]]:
    """The evidence with a pattern for each layer, and how these were chosen, by an earlier run where there was one."""
    chain, images, config = evidence.network, evidence.images, evidence.config
    assert images is not None

    def decide() -> dict[str, Any]:
        started = time.perf_counter()
        on_stage(f"Measuring the sensitivity of the layers under {len(candidates)} patterns")
        device = next(chain.parameters()).device
        fitted = fit_sensitivity(chain, images, dict(evidence.weights), candidates, config, device, left, on_stage)
        table = layer_sensitivities(replace(evidence, config=fitted), candidates, flops, config.repair_steps)
        patterns = {name: str(own or "dense") for name, own in allocate(table, config).patterns.items()}
        return {"patterns": patterns, "seconds": time.perf_counter() - started}

    known = journal.get("allocation")
    facts = known.facts if known is not None else from_main(decide)
    if known is None:
        journal.put("allocation", **facts)
    pattern = PerLayer.parse(facts["patterns"], config.pattern)
    return replace(evidence, pattern=pattern), {"kind": "sensitivity", "budget": config.budget, **facts}


def save(checkpoint: Checkpoint, output: Path, work: Path | None, report: dict[str, Any], packed: bool) -> None:
    """Writes the result, with its report and card.

    Raises:
        SaveError: the disk is full or refuses.
    """
    summary = {"version": __version__, "pattern": report["pattern"], "sparsity": round(report["sparsity"], 6)}
    with whole_folder(output, work) as folder:
        target = folder / "ordinary" if packed else folder
        target.mkdir(exist_ok=True)
        save_checkpoint(checkpoint, target, summary, report)
        write_card(checkpoint, target, report)
        if target is not folder:
            pack_into(target, folder)
            shutil.rmtree(target)


def describe_run(
    checkpoint: Checkpoint, weights: dict[str, Tensor], config: PruneConfig, images: Digest, labels: Tensor | None
) -> dict[str, Any]:
    """What the weights of a result depend on: two runs of the same description make the same ones."""
    model = Digest()
    for name, tensor in weights.items():
        model.add(tensor, name)
    if labels is not None:
        images.add(labels)
    mask = Path(config.mask)
    return {
        "model": model.text(),
        "configuration": hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest(),
        "calibration images": images.text(),
        "settings": config.to_dict() | {"mask": checksum(mask) if mask.suffix == ".safetensors" else config.mask},
        "versions": {
            "snows-hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "timm": timm.__version__,
        },
    }


def find_choice(journal: Journal, evidence: Evidence, on_stage: Callable[[str], None]) -> tuple[Choice, float]:
    """Masks (and weights) by the criterion, and the seconds that it took: an earlier run's where there was one."""

    def decide() -> Record:
        started = time.perf_counter()
        choice = choose(evidence)
        tensors = {f"mask {name}": mask.cpu() for name, mask in choice.masks.items()}
        tensors |= {f"weight {name}": weight.cpu() for name, weight in choice.weights.items()}
        return Record(tensors, {"facts": dict(choice.facts), "seconds": time.perf_counter() - started})

    record = journal.get("choice")
    if record is None:
        on_stage(f"Choosing masks by {Path(evidence.config.mask).name}")
        record = from_main(decide)
        journal.put("choice", record.tensors, **record.facts)
    found: dict[str, dict[str, Tensor]] = {"mask": {}, "weight": {}}
    for name, weight in evidence.weights.items():  # in their order
        for kind, tensors in found.items():
            if f"{kind} {name}" in record.tensors:
                tensors[name] = record.tensors[f"{kind} {name}"].to(weight.device)
    return Choice(found["mask"], found["weight"], record.facts["facts"]), record.facts["seconds"]


def find_batches(
    journal: Journal,
    chain: Chain,
    images: Tensor,
    masks: Masks,
    config: PruneConfig,
    device: torch.device,
    memory: float | None,
    left: int | None,
    on_stage: Callable[[str], None],
) -> PruneConfig:
    """Settings whose batches fit: those of an earlier run with the same budget, else of :func:`fit_batches`."""
    hardware = describe_hardware(device)
    known = journal.get("batches")
    if known is not None:
        config = config.updated(batch_size=known.facts["size"])
        if known.facts["hardware"] != hardware:
            on_stage(
                f"The earlier run had {known.facts['hardware']}, this one has {hardware}: the last bits of "
                "the result may differ"
            )
    if known is None or known.facts["memory"] != memory:
        config = from_main(lambda: fit_batches(chain, images, masks, config, device, left, on_stage))
    journal.put("batches", size=config.batch_size, memory=memory, hardware=hardware)
    return config


def check_apart(data: str, split: str, eval_data: str, eval_split: str, remedy: str) -> None:
    """Refuses to measure a model on the images that made it.

    Raises:
        DataError: both are the same split of the same data, however it is spelled.
    """
    # A Hub id names a folder that does not exist, which serves as well.
    places = [Path(split_revision(name)[0]).expanduser().resolve() for name in (data, eval_data)]
    if split == eval_split and places[0] == places[1]:
        raise DataError(
            f"Calibration or training, and evaluation, would use the same split {eval_split!r} of {eval_data}.",
            f"{remedy}: images that a model was made with cannot measure it.",
        )


def describe_data(data: str, split: str) -> dict[str, str | None]:
    """What the report says of a dataset: of a folder only its last name."""
    name, revision = split_revision(data)
    return {"name": short_name(name), "split": split, "revision": revision}


def check_mask(mask: str) -> None:
    """Refuses a mask file that does not exist, and an unknown criterion.

    Raises:
        ConfigError: no such criterion.
        MaskError: no such file.
    """
    if not mask.endswith(".safetensors"):
        criterion(mask)
    elif not Path(mask).is_file():
        raise MaskError(f"Mask file {mask} does not exist.", "Expected a safetensors file of booleans.")


def alone(choice: Choice, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full weights of a criterion without SNOWS: its own update where it has one, else the dense weights masked."""
    return {
        # Not a product, which would leave zeros of negative weights negative.
        name: choice.weights[name] if name in choice.weights else original[name].to(mask.device).where(mask, 0)
        for name, mask in choice.masks.items()
    }


def finite(value: Any) -> Any:
    """The same report with None for numbers that JSON cannot hold (the loss of a layer that overflowed)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_device(device: str) -> torch.device:
    """``auto`` is what accelerate finds.

    Raises:
        ConfigError: an unknown name, or a device that this machine has not.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"Device {device!r}: expected auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("Device cuda was asked for, and torch finds none here.", "Use --device cpu.")
    # While the main process measures or saves, the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # Where several processes were started and there is no CUDA, accelerate must be told that they shall use CPUs.
    cpu = device == "cpu" or (int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available())
    found = accelerate.Accelerator(cpu=cpu, kwargs_handlers=[patience]).device
    return torch.device("cpu") if found.type == "cpu" else found


def select_layers(chain: Chain, globs: tuple[str, ...]) -> list[Group]:
    """Groups whose name, or that of one of their parameters, matches one of the wildcards; all for none.

    Raises:
        MaskError: a wildcard matches nothing.
    """
    groups = [group for _, group in chain.groups()]
    for glob in globs:
        if not any(_matches(group, glob) for group in groups):
            raise MaskError(
                f"--layers {glob!r} matches no prunable layer.", "`snows-hf inspect MODEL` lists their names."
            )
    return [group for group in groups if not globs or any(_matches(group, glob) for glob in globs)]


def _matches(group: Group, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in (group.name, *group.parameters))


def check_chain(chain: Chain, images: Tensor) -> None:
    """Makes sure that the adapter computes what the model does, on real images.

    Raises:
        AdapterError: the logits differ by more than rounding.
    """
    with torch.no_grad(), frozen(chain.model):
        expected = logits_of(chain.model, images).double()
        got = chain.logits(images).double()
    tolerance = 1e3 * torch.finfo(images.dtype).eps * max(1.0, float(expected.abs().max()))
    if not float((got - expected).abs().max()) <= tolerance:
        raise AdapterError(
            f"The adapter for {type(chain.model).__name__} does not reproduce this model: logits differ by "
            f"{float((got - expected).abs().max()):.2g}, expected at most {tolerance:.2g}.",
            "This variant of the architecture has an option that the adapter does not know.",
        )


def fit_batches(
    chain: Chain,
    images: Tensor,
    masks: Masks,
    config: PruneConfig,
    device: torch.device,
    left: int | None,
    on_stage: Callable[[str], None],
) -> PruneConfig:
    """Settings whose batches fit: on the CPU into half of ``left`` bytes (None: of what is free), on
    CUDA into what the device has free.

    Raises:
        ConfigError: not even one image fits.
    """
    if device.type == "cuda":
        free = int(0.8 * torch.cuda.mem_get_info(device)[0])
    else:
        free = (psutil.virtual_memory().available // local_processes() if left is None else left) // 2
    each = bytes_per_image(chain, images, masks, config, device)
    if config.solver.preconditioner == "gram":
        groups = [{n: masks[n] for n in group.parameters if n in masks} for _, group in chain.groups()]
        free -= factor_bytes(masks) if config.joint_steps else max(map(factor_bytes, groups))
    # What passes through while a product is computed comes on top of what the graphs keep.
    fitting = processes() * int(free / (1.5 * max(each, 1)))
    if fitting >= config.batch_size:
        return config
    if fitting < 1:
        raise ConfigError(
            f"One image needs {1.5 * each / 1e9:.2f} GB at K = {config.k}, and {free / 1e9:.2f} GB are there for it.",
            "Give more --memory, or a smaller --k.",
        )
    on_stage(f"Batches of {fitting} images in place of {config.batch_size}, to fit into memory")
    return config.updated(batch_size=fitting)


def fit_sensitivity(
    chain: Chain,
    images: Tensor | Images,
    weights: dict[str, Tensor],
    candidates: Sequence[Candidate],
    config: PruneConfig,
    device: torch.device,
    left: int | None,
    on_stage: Callable[[str], None],
) -> PruneConfig:
    """:func:`fit_batches` for layers that are repaired one by one, under the candidate that keeps most.

    Raises:
        ConfigError: not even one image fits.
    """
    densest = min((c for c in candidates if c is not None), key=lambda candidate: candidate.sparsity)
    masks = choose_masks(weights, densest, "magnitude")  # of any criterion's size
    return fit_batches(chain, images[:2], masks, config.updated(joint_steps=0), device, left, on_stage)


@torch.no_grad()
def restore_untouched(network: nn.Module, original: dict[str, Tensor], masks: Masks) -> list[str]:
    """Casts every tensor back to its checkpoint's dtype, and puts back the very bits of those that were not pruned.

    Returns:
        Names of those with weights beyond the range of their dtype: these are now the largest that it has.
    """
    beyond = []
    for name, tensor in network.state_dict(keep_vars=True).items():
        source = original[name]
        if name not in masks:
            tensor.data = source.to(tensor.device)
            continue
        largest = torch.finfo(source.dtype).max
        if float(tensor.abs().max()) > largest:
            beyond.append(name)
            tensor.data = tensor.data.double().clamp(-largest, largest)
        tensor.data = tensor.data.to(source.dtype)
    return beyond


def make_report(
    checkpoint: Checkpoint,
    chain: Chain,
    layers: list[Group],
    masks: Masks,
    pattern: Pattern,
    config: PruneConfig,
    reports: list[LayerReport],
) -> dict[str, Any]:
    """The part of the report that does not depend on measurements. Layer names are live names of the library."""
    touched = [group for group in layers if any(name in masks for name in group.parameters)]
    chosen = pattern.patterns if isinstance(pattern, PerLayer) else {}  # with those that it leaves dense
    counted = [group for group in layers if group in touched or any(name in chosen for name in group.parameters)]
    pruned = [chain.weight(name) for group in counted for name in group.parameters]
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    summaries = [report.to_dict() for report in reports if report.sweep == 1]
    weights = {name: chain.weight(name) for group in layers for name in group.parameters}
    _, unfit = split_by_fit(weights, pattern)
    dense_layers = [
        {
            "name": group.name,
            "shape": list(chain.weight(group.parameters[0]).shape),
            "reason": "the allocation leaves it so"
            if any(name in chosen for name in group.parameters)
            else f"{pattern} does not fit its input width"
            if any(name in unfit for name in group.parameters)
            else "the mask file has no mask for it",
        }
        for group in layers
        if not any(name in masks for name in group.parameters)
    ]
    return {
        "source": short_name(checkpoint.source),
        "library": checkpoint.library,
        "architecture": type(checkpoint.model).__name__,
        "pattern": str(pattern),
        "sparsity": zeros / sum(weight.numel() for weight in pruned),
        "settings": config.to_dict() | {"mask": Path(config.mask).name},
        "layers": summaries or [summary(chain, group) for group in touched],
        "later_sweeps": [report.to_dict() for report in reports if report.sweep > 1],
        "dense_layers": dense_layers,
        "namespace": "live parameter names of the loaded model",
        "versions": {
            "snows-hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "timm": timm.__version__,
            "datasets": datasets.__version__,
            "accelerate": accelerate.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "seed": config.seed,
    }


def summary(chain: Chain, group: Group) -> dict[str, Any]:
    """What the report says about a layer that SNOWS has not touched."""
    weights = [chain.weight(name) for name in group.parameters]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "name": group.name,
        "parameters": list(group.parameters),
        "shape": [sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]],
        "sparsity": zeros / sum(weight.numel() for weight in weights),
    }


def describe_size(network: nn.Module, masks: Masks, flops: dict[str, int]) -> dict[str, Any]:
    """Weights and floating-point operations per image, dense and without those that the zeros make superfluous.

    Args:
        network: pruned.
        masks: of the pruned weights.
        flops: of each module on one image, by name, ``""`` being the whole network.
    """
    state = network.state_dict()
    zeros = {name: float((state[name] == 0).double().mean()) for name in masks}
    superfluous = sum(share * flops.get(name.removesuffix(".weight"), 0) for name, share in zeros.items())
    parameters = list(network.parameters())
    return {
        "parameters": {
            "total": sum(p.numel() for p in parameters),
            "nonzero": sum(int(torch.count_nonzero(p)) for p in parameters),
        },
        "flops": {"dense": flops[""], "pruned": round(flops[""] - superfluous)},
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    }


def describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
