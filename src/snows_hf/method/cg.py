"""Algorithm 1: conjugate gradients for one Newton direction, from curvature products alone.

Knows vectors and one callable; no network, no mask. The vectors hold the active weights only, so the system solved
is the reduced one of Eq. 9/10, of size m.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class CGStatus(StrEnum):
    """Why conjugate gradients stopped."""

    CONVERGED = "converged"
    STALLED = "stalled"
    MAX_ITER = "max_iter"
    NEGATIVE_CURVATURE = "negative_curvature"
    NON_FINITE = "non_finite"


@dataclass(frozen=True)
class CGResult:
    """Direction ``delta`` (m,), why the iteration stopped, how many products it took, and the final ‖r‖/‖g‖."""

    delta: Tensor
    status: CGStatus
    iterations: int
    residual: float


def cg(
    product: Callable[[Tensor], Tensor],
    g: Tensor,
    *,
    damping: float = 1e-4,
    rtol: float = 1e-3,
    atol: float = 0.0,
    max_iter: int = 100,
    stall: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> CGResult:
    """Solves ``(H + λI) δ = -g`` (Eq. 10) without forming H.

    Args:
        product: ``p -> H p`` for vectors of shape (m,).
        g: gradient on the active weights, shape (m,).
        damping: λ of Eq. 10 (Table 7: 1e-4).
        rtol: stop when ‖r‖ ≤ rtol·‖g‖. The paper tests ‖r‖ < tol, absolutely; a relative test does not depend on how
            the loss is scaled.
        atol: stop when ‖r‖ ≤ atol: the paper's test.
        max_iter: most products to spend.
        stall: stop once the quadratic model's decrease over the last ten per cent of the iterations (ten at least) is
            below ``stall`` times its whole decrease per iteration (Martens 2010, section 4.4); 0 switches it off.
        preconditioner: r -> M⁻¹ r for some M close to H + λI, symmetric and positive definite; None is the paper's. It
            may be an iteration itself, and not quite linear: directions are made conjugate by what r has changed by
            (Polak and Ribière; Golub and Ye, 1999), which is the same where it is linear.

    Returns:
        The last iterate. Directions of negative curvature end the iteration: the iterate before them is returned, or
        the (preconditioned) negative gradient when it is the first direction that turns out so.
    """
    precondition = preconditioner or (lambda r: r)
    delta, r = g.new_zeros(g.shape), -g
    p = z = precondition(r)
    rz = r @ z
    g_norm = g.norm()
    stop_at = max(atol, rtol * float(g_norm))
    q: list[float] = []  # the quadratic model after each iteration
    status, iteration = CGStatus.MAX_ITER, 0

    def result() -> CGResult:
        return CGResult(delta, status, iteration, float(r.norm() / g_norm) if g_norm > 0 else 0.0)

    if float(g_norm) <= stop_at:
        status = CGStatus.CONVERGED
        return result()
    for iteration in range(1, max_iter + 1):
        Bp = product(p) + damping * p
        curvature = float(p @ Bp)
        if not math.isfinite(curvature):
            status = CGStatus.NON_FINITE
            break
        if curvature <= 0:
            status = CGStatus.NEGATIVE_CURVATURE
            if iteration == 1:
                delta = z
            break
        eta = rz / curvature
        delta = delta + eta * p
        before, r = r, r - eta * Bp
        if float(r.norm()) <= stop_at:
            status = CGStatus.CONVERGED
            break
        # q(δ) = ½ δᵀ(H + λI)δ + gᵀδ = ½ δᵀ(g - r), since r = -g - (H + λI)δ.
        q.append(0.5 * float(delta @ (g - r)))
        window = max(10, iteration // 10)
        if stall and iteration > window and q[-1] - q[-1 - window] > window * stall * q[-1]:
            status = CGStatus.STALLED
            break
        z = precondition(r)
        gamma = ((r - before) @ z) / rz
        p, rz = z + gamma * p, r @ z
    return result()
