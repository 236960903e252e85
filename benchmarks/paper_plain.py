"""The paper's algorithm for one layer, written plainly: the baseline that the solver is measured against.

Exact Hessian products of the whole batch by double backward, conjugate gradients from zero without a preconditioner
(absolute tolerance), a line search by tenths, several passes (Algorithms 1 and 2, A.1.3, Table 7). It shares with the
package the segment and the loss, and nothing of the solver.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad


Loss = Callable[[Tensor], Tensor]
"""Active weights (m,) → loss of one batch, differentiable."""


@dataclass(frozen=True)
class PlainSettings:
    """Table 7 and A.1.3; ``cnn`` and ``vit`` are the paper's."""

    tolerance: float
    most_products: int
    passes: int
    damping: float = 1e-4


CNN = PlainSettings(tolerance=1e-3, most_products=1000, passes=3)
VIT = PlainSettings(tolerance=5e-4, most_products=500, passes=1)


@dataclass
class PlainResult:
    """Weights (m,), products and processor seconds spent, and whether the time limit cut the run off."""

    w: Tensor
    products: int
    seconds: float
    cut_off: bool


def plain_newton(batches: Sequence[Loss], w: Tensor, settings: PlainSettings, limit: float) -> PlainResult:
    """Minimises the batches' losses from ``w``; ends after ``limit`` seconds at the latest, within a system or not."""
    started, products, ratios = time.process_time(), 0, []

    def spent() -> float:
        return time.process_time() - started

    for loss_of in [batch for _ in range(settings.passes) for batch in batches]:
        w = w.detach().requires_grad_()
        loss = loss_of(w)
        (gradient,) = grad(loss, w, create_graph=True)
        g = gradient.detach()
        delta, r = torch.zeros_like(g), -g
        p, rr = r, r @ r
        for _ in range(settings.most_products):
            if rr.sqrt() < settings.tolerance or spent() > limit:
                break
            Hp = grad(gradient, w, p, retain_graph=True)[0] + settings.damping * p
            products += 1
            eta = rr / (p @ Hp)
            delta, r = delta + eta * p, r - eta * Hp
            rr_new = r @ r
            p, rr = r + (rr_new / rr) * p, rr_new
        w, alpha, slope, now = w.detach(), 1.0, float(g @ delta), float(loss.detach())
        with torch.no_grad():
            for _ in range(50):
                new = float(loss_of(w + alpha * delta))
                if new <= now + alpha * 1e-5 * slope:
                    w = w + alpha * delta
                    break
                alpha *= 0.9
        ratios.append(new / now)
        if spent() > limit:
            return PlainResult(w, products, spent(), cut_off=True)
        if len(ratios) >= 5 and min(ratios[-5:]) > 0.995:
            break
    return PlainResult(w, products, spent(), cut_off=False)
