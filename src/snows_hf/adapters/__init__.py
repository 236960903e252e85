"""Adapters: where a model's layers and K-step operations are, read off its own graph."""

from .base import Chain, Group, Operation, State, build_chain, register
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
]
