"""Algorithms 1 and 2: conjugate gradients and stochastic Newton; Adam. All blind to networks."""

from .adam import adam
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
    "adam",
    "cg",
    "newton",
]
