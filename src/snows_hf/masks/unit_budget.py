"""How many units go of each layer, so that it costs the network least: allocation by sensitivity, for structures.

For every n, group OBS says what removal of the first n units costs a layer's output. A position there counts as the
network's outputs depend on it, which makes costs of all layers comparable. They are added up as if layers were
independent, around the dense network.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice

from ..adapters import Chain
from ..adapters.frozen import frozen
from ..adapters.widths import Width
from ..patterns.budget import spend
from .aims import derivatives, weights_by
from .evidence import Evidence
from .group_obs import removals
from .units import readers_of


Losses = Mapping[Width, Sequence[float]]
"""What it costs the network to keep 0, 1, 2, … of the units of each width, all others dense."""

WIDE, STEP = 256, 8
"""From so many units on, so many go at a time: matrix products of other widths are slower on most devices."""


def find_counts(
    evidence: Evidence, groups: Sequence[Sequence[Width]], keep: Mapping[Width, int], flops: Mapping[str, int]
) -> dict[Width, int]:
    """How many units each width keeps, where all of a kind together have as many weights (or operations, as
    ``evidence.config.budget`` says) as by ``keep``, the same share of all.

    Args:
        evidence: of the dense network, with images; its weights are those that read units.
        groups: widths of one kind that keep equally many of equally many units. Others keep what they keep.
        flops: of every module on one image, by name.
    """
    found, kinds = dict(keep), dict.fromkeys(group[0].kind for group in groups)
    losses = losses_of(evidence, [width for group in groups for width in group])
    prices = {width: price_of(evidence.network, width, flops, evidence.config.budget) for width in losses}
    for kind in kinds:
        found |= shared_out([group for group in groups if group[0].kind == kind], keep, losses, prices)
    return found


def losses_of(evidence: Evidence, widths: Sequence[Width]) -> Losses:
    names, losses = [slot.name for width in widths for slot in width.readers], dict[Width, list[float]]()
    with frozen(evidence.network.model):
        depends = derivatives(evidence)
    totals = evidence.moments(names, {name: weights_by(own) for name, own in depends.items()})
    for width in evidence.run.track(widths, "What units cost", len(widths), lambda width: width.name):
        readers = readers_of(evidence, width, dict(islice(totals, len(width.readers))), depends)
        costs = [cost for _, cost in removals(readers)]
        losses[width] = [0.0, *accumulate(costs)][::-1]
    return losses


def price_of(chain: Chain, width: Width, flops: Mapping[str, int], budget: str) -> float:
    """What a unit of a width counts in a budget of weights or of operations."""
    price = 0.0
    for slot in width.slots:
        tensor = chain.tensor(slot.name)
        share = slot.part(tensor, width.units).numel() / tensor.numel() / width.units
        module, _, own = slot.name.rpartition(".")
        price += share * (tensor.numel() if budget == "weights" else flops.get(module, 0) * (own == "weight"))
    return price


def shared_out(
    groups: Sequence[Sequence[Width]], keep: Mapping[Width, int], losses: Losses, prices: Mapping[Width, float]
) -> dict[Width, int]:
    """The counts whose losses sum to the least, of those that cost together no more than ``keep``."""
    counts = [possible_counts(group[0].units, keep[group[0]]) for group in groups]
    each = [sum(prices[width] for width in group) for group in groups]
    taken = spend(
        [[sum(losses[w][n] for w in group) for n in own] for group, own in zip(groups, counts, strict=True)],
        [[math.ceil(price * n) for n in own] for price, own in zip(each, counts, strict=True)],
        sum(math.ceil(price * keep[group[0]]) for price, group in zip(each, groups, strict=True)),
    )
    return {w: own[i] for group, own, i in zip(groups, counts, taken, strict=True) for w in group}


def possible_counts(units: int, usual: int) -> list[int]:
    """How many of its units a width may keep; in any case as many as is ``usual``."""
    step = STEP if units >= WIDE and units % STEP == 0 else 1
    return sorted({*range(step, units + 1, step), usual})
