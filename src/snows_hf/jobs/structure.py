"""Structured pruning: units are chosen and cut out, and what is left is a smaller network of the same class, which the
dense one teaches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..adapters import build_chain
from ..adapters.check import widened
from ..adapters.outputs import outputs_of
from ..adapters.turn import random_bases, rescaled, without_ranks
from ..adapters.widths import Width, cut, unread, widths_of
from ..errors import ConfigError, PatternError, one_line
from ..hub.load import Checkpoint
from ..hub.resize import Size, fields_for, resized
from ..masks.choices import fit_criterion, in_smaller_batches
from ..masks.evidence import Evidence
from ..masks.unit_budget import find_counts
from ..masks.units import choose_units
from ..method.streams import Teacher, holding
from ..patterns import Full
from ..runtime.journal import Record
from ..runtime.memory import Images
from ..runtime.run import Run
from .subject import Subject, copy_of


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


def counts_by_sensitivity(
    run: Run,
    subject: Subject,
    keep: Mapping[Width, int],
    images: Tensor | Images,
    flops: Mapping[str, int],
    allow_custom: bool = False,
) -> dict[Width, int]:
    """How many units each width keeps where layers lose as many as their sensitivity says, as an earlier run has found
    it, where there was one; of each kind all together cost what they would by ``keep``.

    Args:
        flops: of every module on one image, by name.
    """
    chain, config = subject.chain, subject.config
    if config.allocation != "sensitivity":
        return dict(keep)

    def decide() -> Record:
        run.say(f"Sharing out units among {len(keep)} layers by what they cost")
        subject.network.to(run.dtype)
        weights = {slot.name: chain.weight(slot.name).detach() for width in keep for slot in width.readers}
        evidence = Evidence(weights, Full(), config, chain, images, run=run)
        groups = groups_of(subject, keep, allow_custom)
        found = in_smaller_batches(lambda fitting: find_counts(fitting, groups, keep, flops), evidence)
        return Record({}, {"counts": [found[width] for width in keep]})

    counts = run.journal.once("counts of units", decide).facts["counts"]
    return dict(zip(keep, counts, strict=True))


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


def can_be_said(subject: Subject, keep: Mapping[Width, int]) -> bool:
    """Whether a configuration describes the network with so many units; no weight is read."""
    shapes = {name: tensor.to("meta") for name, tensor in subject.original.items()}
    state, sizes = cut(shapes, first_units(keep)), sizes_of(subject, keep)
    return fields_for(subject.checkpoint, state, sizes, unread(subject.chain)) is not None


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


def without_reading(state: Mapping[str, Tensor], kept: Mapping[Width, Tensor]) -> dict[str, Tensor]:
    """Copies of the weights that read the widths, with zeros for the units that are not ``kept``."""
    weights = {slot.name: state[slot.name].detach().clone() for width in kept for slot in width.readers}
    for width, units in kept.items():
        for slot in width.readers:
            slot.part(weights[slot.name], width.units)[:, ~slot.entries(width.marked(units))] = 0
    return weights


@dataclass(frozen=True)
class Cut:
    """A subject without the units that go, or, by itself, one that loses none.

    Attributes:
        subject: with what is left repaired.
        teacher: the dense network, where that is another one.
        bare: the tensors that the repair has changed, by name, as they were before it.
        units: what the report says of each width.
    """

    subject: Subject
    teacher: Teacher | None = None
    bare: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)


def cut_units(
    run: Run,
    subject: Subject,
    keep: Mapping[Width, int],
    images: Tensor | Images,
    labels: Tensor | None,
    allow_custom: bool = False,
) -> Cut:
    """The subject without the units that go, chosen by an earlier run where there was one."""
    chain, config = subject.chain, subject.config
    checkpoint, bare = cut_checkpoint(run, subject, keep, images, labels, allow_custom)
    smaller = build_chain(checkpoint.model, images[:1])
    chosen = {group.name for group in subject.layers}
    layers = [group for _, group in smaller.groups() if group.name in chosen]
    result = Subject(checkpoint, smaller, config, layers, copy_of(checkpoint.model))
    checkpoint.model.to(chain.device, run.dtype)
    facts = {width.name: {"kind": width.kind, "before": width.units, "after": count} for width, count in keep.items()}
    teacher = Teacher.of(chain, smaller, images[:1].to(run.dtype))
    return Cut(result, teacher, {name: tensor.to(chain.device) for name, tensor in bare.items()}, facts)


def cut_checkpoint(
    run: Run,
    subject: Subject,
    keep: Mapping[Width, int],
    images: Tensor | Images,
    labels: Tensor | None,
    allow_custom: bool = False,
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The checkpoint, on the CPU in its own types, without the units that go, those left repaired; and what the repair
    has changed, as it was. The subject's network, which is left as it is, computes in the run's type from here on."""
    chain, config = subject.chain, subject.config
    subject.network.to(run.dtype)
    widths = list(keep)
    names = dict.fromkeys(slot.name for width in widths for slot in (*width.makers, *width.readers))
    weights = {name: chain.weight(name).detach() for name in names}
    evidence = Evidence(weights, Full(), config, chain, images, labels, run)

    def decide() -> Record:
        run.say(f"Choosing units of {len(widths)} layers by {config.units}")
        units = in_smaller_batches(lambda fitting: choose_units(fitting, keep), fit_criterion(evidence))
        tensors = {f"kept {i}": units.kept[width].cpu() for i, width in enumerate(widths)}
        for what, own in (("turned", units.turned), ("tensor", units.tensors)):
            tensors |= {f"{what} {name}": value.cpu() for name, value in own.items()}
        return Record(tensors, {})

    found = run.journal.once("units", decide).tensors
    kept = {width: found[f"kept {i}"] for i, width in enumerate(widths)}

    def kept_of(what: str) -> dict[str, Tensor]:
        own = {name.removeprefix(what): value for name, value in found.items() if name.startswith(what)}
        return {name: value.to(subject.original[name].dtype) for name, value in own.items()}

    turned, tensors = kept_of("turned "), kept_of("tensor ")
    bare = cut(rescaled(subject.original | turned, keep), kept)
    state = cut(rescaled(subject.original | turned | tensors, keep), kept)
    smaller = resized(subject.checkpoint, state, sizes_of(subject, keep), allow_custom, unread(chain))
    return smaller, {name: bare[name] for name in tensors}
