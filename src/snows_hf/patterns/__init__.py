"""Sparsity patterns: N:M, a share of zeros, or one of these for each layer."""

from .pattern import NM, Masks, Pattern, PerLayer, Unstructured, parse_candidates, parse_pattern


__all__ = ["NM", "Masks", "Pattern", "PerLayer", "Unstructured", "parse_candidates", "parse_pattern"]
