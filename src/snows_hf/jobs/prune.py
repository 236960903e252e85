"""The main job: load, read images, choose masks, cascade, measure, save."""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Logits, build_chain
from ..adapters.check import select_layers
from ..adapters.offload import place
from ..data.accuracy import accuracy_of
from ..data.images import open_images
from ..data.names import Name
from ..errors import ConfigError
from ..hub.card import write_card
from ..hub.load import Checkpoint, buffers_follow_weights, load
from ..hub.repack import pack_into
from ..hub.save import claim, save_checkpoint
from ..masks import Evidence, load_masks, split_by_fit
from ..masks.choices import alone, find_allocation, find_choice, find_first_masks
from ..masks.permutation import order_channels
from ..method.cascade import prune_chain
from ..method.fitting import find_batches
from ..method.progress import LayerReport, Progress
from ..patterns import NM, Masks
from ..patterns.plan import Candidate, by_sensitivity, candidates_of, one_pattern, order_for
from ..reports.describe import describe_data, describe_layers, describe_run, describe_size, finite
from ..runtime.device import describe_hardware, find_reproducible
from ..runtime.distributed import from_main, processes
from ..runtime.files import check_output, whole_folder
from ..runtime.journal import Record, digest_of, open_journal
from ..runtime.memory import check_memory, room
from ..settings import preset as preset_for
from .calibration import DEFAULT_DATA, first_pass, read_calibration
from .request import check_apart, check_mask, find_dtype


FORMATS = ("safetensors", "packed")


@dataclass(frozen=True)
class PruneResult:
    """The pruned model (on the CPU, in its checkpoint's own dtype), where it was saved, and the report."""

    model: nn.Module
    output: Path | None
    report: dict[str, Any]


def prune(
    model: Name,
    pattern: str,
    *,
    data: Name | None = None,
    data_split: str = "train",
    eval_data: Name | None = None,
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
        device: ``auto`` (CUDA where torch finds it), ``cpu`` or ``cuda``.
        dtype: in which the solver computes; the result is saved in the checkpoint's own dtypes.
        revision: of the model on the Hub.
        memory: budget of main memory for this process, in GB. Batches are made small enough for it, and activations
            beyond a quarter of it rest on disk. None: half of what is free for each of the two.
        preset: ``default``, or ``paper`` for the paper's own settings.
        update: whether SNOWS re-optimises the kept weights; without it they are the dense ones, or what a criterion
            with an update of its own (sparsegpt, obc, swap) makes of them.
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
    check_memory(memory)
    order_for(asked, candidates)
    solver_dtype = find_dtype(dtype)
    if format not in FORMATS:
        raise ConfigError(f"Format {format!r}: expected one of {', '.join(FORMATS)}.")
    target = find_reproducible(device)
    data = data or DEFAULT_DATA
    check_apart(data, data_split, eval_data, eval_split, "Give --data-split or --eval-split")
    folder = Path(output) if output is not None else None
    if folder is not None:
        check_output(folder, size=0)

    on_stage(f"Loading {model}")
    checkpoint = load(model, revision)
    network = checkpoint.model
    original = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    chain = build_chain(network)
    config = preset_for(preset, chain.family, pattern).updated(**settings)
    if folder is not None:
        # The result, and what is kept on the way: the criterion's choice, weights of layers, two states of the joint
        # solve.
        size = sum(tensor.numel() * tensor.element_size() for tensor in original.values())
        check_output(folder, size * (4 if config.joint_steps else 3))
    layers = select_layers(chain, config.layers)
    weights = {name: original[name] for group in layers for name in group.parameters}
    for candidate in candidates:
        if candidate is not None:
            split_by_fit(weights, candidate)
    if config.mask.endswith(".safetensors"):  # its faults, too, are better known before images are read
        load_masks(Path(config.mask), weights, one_pattern(config))

    on_stage(f"Reading {config.samples} calibration images of {data}")
    source = open_images(data, data_split)
    evaluation = open_images(eval_data, eval_split) if eval_data is not None else None
    left = room(memory)
    images, labels, digest = read_calibration(source, config, checkpoint, solver_dtype, left)
    if len(images) < config.samples:
        on_stage(f"{data} ({data_split}) has only {len(images)} images: all of them are used")

    run = describe_run(checkpoint, original, config, digest, labels)
    permuted, order = {}, order_for(config, candidates)
    if order is not None:
        on_stage(f"Ordering channels for {order}")
        permuted = order_channels(chain, order, images[:2], weights, target)
        original = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        weights = {name: original[name] for name in weights}
        run |= {"order of channels": digest_of(weights)}  # records of layers belong to it
    run |= {"dtype": dtype, "device": target.type, "update": update, "processes": processes()}
    with open_journal(folder, run, restart, on_stage) as journal:
        if folder is not None:
            from_main(lambda: check_output(folder, size=0))  # another run may have been here until a moment ago
        resumed = len(journal.names()) > 1  # the description of the run is always there

        def measure(what: str) -> dict[str, Any] | None:
            if evaluation is None:
                return None

            def found() -> Record:
                on_stage(f"Measuring the {what} model on {eval_data} ({eval_split})")
                classifier = network if chain.offloaded is None else Logits(chain)
                accuracy = accuracy_of(classifier, evaluation, checkpoint.preprocess, checkpoint.class_names)
                return Record({}, accuracy.to_dict())

            name = f"accuracy-{what}-{hashlib.sha256(repr((evaluation.name, eval_split)).encode()).hexdigest()[:8]}"
            return journal.once(name, found).facts

        chain = place(chain, images[:2], target, config.offload, on_stage)
        dense = measure("dense")
        network.to(solver_dtype)
        flops, labels = first_pass(chain, images, labels, source, checkpoint)

        first = next(candidate for candidate in candidates if candidate is not None)
        evidence = Evidence(
            {n: w.to(chain.weight(n).device) for n, w in weights.items()}, first, config, chain, images, labels
        )
        allocation: dict[str, Any] = {"kind": "uniform" if isinstance(first, NM) else config.allocation}
        if by_layer:
            evidence, allocation = find_allocation(journal, evidence, candidates, flops, left, on_stage)
        choice, criterion_seconds = find_choice(journal, evidence, left, on_stage)
        masks, chosen = choice.masks, evidence.pattern
        masked = pruned = None
        if evaluation is not None or not update:
            chain.put(alone(choice, original))
            restore_untouched(network, original, masks)
            masked = pruned = measure("masked")

        reports: list[LayerReport] = []
        final = None
        if update:
            chain.put({name: original[name] for name in masks})
            network.to(solver_dtype)
            begin, final = find_first_masks(journal, evidence, choice, left, on_stage)
            del evidence  # all weights once more, on the device
            config = find_batches(journal, chain, images[:2], begin.masks, config, memory, left, on_stage)
            on_stage(f"Pruning {len(layers)} layers to {pattern}")
            reports = prune_chain(chain, images, begin.masks, config, on_progress, begin.weights, journal, final)
            for name in restore_untouched(network, original, masks):
                on_stage(f"{name}: weights beyond the range of {original[name].dtype} became its largest number")
            pruned = measure("pruned")
        network.to("cpu")

        report = describe_layers(checkpoint, chain, layers, masks, chosen, config, reports)
        report |= describe_size(network, masks, flops) | {
            "update": update,
            "allocation": allocation,
            "permuted": {name: {"kept_before": b, "kept_after": a} for name, (b, a) in permuted.items()},
            "criterion": {
                "seconds": criterion_seconds,
                "labels": labels is not None,
                "own_update": bool(choice.weights),
                "thinned_out_from": str(final.relaxed()) if final else None,
                **choice.facts,
            },
            "samples": len(images),
            "calibration_data": describe_data(data, data_split),
            "eval_data": describe_data(eval_data, eval_split),
            "dense": dense,
            "masked": masked,
            "pruned": pruned,
            "device": str(target),
            "offloaded": chain.offloaded is not None,
            "dtype": dtype,
            "hardware": describe_hardware(target),
            "processes": processes(),
            "resumed": resumed,
            "seconds": time.perf_counter() - started,
        }
        report = finite(report)
        if folder is None:
            return PruneResult(network, None, {"output": None, **report})
        on_stage(f"Saving to {output}")
        report["name"] = folder.resolve().name
        from_main(lambda: save(checkpoint, folder, journal.folder, report, packed=format == "packed"))
        return PruneResult(network, folder, {"output": str(output), **report})


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
    buffers_follow_weights(network)
    return beyond


def save(checkpoint: Checkpoint, output: Path, work: Path | None, report: dict[str, Any], packed: bool) -> None:
    """Writes the result, with its report and card.

    Raises:
        SaveError: the disk is full or refuses.
    """
    bound = map(checkpoint.model.get_parameter, report["pruned_parameters"])
    summary = claim(report["pattern"], report["sparsity"], bound)
    with whole_folder(output, work) as folder:
        target = folder / "ordinary" if packed else folder
        target.mkdir(exist_ok=True)
        save_checkpoint(checkpoint, target, summary, report)
        write_card(checkpoint, target, report)
        if target is not folder:
            pack_into(target, folder)
            shutil.rmtree(target)
