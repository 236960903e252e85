"""Adapters: where an architecture's layers and K-step operations are. Importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Chain, Group, Operation, State, build_chain, register, supported
from .frozen import frozen
from .vit import recorded_attention


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Chain",
    "Group",
    "Operation",
    "State",
    "build_chain",
    "frozen",
    "recorded_attention",
    "register",
    "supported",
]
