"""Hutchinson's estimate of the diagonal H of the Hessian, E[v ⊙ Hv] for Rademacher vectors v (Bekas, Kokiopoulou and
Saad, 2007): HD (H itself), HP (½θ²H), HTS (|θ·g + ½θ²H|), as the Fisher's FD, FP and FTS; of the task loss, or, under
the names that end in -kstep, of each layer's K-step loss (Eq. 3), which needs no labels.

At the dense weights the K-step loss has no gradient, so HTS-kstep ranks as HP-kstep does. Where the task loss curves
downwards HD and HP are negative, and such weights go first.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...solver.newton import Expansion
from ..evidence import Evidence
from .base import Choice, register_criterion


PROBES = 16
"""Vectors v per batch of images. The error falls as 1/√probes."""


Diagonal = tuple[Tensor, Tensor, Tensor]
"""Gradient g (m,), estimated diagonal H (m,), variance of that estimate (m,)."""


def estimate(batches: Iterable[tuple[float, Expansion]], probes: int, generator: torch.Generator) -> Diagonal:
    """H of Σ share · loss over batches, each with its own probes.

    The variance of the mean of independent probes is theirs over their number; between batches shares enter squared.
    """
    g = H = variance = torch.zeros(())
    for share, expansion in batches:
        m = expansion.gradient
        mean, squares = torch.zeros_like(m), torch.zeros_like(m)
        for i in range(1, probes + 1):
            # On the CPU, so that a seed means the same probes on every device.
            v = (2 * torch.randint(2, m.shape, generator=generator) - 1).to(m)
            new = v * expansion.product(v) - mean  # Welford: one pass, no cancellation
            mean += new / i
            squares += new.square() * (i - 1) / i
        g, H = g.to(m) + share * m, H.to(m) + share * mean
        variance = variance.to(m) + share**2 * squares / (probes * max(probes - 1, 1))
    return g, H, variance


def on_task_loss(evidence: Evidence, probes: int = PROBES) -> Diagonal:
    """Over all weights at once."""
    return estimate(evidence.task(), probes, torch.Generator().manual_seed(evidence.config.seed))


def on_k_step_loss(evidence: Evidence, probes: int = PROBES) -> Diagonal:
    """Every group by its own K-step loss."""
    generator = torch.Generator().manual_seed(evidence.config.seed)
    parts: dict[str, list[Tensor]] = {}
    for active, batches in evidence.k_step():
        for kind in map(active.scatter, estimate(batches, probes, generator)):
            for name, part in kind.items():
                parts.setdefault(name, []).append(part)
    g, H, variance = (evidence.everything.gather({n: p[i] for n, p in parts.items()}) for i in range(3))
    return g, H, variance


def _score(name: str, score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def criterion(evidence: Evidence, diagonal: Callable[[Evidence], Diagonal]) -> Choice:
        g, H, variance = diagonal(evidence)
        scores = evidence.everything.scatter(score(evidence.theta(), g, H))
        error = float(variance.sum().sqrt() / H.norm().clamp_min(1e-30))
        facts = {"probes": PROBES, "variance": float(variance.mean()), "relative_error": error}
        return Choice(evidence.ranked(scores), facts=facts)

    register_criterion(name, labels=True)(lambda evidence: criterion(evidence, on_task_loss))
    register_criterion(f"{name}-kstep")(lambda evidence: criterion(evidence, on_k_step_loss))


_score("hd", lambda theta, g, H: H)
_score("hp", lambda theta, g, H: theta.square() / 2 * H)
_score("hts", lambda theta, g, H: (theta * g + theta.square() / 2 * H).abs())
