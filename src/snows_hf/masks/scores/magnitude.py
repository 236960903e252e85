"""Magnitude: |θ|. The paper's masks."""

from torch import Tensor

from ..evidence import Evidence
from .base import register_criterion


@register_criterion("magnitude")
def magnitude(evidence: Evidence) -> dict[str, Tensor]:
    return {name: weight.abs() for name, weight in evidence.weights.items()}
