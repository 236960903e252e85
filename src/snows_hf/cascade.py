"""Algorithm 3: layer after layer, each solved on the inputs that the pruned layers before it produce.

Two streams of activations advance side by side: what the dense network computes, which gives the targets, and what the
network pruned so far computes, which enters each layer. With dense targets every layer also repairs what earlier ones
broke; with cascaded targets (the paper's) the dense layer runs on the pruned stream.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from .adapters import Chain, State, frozen
from .config import PruneConfig
from .masks import Masks
from .objective import ActiveWeights, KStepObjective, Segment
from .solver import newton


@dataclass(frozen=True)
class LayerReport:
    """What happened to one group. Losses are K-step losses on the held-out calibration images."""

    name: str
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """Where a cascade is: layer ``index`` of ``total`` (from 0), its products so far, and its held-out losses."""

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

    They rest on the CPU. ``held_out`` is the index of the batch that only judges.
    """

    dense: list[State]
    pruned: list[State]

    @classmethod
    def start(cls, batches: Sequence[Tensor]) -> "Streams":
        states: list[State] = [(batch,) for batch in batches]
        return cls(states, list(states))

    @torch.no_grad()
    def advance(self, run: Callable[[State], State], which: str, device: torch.device) -> None:
        """Moves one stream through an operation, batch by batch."""
        states = getattr(self, which)
        for i, state in enumerate(states):
            states[i] = send_to_device(run(send_to_device(state, device)), torch.device("cpu"))


@dataclass(frozen=True)
class Batches:
    """The objectives of one layer, each made when its turn comes and freed after: targets are computed once."""

    segment: Segment
    active: ActiveWeights
    streams: Streams
    config: PruneConfig
    device: torch.device
    indices: range

    def objective(self, index: int) -> KStepObjective:
        pruned = send_to_device(self.streams.pruned[index], self.device)
        source = self.streams.dense[index] if self.config.targets == "dense" else pruned
        with torch.no_grad():
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
        )

    def __iter__(self) -> Iterator[KStepObjective]:
        return (self.objective(i) for i in self.indices)


def split_images(images: Tensor, batch_size: int, held_out: float) -> list[Tensor]:
    """Calibration images (n, 3, h, w) → mini-batches of at most ``batch_size``, and last the held-out batch.

    Batches are of equal size but for one image. A single image serves as both batch and judge.
    """
    n = len(images)
    judges = min(max(1, round(held_out * n)), max(n - 1, 1))
    learners = images[: max(n - judges, 1)]
    count = -(-len(learners) // batch_size)
    return [*learners.tensor_split(count), images[-judges:]]


def prune_chain(
    chain: Chain,
    images: Tensor,
    masks: Masks,
    config: PruneConfig,
    device: torch.device,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> list[LayerReport]:
    """Prunes a chain's model in place with the given masks (True: kept).

    Args:
        chain: of the dense model, on ``device``.
        images: preprocessed calibration images (n, 3, h, w), in an order that is already random.
        masks: parameter name → bool mask; parameters without one stay dense.
        config: batch sizes, targets and solver settings.
        device: where segments run.
        on_progress: called when a layer starts, after each Newton step, and when a layer is done.

    Returns:
        One report per pruned group, in forward order.
    """
    streams = Streams.start(split_images(images, config.batch_size, config.held_out))
    todo = {i: g for i, g in chain.groups() if any(name in masks for name in g.parameters)}
    reports: list[LayerReport] = []
    last = max(todo, default=-1)
    with frozen(chain.model):
        for index, operation in enumerate(chain.operations[: last + 1]):
            weights: Mapping[str, Tensor] = {}
            if index in todo:
                position = Progress(len(reports), len(todo), todo[index].name)
                on_progress(position)
                report, weights = _solve_layer(chain, index, masks, streams, config, device, position, on_progress)
                reports.append(report)
                on_progress(Progress(position.index, position.total, report.name, report=report))
            if config.targets == "dense":
                streams.advance(operation.run, "dense", device)
            for name, weight in weights.items():
                chain.weight(name).data.copy_(weight)
            streams.advance(operation.run, "pruned", device)
    return reports


def _solve_layer(
    chain: Chain,
    index: int,
    masks: Masks,
    streams: Streams,
    config: PruneConfig,
    device: torch.device,
    position: Progress,
    on_progress: Callable[[Progress], None],
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Algorithm 2 for the group at operation ``index``: its report, and its new full weights."""
    started = time.perf_counter()
    segment = Segment.cut(chain, index, config.k)
    group = segment.group
    active = ActiveWeights({name: masks[name].to(device) for name in group.parameters if name in masks})
    batches = Batches(segment, active, streams, config, device, range(len(streams.pruned) - 1))
    held_out = batches.objective(len(streams.pruned) - 1)
    w = active.gather({name: chain.weight(name).detach() for name in active.masks})

    def report_step(cg_iterations: int, start: float, loss: float) -> None:
        on_progress(Progress(position.index, position.total, group.name, cg_iterations, start, loss))

    result = newton(batches, held_out, w, config.solver, report_step)
    weights = [chain.weight(name) for name in group.parameters]
    total = sum(weight.numel() for weight in weights)
    report = LayerReport(
        name=group.name,
        parameters=group.parameters,
        shape=(sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]),
        k=segment.stop - segment.start - 1,
        sparsity=(sum(mask.numel() for mask in active.masks.values()) - active.size) / total,
        loss_masked=result.loss_start,
        loss_pruned=result.loss_end,
        cg_iterations=result.cg_iterations,
        steps=result.steps,
        rejected_steps=result.rejected,
        seconds=time.perf_counter() - started,
        status=result.status.value,
        remedy=result.status.remedy,
    )
    return report, active.scatter(result.w)
