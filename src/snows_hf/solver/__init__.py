"""Algorithms 1 and 2: conjugate gradients and stochastic Newton, blind to networks."""

from .cg import CGResult, CGStatus, cg
from .newton import Expansion, NewtonResult, NewtonState, NewtonStatus, Objective, newton


__all__ = [
    "CGResult",
    "CGStatus",
    "Expansion",
    "NewtonResult",
    "NewtonState",
    "NewtonStatus",
    "Objective",
    "cg",
    "newton",
]
