"""Adapters: where an architecture's layers and K-step operations are, one file a family."""

from .base import Chain, Group, Operation, State, build_chain, logits_of, register, supported
from .frozen import frozen


__all__ = ["Chain", "Group", "Operation", "State", "build_chain", "frozen", "logits_of", "register", "supported"]
