"""The main job: load, calibrate, choose masks, solve, measure, save."""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters import Chain
from ..adapters.flops import count_flops
from ..adapters.offload import Whole, place
from ..data.images import ImageSource, open_images
from ..data.names import Name
from ..hub.card import write_card
from ..hub.load import Checkpoint
from ..hub.repack import pack_into
from ..hub.save import claim, claim_of_speed, save_checkpoint, takes_steps
from ..masks.choices import alone, find_allocation, find_choice, find_first_masks, masked
from ..masks.choose import left_dense, load_masks
from ..masks.criteria import fits_layers
from ..masks.evidence import Evidence
from ..masks.permutation import order_channels
from ..masks.scores.base import Choice
from ..method.cascade import prune_chain
from ..method.estimate import MORE, estimated_seconds, in_words
from ..method.fitting import find_batches
from ..method.records import LayerReport
from ..method.streams import Teacher, holding, moved
from ..patterns import NM, Masks, Pattern, split_structures
from ..patterns.plan import Candidate, by_sensitivity, layer_patterns, one_pattern, order_for
from ..reports.describe import describe_data, describe_layers, describe_run, describe_size, finite
from ..runtime.device import describe_hardware
from ..runtime.distributed import from_main, processes
from ..runtime.files import check_output, whole_folder
from ..runtime.journal import digest_of
from ..runtime.memory import Images
from ..runtime.run import Progress, Run
from ..settings import PruneConfig, settings_for
from .calibration import calibrate, first_pass
from .faster import check_can_be_smaller, choose_pattern
from .measure import check_mask_labels, measure, measure_fidelity, measuring, outputs_on_device
from .request import DEFAULT_DATA, check_faster, check_pruning, check_request, find_dtype
from .smaller import units_to_keep
from .structure import Cut, counts_by_sensitivity, cut_units
from .subject import Subject, copy_of, load_subject, restore_untouched


@dataclass(frozen=True)
class PruneResult:
    """The pruned model (on the CPU, in its checkpoint's own dtype), where it was saved, and the report."""

    model: nn.Module
    output: Path | None
    report: dict[str, Any]


@dataclass(frozen=True)
class Chosen:
    """What is decided before any weight moves.

    Attributes:
        choice: masks of the pattern, and the weights of a criterion with an update of its own.
        begin: masks that the solver begins with; those of ``choice``, unless they are to thin out.
        final: the pattern that masks thin out to; None where they stay as they are.
        facts: for the report.
    """

    pattern: Pattern
    choice: Choice
    begin: Choice
    final: Pattern | None
    facts: dict[str, Any]


def prune(
    model: Name,
    pattern: str | None = None,
    *,
    faster: float | None = None,
    faster_batch: int = 1,
    data: Name | None = None,
    data_split: str = "train",
    eval_data: Name | None = None,
    eval_split: str = "test",
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    memory: float | None = None,
    effort: str = "standard",
    update: bool = True,
    allow_custom: bool = False,
    restart: bool = False,
    format: str = "safetensors",
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> PruneResult:
    """Prunes a checkpoint one-shot, and saves the result as an ordinary checkpoint, or packed.

    With an ``output``, every finished layer is kept beside it (journal.py) until the result is whole: the same call
    goes on where an earlier one was broken off, and gives the same bits.

    Args:
        model: Hub id or folder, of transformers or timm.
        pattern: ``"2:4"``, ``"1:4"``, any ``"N:M"`` (N kept of M), a fraction of zeros such as ``"0.7"``, or a set of
            which each layer gets one, such as ``"1:4,2:4,dense"``, with ``sparsity`` for all together; or structures
            (``"mlp:0.5"``), alone or with ``+`` before one of the above.
        faster: in place of a pattern, how many times as fast as the dense model the result should be on this device,
            above 1: the structures that reach this, as measured, at the least loss are found (faster.py).
        faster_batch: images at a time for which that holds.
        data: calibration images: Hub data set (``@REVISION`` may follow), image folder or folder of parquet. Labels
            are read only if the mask criterion needs them.
        data_split: split of ``data``.
        eval_data: images on which the masked and the pruned model's outputs are compared with the dense one's and, if
            they have labels and the model's task has classes, accuracies are measured; None measures nothing.
        eval_split: split of ``eval_data``.
        output: folder to save to, absent or empty; None saves nothing.
        device: ``auto`` (CUDA where torch finds it), ``cpu`` or ``cuda``.
        dtype: in which the solver computes; the result is saved in the checkpoint's own dtypes.
        revision: of the model on the Hub.
        memory: budget of main memory for this process, in GB. Batches are made small enough for it, and activations
            beyond a quarter of it rest on disk. None: half of what is free for each of the two.
        effort: ``quick``, ``standard`` or ``best``, of the time that the weights may take (steps, or views of each
            image), or ``paper`` for the paper's own settings.
        update: whether SNOWS re-optimises the kept weights; without it they are the dense ones, or what a criterion
            with an update of its own (sparsegpt, obc, alps) makes of them.
        allow_custom: make a smaller network also where no configuration of its class describes it; only this package
            loads the result then.
        restart: begin anew where an earlier call was broken off.
        format: of the result: ``safetensors``, or ``packed``, which leaves out the zeros (see :func:`snows_hf.pack`).
        on_stage: called with a line of text when a new stage begins, and for each layer that is done.
        on_progress: called with a :class:`~snows_hf.runtime.run.Progress` as a stage goes on.
        **settings: changes to the effort, by the names of PruneConfig and SolverConfig.

    Raises:
        SnowsError: bad settings, model, data or output; see snows_hf.errors.
    """
    started = time.perf_counter()
    data, folder = data or DEFAULT_DATA, Path(output) if output is not None else None
    pattern = check_faster(pattern, faster, faster_batch, allow_custom, settings)
    candidates = layer_patterns(check_pruning(pattern, effort, settings))
    check_request(data, data_split, eval_data, eval_split, output, device, dtype=dtype, memory=memory, format=format)
    told = {"on_stage": on_stage, "on_progress": on_progress}
    run = Run.begin(device, reproducible=True, dtype=find_dtype(dtype), memory=memory, **told)

    subject = load_subject(run, model, revision, candidates, effort, pattern, settings)
    check_mask_labels(subject.config, subject.checkpoint)
    if faster is None:
        keep = units_to_keep(subject, split_structures(pattern)[0], allow_custom)
    else:
        check_can_be_smaller(subject)
    check_disk_and_masks(subject, folder)
    evaluation = open_images(eval_data, eval_split) if eval_data is not None else None
    run = run.with_room()
    calibration = calibrate(run, open_images(data, data_split), subject.config, subject.checkpoint)
    images = calibration.images
    subject = subject.for_images(images[:1])
    description = describe_run(
        subject.checkpoint, subject.original, subject.config, calibration.digest, calibration.labels
    )
    flops, labels = first_pass(subject.chain, calibration, subject.checkpoint)
    subject, permuted, ordered = permute(run, subject, images[:2], candidates)
    description |= ordered | {"dtype": dtype, "device": run.device.type, "update": update, "processes": processes()}
    if faster is not None:
        description["settings"] |= {"pattern": f"--faster {faster} --faster-batch {faster_batch}"}

    with run.recorded(folder, description, restart) as run:
        if folder is not None:
            from_main(lambda: check_output(folder, size=0))  # another run may have been here until a moment ago
        resumed = len(run.journal.names()) > 1  # the description of the run is always there
        chain = place(run, subject.chain, images[:2], subject.config.offload)
        subject = replace(subject, chain=chain)
        report: dict[str, Any] = {"faster": None}
        if faster is not None:
            pattern, report["faster"] = choose_pattern(run, subject, faster, faster_batch, images, labels)
            subject = replace(subject, config=subject.config.updated(pattern=pattern))
            keep = units_to_keep(subject, split_structures(pattern)[0], allow_custom)
        measurer = Measurer(run, subject, evaluation)
        report |= {"dense": measurer.accuracy("dense"), "masked": None, "pruned": None}
        cut, dense = Cut(subject), describe_size(subject.network, {}, flops)
        if keep:
            keep = counts_by_sensitivity(run, subject, keep, images, flops, allow_custom)
            cut = cut_units(run, subject, keep, images, labels, allow_custom)
            subject, report["units"] = cut.subject, cut.units
            report["custom"] = subject.checkpoint.custom
            if subject.checkpoint.custom and subject.config.allocation == "global":
                run.say("All layers lost the same share: a custom model may lose less with --allocation sensitivity")
            chain, flops = subject.chain, count_flops(subject.chain, images[:1])
            measurer = Measurer(run, subject, evaluation, cut.teacher)
        chosen = choose(run, subject, candidates, images, labels, flops, update, cut.teacher)
        steps = takes_steps({"update": update, "settings": subject.config.to_dict()})
        if update and not (steps or cut.bare or chosen.choice.weights):
            run.say(f"No steps were asked for, and {subject.config.mask} leaves weights as they are: its masks alone")
            update = False
        fidelity: dict[str, Any] = {}
        if evaluation is not None or not update:
            as_cut = update and not steps  # before any fit, which is the result then
            before = Choice(chosen.choice.masks) if as_cut else chosen.choice
            changed = alone(before, subject.original)
            chain.put(changed)
            restore_untouched(subject.network, subject.original, changed)
            with holding(chain, masked(cut.bare, before.masks) if as_cut else {}):
                report["masked"] = report["pruned"] = measurer.accuracy("masked")
                fidelity["masked"] = fidelity["pruned"] = measurer.fidelity("masked", changed)
        reports: list[LayerReport] = []
        if update:
            quick = None
            if effort != "quick":
                quick = settings_for("quick", chain.family, pattern, settings)
            subject, reports = solve(run, subject, chosen, images, cut.teacher, quick)
            report["pruned"] = measurer.accuracy("pruned")
            moving = [*moved(chain, chosen.choice.masks, subject.config.biases), *chosen.choice.free]
            fidelity["pruned"] = measurer.fidelity("pruned", moving)
        report["fidelity"] = fidelity if evaluation is not None else None
        subject.network.to("cpu")
        report |= describe(run, subject, chosen, flops, reports, dense) | {
            "update": update,
            "fitted_dense": [name for name, weight in chosen.choice.free.items() if weight.ndim > 1],
            "permuted": permuted,
            "samples": len(images),
            "calibration_data": describe_data(data, data_split),
            "eval_data": describe_data(eval_data, eval_split),
            "resumed": resumed,
            "seconds": time.perf_counter() - started,
        }
        claims = claim(report["pattern"], report["sparsity"], map(subject.network.get_parameter, chosen.choice.masks))
        claims |= claim_of_speed(report["faster"])
        result = save(run, subject.checkpoint, folder, finite(report), claims, packed=format == "packed")
        if left_out := result.report.get("left_out"):
            run.say(f"Left out, since they are links to files elsewhere: {', '.join(left_out)}")
        return result


class Measurer:
    """What is measured of a subject on images (None: nothing), whose weights change in the meantime."""

    def __init__(self, run: Run, subject: Subject, data: ImageSource | None, teacher: Teacher | None = None) -> None:
        self.run, self.subject, self.data, self.teacher = run, subject, data, teacher
        chain = subject.chain
        self.network = subject.network if chain.offloaded is None else Whole(chain)
        self.measured = measuring(self.network, subject.checkpoint, data)

    def accuracy(self, what: str) -> dict[str, Any] | None:
        return measure(self.run, what, self.measured, self.data)

    def fidelity(self, what: str, changed: Iterable[str]) -> dict[str, Any] | None:
        """Against the dense network, whose weights, those that were ``changed``, come back for each batch."""
        if self.data is None:
            return None
        chain, outputs = self.subject.chain, outputs_on_device(self.network)
        if self.teacher is not None:
            dense_outputs = outputs_on_device(self.teacher.chain.model)
            return measure_fidelity(self.run, what, dense_outputs, self.network, self.subject.checkpoint, self.data)
        weights = {name: self.subject.original[name].to(chain.tensor(name).device) for name in changed}

        def dense(images: Tensor) -> dict[str, Tensor]:
            with holding(chain, weights):
                return outputs(images)

        return measure_fidelity(self.run, what, dense, self.network, self.subject.checkpoint, self.data)


def check_disk_and_masks(subject: Subject, folder: Path | None) -> None:
    """
    Raises:
        MaskError: a mask file that is not for this model.
        SaveError: the disk has no room.
    """
    config = subject.config
    if folder is not None:
        # The result, and what is kept on the way: the criterion's choice, weights of layers, two states of the joint
        # solve.
        size = sum(tensor.nbytes for tensor in subject.original.values())
        check_output(folder, size * (4 if config.joint_steps else 3))
    if config.mask.endswith(".safetensors"):
        load_masks(Path(config.mask), subject.weights, one_pattern(config))


def permute(
    run: Run, subject: Subject, images: Tensor, candidates: Sequence[Candidate]
) -> tuple[Subject, dict[str, Any], dict[str, str]]:
    """The subject with its channels in a better order for N:M, where that is asked for; what it gains, for the report;
    and what records of layers depend on besides."""
    order = order_for(subject.config, candidates)
    if order is None:
        return subject, {}, {}
    run.say(f"Ordering channels for {order}")
    gains = order_channels(subject.chain, order, images, subject.weights, run.device)
    subject = replace(subject, original=copy_of(subject.network))
    permuted = {name: {"kept_before": before, "kept_after": after} for name, (before, after) in gains.items()}
    return subject, permuted, {"order of channels": digest_of(subject.weights)}


def choose(
    run: Run,
    subject: Subject,
    candidates: Sequence[Candidate],
    images: Images,
    labels: Tensor | None,
    flops: dict[str, int],
    update: bool,
    teacher: Teacher | None = None,
) -> Chosen:
    """Patterns and masks of all layers, from the dense network, which computes in the run's type from here on; or from
    one that was cut out of it, and has it as its ``teacher``."""
    chain, config = subject.chain, subject.config
    subject.network.to(run.dtype)
    weights = {name: weight.to(chain.weight(name).device) for name, weight in subject.weights.items()}
    first = next(candidate for candidate in candidates if candidate is not None)
    whole = teacher.chain if teacher else None
    evidence = Evidence(weights, first, config, chain, images, labels, run, teacher=whole)
    alike = isinstance(first, NM) and config.allocation == "global"
    allocation: dict[str, Any] = {"kind": "uniform" if alike else config.allocation}
    if by_sensitivity(config):
        evidence, allocation = find_allocation(evidence, candidates, flops)
    if update and config.fit_dense and not config.layers and fits_layers(config.mask):
        evidence = replace(evidence, free=left_dense(chain, evidence.pattern))
    choice, seconds = find_choice(evidence)
    begin, final = find_first_masks(evidence, choice) if update else (choice, None)
    criterion = {
        "seconds": seconds,
        "labels": labels is not None,
        "own_update": bool(choice.weights),
        "thinned_out_from": str(final.relaxed()) if final else None,
        **choice.facts,
    }
    return Chosen(evidence.pattern, choice, begin, final, {"allocation": allocation, "criterion": criterion})


def solve(
    run: Run,
    subject: Subject,
    chosen: Chosen,
    images: Images,
    teacher: Teacher | None = None,
    quick: PruneConfig | None = None,
) -> tuple[Subject, list[LayerReport]]:
    """Algorithm 3 on the dense network, which is pruned, and in the checkpoint's own types, when it is done. How long
    it will take is said before, with what the ``quick`` settings would take.

    Returns:
        The subject with the batches that fitted into memory, and what happened to each layer.
    """
    chain, masks = subject.chain, chosen.choice.masks
    moving = [*moved(chain, masks, subject.config.biases), *chosen.begin.free]
    chain.put({name: subject.original[name] for name in moving})
    subject.network.to(run.dtype)
    config, begin = subject.config, chosen.begin
    run.say(f"Pruning {len(subject.layers)} layers to {config.pattern}")
    if config.sweeps or config.joint_steps:
        config = find_batches(run, chain, images[:2], begin.masks, config)
        tell_estimate(run, chain, images, begin.masks, config, quick)
    reports = prune_chain(chain, images, begin.masks, config, run, begin.weights, chosen.final, teacher)
    for name in restore_untouched(subject.network, subject.original, moving):
        run.say(f"{name}: weights beyond the range of {subject.original[name].dtype} became its largest number")
    return replace(subject, config=config), reports


LONG = 300.0
"""Seconds from which on a prune is told what a quick one would take."""


def tell_estimate(
    run: Run, chain: Chain, images: Images, masks: Masks, config: PruneConfig, quick: PruneConfig | None
) -> None:
    """Says how long the layers will take, before the work begins; not of one that goes on, nor of shared work."""
    if processes() > 1 or any(name.startswith("layer-") for name in run.journal.names()):
        return
    some, count = images[:MORE], len(images)
    seconds = estimated_seconds(chain, some, count, masks, config)
    if not seconds:
        return
    less = None
    if quick is not None and seconds > LONG:
        batch, entries = min(quick.batch_size, config.batch_size), config.solver.factor_entries  # more may not fit
        quick = quick.updated(batch_size=batch, factor_entries=entries)
        less = estimated_seconds(chain, some, count, masks, quick)
    instead = ""
    if less is not None and less < seconds / 2:
        instead = f"; with --effort quick {f'about {in_words(less)}' if less else 'none, which keeps the masks alone'}"
    run.say(f"The layers will take about {in_words(seconds)} on this machine{instead}")


def describe(
    run: Run,
    subject: Subject,
    chosen: Chosen,
    flops: dict[str, int],
    reports: list[LayerReport],
    dense: dict[str, Any],
) -> dict[str, Any]:
    """What the report says of the result itself; ``dense`` is the size of the network that it was made of."""
    masks, chain = chosen.choice.masks, subject.chain
    layers = describe_layers(subject.checkpoint, chain, subject.layers, masks, chosen.pattern, subject.config, reports)
    size = describe_size(subject.network, masks, flops)
    size["parameters"]["dense"], size["dense_bytes"] = dense["parameters"]["total"], dense["bytes"]
    size["flops"]["dense"] = dense["flops"]["dense"]
    return (
        layers
        | ({"pattern": subject.config.pattern} if split_structures(subject.config.pattern)[0] else {})
        | size
        | chosen.facts
        | {
            "device": str(run.device),
            "offloaded": chain.offloaded is not None,
            "dtype": str(run.dtype).removeprefix("torch."),
            "hardware": describe_hardware(run.device),
            "processes": processes(),
        }
    )


def save(
    run: Run,
    checkpoint: Checkpoint,
    output: Path | None,
    report: dict[str, Any],
    claims: dict[str, Any],
    packed: bool = False,
) -> PruneResult:
    """What a job has made, written with its report and card where there is a folder for it; ``claims`` is what
    config.json says under ``snows``.

    Raises:
        SaveError: the disk is full or refuses.
    """
    if output is None:
        return PruneResult(checkpoint.model, None, {"output": None, **report})
    run.say(f"Saving to {output}")
    report = report | {"name": output.resolve().name}

    def write() -> None:
        with whole_folder(output, run.journal.folder) as folder:
            target = folder / "ordinary" if packed else folder
            target.mkdir(exist_ok=True)
            save_checkpoint(checkpoint, target, claims, report)
            write_card(checkpoint, target, report)
            if packed:
                pack_into(target, folder)
                shutil.rmtree(target)

    from_main(write)
    return PruneResult(checkpoint.model, output, {"output": str(output), **report})
