"""Algorithms 1 and 2: conjugate gradients and stochastic Newton, blind to networks."""

from .cg import CGResult, CGStatus, cg
from .newton import Expansion, NewtonResult, NewtonState, NewtonStatus, Objective, Step, newton, newton_step


__all__ = [
    "CGResult",
    "CGStatus",
    "Expansion",
    "NewtonResult",
    "NewtonState",
    "NewtonStatus",
    "Objective",
    "Step",
    "cg",
    "newton",
    "newton_step",
]
