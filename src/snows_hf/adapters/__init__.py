"""Adapters: where an architecture's layers and K-step operations are. Importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Chain, Group, Operation, State, build_chain, register, supported
from .frozen import frozen
from .offload import Logits, offloaded
from .vit import recorded_attention


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Chain",
    "Group",
    "Logits",
    "Operation",
    "State",
    "build_chain",
    "frozen",
    "offloaded",
    "recorded_attention",
    "register",
    "supported",
]
