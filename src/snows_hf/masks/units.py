"""Which units of a structure go, and how the layers that read them make up for those."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from pkgutil import resolve_name

import torch
from torch import Tensor

from ..adapters.widths import Slot, Width
from ..patterns import Full
from .aims import Fit, aim_of, bias_for, halfway_fits
from .criteria import find_criterion
from .estimate import tell_estimate
from .evidence import Evidence, matrix, unmatrix
from .group_obs import Moments, Reader, repair, units_left, variance
from .scores.base import Choice, Score


@dataclass(frozen=True)
class Units:
    """The units that each width keeps, in order, and the tensors that make up for the others, of their old shapes."""

    kept: dict[Width, Tensor]
    tensors: dict[str, Tensor]


def choose_units(evidence: Evidence, keep: Mapping[Width, int]) -> Units:
    """Units by ``evidence.config.units``, and the repair that group OBS ends with, wherever that is asked for.

    Args:
        evidence: of the dense network, with images.
        keep: how many units each width keeps.
    """
    config, kept = evidence.config, dict[Width, Tensor]()
    mended = config.units == "obs" or config.repair
    if mended:  # takes as long whichever units stay
        first = {width: torch.arange(count) for width, count in keep.items()}
        tell_estimate(*repairing(evidence, first), "repairs")
    scores = {} if config.units == "obs" else scores_of(evidence, keep)
    totals = evidence.moments([slot.name for width in keep for slot in width.readers] if config.units == "obs" else [])
    for width in evidence.run.track(list(keep), f"Units by {config.units}", len(keep), lambda width: width.name):
        if config.units == "obs":
            moments = {name: moments_of(evidence, name, total) for name, total in islice(totals, len(width.readers))}
            kept[width] = units_left(readers_of(evidence, width, moments), keep[width])
        else:
            kept[width] = scores[width].topk(keep[width]).indices.sort().values
    return Units(kept, repairs(evidence, kept) if mended else {})


def repairs(evidence: Evidence, kept: Mapping[Width, Tensor]) -> dict[str, Tensor]:
    """Weights and biases of all readers, one after the other, each fitted halfway to the dense network (aims.py) with
    the units alone that are ``kept``."""
    (fitting, settle), tensors = repairing(evidence, kept), dict[str, Tensor]()
    fits = halfway_fits(fitting, tensors)
    for fit in evidence.run.track(fits, "Repairs", len(fitting.weights), attrgetter("name")):
        tensors |= settle(fitting, fit)
    return tensors


def repairing(
    evidence: Evidence, kept: Mapping[Width, Tensor]
) -> tuple[Evidence, Callable[[Evidence, Fit], dict[str, Tensor]]]:
    """Evidence of the layers that read the widths, and what becomes of each by its fit."""
    slots = {slot.name: (slot, units) for width, units in kept.items() for slot in width.readers}
    weights = {name: evidence.network.weight(name).detach() for name in slots}
    fitting = replace(evidence, weights=weights, config=evidence.config.updated(biases=True))
    return fitting, lambda own, fit: repaired(own, fit, *slots[fit.name])


def moments_of(evidence: Evidence, name: str, total: Tensor) -> Moments:
    """Moments of what a layer reads; around zero where no bias can make up for a mean."""
    moments = Moments.of(total)
    if name in evidence.network.biases:
        return moments
    mean = moments.mean
    return Moments(torch.zeros_like(mean), moments.covariance + mean.outer(mean))


def readers_of(evidence: Evidence, width: Width, moments: Mapping[str, Moments]) -> list[Reader]:
    """The layers that read a width; of several, what each loses counts as a share of its output."""
    weights = {slot.name: evidence.network.weight(slot.name).detach().flatten(1) for slot in width.readers}
    if len(weights) == 1:
        return [Reader(W, moments[name], width.units) for name, W in weights.items()]
    shares = {name: 1 / max(variance(W, moments[name]), 1e-30) for name, W in weights.items()}
    return [Reader(W, moments[name], width.units, shares[name]) for name, W in weights.items()]


def repaired(evidence: Evidence, fit: Fit, slot: Slot, kept: Tensor) -> dict[str, Tensor]:
    """A reader's weight and bias once only the units ``kept`` are there; a batch norm's mean in a bias's place."""
    aim, weight = aim_of(evidence, fit), evidence.network.weight(slot.name).detach()
    units = torch.zeros(weight.shape[1] // slot.each, dtype=torch.bool, device=aim.W.device)
    columns = units.index_fill_(0, kept.to(units.device), True).repeat_interleave(weight[0].numel() // len(units))
    updated = repair(aim.W, aim.H[0], matrix(columns.view(1, *weight.shape[1:]))[0])
    return {slot.name: unmatrix(updated, weight.shape).to(weight)} | bias_for(evidence, aim, updated)


def scores_of(evidence: Evidence, keep: Mapping[Width, int]) -> dict[Width, Tensor]:
    """The scores of the weights of each unit, summed, (units,), by a criterion that has such (``SCORES``).

    Raises:
        NumericsError: a score is no number.
    """
    chain, name = evidence.network, evidence.config.units
    names = dict.fromkeys(slot.name for width in keep for slot in (*width.makers, *width.readers))
    weights = {name: chain.weight(name).detach() for name in names}
    score: Score = resolve_name(f"{__package__}.scores.{find_criterion(name).function}")
    config = evidence.config.updated(mask=name)
    evidence = replace(evidence, weights=weights, pattern=Full(), config=config)
    found = score(evidence)
    scores = dict(found.scores if isinstance(found, Choice) else found)
    evidence.ranked(scores)  # which refuses those that are no numbers
    sums = {}
    for width in keep:
        each = (scores[slot.name].movedim(slot.dim, 0) for slot in (*width.makers, *width.readers))
        slots = (*width.makers, *width.readers)
        own = (s[t.offset : t.offset + width.units * t.each] for s, t in zip(each, slots, strict=True))
        sums[width] = torch.stack([part.reshape(width.units, -1).sum(1) for part in own]).sum(0)
    return sums
