"""Algorithm 3: layer after layer, each solved on the inputs that the pruned layers before it produce (streams.py)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..adapters import Chain, frozen
from ..errors import MemoryLimitError
from ..patterns import Masks, Pattern
from ..runtime.distributed import processes
from ..runtime.journal import Journal
from ..runtime.memory import Images, Shelf, until_it_fits
from ..settings import PruneConfig
from .gradual import thin_out
from .newton import NewtonState, newton
from .objective import ActiveWeights, Segment
from .progress import LayerReport, Progress
from .streams import Batches, Streams, holding, masked_operations, split_images, whole_network


Solution = tuple[LayerReport, dict[str, Tensor]]
"""Of a group: what happened, and its full weights."""


def prune_chain(
    chain: Chain,
    images: Tensor | Images,
    masks: Masks,
    config: PruneConfig,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    start: Mapping[str, Tensor] | None = None,
    journal: Journal | None = None,
    pattern: Pattern | None = None,
) -> list[LayerReport]:
    """Prunes a chain's model in place with the given masks (True: kept).

    Args:
        chain: of the dense model, on the device where segments are to run.
        images: preprocessed calibration images (n, 3, h, w), in an order that is already random. Activations rest on
            their shelf; those of a tensor's stay in memory.
        masks: parameter name → bool mask; parameters without one stay dense.
        config: batch sizes, targets and solver settings.
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
    again = config.sweeps > 1 or config.joint_steps > 0
    dense = {name: chain.weight(name).detach().clone() for name in masks} if again else {}
    cascade = Cascade(chain, masks, dense, config, on_progress, start or {}, journal or Journal(), pattern)
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
                report, weights = self.finish(segment, number, streams, place)
                reports.append(report)
            if self.config.targets == "dense":
                with holding(self.chain, self.dense):
                    streams.advance(operation.run, "dense", self.chain.device)
            self.chain.put(weights)
            streams.advance(operation.run, "pruned", self.chain.device)
        return reports

    def gradual(self, streams: Streams) -> tuple[LayerReport, "Cascade"]:
        """All layers at once while their masks thin out (gradual.py), and the cascade with the masks of the end."""
        segment, sweep = whole_network(self.chain, self.masks, "all layers, thinning out"), self.config.sweeps + 1
        report, weights = self.finish(segment, sweep, streams, self.layers, self.pattern)
        self.chain.put(weights)
        return report, replace(self, masks={name: weight != 0 for name, weight in weights.items()})

    def joint(self, streams: Streams) -> LayerReport:
        """All layers at once: Algorithm 2 on the outputs of every operation of the network, from its images on."""
        segment, sweep = whole_network(self.chain, self.masks), self.config.sweeps + 1
        report, weights = self.finish(segment, sweep, streams, self.total - 1)
        self.chain.put(weights)
        return report

    def finish(
        self, segment: Segment, sweep: int, streams: Streams, place: int, pattern: Pattern | None = None
    ) -> Solution:
        """:meth:`solve` for number ``place`` of all, or what an earlier run kept of it. Where memory runs out, the
        group is solved again with batches of half the size, and of single images with a smaller K."""
        name, group = f"layer-{place:04d}", segment.group
        active = ActiveWeights.of(group, self.masks, self.chain.device)
        found = self.journal.get(name)
        known = found or self.journal.get(f"{name}-halved")
        while known is not None and streams.halvings < known.facts["halvings"]:
            streams.halve()
        if found is not None:
            report = LayerReport.from_dict(found.facts["report"])
            self.on_progress(Progress(place, self.total, report.name, report=report))
            return report, active.scatter(found.tensors["w"].to(self.chain.device))

        def shrink() -> None:
            if processes() > 1:  # the others wait for what this one cannot compute
                raise MemoryLimitError(
                    f"{group.name}: out of memory, in one process of several.",
                    "Repeat the command with --memory, or with more processes.",
                )
            nonlocal segment
            if streams.largest > 1:
                streams.halve()
                less = f"in batches of {streams.largest} images"
            elif group.kind != "joint" and segment.stop - segment.start > 1:
                segment = replace(segment, stop=segment.stop - 1)
                less = f"with K = {segment.stop - segment.start - 1}"
            else:
                raise MemoryLimitError(
                    f"{group.name}: memory does not suffice for a single image.",
                    "Set joint_steps to 0 (--config)." if group.kind == "joint" else "Give --device cpu.",
                )
            note = f"{group.name}: out of memory; solved again {less}"
            self.on_progress(Progress(place, self.total, group.name, note=note))
            self.journal.drop(f"{name}-")
            self.journal.put(f"{name}-halved", halvings=streams.halvings)

        report, weights = until_it_fits(lambda: self.solve(segment, sweep, streams, place, pattern), shrink)
        self.journal.put(name, {"w": active.gather(weights)}, report=report.to_dict(), halvings=streams.halvings)
        self.journal.drop(f"{name}-")
        self.on_progress(Progress(place, self.total, report.name, report=report))
        return report, weights

    def solve(self, segment: Segment, sweep: int, streams: Streams, place: int, pattern: Pattern | None) -> Solution:
        """Algorithm 2 for a segment's group; with a ``pattern``, its masks thin out to that meanwhile."""
        started = time.perf_counter()
        record, group = f"layer-{place:04d}", segment.group
        joint = group.kind == "joint"
        self.on_progress(Progress(place, self.total, group.name))
        active = ActiveWeights.of(group, self.masks, self.chain.device)
        judge = len(streams.pruned) - 1
        state = self.journal.get_state(record, self.chain.device) if joint else None
        done = state.result.steps if state else 0
        if pattern is not None:
            first, steps = 0, self.gradual_steps
        elif joint:
            first, steps = self.gradual_steps, self.joint_steps
        else:
            first, steps = 0, self.layer_steps(judge)
        # Layers that do not get to all batches begin where the layer before them ended: all images have a part.
        order = [(first + i, (place * steps + i) % judge) for i in range(done, steps)]
        batches = Batches(segment, self.dense, active, streams, self.config, order)
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
                self.journal.put_state(record, state)

        solver = replace(self.config.solver, passes=1)  # the order has them all
        if pattern is None:
            result = newton(batches, held_out, w, solver, report_step, state)
        else:
            result = thin_out(batches, held_out, w, solver, pattern, report_step, state)
        report = LayerReport.of(segment, sweep, result, streams, active, time.perf_counter() - started)
        return report, active.scatter(result.w)
