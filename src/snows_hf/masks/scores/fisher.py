"""The diagonal F of the empirical Fisher matrix, F = (1/n) Σ gᵢ², with gᵢ the task loss's gradient at image i and its
own label: FD (F itself), FP (½θ²F), FTS (|θ·g + ½θ²F|), the criteria of Gollini Navarrete et al., "What Scalable
Second-Order Information Knows for Pruning at Initialization".

FTS has the signs of that paper; a Taylor expansion of the loss at the removal θ → 0 would have −θ·g.
"""

import torch
from torch import Tensor

from ..evidence import Evidence


def fisher(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Gradient g (m,) of the task loss and Fisher diagonal F (m,), from one backward pass per image."""
    g, F = torch.zeros(2, evidence.everything.size)
    for share, expansion in evidence.task(size=1):
        g = g.to(expansion.gradient) + share * expansion.gradient
        F = F.to(expansion.gradient) + share * expansion.gradient.square()
    return g, F


def fd(evidence: Evidence) -> dict[str, Tensor]:
    return evidence.everything.scatter(fisher(evidence)[1])


def fp(evidence: Evidence) -> dict[str, Tensor]:
    return evidence.everything.scatter(evidence.theta().square() / 2 * fisher(evidence)[1])


def fts(evidence: Evidence) -> dict[str, Tensor]:
    (g, F), theta = fisher(evidence), evidence.theta()
    return evidence.everything.scatter((theta * g + theta.square() / 2 * F).abs())
