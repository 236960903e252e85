"""Hutchinson's estimate of the diagonal H of the Hessian from Rademacher vectors: HD (H itself), HP (½θ²H), HTS
(|θ·g + ½θ²H|), as the Fisher's FD, FP and FTS; of the task loss, or, under the names that end in -kstep, of each
layer's K-step loss (Eq. 3), which needs no labels.

Of the task loss H = E[v ⊙ Hv] (Bekas, Kokiopoulou and Saad, 2007); where it curves downwards HD and HP are negative,
and such weights go first. Of the K-step loss the Hessian at the dense weights is JᵀCJ, so H = E[(Jᵀ√C u)²] with u on
the outputs (Martens, Sutskever and Swersky, 2012): never negative, and the error of an entry at most √2/√probes of the
entry itself, where that of v ⊙ Hv grows with its whole row of the Hessian. The gradient is zero there, so HTS-kstep
ranks as HP-kstep does.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import grad

from ...method.newton import Expansion
from ..evidence import Evidence, Linearisation
from .base import Choice, Score


PROBES = 16
"""Random vectors per batch of images. The error falls as 1/√probes."""

Diagonal = tuple[Tensor, Tensor, Tensor]
"""Gradient g (m,), estimated diagonal H (m,), variance of that estimate (m,)."""

Batch = tuple[float, Tensor, Callable[[], Tensor]]
"""Share of all images, gradient (m,), and a draw: an unbiased estimate of the diagonal (m,) from one random vector."""


def estimate(batches: Iterable[Batch], probes: int) -> Diagonal:
    """H of Σ share · loss over batches, each with its own probes.

    The variance of the mean of independent probes is theirs over their number; between batches shares enter squared.
    """
    g = H = variance = torch.zeros(())
    for share, gradient, draw in batches:
        mean, squares = torch.zeros_like(gradient), torch.zeros_like(gradient)
        for i in range(1, probes + 1):
            new = draw() - mean  # Welford: one pass, no cancellation
            mean += new / i
            squares += new.square() * (i - 1) / i
        g, H = g.to(mean) + share * gradient, H.to(mean) + share * mean
        variance = variance.to(mean) + share**2 * squares / (probes * max(probes - 1, 1))
    return g, H, variance


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1, drawn on the CPU, so that a seed means the same probes on every device."""
    return (2 * torch.randint(2, like.shape, generator=generator, dtype=torch.int8) - 1).to(like)


def on_task_loss(evidence: Evidence, probes: int = PROBES) -> Diagonal:
    """Over all weights at once."""
    generator = torch.Generator().manual_seed(evidence.config.seed)

    def draw(expansion: Expansion) -> Tensor:
        v = rademacher(expansion.gradient, generator)
        return v * expansion.product(v)

    return estimate(((share, e.gradient, partial(draw, e)) for share, e in evidence.task()), probes)


def on_k_step_loss(evidence: Evidence, probes: int = PROBES) -> Diagonal:
    """Every group by its own K-step loss."""
    generator = torch.Generator().manual_seed(evidence.config.seed)

    def draw(batch: Linearisation) -> Tensor:
        u = [curvature**0.5 * rademacher(output, generator) for curvature, output in batch.outputs]
        return grad([output for _, output in batch.outputs], batch.w, u, retain_graph=True)[0].square()

    parts: dict[str, list[Tensor]] = {}
    for active, linearisations in evidence.k_step():
        batches = ((batch.share, torch.zeros_like(batch.w), partial(draw, batch)) for batch in linearisations)
        for kind in estimate(batches, probes):
            for name, part in active.scatter(kind.detach()).items():
                parts.setdefault(name, []).append(part)
    g, H, variance = (evidence.everything.gather({n: p[i] for n, p in parts.items()}) for i in range(3))
    return g, H, variance


Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def scored(diagonal: Callable[[Evidence], Diagonal], formula: Formula, evidence: Evidence) -> Choice:
    """Masks and scores by a formula, θ, g, H (m,) → scores (m,), and how far off the diagonal in it may be."""
    g, H, variance = diagonal(evidence)
    scores = evidence.everything.scatter(formula(evidence.theta(), g, H))
    error = float(variance.sum().sqrt() / H.norm().clamp_min(1e-30))
    facts = {"probes": PROBES, "variance": float(variance.mean()), "relative_error": error}
    return Choice(evidence.ranked(scores), facts=facts, scores=scores)


def _both(formula: Formula) -> tuple[Score, Score]:
    """A criterion on the task loss, and the same on the K-step loss."""
    return partial(scored, on_task_loss, formula), partial(scored, on_k_step_loss, formula)


hd, hd_kstep = _both(lambda theta, g, H: H)
hp, hp_kstep = _both(lambda theta, g, H: theta.square() / 2 * H)
hts, hts_kstep = _both(lambda theta, g, H: (theta * g + theta.square() / 2 * H).abs())
