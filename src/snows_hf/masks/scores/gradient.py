"""Criteria by the gradient g of the task loss over the calibration images.

Gradient norm: |g|. SNIP: |θ·g|, the change of the loss to first order (Lee et al., 2019, Eq. 6; it normalises by the
sum, which ranks the same). GraSP: θ·Hg, half of what the squared norm of the gradient loses when a weight goes, which
keeps the weights whose removal hurts the gradient flow most (Wang et al., 2020, Eq. 8); without the temperature that
the authors' code divides the logits by, and made for untrained networks: at the end of training g is next to nothing.
"""

import torch
from torch import Tensor

from ..evidence import Evidence


def grad_norm(evidence: Evidence) -> dict[str, Tensor]:
    return evidence.everything.scatter(evidence.gradient().abs())


def snip(evidence: Evidence) -> dict[str, Tensor]:
    return evidence.everything.scatter((evidence.theta() * evidence.gradient()).abs())


def grasp(evidence: Evidence) -> dict[str, Tensor]:
    g = evidence.gradient()
    Hg = sum((share * expansion.product(g) for share, expansion in evidence.task()), torch.zeros_like(g))
    return evidence.everything.scatter(evidence.theta() * Hg)
