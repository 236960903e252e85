"""Mask criteria, one per file. Importing this package registers every file in it.

A criterion maps evidence (weights, network, images, labels) to scores of the weights' shapes; the highest stay.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import Choice, Criterion, criteria, criterion, needs_labels, register_criterion


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Choice", "Criterion", "criteria", "criterion", "needs_labels", "register_criterion"]
