"""Magnitude: |θ|. The paper's masks."""

from torch import Tensor

from ..evidence import Evidence


def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    return {name: weight.abs() for name, weight in evidence.weights.items()}
