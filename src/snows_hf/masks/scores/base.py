"""The registry of mask criteria."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ..evidence import Evidence


@dataclass(frozen=True)
class Choice:
    """What a criterion decided.

    Attributes:
        masks: parameter name → bool mask (True: kept) of the parameter's shape.
        weights: full weights, zero where masked, of a criterion that updates what it keeps; empty for the others.
        facts: what the report should say about how it was decided.
    """

    masks: dict[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


Criterion = Callable[[Evidence], dict[str, Tensor] | Choice]
"""Evidence → scores by parameter name, of the weights' shapes, of which the pattern keeps the highest; or a whole
:class:`Choice`, where a criterion makes its masks itself."""

_CRITERIA: dict[str, Criterion] = {}
_LABELLED: set[str] = set()


def register_criterion(name: str, labels: bool = False) -> Callable[[Criterion], Criterion]:
    """Decorator that makes a criterion selectable as ``--mask name``; ``labels``: it needs those of the images."""

    def add(function: Criterion) -> Criterion:
        _CRITERIA[name] = function
        if labels:
            _LABELLED.add(name)
        return function

    return add


def criteria() -> list[str]:
    """Names of all criteria."""
    return sorted(_CRITERIA)


def needs_labels(name: str) -> bool:
    """Whether a criterion reads the labels of the calibration images."""
    return name in _LABELLED


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _CRITERIA:
        raise ConfigError(
            f"Mask criterion {name!r}: expected one of {', '.join(criteria())}, or a safetensors file of booleans."
        )
    return _CRITERIA[name]
