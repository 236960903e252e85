"""Adapters: where an architecture's layers and K-step operations are, one file a family."""

from .base import Chain, Group, Operation, State, build_chain, register, supported
from .frozen import frozen
from .outputs import logits_of, outputs_of


__all__ = [
    "Chain",
    "Group",
    "Operation",
    "State",
    "build_chain",
    "frozen",
    "logits_of",
    "outputs_of",
    "register",
    "supported",
]
