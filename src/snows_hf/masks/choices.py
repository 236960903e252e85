"""Patterns and masks of a prune: chosen, or as an earlier run has chosen them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import MemoryLimitError
from ..method.fitting import fit_batches
from ..patterns import Full, Masks, Pattern, PerLayer
from ..patterns.plan import Candidate
from ..runtime.journal import Record
from ..runtime.memory import until_it_fits
from .allocation import Sensitivity, allocate, layer_sensitivities
from .choose import choose, choose_masks
from .criteria import needs_labels
from .evidence import Evidence
from .scores.base import Choice


T = TypeVar("T")


def measure_sensitivities(
    evidence: Evidence, candidates: Sequence[Candidate], flops: Mapping[str, int]
) -> list[Sensitivity]:
    """:func:`layer_sensitivities` in batches that fit into memory.

    Raises:
        ConfigError: not even one image fits.
        MemoryLimitError: a single image is too much.
    """
    given = fit_criterion(fit_sensitivity(evidence, candidates))
    return in_smaller_batches(lambda fitting: layer_sensitivities(fitting, candidates, flops), given)


def find_allocation(
    evidence: Evidence, candidates: Sequence[Candidate], flops: Mapping[str, int]
) -> tuple[Evidence, dict[str, Any]]:
    """The evidence with a pattern for each layer, and how these were chosen, by an earlier run where there was one."""
    config, run = evidence.config, evidence.run

    def decide() -> Record:
        started = time.perf_counter()
        run.say(f"Measuring the sensitivity of the layers under {len(candidates)} patterns")
        table = measure_sensitivities(evidence, candidates, flops)
        patterns = {name: str(own or "dense") for name, own in allocate(table, config).patterns.items()}
        return Record({}, {"patterns": patterns, "seconds": time.perf_counter() - started})

    facts = run.journal.once("allocation", decide).facts
    run.journal.drop("candidate-")
    pattern = PerLayer.parse(facts["patterns"], config.pattern)
    return replace(evidence, pattern=pattern), {"kind": "sensitivity", "budget": config.budget, **facts}


def find_choice(evidence: Evidence) -> tuple[Choice, float]:
    """Masks (and weights) by the criterion, and the seconds that it took: an earlier run's where there was one."""
    run = evidence.run

    def decide() -> Record:
        started = time.perf_counter()
        if not isinstance(evidence.pattern, Full):  # which keeps all, where units go alone
            run.say(f"Choosing masks by {Path(evidence.config.mask).name} for {evidence.pattern}")
        choice = in_smaller_batches(choose, fit_criterion(evidence))
        tensors = {f"mask {name}": mask.cpu() for name, mask in choice.masks.items()}
        tensors |= {f"weight {name}": weight.cpu() for name, weight in choice.weights.items()}
        return Record(tensors, {"facts": dict(choice.facts), "seconds": time.perf_counter() - started})

    kept = run.journal.once(evidence.record, decide)
    run.journal.drop(f"{evidence.record}-layer-")
    found: dict[str, dict[str, Tensor]] = {"mask": {}, "weight": {}}
    places = {name: place for place, name in enumerate(evidence.weights)}
    device = next(iter(evidence.weights.values())).device
    for key in sorted(kept.tensors, key=lambda key: places.get(key.split(" ", 1)[1], len(places))):
        kind, name = key.split(" ", 1)
        found[kind][name] = kept.tensors[key].to(device)
    return Choice(found["mask"], found["weight"], kept.facts["facts"]), kept.facts["seconds"]


def in_smaller_batches(work: Callable[[Evidence], T], evidence: Evidence) -> T:
    """``work(evidence)``, with batches of half the size, and half of that, where memory does not suffice.

    Raises:
        MemoryLimitError: a single image is too much.
    """
    size = min(evidence.config.batch_size, len(evidence.images) if evidence.images is not None else 1)
    name = f"Mask criterion {Path(evidence.config.mask).name}"

    def shrink() -> None:
        nonlocal size
        if size == 1:
            raise MemoryLimitError(
                f"{name}: memory does not suffice for a single image.",
                "Choose one that reads no images (--mask magnitude), or give --device cpu.",
            )
        size = (size + 1) // 2
        evidence.run.say(f"{name}: out of memory; again in batches of {size} images")

    return until_it_fits(lambda: work(replace(evidence, config=evidence.config.updated(batch_size=size))), shrink)


def find_first_masks(evidence: Evidence, choice: Choice) -> tuple[Choice, Pattern | None]:
    """What a prune begins with, and the pattern that its masks thin out to: with gradual steps, the criterion's choice
    for twice as many weights; else ``choice`` as it is, and None."""
    config, relaxed = evidence.config, evidence.pattern.relaxed()
    if not config.gradual_steps or relaxed is None or config.mask.endswith(".safetensors"):
        return choice, None
    first, _ = find_choice(replace(evidence, pattern=relaxed, record="choice-relaxed"))
    masks = {name: first.masks.get(name, torch.ones_like(mask)) for name, mask in choice.masks.items()}
    return Choice(masks, first.weights), evidence.pattern


def alone(choice: Choice, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full weights of a criterion without SNOWS: its own update where it has one, else the dense weights masked."""
    weights = {name: choice.weights.get(name, original[name]).to(mask.device) for name, mask in choice.masks.items()}
    return masked(weights, choice.masks) | choice.free


def masked(weights: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Weights with zeros where their masks, if they have such, keep none."""
    # not a product, which would leave zeros of negative weights negative
    return {name: weight.where(masks[name], 0) if name in masks else weight for name, weight in weights.items()}


def fit_sensitivity(evidence: Evidence, candidates: Sequence[Candidate]) -> Evidence:
    """Evidence, with images, whose batches fit where layers are repaired one by one, under the candidate that keeps
    most.

    Raises:
        ConfigError: not even one image fits.
    """
    densest = min((c for c in candidates if c is not None), key=lambda candidate: candidate.sparsity)
    masks = choose_masks(dict(evidence.weights), densest, "magnitude")  # of any criterion's size
    images, config = evidence.images, evidence.config.updated(joint_steps=0)
    assert images is not None
    return replace(evidence, config=fit_batches(evidence.run, evidence.network, images[:2], masks, config))


def fit_criterion(evidence: Evidence) -> Evidence:
    """Evidence whose batches fit where a criterion needs labels: it expands the loss of the whole network.

    Raises:
        ConfigError: not even one image fits.
    """
    images = evidence.images
    if images is None or not needs_labels(evidence.config.mask, evidence.config.units):
        return evidence
    chain, config = evidence.network, evidence.config
    whole = config.updated(joint_steps=1, gradual=0.0, curvature="hessian", preconditioner="none")
    fitted = fit_batches(evidence.run, chain, images[:2], dict(evidence.everything.masks), whole)
    return replace(evidence, config=config.updated(batch_size=fitted.batch_size))
