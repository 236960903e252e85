"""What a cascade tells of its layers, while it runs and in the end."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .newton import NewtonResult
from .objective import ActiveWeights, Segment
from .streams import Streams


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
