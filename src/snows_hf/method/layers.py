"""One solve of a cascade: Algorithm 2 for a layer, or for all together, kept in the journal and told of."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..adapters import Chain
from ..errors import MemoryLimitError
from ..patterns import Masks, Pattern
from ..runtime.distributed import processes
from ..runtime.memory import until_it_fits
from ..runtime.run import Run
from ..settings import PruneConfig
from .gradual import thin_out
from .newton import NewtonState, NewtonStatus, Objective, newton
from .objective import ActiveWeights, Segment
from .records import LayerReport, get_state, put_state
from .streams import Batches, Streams, Teacher


STAGE = "Layers"


@dataclass(frozen=True)
class Task:
    """What is to be solved: the group of a segment.

    Attributes:
        sweep: counted from 1.
        place: which of all solves this is, from 0 on.
        first: number of the first step, of all joint ones.
        steps: how many there are; None: as many as the settings give a layer.
        pattern: to which masks thin out meanwhile (gradual.py); None where they stay.
    """

    segment: Segment
    sweep: int
    place: int
    first: int = 0
    steps: int | None = None
    pattern: Pattern | None = None

    @property
    def record(self) -> str:
        """The name of what is kept of it."""
        return f"layer-{self.place:04d}"


@dataclass(frozen=True)
class Layers:
    """The layers of a chain as a cascade solves them, ``total`` times in all. ``dense`` holds the weights that pruning
    has overwritten, ``start`` those that may be a better start than the masked ones."""

    chain: Chain
    masks: Masks
    dense: Mapping[str, Tensor]
    config: PruneConfig
    run: Run
    start: Mapping[str, Tensor]
    total: int
    teacher: Teacher | None = None

    def finish(self, task: Task, streams: Streams) -> tuple[LayerReport, dict[str, Tensor]]:
        """:meth:`solve`, or what an earlier run kept of it, put into the chain's model. Where memory runs out, the
        group is solved again with batches of half the size, and of single images with a smaller K."""
        name, journal = task.record, self.run.journal
        active = ActiveWeights.of(task.segment.group, self.masks, self.chain.device, self.config.biases)
        found = journal.get(name)
        known = found or journal.get(f"{name}-halved")
        while known is not None and streams.halvings < known.facts["halvings"]:
            streams.halve()

        def shrink() -> None:
            nonlocal task
            segment, less = smaller(task.segment, streams)
            task = replace(task, segment=segment)
            self.run.say(f"{segment.group.name}: out of memory; solved again {less}")
            journal.drop(f"{name}-")
            journal.put(f"{name}-halved", halvings=streams.halvings)

        if found is not None:
            report = LayerReport.from_dict(found.facts["report"])
            weights = active.scatter(found.tensors["w"].to(self.chain.device))
        else:
            report, weights = until_it_fits(lambda: self.solve(task, streams), shrink)
            journal.put(name, {"w": active.gather(weights)}, report=report.to_dict(), halvings=streams.halvings)
            journal.drop(f"{name}-")
        self.chain.put(weights)
        self.run.tell(STAGE, task.place + 1, self.total, report.name)
        self.run.say(
            f"{task.place + 1:3d}/{self.total} {report.name}: loss {report.loss_start:.4g} → {report.loss_pruned:.4g},"
            f" {report.cg_iterations} CG iterations, {report.seconds:.1f} s"
            + ("" if report.status == "improved" else f" [{report.status}]")
        )
        return report, weights

    def solve(self, task: Task, streams: Streams) -> tuple[LayerReport, dict[str, Tensor]]:
        """Algorithm 2 for a segment's group; with a pattern, its masks thin out to that meanwhile. Gives what
        happened, and the group's full weights."""
        started = time.perf_counter()
        group, place, judge = task.segment.group, task.place, len(streams.pruned) - 1
        joint = group.kind == "joint"
        active = ActiveWeights.of(group, self.masks, self.chain.device, self.config.biases)
        state = get_state(self.run.journal, task.record, self.chain.device) if joint else None
        done = state.result.steps if state else 0
        steps = self.config.steps_of_a_layer(judge) if task.steps is None else task.steps
        self.run.tell(STAGE, place, self.total, group.name)
        # Layers that do not get to all images begin where the layer before them ended: all images have a part.
        first, turn = task.first if joint else place * steps, place * steps
        order = [(first + i, (turn + i) % judge) for i in range(done, steps)]
        batches = Batches(task.segment, self.dense, active, streams, self.config, order, self.teacher)
        held_out = batches.objective(judge)
        masked = None
        if state is None:
            w, loss, masked = self.begin(active, held_out, task.sweep)
            status = NewtonStatus.THINNED_OUT if task.pattern else NewtonStatus.NOT_IMPROVED
            state = NewtonState.start(w, loss, status)

        def tell_step(state: NewtonState) -> None:
            result = state.result
            detail = f"{result.cg_iterations} CG iterations, loss {result.loss_start:.4g} → {result.loss_end:.4g}"
            self.run.tell(STAGE, place + result.steps / (steps + 1), self.total, group.name, detail)
            if joint:
                put_state(self.run.journal, task.record, state)

        solver = replace(self.config.solver, passes=1)  # the order has them all
        if task.pattern is None:
            result = newton(batches, held_out, state.w, solver, tell_step, state)
        else:
            result = thin_out(batches, held_out, state, solver, task.pattern, tell_step)
        seconds = time.perf_counter() - started
        report = LayerReport.of(task.segment, task.sweep, result, active, masked, streams.largest, seconds)
        return report, active.scatter(result.w)

    def begin(self, active: ActiveWeights, held_out: Objective, sweep: int) -> tuple[Tensor, float, float | None]:
        """The weights (m,) to begin with, their held-out loss and, in the first sweep, that of the mask alone."""
        w = active.within(self.chain)
        loss = held_out.value(w)
        if sweep > 1:
            return w, loss, None
        if any(name in self.start for name in active.masks):
            own = {name: self.chain.weight(name).detach() for name in active.masks}
            updated = active.gather({name: self.start.get(name, weight).to(weight) for name, weight in own.items()})
            if (lower := held_out.value(updated)) < loss:
                return updated, lower, loss
        return w, loss, loss


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
