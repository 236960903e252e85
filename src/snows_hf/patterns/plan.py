"""What the pattern and the settings beside it ask for: one pattern for all layers, or candidates for each."""

from collections.abc import Sequence
from dataclasses import replace

from ..errors import ConfigError
from ..settings import PruneConfig, TrainConfig
from .pattern import NM, Full, Pattern, Unstructured, parse_candidates, parse_pattern, split_structures


DENSITIES = (0.25, 0.5, 1.0, 1.5, 2.5)
"""Candidates around an unstructured sparsity, as multiples of the share of weights that it keeps."""

MOST_KEPT = 0.95
"""The share that the last candidate keeps; beyond it there is only dense."""

Candidate = NM | Unstructured | Full | None


def by_sensitivity(config: PruneConfig) -> bool:
    """Whether patterns are chosen layer by layer.

    Raises:
        ConfigError: pattern, allocation, sparsity, budget and mask do not go together.
        PatternError: no pattern.
    """
    candidates = parse_candidates(config.pattern)
    several = len(candidates) > 1
    shared_out = config.allocation == "sensitivity"
    units = shared_out and bool(split_structures(config.pattern)[0])  # may be what is shared out (unit_budget.py)
    wanted = several or (shared_out and (not units or isinstance(candidates[0], Unstructured)))
    if several and config.allocation == "uniform":
        raise ConfigError(f"Allocation 'uniform' takes one pattern, not {config.pattern!r}.", "Leave it out.")
    if several and any(isinstance(candidate, Unstructured) for candidate in candidates):
        raise ConfigError(
            f"Pattern {config.pattern!r}: a set may hold N:M patterns and 'dense' alone.",
            "For sparsities of each layer's own, give the total, as in --pattern 0.8 --allocation sensitivity.",
        )
    if several and not config.sparsity:
        raise ConfigError(
            f"Pattern {config.pattern!r}: how many zeros all layers together should have is not said.",
            "Add --sparsity 0.65, for example.",
        )
    sparsest = max((candidate.sparsity for candidate in candidates if candidate is not None), default=0.0)
    if several and config.sparsity > sparsest:
        raise ConfigError(
            f"Sparsity {config.sparsity:g}: all layers at the sparsest of {config.pattern!r} have {sparsest:g}.",
            "Give a lower sparsity, or sparser patterns to choose from.",
        )
    if not several and config.sparsity:
        raise ConfigError(
            f"Sparsity {config.sparsity:g} goes with a set of patterns, as 1:4,2:4,dense; {config.pattern!r} says it."
        )
    if not several and wanted and not isinstance(candidates[0], Unstructured):
        raise ConfigError(
            f"Allocation 'sensitivity' has nothing to choose with pattern {config.pattern}.",
            "Give a set, as in --pattern 1:4,2:4,dense --sparsity 0.65.",
        )
    if config.budget != "weights" and not (wanted or units):
        raise ConfigError(f"Budget {config.budget!r} goes with --allocation sensitivity.")
    if wanted and config.mask.endswith(".safetensors"):
        raise ConfigError("A mask file has decided already how sparse each layer is.", "Leave out one of the two.")
    return wanted


def candidates_of(config: PruneConfig) -> list[Candidate]:
    """What layers are measured under: the set that the pattern names, or sparsities around an unstructured one."""
    candidates = parse_candidates(config.pattern)
    if not isinstance(candidates[0], Unstructured) or len(candidates) > 1:
        return [replace(c, scope="layer") if isinstance(c, Unstructured) else c for c in candidates]
    density = 1 - candidates[0].sparsity
    kept = [density * factor for factor in DENSITIES if density * factor < MOST_KEPT]
    return [Unstructured(round(1 - share, 12), "layer") for share in (*kept, MOST_KEPT)]


def one_pattern(config: PruneConfig) -> NM | Unstructured | Full:
    """The pattern of all layers, where it is one; unstructured, as the allocation wants it shared out."""
    pattern = parse_pattern(config.pattern)
    scope = "layer" if config.allocation == "uniform" else "global"
    return replace(pattern, scope=scope) if isinstance(pattern, Unstructured) else pattern


def layer_patterns(config: PruneConfig) -> list[Candidate]:
    """The patterns that a layer may have: :func:`candidates_of` where that is to be chosen, else the one of all.

    Raises:
        ConfigError: as :func:`by_sensitivity`.
    """
    return candidates_of(config) if by_sensitivity(config) else [one_pattern(config)]


def order_for(config: PruneConfig, candidates: Sequence[Candidate]) -> NM | None:
    """The N:M that channels are put in order for, the sparsest where layers may have several; None where they keep
    their order.

    Raises:
        ConfigError: an order was asked for where there is no N:M, or groups are of different sizes, or the masks come
            from a file.
    """
    patterns = [candidate for candidate in candidates if candidate is not None]
    several = [pattern for pattern in patterns if isinstance(pattern, NM)]
    sparsest = max(several, key=lambda pattern: pattern.sparsity, default=None)
    fits = sparsest is not None and len(several) == len(patterns) and len({pattern.m for pattern in several}) == 1
    from_file = config.mask.endswith(".safetensors")
    if not config.permute:
        alone = config.permute is None and fits and len(candidates) == 1 and not from_file
        return sparsest if alone and sparsest is not None and sparsest.relaxed() is not None else None
    if not fits:
        names = ", ".join(map(str, patterns))
        raise ConfigError(f"Channels cannot be ordered for {names}: expected N:M, all of one M.", "Leave out permute.")
    if from_file:
        raise ConfigError(
            f"Masks from a file ({config.mask}) are for the channels as they are, not for another order.",
            "Leave out permute.",
        )
    return sparsest


def at_initialisation(pattern: str, config: TrainConfig) -> Pattern:
    """The pattern, unstructured with all layers ranked together as the paper has it, up to the layer cap.

    Raises:
        PatternError: no pattern, or a cap below its sparsity.
    """
    chosen = parse_pattern(pattern)
    if not isinstance(chosen, Unstructured):
        return chosen
    if config.allocation == "uniform":
        return replace(chosen, scope="layer")
    return replace(chosen, layer_cap=config.layer_cap)
