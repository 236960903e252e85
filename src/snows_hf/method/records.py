"""What is kept and reported of the layers that a cascade solves."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..runtime.journal import Journal
from .cg import CGStatus
from .newton import NewtonResult, NewtonState, NewtonStatus
from .objective import ActiveWeights, Segment


@dataclass(frozen=True)
class LayerReport:
    """What happened to one group in one sweep.

    Attributes:
        loss_masked: K-step loss, on the held-out calibration images as all losses here, of the dense weights under the
            mask; None after the first sweep, where there are no dense weights to mask any more.
        loss_start: of the weights that it began with: those, or the criterion's own where they are better.
        loss_pruned: of the weights that it ended with.
        losses: the lowest so far, after each step.
        cg_statuses: why conjugate gradients stopped, and how often.
        batch_size: images of its largest batch, fewer than asked for where memory ran out.
    """

    name: str
    sweep: int
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    k: int
    sparsity: float
    loss_masked: float | None
    loss_start: float
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
        active: ActiveWeights,
        loss_masked: float | None,
        batch_size: int,
        seconds: float,
    ) -> "LayerReport":
        """What Algorithm 2 did to a segment's group; ``active`` are the weights that it has in ``result.w``."""
        weights = [segment.chain.weight(name) for name in segment.group.parameters]
        size = sum(weight.numel() for weight in weights)
        joint = segment.group.kind == "joint"
        found = active.scatter(result.w)
        masked = sum(int((found[name] == 0).sum()) for name in active.weights)
        return cls(
            name=segment.group.name,
            sweep=sweep,
            parameters=segment.group.parameters,
            shape=(size,) if joint else (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]),
            k=segment.stop - segment.start - 1,
            sparsity=masked / size,
            loss_masked=loss_masked,
            loss_start=result.loss_start,
            loss_pruned=result.loss_end,
            cg_iterations=result.cg_iterations,
            steps=result.steps,
            rejected_steps=result.rejected,
            seconds=seconds,
            status=result.status.value,
            remedy=result.status.remedy,
            losses=tuple(result.losses),
            cg_statuses=dict(Counter(status.value for status in result.cg_statuses)),
            batch_size=batch_size,
        )

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "LayerReport":
        """:meth:`to_dict` undone, after JSON."""
        own: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def put_state(journal: Journal, name: str, state: NewtonState) -> None:
    """Keeps where Algorithm 2 is under a layer's name."""
    tensors = {"w": state.w, "mean": state.mean, "best": state.result.w}
    tensors = {key: tensor for key, tensor in tensors.items() if key == "w" or tensor is not state.w}
    counts = {key: value for key, value in vars(state.result).items() if key != "w"}
    journal.put_next(name, state.result.steps, tensors, result=counts, milestone=state.milestone, stale=state.stale)


def get_state(journal: Journal, name: str, device: torch.device) -> NewtonState | None:
    """The last state that was kept under a layer's name."""
    record = journal.latest(name)
    if record is None:
        return None
    tensors = {key: tensor.to(device) for key, tensor in record.tensors.items()}
    w, counts = tensors["w"], record.facts["result"]
    counts["status"] = NewtonStatus(counts["status"])
    counts["cg_statuses"] = [CGStatus(status) for status in counts["cg_statuses"]]
    result = NewtonResult(tensors.get("best", w), **counts)
    return NewtonState(w, tensors.get("mean", w), result, record.facts["milestone"], record.facts["stale"])
