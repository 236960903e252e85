"""Gradient norm: |g|, with g the gradient of the task loss over the calibration images."""

from torch import Tensor

from ..evidence import Evidence


def grad_norm(evidence: Evidence) -> dict[str, Tensor]:
    return evidence.everything.scatter(evidence.gradient().abs())
