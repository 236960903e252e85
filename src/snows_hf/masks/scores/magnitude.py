"""Magnitude: |w|. The paper's masks."""

from collections.abc import Mapping

from torch import Tensor

from .base import register_criterion


@register_criterion("magnitude")
def magnitude(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.abs() for name, weight in weights.items()}
