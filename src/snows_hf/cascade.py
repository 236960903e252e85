"""Algorithm 3: layer after layer, each solved on the inputs that the pruned layers before it produce (streams.py)."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from .adapters import Chain, frozen
from .config import PruneConfig
from .distributed import processes
from .errors import MemoryLimitError
from .journal import Journal
from .masks import Masks
from .memory import Images, Shelf, out_of_memory
from .objective import ActiveWeights, Segment
from .solver import NewtonState, newton
from .streams import Batches, Streams, holding, masked_operations, split_images, whole


@dataclass(frozen=True)
class LayerReport:
    """What happened to one group in one sweep. Losses are K-step losses on the held-out calibration images: at the
    start (in the first sweep, of the mask alone, or of the criterion's own weights where these are better) and at the
    end, in ``losses`` the lowest so far after each step. ``cg_statuses`` counts why conjugate gradients stopped.
    ``batch_size``: images of its largest batch, fewer than asked for where memory ran out."""

    name: str
    sweep: int
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    k: int
    sparsity: float
    loss_masked: float
    loss_pruned: float
    cg_iterations: int
    steps: int
    rejected_steps: int
    seconds: float
    status: str
    remedy: str
    batch_size: int
    losses: tuple[float, ...] = ()
    cg_statuses: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "LayerReport":
        """:meth:`to_dict` undone, after JSON."""
        lists = {"parameters": tuple(facts["parameters"]), "shape": tuple(facts["shape"])}
        lists["losses"] = tuple(facts.get("losses", ()))
        return cls(**{**facts, **lists})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """Where a cascade is: layer ``index`` (from 0) of ``total`` in all sweeps, its products so far, its losses;
    ``note`` says what people should know."""

    index: int
    total: int
    name: str
    cg_iterations: int = 0
    loss_masked: float | None = None
    loss: float | None = None
    report: LayerReport | None = None
    note: str = ""


def prune_chain(
    chain: Chain,
    images: Tensor | Images,
    masks: Masks,
    config: PruneConfig,
    device: torch.device,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    start: Mapping[str, Tensor] | None = None,
    journal: Journal | None = None,
) -> list[LayerReport]:
    """Prunes a chain's model in place with the given masks (True: kept).

    Args:
        chain: of the dense model, on ``device``.
        images: preprocessed calibration images (n, 3, h, w), in an order that is already random. Activations rest on
            their shelf; those of a tensor's stay in memory.
        masks: parameter name → bool mask; parameters without one stay dense.
        config: batch sizes, targets and solver settings.
        device: where segments run.
        on_progress: called when a layer starts, after each Newton step, and when a layer is done.
        start: full weights that a criterion has updated for these masks. A layer starts from them in the first sweep
            where their held-out loss is below that of the dense weights masked; targets stay the dense network's.
        journal: keeps every finished layer, and has those that an earlier run has finished.

    Raises:
        MemoryLimitError: a single image is too much.

    Returns:
        One report per pruned group, in forward order; the groups once more for every further sweep, and one for the
        joint solve.
    """
    batches = split_images(len(images), config.batch_size, config.held_out)
    # In the first sweep nothing of a segment is pruned yet: the model's own weights are the dense ones.
    again = config.sweeps > 1 or config.joint_steps > 0
    dense = {name: chain.weight(name).detach().clone() for name in masks} if again else {}
    cascade = Cascade(chain, masks, dense, config, device, on_progress, start or {}, journal or Journal())
    shelf = images.shelf if isinstance(images, Images) else Shelf()
    with frozen(chain.model):
        reports = [
            report
            for sweep in range(1, config.sweeps + 1)
            for report in cascade.sweep(sweep, Streams.start(images, batches, shelf))
        ]
        if config.joint_steps:
            reports.append(cascade.joint(Streams.start(images, batches, shelf)))
    return reports


@dataclass(frozen=True)
class Cascade:
    """One run of Algorithm 3, over one sweep or several. ``dense`` holds the weights that pruning has overwritten,
    ``start`` those that may be a better start than the masked ones, ``journal`` what is finished."""

    chain: Chain
    masks: Masks
    dense: Mapping[str, Tensor]
    config: PruneConfig
    device: torch.device
    on_progress: Callable[[Progress], None]
    start: Mapping[str, Tensor]
    journal: Journal

    def layer_steps(self, learners: int) -> int:
        """Newton steps for one layer with that many batches."""
        steps = self.config.solver.passes * learners
        return min(steps, self.config.layer_steps or steps)

    def sweep(self, number: int, streams: Streams) -> list[LayerReport]:
        """All layers once, in forward order; ``number`` counts from 1."""
        reports: list[LayerReport] = []
        todo = masked_operations(self.chain, self.masks)
        total = self.config.sweeps * len(todo) + (self.config.joint_steps > 0)
        for index, operation in enumerate(self.chain.operations[: max(todo, default=-1) + 1]):
            weights: Mapping[str, Tensor] = {}
            if index in todo:
                place = (number - 1) * len(todo) + len(reports), total
                segment = Segment.cut(self.chain, index, self.config.k)
                report, weights = self.finish(segment, number, streams, *place)
                reports.append(report)
                self.on_progress(Progress(*place, report.name, report=report))
            if self.config.targets == "dense":
                with holding(self.chain, self.dense):
                    streams.advance(operation.run, "dense", self.device)
            self.chain.put(weights)
            streams.advance(operation.run, "pruned", self.device)
        return reports

    def joint(self, streams: Streams) -> LayerReport:
        """All layers at once: Algorithm 2 on the outputs of every operation of the network, from its images on."""
        segment = whole(self.chain, self.masks)
        total = self.config.sweeps * len(masked_operations(self.chain, self.masks))
        report, weights = self.finish(segment, self.config.sweeps + 1, streams, total, total + 1)
        self.chain.put(weights)
        self.on_progress(Progress(total, total + 1, report.name, report=report))
        return report

    def finish(
        self, segment: Segment, sweep: int, streams: Streams, place: int, total: int
    ) -> tuple[LayerReport, dict[str, Tensor]]:
        """A segment's group, number ``place`` of ``total``, as an earlier run left it, or solved and kept: report,
        weights. Where memory runs out, it is solved again with batches of half the size."""
        name, group = f"layer-{place:04d}", segment.group
        active = ActiveWeights.of(group, self.masks, self.device)
        found = self.journal.get(name)
        known = found or self.journal.get(f"{name}-halved")
        while known is not None and streams.halvings < known.facts["halvings"]:
            streams.halve()
        if found is not None:
            return LayerReport.from_dict(found.facts["report"]), active.scatter(found.tensors["w"].to(self.device))
        while True:
            try:
                report, weights = self.solve(segment, sweep, streams, place, total)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if processes() > 1:  # the others wait for what this one cannot compute
                    raise MemoryLimitError(
                        f"{group.name}: out of memory, in one process of several.",
                        "Repeat the command with --memory, or with more processes.",
                    ) from error
            # Out of the block, which holds the graphs of what failed.
            if streams.largest == 1:
                raise MemoryLimitError(
                    f"{group.name}: memory does not suffice for a single image.", "Give a smaller --k."
                )
            clear_device_cache(garbage_collection=True)
            streams.halve()
            note = f"{group.name}: out of memory; solved again in batches of {streams.largest} images"
            self.on_progress(Progress(place, total, group.name, note=note))
            self.journal.drop(f"{name}-")
            self.journal.put(f"{name}-halved", halvings=streams.halvings)
        self.journal.put(name, {"w": active.gather(weights)}, report=report.to_dict(), halvings=streams.halvings)
        self.journal.drop(f"{name}-")
        return report, weights

    def solve(
        self, segment: Segment, sweep: int, streams: Streams, place: int, total: int
    ) -> tuple[LayerReport, dict[str, Tensor]]:
        """Algorithm 2 for a segment's group, number ``place`` of ``total``: report, weights."""
        started = time.perf_counter()
        group = segment.group
        joint = group.kind == "joint"
        self.on_progress(Progress(place, total, group.name))
        active = ActiveWeights.of(group, self.masks, self.device)
        judge = len(streams.pruned) - 1
        steps = self.config.joint_steps if joint else self.layer_steps(judge)
        state = self.journal.get_state(f"layer-{place:04d}", self.device) if joint else None
        solver = replace(self.config.solver, passes=1)  # the order has them all
        # Layers that do not get to all batches begin where the layer before them ended: all images have a part.
        order = [(i, (place * steps + i) % judge) for i in range(state.result.steps if state else 0, steps)]
        batches = Batches(segment, self.dense, active, streams, self.config, self.device, order)
        held_out = batches.objective(judge)
        own = {name: self.chain.weight(name).detach() for name in active.masks}
        w = active.gather(own)
        if sweep == 1 and any(name in self.start for name in own):
            updated = active.gather({name: self.start.get(name, weight).to(weight) for name, weight in own.items()})
            w = updated if held_out.value(updated) < held_out.value(w) else w

        def report_step(state: NewtonState) -> None:
            result = state.result
            counts = result.cg_iterations, result.loss_start, result.loss_end
            self.on_progress(Progress(place, total, group.name, *counts))
            if joint:
                self.journal.put_state(f"layer-{place:04d}", state)

        result = newton(batches, held_out, w, solver, report_step, state)
        weights = [self.chain.weight(name) for name in group.parameters]
        size = sum(weight.numel() for weight in weights)
        report = LayerReport(
            name=group.name,
            sweep=sweep,
            parameters=group.parameters,
            shape=(size,) if joint else (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]),
            k=segment.stop - segment.start - 1,
            sparsity=(sum(mask.numel() for mask in active.masks.values()) - active.size) / size,
            loss_masked=result.loss_start,
            loss_pruned=result.loss_end,
            cg_iterations=result.cg_iterations,
            steps=result.steps,
            rejected_steps=result.rejected,
            seconds=time.perf_counter() - started,
            status=result.status.value,
            remedy=result.status.remedy,
            losses=tuple(result.losses),
            cg_statuses=dict(Counter(status.value for status in result.cg_statuses)),
            batch_size=streams.largest,
        )
        return report, active.scatter(result.w)
