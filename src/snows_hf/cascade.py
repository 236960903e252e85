"""Algorithm 3: layer after layer, each solved on the inputs that the pruned layers before it produce.

Two streams of activations advance side by side: what the dense network computes, which gives the targets, and what the
network pruned so far computes, which enters each layer. With dense targets every layer also repairs what earlier ones
broke; with cascaded targets (the paper's) the dense layer runs on the pruned stream.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from .adapters import Chain, Group, State, frozen
from .augment import augmented
from .config import PruneConfig
from .distributed import processes, share
from .errors import MemoryLimitError
from .journal import Journal
from .masks import Masks
from .memory import Images, Kept, Shelf, halves, in_parts, out_of_memory, saved_bytes
from .objective import ActiveWeights, KStepObjective, Segment
from .solver import Expansion, NewtonState, newton


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


@dataclass
class Streams:
    """Activations before one operation, per batch of images (of this process's share of them): of the dense network,
    and of the one pruned so far.

    They rest on a shelf (memory.py). The last batch only judges. ``halvings``: how often batches were halved.
    """

    shelf: Shelf
    dense: list[Kept]
    pruned: list[Kept]
    batches: list[slice]
    halvings: int = 0

    @classmethod
    def start(cls, images: Tensor | Images, batches: Sequence[slice], shelf: Shelf) -> "Streams":
        parts = [(batch.start, share(batch.stop - batch.start)) for batch in batches]
        states = [shelf.keep((images[first + part.start : first + part.stop],)) for first, part in parts]
        return cls(shelf, states, list(states), list(batches))

    def size(self, index: int) -> int:
        """Images of a batch, of all processes together."""
        return self.batches[index].stop - self.batches[index].start

    @property
    def largest(self) -> int:
        """Images of the largest batch."""
        return max(map(self.size, range(len(self.batches))))

    def halve(self) -> None:
        """Cuts every batch in two; of the one that judges, only the first half stays."""
        parts = [part for batch in self.batches for part in halves(batch)]
        for which in ("dense", "pruned"):
            states = []
            for batch, kept in zip(self.batches, getattr(self, which), strict=True):
                state = kept.get()
                states += [
                    self.shelf.keep(tuple(t[part.start - batch.start : part.stop - batch.start] for t in state))
                    for part in halves(batch)
                ]
            setattr(self, which, states[: len(states) + 1 - len(halves(self.batches[-1]))])
        self.batches = parts[: len(parts) + 1 - len(halves(self.batches[-1]))]
        self.halvings += 1

    @torch.no_grad()
    def advance(self, run: Callable[[State], State], which: str, device: torch.device) -> None:
        """Moves one stream through an operation, batch by batch."""
        states: list[Kept] = getattr(self, which)
        for i in range(len(states)):
            state = send_to_device(in_parts(run, send_to_device(states[i].get(), device)), torch.device("cpu"))
            states[i] = self.shelf.keep(state)


@contextmanager
def holding(chain: Chain, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the block the chain's model computes with ``weights``; nothing is copied."""
    own = {name: chain.weight(name).data for name in weights}
    for name, weight in weights.items():
        chain.weight(name).data = weight
    try:
        yield
    finally:
        for name, weight in own.items():
            chain.weight(name).data = weight


@dataclass(frozen=True)
class Batches:
    """The objectives of one layer, each made when its turn comes and freed after.

    ``dense``: weights that stand in for the model's own where targets are computed. ``order``: of steps, and the batch
    of each.
    """

    segment: Segment
    dense: Mapping[str, Tensor]
    active: ActiveWeights
    streams: Streams
    config: PruneConfig
    device: torch.device
    order: Sequence[tuple[int, int]]

    def objective(self, index: int, step: int | None = None) -> KStepObjective:
        """That of one batch; where images are augmented, as they look at a step."""
        joint = self.segment.group.kind == "joint"
        part = share(self.streams.size(index))
        pruned = send_to_device(self.streams.pruned[index].get(), self.device)
        source = self.streams.dense[index].get() if self.config.targets == "dense" else pruned
        if self.config.augment and joint and step is not None:  # elsewhere what comes in is not images
            source = pruned = (augmented(pruned[0], 1000 * self.config.seed + step, part),)
        with torch.no_grad(), holding(self.segment.chain, self.dense):
            targets = self.segment.outputs(send_to_device(source, self.device))
        solver = self.config.solver
        return KStepObjective(
            self.segment,
            self.active,
            pruned,
            targets,
            solver.curvature,
            solver.preconditioner,
            solver.damping,
            relative=self.config.weighting == "relative",
            emphasis=self.config.emphasis if joint else 0.0,
            share=part,
        )

    def __iter__(self) -> Iterator[KStepObjective]:
        return (self.objective(index, step) for step, index in self.order)


def split_images(n: int, batch_size: int, held_out: float) -> list[slice]:
    """n calibration images as slices: mini-batches of at most ``batch_size``, and last the held-out batch.

    Batches are of equal size but for one image. No more than ``batch_size`` images judge. A single image serves as
    both batch and judge.
    """
    judges = min(max(1, round(held_out * n)), max(n - 1, 1), batch_size)
    learners = max(n - judges, 1)
    count = -(-learners // batch_size)
    ends = [learners * i // count for i in range(count + 1)]
    return [*(slice(*pair) for pair in pairwise(ends)), slice(n - judges, n)]


def masked_operations(chain: Chain, masks: Masks) -> list[int]:
    """Operations whose group has a mask."""
    return [i for i, group in chain.groups() if any(name in masks for name in group.parameters)]


def whole(chain: Chain, masks: Masks) -> Segment:
    """The network from its images on, with all pruned weights as one group."""
    names = tuple(name for _, group in chain.groups() for name in group.parameters if name in masks)
    return Segment(chain, Group("all layers", names, "joint"), 0, len(chain.operations))


def bytes_per_image(chain: Chain, images: Tensor, masks: Masks, config: PruneConfig, device: torch.device) -> int:
    """Most that the graphs of any layer's objective keep in memory per image of a batch; ``images`` holds two."""
    start: State = (images.to(device),)
    state, segments = start, []
    todo = masked_operations(chain, masks)
    with frozen(chain.model):
        for index, operation in enumerate(chain.operations):
            if index in todo:
                segments.append((Segment.cut(chain, index, config.k), state))
            with torch.no_grad():
                state = operation.run(state)
        if config.joint_steps:
            segments.append((whole(chain, masks), start))
        return max(
            saved_bytes(partial(_expand, segment, state, masks, config))
            - saved_bytes(partial(_expand, segment, tuple(tensor[:1] for tensor in state), masks, config))
            for segment, state in segments
        )


def _expand(segment: Segment, state: State, masks: Masks, config: PruneConfig) -> Expansion:
    with torch.no_grad():
        targets = segment.outputs(state)
    active = ActiveWeights.of(segment.group, masks, targets[0].device)
    w = active.gather({name: segment.chain.weight(name).detach() for name in active.masks})
    return KStepObjective(segment, active, state, targets, config.solver.curvature).expand(w)


def prune_chain(
    chain: Chain,
    images: Tensor | Images,
    masks: Masks,
    config: PruneConfig,
    device: torch.device,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    shelf: Shelf | None = None,
    start: Mapping[str, Tensor] | None = None,
    journal: Journal | None = None,
) -> list[LayerReport]:
    """Prunes a chain's model in place with the given masks (True: kept).

    Args:
        chain: of the dense model, on ``device``.
        images: preprocessed calibration images (n, 3, h, w), in an order that is already random.
        masks: parameter name → bool mask; parameters without one stay dense.
        config: batch sizes, targets and solver settings.
        device: where segments run.
        on_progress: called when a layer starts, after each Newton step, and when a layer is done.
        shelf: where activations rest; None keeps them in memory.
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
    shelf = shelf or Shelf()
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
