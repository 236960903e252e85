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
from torch import Tensor

from .adapters import Chain, Group, State, frozen
from .augment import augmented
from .config import PruneConfig
from .masks import Masks
from .memory import Images, Kept, Shelf, saved_bytes
from .objective import ActiveWeights, KStepObjective, Segment
from .solver import Expansion, newton


@dataclass(frozen=True)
class LayerReport:
    """What happened to one group in one sweep. Losses are K-step losses on the held-out calibration images: at the
    start (in the first sweep, of the mask alone, or of the criterion's own weights where these are better) and at the
    end, in ``losses`` the lowest so far after each step. ``cg_statuses`` counts why conjugate gradients stopped."""

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
    losses: tuple[float, ...] = ()
    cg_statuses: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """Where a cascade is: layer ``index`` (from 0) of ``total`` in all sweeps, its products so far, its losses."""

    index: int
    total: int
    name: str
    cg_iterations: int = 0
    loss_masked: float | None = None
    loss: float | None = None
    report: LayerReport | None = None


@dataclass
class Streams:
    """Activations before one operation, per batch of images: of the dense network, and of the one pruned so far.

    They rest on a shelf (memory.py). The last batch only judges.
    """

    shelf: Shelf
    dense: list[Kept]
    pruned: list[Kept]

    @classmethod
    def start(cls, images: Tensor | Images, batches: Sequence[slice], shelf: Shelf) -> "Streams":
        states = [shelf.keep((images[batch],)) for batch in batches]
        return cls(shelf, states, list(states))

    @torch.no_grad()
    def advance(self, run: Callable[[State], State], which: str, device: torch.device) -> None:
        """Moves one stream through an operation, batch by batch."""
        states: list[Kept] = getattr(self, which)
        for i in range(len(states)):
            state = send_to_device(run(send_to_device(states[i].get(), device)), torch.device("cpu"))
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

    ``dense``: weights that stand in for the model's own where targets are computed.
    """

    segment: Segment
    dense: Mapping[str, Tensor]
    active: ActiveWeights
    streams: Streams
    config: PruneConfig
    device: torch.device
    order: Sequence[int]
    augment: bool = False

    def objective(self, index: int, step: int | None = None) -> KStepObjective:
        """That of one batch; with ``augment``, of its images as they look at a step."""
        pruned = send_to_device(self.streams.pruned[index].get(), self.device)
        source = self.streams.dense[index].get() if self.config.targets == "dense" else pruned
        if self.augment and step is not None:
            source = pruned = (augmented(pruned[0], 1000 * self.config.seed + step),)
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
            emphasis=self.config.emphasis,
        )

    def __iter__(self) -> Iterator[KStepObjective]:
        return (self.objective(index, step) for step, index in enumerate(self.order))


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

    Returns:
        One report per pruned group, in forward order; the groups once more for every further sweep, and one for the
        joint solve.
    """
    batches = split_images(len(images), config.batch_size, config.held_out)
    # In the first sweep nothing of a segment is pruned yet: the model's own weights are the dense ones.
    again = config.sweeps > 1 or config.joint_steps > 0
    dense = {name: chain.weight(name).detach().clone() for name in masks} if again else {}
    cascade = Cascade(chain, masks, dense, config, device, on_progress, start or {})
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
    ``start`` those that may be a better start than the masked ones."""

    chain: Chain
    masks: Masks
    dense: Mapping[str, Tensor]
    config: PruneConfig
    device: torch.device
    on_progress: Callable[[Progress], None]
    start: Mapping[str, Tensor]

    def layer_steps(self, learners: int) -> int:
        """Newton steps for one layer with that many batches."""
        steps = self.config.solver.passes * learners
        return min(steps, self.config.layer_steps or steps)

    def sweep(self, number: int, streams: Streams) -> list[LayerReport]:
        """All layers once, in forward order; ``number`` counts from 1."""
        reports: list[LayerReport] = []
        todo = masked_operations(self.chain, self.masks)
        total = self.config.sweeps * len(todo) + (self.config.joint_steps > 0)
        steps = self.layer_steps(len(streams.pruned) - 1)
        for index, operation in enumerate(self.chain.operations[: max(todo, default=-1) + 1]):
            weights: Mapping[str, Tensor] = {}
            if index in todo:
                place = (number - 1) * len(todo) + len(reports), total
                segment = Segment.cut(self.chain, index, self.config.k)
                report, weights = self.solve(segment, number, streams, *place, steps)
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
        number, steps = self.config.sweeps + 1, self.config.joint_steps
        report, weights = self.solve(segment, number, streams, total, total + 1, steps)
        self.chain.put(weights)
        self.on_progress(Progress(total, total + 1, report.name, report=report))
        return report

    def solve(
        self, segment: Segment, sweep: int, streams: Streams, place: int, total: int, steps: int
    ) -> tuple[LayerReport, dict[str, Tensor]]:
        """Algorithm 2 for a segment's group, number ``place`` of ``total``, in ``steps`` steps: report, weights."""
        started = time.perf_counter()
        group = segment.group
        self.on_progress(Progress(place, total, group.name))
        active = ActiveWeights.of(group, self.masks, self.device)
        judge = len(streams.pruned) - 1
        solver = replace(self.config.solver, passes=1)  # the order has them all
        # Layers that do not get to all batches begin where the layer before them ended: all images have a part.
        order = [(place * steps + i) % judge for i in range(steps)]
        augment = self.config.augment and group.kind == "joint"  # elsewhere what comes in is not images
        batches = Batches(segment, self.dense, active, streams, self.config, self.device, order, augment)
        held_out = batches.objective(judge)
        own = {name: self.chain.weight(name).detach() for name in active.masks}
        w = active.gather(own)
        if sweep == 1 and any(name in self.start for name in own):
            updated = active.gather({name: self.start.get(name, weight).to(weight) for name, weight in own.items()})
            w = updated if held_out.value(updated) < held_out.value(w) else w

        def report_step(cg_iterations: int, start: float, loss: float) -> None:
            self.on_progress(Progress(place, total, group.name, cg_iterations, start, loss))

        result = newton(batches, held_out, w, solver, report_step)
        weights = [self.chain.weight(name) for name in group.parameters]
        size = sum(weight.numel() for weight in weights)
        report = LayerReport(
            name=group.name,
            sweep=sweep,
            parameters=group.parameters,
            shape=(size,)
            if group.kind == "joint"
            else (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]),
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
        )
        return report, active.scatter(result.w)
