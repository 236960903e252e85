"""How many units go of each layer, so that it costs the network least: allocation by sensitivity, for structures.

For every n, group OBS says what a layer's output loses by n units. What the network loses by that is measured for some
n, each layer alone, repaired, on images that the repair has not seen; between them it goes as group OBS says. Losses
of all layers are added up, as if these were independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, islice

import numpy as np
import torch
from torch import Tensor

from ..adapters import Chain
from ..adapters.frozen import frozen
from ..adapters.widths import Width
from ..errors import ConfigError
from ..patterns.budget import spend
from .aims import importance, shifted
from .evidence import Evidence
from .group_obs import removals, repair
from .units import Layers, columns_of, dense_layers, readers_of


Losses = Mapping[Width, Sequence[float]]
"""What it costs the network to keep 0, 1, 2, … of the units of each width, all others dense."""

IMAGES, JUDGES = 256, 64
"""Most images that are used, and most of these, and a quarter, that judge."""

WIDE, STEP = 64, 8
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
    losses = losses_of(evidence, {width: keep[width] for group in groups for width in group})
    prices = {width: price_of(evidence.network, width, flops, evidence.config.budget) for width in losses}
    for kind in kinds:
        found |= shared_out([group for group in groups if group[0].kind == kind], keep, losses, prices)
    return found


def losses_of(evidence: Evidence, keep: Mapping[Width, int]) -> Losses:
    """Measured at what each of the widths is to ``keep``, at half of it, and halfway to all.

    Raises:
        ConfigError: fewer than four images.
    """
    losses, images = dict[Width, list[float]](), evidence.calibration
    count = min(len(images), IMAGES)
    judges = min(JUDGES, count // 4)
    if not judges:
        raise ConfigError(
            f"Allocation 'sensitivity' takes four images at least, one of which judges: there are {count}."
        )
    learning, judging = replace(evidence, images=images[: count - judges]), images[count - judges : count]
    with frozen(evidence.network.model):
        weights, dense = importance(learning), last_output(evidence, judging, {})
        positions = {name: own.positions for name, own in weights.items()}
    totals = learning.moments([slot.name for width in keep for slot in width.readers], positions)
    for width, kept in evidence.run.track(keep.items(), "What units cost", len(keep), lambda item: item[0].name):
        grams = dict(islice(totals, len(width.readers)))
        layers = dense_layers(evidence, width, grams)
        order, costs = zip(*removals(readers_of(width, layers)), strict=True)
        curve = np.maximum([0.0, *accumulate(costs)][::-1], 1e-30)
        counts = sorted({max(1, kept // 2), kept, (kept + width.units) // 2})
        with frozen(evidence.network.model):
            cut = (repaired(evidence.network, width, grams, layers, order[: width.units - own]) for own in counts)
            measured = [float((last_output(evidence, judging, own) - dense).square().mean()) for own in cut]
        factors = np.log(np.maximum(measured, 1e-30) / curve[counts])
        losses[width] = list(curve * np.exp(np.interp(np.arange(width.units + 1), counts, factors)))
    return losses


def repaired(
    chain: Chain, width: Width, grams: Mapping[str, Tensor], layers: Layers, gone: Sequence[int]
) -> dict[str, Tensor]:
    """The weights that read a width, by name, and their biases, once they make up for the units that are ``gone``."""
    tensors, stays = dict[str, Tensor](), ~width.marked(torch.tensor(gone, dtype=torch.long))
    for slot in width.readers:
        gram, weight, (W, C) = grams[slot.name], chain.weight(slot.name), layers[slot.name]
        updated = repair(W, C, columns_of(slot, stays, W))
        tensors[slot.name] = updated.view_as(weight).to(weight)
        if slot.name in chain.biases:
            mean = (gram[:-1, -1] / gram[-1, -1]).double()
            tensors |= shifted(chain, slot.name, (W.double() - updated) @ mean)
    return tensors


@torch.no_grad()
def last_output(evidence: Evidence, images: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The chain's last, with some tensors in place of its own."""
    chain = evidence.network
    batches = (images.to(chain.device) for images in images.split(evidence.config.batch_size))
    return torch.cat([chain.outputs((batch,), 0, len(chain.operations), tensors)[-1] for batch in batches])


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
        [[round(price * n) for n in own] for price, own in zip(each, counts, strict=True)],
        sum(round(price * keep[group[0]]) for price, group in zip(each, groups, strict=True)),
    )
    return {w: own[i] for group, own, i in zip(groups, counts, taken, strict=True) for w in group}


def possible_counts(units: int, usual: int) -> list[int]:
    """How many of its units a width may keep; in any case as many as is ``usual``."""
    step = STEP if units >= WIDE and units % STEP == 0 else 1
    return sorted({*range(step, units + 1, step), usual})
