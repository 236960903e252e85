"""Sparsity patterns: which weights may stay, along which axis, and the check that a tensor obeys.

Convention: N of every M consecutive weights are KEPT, along dimension 1 of the weight: the input features of a Linear
(out, in), the input channels of a Conv2d (out, in / groups, height, width) for each filter and kernel position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import PatternError
from .structure import split_structures


if TYPE_CHECKING:  # a command line is read, and refused, before torch is loaded
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class NM:
    """N:M sparsity: n of every m consecutive weights kept.

    Raises:
        PatternError: unless 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise PatternError(
                f"Pattern {self}: expected N:M with 0 < N < M, where N weights of every M are kept.",
                "2:4 keeps half of the weights, 1:4 a quarter.",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.n / self.m

    def fits(self, shape: torch.Size) -> bool:
        """Whether dimension 1 divides by M."""
        return len(shape) >= 2 and shape[1] % self.m == 0

    def mask(self, scores: Tensor) -> Tensor:
        """The mask, bool and shaped like ``scores``, that keeps the N highest scores of every group of M.

        Ties keep the earlier weight, so that a mask is the same on every device.
        """
        if not self.fits(scores.shape):
            raise PatternError(
                f"Pattern {self} does not fit a weight of shape {tuple(scores.shape)}: dimension 1 must divide by "
                f"{self.m}."
            )
        import torch

        groups = scores.movedim(1, -1).unflatten(-1, (-1, self.m))
        places = groups.movedim(-1, 0).contiguous()
        ahead = torch.zeros_like(places, dtype=torch.int16)  # compared in pairs: a third of the time of sorting fours
        for place, score in enumerate(places):
            ahead[:place] += score > places[:place]
            ahead[place + 1 :] += score >= places[place + 1 :]
        return (ahead < self.n).movedim(0, -1).flatten(-2).movedim(-1, 1).contiguous()

    def masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """:meth:`mask` of every tensor."""
        return {name: self.mask(score) for name, score in scores.items()}

    def of(self, name: str) -> NM:
        """The pattern of one layer: this one."""
        return self

    def relaxed(self) -> NM | None:
        """The pattern that keeps twice as many weights; None where these are all."""
        return NM(2 * self.n, self.m) if 2 * self.n < self.m else None

    def zeros(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights each layer loses."""
        return {name: weight.numel() // self.m * (self.m - self.n) for name, weight in weights.items()}

    def holds(self, weight: Tensor) -> bool:
        """Whether no group of M weights has more than N that are not zero."""
        if not self.fits(weight.shape):
            return False
        groups = (weight != 0).movedim(1, -1).unflatten(-1, (-1, self.m))
        return bool((groups.sum(-1) <= self.n).all())


@dataclass(frozen=True)
class Unstructured:
    """A fraction ``sparsity`` of the weights zero, anywhere.

    Attributes:
        sparsity: between 0 and 1, exclusive.
        scope: ``global`` ranks the weights of all layers together, ``layer`` those of each layer.
        layer_cap: with ``global``, the most that one layer may lose; None means 0.9 (as the paper's code), or half of
            the way from ``sparsity`` to 1 where that is more.

    Raises:
        PatternError: a sparsity or cap outside its range.
    """

    sparsity: float
    scope: str = "global"
    layer_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise PatternError(
                f"Sparsity {self.sparsity}: expected a fraction of zeros between 0 and 1.", "0.7 zeroes 70 %."
            )
        if self.scope not in ("global", "layer"):
            raise PatternError(f"Scope {self.scope!r}: expected 'global' or 'layer'.")
        if self.layer_cap is not None and not self.sparsity <= self.layer_cap <= 1:
            raise PatternError(f"Layer cap {self.layer_cap}: expected a value from {self.sparsity} (sparsity) to 1.")

    def __str__(self) -> str:
        return f"{self.sparsity:.12g}"

    @property
    def cap(self) -> float:
        return max(0.9, (1 + self.sparsity) / 2) if self.layer_cap is None else self.layer_cap

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) >= 2

    def masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masks, bool and shaped like the ``scores``, with ``round(sparsity · weights)`` zeros.

        ``global``: the lowest scores of all layers go, but never more than ``cap`` of one layer; what a capped layer
        cannot give, the others do.
        """
        if self.scope == "layer":
            return {name: _keep_highest(s, s.numel() - round(self.sparsity * s.numel())) for name, s in scores.items()}
        import torch

        names = list(scores)
        budget = round(self.sparsity * sum(s.numel() for s in scores.values()))
        # A weight can go only if it is among the lowest `cap` of its own layer; of those, the lowest go.
        candidates = [s.flatten().sort(stable=True).values[: math.ceil(self.cap * s.numel())] for s in scores.values()]
        owners = [torch.full_like(lowest, i, dtype=torch.long) for i, lowest in enumerate(candidates)]
        order = torch.cat(candidates).argsort(stable=True)[:budget]
        removed = torch.cat(owners)[order].bincount(minlength=len(names)).tolist()
        return {n: _keep_highest(scores[n], scores[n].numel() - removed[i]) for i, n in enumerate(names)}

    def of(self, name: str) -> Unstructured:
        """The pattern of one layer, as far as it has one by itself: this one."""
        return self

    def relaxed(self) -> Unstructured | None:
        """The sparsity that keeps twice as many weights; None where these are all."""
        sparsity = round(2 * self.sparsity - 1, 12)
        return replace(self, sparsity=sparsity) if sparsity > 0 else None

    def zeros(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights each layer loses where all lose the same share: ``round(sparsity · weights)`` in all."""
        counts, before = {}, 0
        for name, weight in weights.items():
            after = before + weight.numel()
            counts[name] = round(self.sparsity * after) - round(self.sparsity * before)
            before = after
        return counts

    def holds(self, weight: Tensor) -> bool:
        """Any weight is allowed by itself: what counts is the sparsity over all layers."""
        return True


@dataclass(frozen=True)
class Full:
    """No zeros: what is left once structures have gone is kept."""

    sparsity: float = 0.0

    def __str__(self) -> str:
        return "full"

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) >= 2

    def masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masks, bool and shaped like the ``scores``, that keep everything."""
        import torch

        return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}

    def of(self, name: str) -> Full:
        """The pattern of one layer: this one."""
        return self

    def relaxed(self) -> None:
        """None: these are all weights."""

    def zeros(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights each layer loses: none."""
        return dict.fromkeys(weights, 0)

    def holds(self, weight: Tensor) -> bool:
        return True


@dataclass(frozen=True)
class PerLayer:
    """A pattern for each layer, as an allocation chose them.

    Attributes:
        patterns: by parameter name; None for what is left dense by choice. What is not named no candidate fits.
        title: what stands for all of them, ``0.8`` or ``1:4,2:4,dense`` for example.
    """

    patterns: Mapping[str, NM | Unstructured | Full | None]
    title: str

    def __str__(self) -> str:
        return self.title

    @classmethod
    def parse(cls, patterns: Mapping[str, str], title: str) -> PerLayer:
        """From the patterns as text, ``dense`` for None."""
        found = {name: None if text == "dense" else parse_pattern(text) for name, text in patterns.items()}
        layers = {n: replace(p, scope="layer") if isinstance(p, Unstructured) else p for n, p in found.items()}
        return cls(layers, title)

    def of(self, name: str) -> NM | Unstructured | Full | None:
        """The pattern of one layer; None where it stays dense."""
        return self.patterns.get(name)

    def relaxed(self) -> PerLayer | None:
        """Each layer's own relaxed pattern; None where all are dense."""
        patterns = {name: own and own.relaxed() for name, own in self.patterns.items()}
        return PerLayer(patterns, f"{self.title}, relaxed") if any(patterns.values()) else None

    def masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masks, bool and shaped like the ``scores``, each by its layer's own pattern."""
        return {name: self._sparse(name).masks({name: score})[name] for name, score in scores.items()}

    def zeros(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights each layer loses."""
        return {name: self._sparse(name).zeros({name: weight})[name] for name, weight in weights.items()}

    def _sparse(self, name: str) -> NM | Unstructured | Full:
        own = self.patterns[name]
        assert own is not None, f"{name} stays dense"
        return own


Pattern = NM | Unstructured | PerLayer | Full

Masks = dict[str, "Tensor"]
"""Parameter name → bool mask (True: kept) of the parameter's shape."""


def _keep_highest(scores: Tensor, keep: int) -> Tensor:
    import torch

    order = scores.flatten().argsort(descending=True, stable=True)[:keep]
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order] = True
    return mask.view_as(scores)


def parse_pattern(text: str) -> NM | Unstructured | Full:
    """``"2:4"`` → ``NM(2, 4)``; ``"0.7"`` → ``Unstructured(0.7)``; ``"mlp:0.5"``, structures alone → ``Full()``.

    Raises:
        PatternError: neither form, or numbers out of range.
    """
    shares, rest = split_structures(text)
    if shares and not rest:
        return Full()
    text = rest
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        return NM(int(match[1]), int(match[2]))
    try:
        return Unstructured(round(float(text), 12))  # as many digits as its text has again
    except ValueError:
        raise PatternError(
            f"Pattern {text!r}: expected N:M (2:4, 1:4), a fraction of zeros (0.7) or structures (mlp:0.5).",
            "2:4 is the pattern that sparse tensor cores run.",
        ) from None


def parse_candidates(text: str) -> list[NM | Unstructured | Full | None]:
    """``"1:4,2:4,dense"`` → the patterns that a layer may have, None standing for dense; ``"2:4"`` → itself;
    structures before them are left out.

    Raises:
        PatternError: one that is no pattern, or a set of nothing but ``dense``.
    """
    shares, rest = split_structures(text)
    if shares and not rest:
        return [Full()]
    candidates = [None if part.strip() == "dense" else parse_pattern(part) for part in rest.split(",")]
    if not any(candidates):
        raise PatternError(f"Pattern {text!r}: expected at least one beside 'dense'.", "As in 1:4,2:4,dense.")
    return candidates
