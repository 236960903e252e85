"""Which smaller network a pattern of structures asks for, and whether it can be had: a configuration says it, its code
runs with the new widths. All of that is known before any image is read."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..adapters.check import widened
from ..adapters.outputs import outputs_of
from ..adapters.turn import random_bases, rescaled, without_ranks
from ..adapters.widths import Width, cut, unread, widths_of
from ..errors import ConfigError, PatternError, one_line
from ..hub.load import Checkpoint
from ..hub.resize import Size, fields_for, resized
from ..method.streams import holding
from .subject import Subject


UNITS = {"mlp": "units", "heads": "heads", "ranks": "ranks", "channels": "channels"}
"""What each structure is made of, in words."""


def units_to_keep(subject: Subject, shares: Mapping[str, float], allow_custom: bool = False) -> dict[Width, int]:
    """:func:`counts_left`; what the model's configuration could not say is refused, unless it may be custom. Where
    layers are to keep as many as their sensitivity says, these are the numbers to begin with.

    Raises:
        ConfigError: a smaller network that no configuration describes, or that a custom one is not either.
        PatternError: there is no such structure, or nothing of it would be left.
    """
    if not shares:
        return {}
    widths = widths_asked_for(subject)
    keep = counts_left(subject, widths, shares)
    if not can_be_said(subject, keep) and can_be_said(subject, fewer := rounded_down(keep, shares)):
        keep = fewer
    trial = keep
    if subject.config.allocation == "sensitivity":
        trial = unequal(keep, groups_of(subject, keep, allow_custom))
    bases = random_bases(subject.original, (width for width in keep if width.kind == "ranks"))
    smaller = resized_to_first(subject, trial, allow_custom, bases)
    if smaller.custom or bases:
        check_smaller(subject, smaller, first_units(trial), bases)
    return keep


def widths_asked_for(subject: Subject) -> list[Width]:
    """The widths that can be cut of the layers that are asked for."""
    chosen = {group.name for group in subject.layers}
    return [width for width in widths_of(subject.chain) if width.name in chosen]


def counts_left(subject: Subject, widths: Sequence[Width], shares: Mapping[str, float]) -> dict[Width, int]:
    """How many units each of the widths keeps that has units of a structure, once a share of these has gone.

    Raises:
        PatternError: there is no such structure, or nothing of it would be left.
    """
    keep: dict[Width, int] = {}
    for structure, share in shares.items():
        own = [width for width in widths if width.kind == structure]
        if not own:
            there = ", ".join(dict.fromkeys(width.kind for width in widths)) or "none"
            raise PatternError(
                f"Pattern {structure}:{share:g}: {type(subject.network).__name__} has no such structure that can be "
                f"cut; it has: {there}.",
                "Patterns of zeros, such as 2:4, fit any layer.",
            )
        for width in own:
            keep[width] = width.units - round(share * width.units)
            if not 0 < keep[width] < width.units:
                raise PatternError(
                    f"Pattern {structure}:{share:g}: {width.name} has {width.units} {UNITS[structure]}, and "
                    f"{keep[width]} would be left.",
                    f"A share from {1 / width.units:.2g} to {1 - 1 / width.units:.2g} leaves some.",
                )
    return keep


def rounded_down(keep: Mapping[Width, int], shares: Mapping[str, float]) -> dict[Width, int]:
    """:func:`counts_left` as most classes count the widths of several stages: never up."""
    return {width: max(1, math.floor((1 - shares[width.kind]) * width.units + 1e-9)) for width in keep}


def groups_of(subject: Subject, keep: Mapping[Width, int], allow_custom: bool) -> list[list[Width]]:
    """Widths that keep the same number of units, whatever the next ones keep: each by itself, or those of a stage, as
    the configuration can say it. Ranks are not among them: what they cost is not what units do.

    Raises:
        ConfigError: there are ranks alone, or the configuration says one number for all layers.
    """
    free = [width for width in keep if width.kind != "ranks"]
    if not free:
        raise ConfigError(
            "Allocation 'sensitivity': ranks go alike everywhere, and nothing else does.", "Leave it out."
        )
    by_stage = [list(stage) for _, stage in groupby(free, key=lambda width: (width.kind, width.units))]
    alone = [[width] for width in free]
    for groups in (alone, by_stage):
        if len(groups) > 1 and can_be_said(subject, unequal(keep, groups)):
            return groups
    if not allow_custom:
        raise ConfigError(
            f"Allocation 'sensitivity': a configuration of {type(subject.network).__name__} says one width for all "
            "layers.",
            "Leave it out, or make a model that only this package loads: --allow-custom.",
        )
    return alone


def unequal(keep: Mapping[Width, int], groups: Sequence[Sequence[Width]]) -> dict[Width, int]:
    """With one unit more in the first of the groups of each kind."""
    first = {group[0].kind: group for group in reversed(groups)}
    return dict(keep) | {width: keep[width] + 1 for group in first.values() for width in group}


def can_be_said(subject: Subject, keep: Mapping[Width, int]) -> bool:
    """Whether a configuration describes the network with so many units; no weight is read."""
    shapes = {name: tensor.to("meta") for name, tensor in subject.original.items()}
    state, sizes = cut(shapes, first_units(keep)), sizes_of(subject, keep)
    return fields_for(subject.checkpoint, state, sizes, unread(subject.chain)) is not None


def resized_to_first(
    subject: Subject,
    keep: Mapping[Width, int],
    allow_custom: bool = False,
    bases: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """A smaller network of the first units of each width, in other ``bases`` of its heads: of the right shapes, but
    not one to use.

    Raises:
        ConfigError: no configuration describes it.
    """
    state = cut(rescaled({**subject.original, **(bases or {})}, keep), first_units(keep))
    return resized(subject.checkpoint, state, sizes_of(subject, keep), allow_custom, unread(subject.chain))


def first_units(keep: Mapping[Width, int]) -> dict[Width, Tensor]:
    return {width: torch.arange(count) for width, count in keep.items()}


def sizes_of(subject: Subject, keep: Mapping[Width, int]) -> dict[str, Size]:
    """What is known of each structure's size, by its first width; layers one after the other that are alike are a
    stage."""
    sizes: dict[str, Size] = {}
    for kind in dict.fromkeys(width.kind for width in keep):
        own = [(width.units, count, width.makers[0].each) for width, count in keep.items() if width.kind == kind]
        first = next(width for width in keep if width.kind == kind)
        reads = subject.original[first.makers[0].name].shape[1]
        sizes[kind] = Size(*own[0], reads, tuple(stage for stage, _ in groupby(own)))
    return sizes


@torch.no_grad()
def check_smaller(
    subject: Subject, smaller: Checkpoint, kept: Mapping[Width, Tensor], bases: Mapping[str, Tensor]
) -> None:
    """Makes sure that a smaller network whose modules were narrowed from outside, or whose heads compute in other
    ``bases``, computes what the whole one does where nothing reads the units that are gone; and the whole one what it
    does, in these bases.

    Raises:
        ConfigError: it does not, or does not run.
    """
    kind = type(smaller.model).__name__
    whole = {**bases, **without_ranks({**subject.original, **bases}, kept)}
    whole |= without_reading({**subject.original, **whole}, kept)
    with widened(subject.network), widened(smaller.model):
        expected = answers(subject, whole)
        same = not bases or agree(answers(subject, bases), answers(subject, {}))
        try:
            got = outputs_of(smaller.model, noise_for(subject))
        except Exception as error:  # a library's, of any type
            fault = f"A narrower {kind} cannot run: {type(error).__name__}: {one_line(error)}"
            raise ConfigError(fault, "Its code depends on the old widths. Try zeros, such as 2:4.") from error
    if not same:
        fault = f"{kind}: heads in other bases compute other outputs, so that no ranks can go."
        raise ConfigError(fault, "Something tells their dimensions apart (rotary positions do). Try mlp:0.5.")
    if not agree(got, expected):
        fault = f"A narrower {kind} computes other outputs than the whole one without the units."
        raise ConfigError(fault, "Its code depends on the old widths. Try zeros, such as 2:4.")


def noise_for(subject: Subject) -> Tensor:
    """Two images of noise of the size that the model reads."""
    image = subject.chain.image if subject.chain.image is not None else subject.checkpoint.image()
    noise = torch.randn((2, *image.shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.to(next(subject.network.parameters()))


def answers(subject: Subject, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the whole network computes with some tensors in place of its own."""
    chain = subject.chain
    with holding(chain, {name: tensor.to(chain.tensor(name)) for name, tensor in tensors.items()}):
        return outputs_of(subject.network, noise_for(subject))


def agree(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether all outputs that are expected are there, but for rounding in float32."""
    return all(
        name in got and torch.allclose(got[name], values, rtol=1e-3, atol=1e-3 * float(values.std()))
        for name, values in expected.items()
    )


def without_reading(state: Mapping[str, Tensor], kept: Mapping[Width, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights that read the widths, with zeros for the units that are not ``kept``."""
    weights = {slot.name: state[slot.name].detach().clone() for width in kept for slot in width.readers}
    for width, units in kept.items():
        for slot in width.readers:
            slot.part(weights[slot.name], width.units)[:, ~slot.entries(width.marked(units))] = 0
    return weights
