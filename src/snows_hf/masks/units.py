"""Which units of a structure go, and how the layers that read them make up for those."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from pkgutil import resolve_name

import torch
from torch import Tensor

from ..adapters.turn import without_ranks
from ..adapters.widths import Slot, Width
from ..method.streams import holding
from ..patterns import Full
from .aims import Aim, Fit, aim_of, bias_for, damped, halfway_fits
from .criteria import find_criterion
from .estimate import tell_estimate
from .evidence import Evidence, matrix, unmatrix
from .group_obs import Reader, covariance, repair, units_left, variance
from .ranks import turned_for
from .scores.base import Choice, Score


@dataclass(frozen=True)
class Units:
    """The units that each width keeps, in order, and the tensors that make up for the others, of their old shapes.

    Where ranks go, it is in other bases, in which ``turned`` has the dense network's tensors.
    """

    kept: dict[Width, Tensor]
    tensors: dict[str, Tensor]
    turned: dict[str, Tensor]


def choose_units(evidence: Evidence, keep: Mapping[Width, int]) -> Units:
    """Units by ``evidence.config.units``, and the repair that group OBS ends with, wherever that is asked for: the
    layers that read units are fitted one after the other, halfway to the dense network (aims.py), with those alone
    that stay, and the layers between them whole (``fit_between``). Group OBS chooses by these fits, too.

    Args:
        evidence: of the dense network, with images.
        keep: how many units each width keeps.
    """
    config, chain = evidence.config, evidence.network
    obs = config.units == "obs"
    ranks = [width for width in keep if width.kind == "ranks" and obs]
    turned = turned_for(evidence, ranks)
    with holding(chain, turned):
        kept = shared_units(evidence, keep) if obs else units_by_score(evidence, keep)
        kept |= {width: torch.arange(keep[width]) for width in ranks}
        tensors = without_ranks(dict(chain.model.named_parameters()), kept)
        if obs or config.repair:
            seconds = tell_estimate(*repairing(evidence, keep, dict(kept)), "repairs")
            fitting, settle = repairing(evidence, keep, kept)
            fits = halfway_fits(fitting, tensors)
            for fit in evidence.run.track(fits, "Repairs", len(fitting.fitted), attrgetter("name"), seconds):
                tensors |= settle(fitting, fit)
    return Units(kept, tensors, turned)


def repairing(
    evidence: Evidence, keep: Mapping[Width, int], kept: dict[Width, Tensor]
) -> tuple[Evidence, Callable[[Evidence, Fit], dict[str, Tensor]]]:
    """Evidence of the layers that read the widths, and of those between them, and what becomes of each by its fit: of
    units that are read it is chosen first what stays, where they are not among those ``kept``."""
    read = {slot.name: width for width in keep for slot in width.readers}
    weights = {name: evidence.network.weight(name).detach() for name in read}
    config = evidence.config.updated(biases=True)
    fitting = replace(evidence, weights=weights, config=config)
    if config.fit_between and not config.layers:
        fitting = replace(fitting, free=between(fitting, keep))

    def settle(own: Evidence, fit: Fit) -> dict[str, Tensor]:
        aim, weight = aim_of(own, fit), own.network.weight(fit.name).detach()
        if fit.name not in read:
            return {fit.name: unmatrix(aim.W, weight.shape).to(weight)} | bias_for(own, aim, aim.W)
        width = read[fit.name]
        W, C = by_unit(aim, weight)
        if width not in kept:
            kept[width] = units_left([Reader(W, C, width.units)], keep[width])
        updated = repair(W, C, columns_of(width.readers[0], width.marked(kept[width]), W)).view_as(weight)
        return {fit.name: updated.to(weight)} | bias_for(own, aim, matrix(updated))

    return fitting, settle


def between(evidence: Evidence, keep: Mapping[Width, int]) -> dict[str, Tensor]:
    """The weights, by name, after the first of those that the evidence has; but for what makes ranks, whose last
    dimensions are to be nothing."""
    chain, ranks = evidence.network, (width for width in keep if width.kind == "ranks")
    names = [name for _, group in chain.groups() for name in group.parameters]
    left_alone = {*evidence.weights, *(slot.name for width in ranks for slot in width.makers)}
    later = names[min(map(names.index, evidence.weights)) :]
    return {name: chain.weight(name).detach() for name in later if name not in left_alone}


def by_unit(aim: Aim, weight: Tensor) -> tuple[Tensor, Tensor]:
    """W* (rows, d) and H (d, d) of an aim, with columns as ``weight.flatten(1)`` has them, a unit's side by side."""
    places = matrix(torch.arange(weight[0].numel()).view(1, *weight.shape[1:]))[0].argsort().to(aim.W.device)
    return aim.W[:, places], aim.H[0][places[:, None], places]


def shared_units(evidence: Evidence, keep: Mapping[Width, int]) -> dict[Width, Tensor]:
    """By group OBS, of what layers read in the dense network, the units of widths that several layers read: the first
    of them is fitted before the others'."""
    kept, shared = dict[Width, Tensor](), [width for width in keep if len(width.readers) > 1]
    totals = evidence.moments([slot.name for width in shared for slot in width.readers])
    for width in evidence.run.track(shared, "Units that several layers read", len(shared), lambda width: width.name):
        grams = dict(islice(totals, len(width.readers)))
        kept[width] = units_left(readers_of(width, dense_layers(evidence, width, grams)), keep[width])
    return kept


Layers = Mapping[str, tuple[Tensor, Tensor]]
"""Of layers, by name, the dense weight W (rows, d), and the covariance C (d, d) of what it reads."""


def dense_layers(evidence: Evidence, width: Width, grams: Mapping[str, Tensor]) -> Layers:
    """Those that read a width, by Σ [x, 1][x, 1]ᵀ of their inputs, which are around zero where no bias can make up for
    a mean."""
    chain, layers = evidence.network, dict[str, tuple[Tensor, Tensor]]()
    for slot in width.readers:
        C = damped(covariance(grams[slot.name], slot.name in chain.biases)[None])[0]
        layers[slot.name] = chain.weight(slot.name).detach().flatten(1), C
    return layers


def readers_of(width: Width, layers: Layers) -> list[Reader]:
    """The layers that read a width. What each loses counts as a share of its output."""
    return [Reader(W, C, width.units, 1 / max(variance(W, C), 1e-30)) for W, C in layers.values()]


def columns_of(slot: Slot, stays: Tensor, W: Tensor) -> Tensor:
    """Which columns of a layer W (rows, d) that reads units stay (bool, (d,)), where each unit does (bool, (units,)):
    those of all places of a kernel."""
    entries = slot.entries(stays)
    return entries.repeat_interleave(W.shape[1] // len(entries)).to(W.device)


def units_by_score(evidence: Evidence, keep: Mapping[Width, int]) -> dict[Width, Tensor]:
    """Those of the highest scores, in order."""
    scores = scores_of(evidence, keep)
    return {width: scores[width].topk(count).indices.sort().values for width, count in keep.items()}


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
        slots = (*width.makers, *width.readers)
        parts = ((slot, slot.part(scores[slot.name], width.units).movedim(slot.dim, 0)) for slot in slots)
        sums[width] = torch.stack([s.reshape(slot.times, width.units, -1).sum((0, 2)) for slot, s in parts]).sum(0)
    return sums
