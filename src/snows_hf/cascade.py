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
from .gradual import surplus, thinning_step
from .journal import Journal
from .masks import Masks, Pattern
from .memory import Images, Shelf, out_of_memory
from .objective import ActiveWeights, Segment
from .solver import NewtonResult, NewtonState, NewtonStatus, newton
from .streams import Batches, Streams, holding, masked_operations, split_images, whole_network


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
    def of(
        cls,
        segment: Segment,
        sweep: int,
        result: NewtonResult,
        streams: Streams,
        active: ActiveWeights,
        seconds: float,
    ) -> "LayerReport":
        """What Algorithm 2 did to a segment's group; ``active`` are the weights that it has in ``result.w``."""
        weights = [segment.chain.weight(name) for name in segment.group.parameters]
        size = sum(weight.numel() for weight in weights)
        joint = segment.group.kind == "joint"
        masked = sum(mask.numel() for mask in active.masks.values()) - int(torch.count_nonzero(result.w))
        return cls(
            name=segment.group.name,
            sweep=sweep,
            parameters=segment.group.parameters,
            shape=(size,) if joint else (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]),
            k=segment.stop - segment.start - 1,
            sparsity=masked / size,
            loss_masked=result.loss_start,
            loss_pruned=result.loss_end,
            cg_iterations=result.cg_iterations,
            steps=result.steps,
            rejected_steps=result.rejected,
            seconds=seconds,
            status=result.status.value,
            remedy=result.status.remedy,
            losses=tuple(result.losses),
            cg_statuses=dict(Counter(status.value for status in result.cg_statuses)),
            batch_size=streams.largest,
        )

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "LayerReport":
        """:meth:`to_dict` undone, after JSON."""
        lists = {"parameters": tuple(facts["parameters"]), "shape": tuple(facts["shape"])}
        lists["losses"] = tuple(facts.get("losses", ()))
        return cls(**{**facts, **lists})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Solution = tuple[LayerReport, dict[str, Tensor]]
"""Of a group: what happened, and its full weights."""

Solve = Callable[[Segment, int, Streams, int], Solution]
"""From a segment, the sweep, both streams, and the group's place among all."""


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
    pattern: Pattern | None = None,
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
        pattern: to which the masks, which keep more, thin out after the sweeps, in ``config.gradual_steps`` joint
            steps. None: they stay as they are.

    Raises:
        MemoryLimitError: a single image is too much.

    Returns:
        One report per pruned group, in forward order; the groups once more for every further sweep, and one each for
        gradual steps and the joint solve.
    """
    batches = split_images(len(images), config.batch_size, config.held_out)
    # In the first sweep nothing of a segment is pruned yet: the model's own weights are the dense ones.
    again = config.sweeps > 1 or config.joint_steps > 0 or pattern is not None
    dense = {name: chain.weight(name).detach().clone() for name in masks} if again else {}
    cascade = Cascade(chain, masks, dense, config, device, on_progress, start or {}, journal or Journal(), pattern)
    shelf = images.shelf if isinstance(images, Images) else Shelf()
    with frozen(chain.model):
        reports = [
            report
            for sweep in range(1, config.sweeps + 1)
            for report in cascade.sweep(sweep, Streams.start(images, batches, shelf))
        ]
        if pattern is not None:
            report, cascade = cascade.gradual(Streams.start(images, batches, shelf))
            reports.append(report)
        if cascade.joint_steps:
            reports.append(cascade.joint(Streams.start(images, batches, shelf)))
    return reports


@dataclass(frozen=True)
class Cascade:
    """One run of Algorithm 3, over one sweep or several. ``dense`` holds the weights that pruning has overwritten,
    ``start`` those that may be a better start than the masked ones, ``journal`` what is finished, ``pattern`` what the
    masks still have to thin out to."""

    chain: Chain
    masks: Masks
    dense: Mapping[str, Tensor]
    config: PruneConfig
    device: torch.device
    on_progress: Callable[[Progress], None]
    start: Mapping[str, Tensor]
    journal: Journal
    pattern: Pattern | None = None

    @property
    def layers(self) -> int:
        """How many there are to solve, in all sweeps."""
        return self.config.sweeps * len(masked_operations(self.chain, self.masks))

    @property
    def total(self) -> int:
        """Everything there is to solve: layers, and all of them together."""
        return self.layers + (self.pattern is not None) + (self.joint_steps > 0)

    @property
    def gradual_steps(self) -> int:
        """Joint steps with masks that thin out."""
        return self.config.gradual_steps if self.pattern is not None else 0

    @property
    def joint_steps(self) -> int:
        """Joint steps with masks that stay."""
        return self.config.joint_steps - self.gradual_steps

    def layer_steps(self, learners: int) -> int:
        """Newton steps for one layer with that many batches."""
        steps = self.config.solver.passes * learners
        return min(steps, self.config.layer_steps or steps)

    def sweep(self, number: int, streams: Streams) -> list[LayerReport]:
        """All layers once, in forward order; ``number`` counts from 1."""
        reports: list[LayerReport] = []
        todo = masked_operations(self.chain, self.masks)
        for index, operation in enumerate(self.chain.operations[: max(todo, default=-1) + 1]):
            weights: Mapping[str, Tensor] = {}
            if index in todo:
                place = (number - 1) * len(todo) + len(reports)
                segment = Segment.cut(self.chain, index, self.config.k)
                report, weights = self.finish(segment, number, streams, place, self.solve)
                reports.append(report)
            if self.config.targets == "dense":
                with holding(self.chain, self.dense):
                    streams.advance(operation.run, "dense", self.device)
            self.chain.put(weights)
            streams.advance(operation.run, "pruned", self.device)
        return reports

    def gradual(self, streams: Streams) -> tuple[LayerReport, "Cascade"]:
        """All layers at once while their masks thin out (gradual.py), and the cascade with the masks of the end."""
        segment, sweep = whole_network(self.chain, self.masks, "all layers, thinning out"), self.config.sweeps + 1
        report, weights = self.finish(segment, sweep, streams, self.layers, self.thin_out)
        self.chain.put(weights)
        return report, replace(self, masks={name: weight != 0 for name, weight in weights.items()})

    def joint(self, streams: Streams) -> LayerReport:
        """All layers at once: Algorithm 2 on the outputs of every operation of the network, from its images on."""
        segment, sweep = whole_network(self.chain, self.masks), self.config.sweeps + 1
        report, weights = self.finish(segment, sweep, streams, self.total - 1, self.solve)
        self.chain.put(weights)
        return report

    def finish(
        self,
        segment: Segment,
        sweep: int,
        streams: Streams,
        place: int,
        solve: Callable[[Segment, int, Streams, int], Solution],
    ) -> Solution:
        """A segment's group, number ``place`` of all, as an earlier run left it, or solved and kept. Where memory runs
        out, it is solved again with batches of half the size."""
        name, group = f"layer-{place:04d}", segment.group
        active = ActiveWeights.of(group, self.masks, self.device)
        found = self.journal.get(name)
        known = found or self.journal.get(f"{name}-halved")
        while known is not None and streams.halvings < known.facts["halvings"]:
            streams.halve()
        if found is not None:
            report = LayerReport.from_dict(found.facts["report"])
            self.on_progress(Progress(place, self.total, report.name, report=report))
            return report, active.scatter(found.tensors["w"].to(self.device))
        while True:
            try:
                report, weights = solve(segment, sweep, streams, place)
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
            self.on_progress(Progress(place, self.total, group.name, note=note))
            self.journal.drop(f"{name}-")
            self.journal.put(f"{name}-halved", halvings=streams.halvings)
        self.journal.put(name, {"w": active.gather(weights)}, report=report.to_dict(), halvings=streams.halvings)
        self.journal.drop(f"{name}-")
        self.on_progress(Progress(place, self.total, report.name, report=report))
        return report, weights

    def solve(self, segment: Segment, sweep: int, streams: Streams, place: int) -> Solution:
        """Algorithm 2 for a segment's group."""
        started = time.perf_counter()
        group = segment.group
        joint = group.kind == "joint"
        self.on_progress(Progress(place, self.total, group.name))
        active = ActiveWeights.of(group, self.masks, self.device)
        judge = len(streams.pruned) - 1
        steps, before = (self.joint_steps, self.gradual_steps) if joint else (self.layer_steps(judge), 0)
        state = self.journal.get_state(f"layer-{place:04d}", self.device) if joint else None
        solver = replace(self.config.solver, passes=1)  # the order has them all
        # Layers that do not get to all batches begin where the layer before them ended: all images have a part.
        order = [(before + i, (place * steps + i) % judge) for i in range(state.result.steps if state else 0, steps)]
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
            self.on_progress(Progress(place, self.total, group.name, *counts))
            if joint:
                self.journal.put_state(f"layer-{place:04d}", state)

        result = newton(batches, held_out, w, solver, report_step, state)
        report = LayerReport.of(segment, sweep, result, streams, active, time.perf_counter() - started)
        return report, active.scatter(result.w)

    def thin_out(self, segment: Segment, sweep: int, streams: Streams, place: int) -> Solution:
        """A Newton step on all layers, then some weights go, ``gradual_steps`` times (gradual.py)."""
        started = time.perf_counter()
        assert self.pattern is not None
        record, name = f"layer-{place:04d}", segment.group.name
        # What is gone is zero in w, which has the weights of the first masks throughout.
        start = ActiveWeights.of(segment.group, self.masks, self.device)
        batches = Batches(segment, self.dense, start, streams, self.config, self.device)
        judge = len(streams.pruned) - 1
        held_out = batches.objective(judge)
        state = self.journal.get_state(record, self.device)
        if state is None:
            w = start.within(self.chain)
            loss = held_out.value(w)
            state = NewtonState(w, w, NewtonResult(w, NewtonStatus.THINNED_OUT, loss, loss), milestone=loss)
        result = state.result
        self.on_progress(Progress(place, self.total, name))
        for step in range(result.steps, self.gradual_steps):
            weights = start.scatter(state.w)
            active = ActiveWeights({key: weight != 0 for key, weight in weights.items()})
            batch = replace(batches, active=active).objective(step % judge, step)
            share = surplus(step + 1, self.gradual_steps)
            taken, weights = thinning_step(batch, weights, self.config.solver, self.pattern, share)
            state.w = state.mean = result.w = start.gather(weights)
            result.steps, result.loss_end = step + 1, held_out.value(state.w)
            result.losses.append(result.loss_end)
            if taken is None:
                result.status = NewtonStatus.NON_FINITE
                break
            result.cg_iterations += taken.direction.iterations
            result.cg_statuses.append(taken.direction.status)
            result.rejected += taken.alpha == 0.0
            counts = result.cg_iterations, result.loss_start, result.loss_end
            self.on_progress(Progress(place, self.total, name, *counts))
            self.journal.put_state(record, state)
        report = LayerReport.of(segment, sweep, result, streams, start, time.perf_counter() - started)
        return report, start.scatter(result.w)
