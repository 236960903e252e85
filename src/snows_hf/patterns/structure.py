"""Structures: whole units that go, written before a pattern of zeros: ``mlp:0.5``, ``mlp:0.5+heads:0.33+2:4``."""

from __future__ import annotations

import re

from ..errors import PatternError


STRUCTURES = ("mlp", "heads", "ranks", "channels")
"""Units of MLPs, heads of attentions, dimensions of each of these, inner channels of residual units and inverted
bottlenecks."""


def split_structures(text: str) -> tuple[dict[str, float], str]:
    """``"mlp:0.5+2:4"`` → ``({"mlp": 0.5}, "2:4")``: the share of each structure that goes, and the pattern of what is
    left, empty where there is none.

    Raises:
        PatternError: a share that is none, the same structure twice, or more than one pattern behind.
    """
    shares: dict[str, float] = {}
    rest = list[str]()
    for part in (part.strip() for part in text.split("+")):
        match = re.fullmatch(r"([a-z]+):(.*)", part)
        if match is None:
            rest.append(part)
            continue
        name, share = match[1], _share(match[2])
        if name not in STRUCTURES or not 0 < share < 1:
            raise PatternError(
                f"Pattern {part!r}: expected a share between 0 and 1 of {', '.join(STRUCTURES)}.",
                "mlp:0.5 removes half of the units of every MLP.",
            )
        if name in shares:
            raise PatternError(f"Pattern {text!r}: {name} is said twice.")
        shares[name] = share
    if {"heads", "ranks"} <= shares.keys():
        raise PatternError(f"Pattern {text!r}: heads lose either some of their number or some of their ranks.")
    if len(rest) > 1:
        raise PatternError(f"Pattern {text!r}: expected at most one pattern of zeros, got {' and '.join(rest)}.")
    return shares, "".join(rest)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
