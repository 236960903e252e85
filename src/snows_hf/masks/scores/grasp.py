"""GraSP: −θ·Hg, half of what the squared norm of the gradient gains when a weight goes (Wang et al., 2020, Eq. 8).

Weights whose removal hurts the gradient flow most stay, so the score, highest kept, is θ·Hg. The task loss is taken
without the temperature that the authors' code divides the logits by. Made for untrained networks: at the end of
training g is next to nothing.
"""

import torch
from torch import Tensor

from ..evidence import Evidence


def grasp(evidence: Evidence) -> dict[str, Tensor]:
    g = evidence.gradient()
    Hg = sum((share * expansion.product(g) for share, expansion in evidence.task()), torch.zeros_like(g))
    return evidence.everything.scatter(evidence.theta() * Hg)
