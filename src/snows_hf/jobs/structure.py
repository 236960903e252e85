"""Structured pruning: units are chosen and cut out, and what is left is a smaller network of the same class, which the
dense one teaches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapters import build_chain
from ..adapters.turn import rescaled
from ..adapters.widths import Width, cut, unread
from ..hub.load import Checkpoint
from ..hub.resize import resized
from ..masks.choices import fit_criterion, in_smaller_batches
from ..masks.evidence import Evidence
from ..masks.unit_budget import find_counts
from ..masks.units import choose_units
from ..method.streams import Teacher
from ..patterns import Full
from ..runtime.journal import Record
from ..runtime.memory import Images
from ..runtime.run import Run
from .smaller import groups_of, sizes_of
from .subject import Subject, copy_of


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
