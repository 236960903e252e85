"""Patterns, criteria and masks."""

from .choose import Masks, choose_masks, load_masks, split_by_fit
from .pattern import NM, Pattern, Unstructured, parse_pattern


__all__ = ["NM", "Masks", "Pattern", "Unstructured", "choose_masks", "load_masks", "parse_pattern", "split_by_fit"]
