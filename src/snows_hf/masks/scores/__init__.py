"""Mask criteria, one per file. Importing this package registers every file in it.

A criterion maps weights to scores of the same shapes; the highest scores stay.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import Criterion, criteria, criterion, register_criterion


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Criterion", "criteria", "criterion", "register_criterion"]
