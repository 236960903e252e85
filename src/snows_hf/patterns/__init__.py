"""Sparsity patterns: N:M, a share of zeros, or one of these for each layer."""

from .pattern import NM, Full, Masks, Pattern, PerLayer, Unstructured, parse_candidates, parse_pattern
from .structure import STRUCTURES, split_structures


__all__ = [
    "NM",
    "STRUCTURES",
    "Full",
    "Masks",
    "Pattern",
    "PerLayer",
    "Unstructured",
    "parse_candidates",
    "parse_pattern",
    "split_structures",
]  # fmt: skip
