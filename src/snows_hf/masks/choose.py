"""From a pattern and a criterion, or a file, to one boolean mask per parameter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapters import Chain
from ..errors import MaskError, PatternError
from ..patterns import NM, Full, Masks, Pattern, Unstructured
from ..settings import PruneConfig
from .criteria import find_criterion
from .evidence import Evidence
from .scores.base import Choice, Score


def split_by_fit(weights: Mapping[str, Tensor], pattern: Pattern) -> tuple[list[str], list[str]]:
    """Names of the weights that the pattern fits, and of those that stay dense because it does not.

    Raises:
        PatternError: it fits none.
    """
    own = {name: pattern.of(name) for name in weights}
    fitting = [name for name, p in own.items() if p is not None and p.fits(weights[name].shape)]
    if not fitting:
        widths = sorted({weight.shape[1] for weight in weights.values()})
        raise PatternError(
            f"Pattern {pattern} fits no layer: the input widths are {', '.join(map(str, widths))}.",
            "Choose an M that divides them, or an unstructured sparsity such as 0.5.",
        )
    return fitting, [name for name in weights if name not in fitting]


def left_dense(chain: Chain, pattern: Pattern) -> dict[str, Tensor]:
    """The weights, by name, that a pattern does not fit, of layers after one that it fits."""
    weights = {name: chain.weight(name).detach() for _, group in chain.groups() for name in group.parameters}
    fitting, unfit = split_by_fit(weights, pattern)
    names = list(weights)
    later = names[min(map(names.index, fitting)) :]
    return {name: weights[name] for name in later if name in unfit}


def choose(evidence: Evidence) -> Choice:
    """Masks, and the weights of criteria that have an update of their own, for every weight that the pattern fits, by
    the criterion, or the safetensors file of booleans, that ``evidence.config.mask`` says.

    Raises:
        MaskError: a bad mask file, or the criterion needs what is not there.
        NumericsError: scores or inputs that are no numbers.
        PatternError: the pattern fits no weight.
    """
    fitting, _ = split_by_fit(evidence.weights, evidence.pattern)
    mask = evidence.config.mask
    if mask.endswith(".safetensors"):
        return Choice(load_masks(Path(mask), evidence.weights, evidence.pattern))
    evidence = replace(evidence, weights={name: evidence.weights[name].detach() for name in fitting})
    if isinstance(evidence.pattern, Full):
        return Choice(evidence.pattern.masks(dict(evidence.weights)))
    score: Score = resolve_name(f"{__package__}.scores.{find_criterion(mask).function}")
    found = score(evidence)
    return found if isinstance(found, Choice) else Choice(evidence.ranked(found))


def choose_masks(weights: Mapping[str, Tensor], pattern: Pattern, mask: str) -> Masks:
    """The masks of :func:`choose` by a criterion that needs no more than weights, or by a file."""
    return choose(Evidence(weights, pattern, PruneConfig(str(pattern), mask=mask))).masks


def load_masks(path: Path, weights: Mapping[str, Tensor], pattern: Pattern) -> Masks:
    """Masks from a safetensors file of booleans, keyed by live parameter names; weights that it omits stay dense.

    Raises:
        MaskError: unreadable file, unknown name, wrong type or shape, masks that break the pattern, or that are less
            sparse than it.
    """
    try:
        masks = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MaskError(f"Mask file {path} cannot be read: {error}.", "Expected a safetensors file.") from error
    for name, mask in masks.items():
        if name not in weights:
            raise MaskError(
                f"Mask file {path}: {name!r} is no prunable weight of this model.",
                "`snows-hf inspect MODEL` lists the names.",
            )
        if mask.dtype != torch.bool or mask.shape != weights[name].shape:
            raise MaskError(
                f"Mask file {path}: {name} is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
                f"{tuple(weights[name].shape)}."
            )
        own = pattern.of(name)
        if isinstance(own, NM) and not own.holds(mask):
            raise MaskError(f"Mask file {path}: {name} does not follow the pattern {own}.")
    if not masks:
        raise MaskError(f"Mask file {path} holds no mask.")
    if isinstance(pattern, Unstructured):
        zeros = 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        if zeros < pattern.sparsity - 0.001:
            asked = f"{pattern.sparsity:.1%}"
            raise MaskError(f"Mask file {path}: {zeros:.1%} of its entries are zeros, and --pattern asks for {asked}.")
    return {name: masks[name].to(weights[name].device) for name in weights if name in masks}
