"""Algorithm 2: stochastic Newton descent on the active weights of one layer, with the Armijo rule of A.1.3.

Knows objectives only through :class:`Objective`: a value, and a second-order expansion (Eq. 7).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, repeat
from typing import Protocol

import torch
from torch import Tensor

from ..settings import SolverConfig
from .cg import CGResult, CGStatus, cg


@dataclass(frozen=True)
class Expansion:
    """Eq. 7 around one point: loss ``value``, ``gradient`` (m,), and ``product``: p -> H p for p of shape (m,).

    ``preconditioner``: r -> M⁻¹ r with M close to H, or None.
    """

    value: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    preconditioner: Callable[[Tensor], Tensor] | None = None


class Objective(Protocol):
    """The K-step loss of one batch (Eq. 6), as a function of the active weights w (m,)."""

    def value(self, w: Tensor) -> float: ...

    def expand(self, w: Tensor) -> Expansion: ...


class NewtonStatus(StrEnum):
    """How a layer's optimisation ended."""

    IMPROVED = "improved"
    NOT_IMPROVED = "not_improved"
    THINNED_OUT = "thinned_out"
    NON_FINITE = "non_finite"

    @property
    def remedy(self) -> str:
        return {
            "not_improved": "No step of its own lowered the held-out loss. Use more images, or a larger damping.",
            "non_finite": "The loss or a product was not finite: the best finite weights were kept. Use --dtype "
            "float32, or a larger damping.",
        }.get(self.value, "")


@dataclass
class NewtonResult:
    """Best weights seen (m,), how the run ended, and its counts.

    ``loss_start`` and ``loss_end`` are held-out losses, ``losses`` the lowest so far after each step;
    ``cg_iterations`` counts curvature products.
    """

    w: Tensor
    status: NewtonStatus
    loss_start: float
    loss_end: float
    steps: int = 0
    rejected: int = 0
    cg_iterations: int = 0
    cg_statuses: list[CGStatus] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass
class NewtonState:
    """All that the next step depends on, besides its batch: iterate ``w`` (m,), the iterates' running ``mean`` (m,),
    the ``result`` so far, and patience's counters. A run that gets it continues as if it had never ended."""

    w: Tensor
    mean: Tensor
    result: NewtonResult
    milestone: float
    stale: int = 0

    @classmethod
    def start(cls, w: Tensor, loss: float, status: NewtonStatus = NewtonStatus.NOT_IMPROVED) -> "NewtonState":
        """Before the first step, from w (m,) with its held-out loss; ``status`` is what the run ends with unless more
        can be said of it."""
        return cls(w, w, NewtonResult(w, status, loss, loss), milestone=loss)


def armijo(
    value: Callable[[Tensor], float], w: Tensor, delta: Tensor, loss: float, slope: float, config: SolverConfig
) -> float:
    """Largest α ≤ 1 of a backtracking sequence with L(w + αδ) ≤ L(w) + αβ δᵀg (A.1.3), on one and the same batch; 0
    where no step of the sequence qualifies."""
    alpha = 1.0
    for _ in range(config.max_backtracks + 1):
        if value(w + alpha * delta) <= loss + alpha * config.beta * slope:
            return alpha
        alpha *= config.backtrack
    return 0.0


@dataclass(frozen=True)
class Step:
    """One Newton step: weights ``w`` (m,) after it, α (0 where it was rejected, and w is what it was), direction, and
    the preconditioner, which outlives the graphs that made it."""

    w: Tensor
    alpha: float
    direction: CGResult
    preconditioner: Callable[[Tensor], Tensor] | None


def step_along(direction: CGResult, batch: Objective, w: Tensor, local: Expansion, config: SolverConfig) -> Step:
    """The step from w (m,) as far along a direction as the Armijo rule allows; rejected where the loss would rise."""
    slope = float(direction.delta @ local.gradient)
    alpha = armijo(batch.value, w, direction.delta, local.value, slope, config) if slope < 0 else 0.0
    return Step(w + alpha * direction.delta if alpha else w, alpha, direction, local.preconditioner)


def newton_step(batch: Objective, w: Tensor, config: SolverConfig) -> Step | None:
    """One step of Algorithm 2 from w (m,) on one batch; None where loss or gradient are not finite."""
    local = batch.expand(w)
    if not math.isfinite(local.value) or not torch.isfinite(local.gradient).all():
        return None
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
    return step_along(direction, batch, w, local, config)


def newton(
    batches: Iterable[Objective],
    held_out: Objective,
    w: Tensor,
    config: SolverConfig,
    progress: Callable[[NewtonState], None] | None = None,
    state: NewtonState | None = None,
) -> NewtonResult:
    """Minimises the mean of ``batches`` from w by one Newton step per batch and pass.

    The weights returned are the best by the ``held_out`` loss: of the start, so that a layer never comes out worse
    than it came in, of all iterates and, with ``average``, of their running mean, which has less of the batches'
    noise: the plain mean of the first ``average`` iterates, and from then on an exponential one. The run ends early
    once ``patience`` steps in a row have brought less than ``min_gain`` together.

    Args:
        batches: one objective per mini-batch, at least one; iterated once per pass.
        held_out: objective on images that no batch holds.
        w: active weights to start from, (m,).
        progress: called after each step, with where the run is; it changes in the next.
        state: where an earlier run was; ``w`` is not read then, and ``batches`` are those that it had left.
    """
    if state is None:
        state = NewtonState.start(w, held_out.value(w))
    w, result = state.w, state.result
    if not math.isfinite(result.loss_start):
        result.status = NewtonStatus.NON_FINITE
    if not math.isfinite(result.loss_start) or state.stale >= config.patience:
        return result
    for batch in chain.from_iterable(repeat(batches, config.passes)):
        step = newton_step(batch, w, config)
        if step is None:
            result.status = NewtonStatus.NON_FINITE
            break
        w = step.w
        result.steps += 1
        result.cg_iterations += step.direction.iterations
        result.cg_statuses.append(step.direction.status)
        if step.alpha == 0.0:
            result.rejected += 1
        else:
            taken = result.steps - result.rejected
            state.mean = state.mean + (w - state.mean) / min(taken, config.average) if config.average else w
            for candidate in (w, state.mean) if config.average and taken > 1 else (w,):
                loss = held_out.value(candidate)
                if loss < result.loss_end:
                    result.w, result.loss_end, result.status = candidate, loss, NewtonStatus.IMPROVED
        result.losses.append(result.loss_end)
        if result.loss_end < (1 - config.min_gain) * state.milestone:
            state.milestone, state.stale = result.loss_end, 0
        else:
            state.stale += 1
        state.w = w
        del step  # its preconditioner, before the next one is made
        if progress is not None:
            progress(state)
        if state.stale >= config.patience:
            break
    if result.status is NewtonStatus.NOT_IMPROVED and CGStatus.NON_FINITE in result.cg_statuses:
        result.status = NewtonStatus.NON_FINITE
    return result
