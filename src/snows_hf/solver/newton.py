"""Algorithm 2: stochastic Newton descent on the active weights of one layer, with the Armijo rule of A.1.3.

Knows objectives only through :class:`Objective`: a value, and a second-order expansion (Eq. 7).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ..config import SolverConfig
from .cg import CGStatus, cg


@dataclass(frozen=True)
class Expansion:
    """Eq. 7 around one point: loss ``value``, ``gradient`` (m,), and ``product``: p -> H p for p of shape (m,).

    ``preconditioner`` is a positive diagonal (m,), or None.
    """

    value: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    preconditioner: Tensor | None = None


class Objective(Protocol):
    """The K-step loss of one batch (Eq. 6), as a function of the active weights w (m,)."""

    def value(self, w: Tensor) -> float: ...

    def expand(self, w: Tensor) -> Expansion: ...


class NewtonStatus(str, Enum):
    """How a layer's optimisation ended."""

    IMPROVED = "improved"
    KEPT_MASKED = "kept_masked"
    NON_FINITE = "non_finite"

    @property
    def remedy(self) -> str:
        return {
            "improved": "",
            "kept_masked": "No step lowered the held-out loss: the masked weights were kept. Use more images, or a "
            "larger damping.",
            "non_finite": "The loss or a product was not finite: the best finite weights were kept. Use --dtype "
            "float32, or a larger damping.",
        }[self.value]


@dataclass
class NewtonResult:
    """Best weights seen (m,), how the run ended, and its counts.

    ``loss_start`` and ``loss_end`` are held-out losses; ``cg_iterations`` counts curvature products.
    """

    w: Tensor
    status: NewtonStatus
    loss_start: float
    loss_end: float
    steps: int = 0
    rejected: int = 0
    cg_iterations: int = 0
    cg_statuses: list[CGStatus] = field(default_factory=list)


def armijo(
    value: Callable[[Tensor], float], w: Tensor, delta: Tensor, loss: float, slope: float, config: SolverConfig
) -> tuple[float, float]:
    """Largest α ≤ 1 of a backtracking sequence with L(w + αδ) ≤ L(w) + αβ δᵀg (A.1.3), on one and the same batch.

    Returns:
        α and the loss there; α = 0 and the old loss when no step of the sequence qualifies.
    """
    alpha = 1.0
    for _ in range(config.max_backtracks + 1):
        trial = value(w + alpha * delta)
        if trial <= loss + alpha * config.beta * slope:
            return alpha, trial
        alpha *= config.backtrack
    return 0.0, loss


def newton(
    batches: Iterable[Objective],
    held_out: Objective,
    w: Tensor,
    config: SolverConfig,
    progress: Callable[[int, float, float], None] | None = None,
) -> NewtonResult:
    """Minimises the mean of ``batches`` from w by one Newton step per batch and pass.

    The weights returned are the best of all iterates, the start included, by the ``held_out`` loss: a layer never
    comes out worse than it came in.

    Args:
        batches: one objective per mini-batch, at least one; iterated once per pass.
        held_out: objective on images that no batch holds.
        w: active weights to start from, shape (m,).
        config: passes, CG and line-search settings.
        progress: called after each step with the products spent so far, the held-out loss at the start and the best one.
    """
    start = held_out.value(w)
    result = NewtonResult(w, NewtonStatus.KEPT_MASKED, loss_start=start, loss_end=start)
    if not math.isfinite(start):
        result.status = NewtonStatus.NON_FINITE
        return result
    for sweep in range(config.passes):
        best_before = result.loss_end
        for batch in batches:
            local = batch.expand(w)
            if not math.isfinite(local.value) or not torch.isfinite(local.gradient).all():
                result.status = NewtonStatus.NON_FINITE
                return result
            direction = cg(
                local.product,
                local.gradient,
                damping=config.damping,
                rtol=config.cg_rtol,
                atol=config.cg_atol,
                max_iter=config.cg_max_iter,
                stall=config.cg_stall,
                preconditioner=local.preconditioner,
            )
            result.steps += 1
            result.cg_iterations += direction.iterations
            result.cg_statuses.append(direction.status)
            slope = float(direction.delta @ local.gradient)
            alpha = 0.0
            if slope < 0:
                alpha, _ = armijo(batch.value, w, direction.delta, local.value, slope, config)
            if alpha == 0.0:
                result.rejected += 1
                continue
            w = w + alpha * direction.delta
            loss = held_out.value(w)
            if loss < result.loss_end:
                result.w, result.loss_end, result.status = w, loss, NewtonStatus.IMPROVED
            if progress is not None:
                progress(result.cg_iterations, start, result.loss_end)
        if sweep and result.loss_end > config.pass_ratio * best_before:
            break
    return result
