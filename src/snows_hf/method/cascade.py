"""Algorithm 3: layer after layer, each solved on the inputs that the pruned layers before it produce (streams.py)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..adapters import Chain, Operation, frozen
from ..errors import MemoryLimitError
from ..patterns import Masks, Pattern
from ..runtime.distributed import processes
from ..runtime.memory import Images, Shelf, until_it_fits
from ..runtime.run import Run
from ..settings import PruneConfig
from .gradual import thin_out
from .newton import NewtonState, NewtonStatus, Objective, newton
from .objective import ActiveWeights, Segment
from .records import LayerReport, get_state, put_state
from .streams import Batches, Streams, holding, masked_operations, split_images, whole_network


STAGE = "Layers"

Solution = tuple[LayerReport, dict[str, Tensor]]
"""Of a group: what happened, and its full weights."""


def prune_chain(
    chain: Chain,
    images: Tensor | Images,
    masks: Masks,
    config: PruneConfig,
    run: Run | None = None,
    start: Mapping[str, Tensor] | None = None,
    pattern: Pattern | None = None,
) -> list[LayerReport]:
    """Prunes a chain's model in place with the given masks (True: kept).

    Args:
        chain: of the dense model, on the device where segments are to run.
        images: preprocessed calibration images (n, 3, h, w), in an order that is already random. Activations rest on
            their shelf; those of a tensor's stay in memory.
        masks: parameter name → bool mask; parameters without one stay dense.
        config: batch sizes, targets and solver settings.
        run: is told when a layer starts, after each Newton step, and when a layer is done; its journal keeps every
            finished layer, and has those that an earlier run has finished.
        start: full weights that a criterion has updated for these masks. A layer starts from them in the first sweep
            where their held-out loss is below that of the dense weights masked; targets stay the dense network's.
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
    cascade = Cascade(chain, masks, dense, config, run or Run(), start or {}, pattern)
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
    """Algorithm 3, over one sweep or several. ``dense`` holds the weights that pruning has overwritten, ``start``
    those that may be a better start than the masked ones, ``pattern`` what the masks still have to thin out to."""

    chain: Chain
    masks: Masks
    dense: Mapping[str, Tensor]
    config: PruneConfig
    run: Run
    start: Mapping[str, Tensor]
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
        before: dict[str, Tensor] = {}  # of the layer that was solved last: what the dense stream still takes

        def advance(operation: Operation, streams: Streams) -> Streams:
            if self.config.targets == "dense":
                with holding(self.chain, self.dense or before):
                    streams.advance(operation, "dense", self.chain.device)
            streams.advance(operation, "pruned", self.chain.device)
            before.clear()
            return streams

        for index, operation, _ in self.chain.walk(streams, advance, stop=max(todo, default=-1) + 1):
            if operation.group is not None and index in todo:
                place = (number - 1) * len(todo) + len(reports)
                segment = Segment.cut(self.chain, index, self.config.k)
                report, weights = self.finish(segment, number, streams, place)
                if not self.dense:
                    before.update((name, self.chain.weight(name).detach().clone()) for name in weights)
                self.chain.put(weights)
                reports.append(report)
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
        name, journal = f"layer-{place:04d}", self.run.journal
        active = ActiveWeights.of(segment.group, self.masks, self.chain.device)
        found = journal.get(name)
        known = found or journal.get(f"{name}-halved")
        while known is not None and streams.halvings < known.facts["halvings"]:
            streams.halve()
        if found is not None:
            report = LayerReport.from_dict(found.facts["report"])
            self.tell_of(report, place)
            return report, active.scatter(found.tensors["w"].to(self.chain.device))

        def shrink() -> None:
            nonlocal segment
            segment, less = smaller(segment, streams)
            self.run.say(f"{segment.group.name}: out of memory; solved again {less}")
            journal.drop(f"{name}-")
            journal.put(f"{name}-halved", halvings=streams.halvings)

        report, weights = until_it_fits(lambda: self.solve(segment, sweep, streams, place, pattern), shrink)
        journal.put(name, {"w": active.gather(weights)}, report=report.to_dict(), halvings=streams.halvings)
        journal.drop(f"{name}-")
        self.tell_of(report, place)
        return report, weights

    def solve(self, segment: Segment, sweep: int, streams: Streams, place: int, pattern: Pattern | None) -> Solution:
        """Algorithm 2 for a segment's group; with a ``pattern``, its masks thin out to that meanwhile."""
        started = time.perf_counter()
        record, group = f"layer-{place:04d}", segment.group
        joint = group.kind == "joint"
        active = ActiveWeights.of(group, self.masks, self.chain.device)
        judge = len(streams.pruned) - 1
        state = get_state(self.run.journal, record, self.chain.device) if joint else None
        done = state.result.steps if state else 0
        first, steps = self.steps(joint, pattern, judge)
        self.run.tell(STAGE, place, self.total, group.name)
        # Layers that do not get to all batches begin where the layer before them ended: all images have a part.
        order = [(first + i, (place * steps + i) % judge) for i in range(done, steps)]
        batches = Batches(segment, self.dense, active, streams, self.config, order)
        held_out = batches.objective(judge)
        masked = None
        if state is None:
            w, loss, masked = self.begin(active, held_out, sweep)
            state = NewtonState.start(w, loss, NewtonStatus.THINNED_OUT if pattern else NewtonStatus.NOT_IMPROVED)

        def tell_step(state: NewtonState) -> None:
            result = state.result
            detail = f"{result.cg_iterations} CG iterations, loss {result.loss_start:.4g} → {result.loss_end:.4g}"
            self.run.tell(STAGE, place + result.steps / (steps + 1), self.total, group.name, detail)
            if joint:
                put_state(self.run.journal, record, state)

        solver = replace(self.config.solver, passes=1)  # the order has them all
        if pattern is None:
            result = newton(batches, held_out, state.w, solver, tell_step, state)
        else:
            result = thin_out(batches, held_out, state.w, solver, pattern, tell_step, state)
        report = LayerReport.of(segment, sweep, result, streams, active, masked, time.perf_counter() - started)
        return report, active.scatter(result.w)

    def steps(self, joint: bool, pattern: Pattern | None, learners: int) -> tuple[int, int]:
        """Number of a solve's first step, of all joint ones, and how many there are."""
        if pattern is not None:
            return 0, self.gradual_steps
        return (self.gradual_steps, self.joint_steps) if joint else (0, self.layer_steps(learners))

    def begin(self, active: ActiveWeights, held_out: Objective, sweep: int) -> tuple[Tensor, float, float | None]:
        """The weights (m,) to begin with, their held-out loss and, in the first sweep, that of the mask alone."""
        own = {name: self.chain.weight(name).detach() for name in active.masks}
        w = active.gather(own)
        loss = held_out.value(w)
        if sweep > 1:
            return w, loss, None
        masked = loss
        if any(name in self.start for name in own):
            updated = active.gather({name: self.start.get(name, weight).to(weight) for name, weight in own.items()})
            if (lower := held_out.value(updated)) < loss:
                w, loss = updated, lower
        return w, loss, masked

    def tell_of(self, report: LayerReport, place: int) -> None:
        """A line about a group that is done."""
        self.run.tell(STAGE, place + 1, self.total, report.name)
        self.run.say(
            f"{place + 1:3d}/{self.total} {report.name}: loss {report.loss_start:.4g} → {report.loss_pruned:.4g}, "
            f"{report.cg_iterations} CG iterations, {report.seconds:.1f} s"
            + ("" if report.status == "improved" else f" [{report.status}]")
        )


def smaller(segment: Segment, streams: Streams) -> tuple[Segment, str]:
    """A segment that takes less memory, by batches of half the size, of single images by a smaller K; in words, too.

    Raises:
        MemoryLimitError: there is no less, or other processes wait for this one.
    """
    group = segment.group
    if processes() > 1:  # the others wait for what this one cannot compute
        raise MemoryLimitError(
            f"{group.name}: out of memory, in one process of several.",
            "Repeat the command with --memory, or with more processes.",
        )
    if streams.largest > 1:
        streams.halve()
        return segment, f"in batches of {streams.largest} images"
    if group.kind != "joint" and segment.stop - segment.start > 1:
        return replace(segment, stop=segment.stop - 1), f"with K = {segment.stop - segment.start - 2}"
    raise MemoryLimitError(
        f"{group.name}: memory does not suffice for a single image.",
        "Set joint_steps to 0 (--config)." if group.kind == "joint" else "Give --device cpu.",
    )
