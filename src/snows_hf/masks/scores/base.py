"""The registry of mask criteria."""

from collections.abc import Callable, Mapping

from torch import Tensor

from ...errors import ConfigError


Criterion = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Weights by parameter name → scores of the same shapes, highest kept."""

_CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Decorator that makes a criterion selectable as ``--mask name``."""

    def add(function: Criterion) -> Criterion:
        _CRITERIA[name] = function
        return function

    return add


def criteria() -> list[str]:
    """Names of all criteria."""
    return sorted(_CRITERIA)


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
