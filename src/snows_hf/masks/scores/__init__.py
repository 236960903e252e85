"""Mask criteria, one per file, each with a row in :data:`snows_hf.masks.criteria.CRITERIA`.

A criterion maps evidence (weights, network, images, labels) to scores of the weights' shapes; the highest stay.
"""

from pkgutil import resolve_name

from ..criteria import find_criterion
from .base import Choice, Score


def criterion(name: str) -> Score:
    """The function of the criterion of that name.

    Raises:
        ConfigError: there is none.
    """
    found: Score = resolve_name(f"{__name__}.{find_criterion(name).function}")
    return found


__all__ = ["Choice", "Score", "criterion"]
