"""Which parameters of a test are for ``make test``, which ends within minutes."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """All of the values as parameters of a test; those that are not among the ``quick`` ones for ``make test-all``."""
    return [value if value in quick else slow(value) for value in values]


def slow(value: Any) -> Any:
    """A parameter, or a tuple of several, for ``make test-all``."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
