"""Patterns, criteria and masks."""

from .choose import Masks, choose, choose_masks, load_masks, split_by_fit
from .evidence import Evidence
from .pattern import NM, Pattern, PerLayer, Unstructured, parse_candidates, parse_pattern
from .scores import Choice


__all__ = [
    "NM",
    "Choice",
    "Evidence",
    "Masks",
    "Pattern",
    "PerLayer",
    "Unstructured",
    "choose",
    "choose_masks",
    "load_masks",
    "parse_candidates",
    "parse_pattern",
    "split_by_fit",
]
