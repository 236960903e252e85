"""Patterns and masks of a prune: chosen, or as an earlier run has chosen them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .allocation import Candidate, Sensitivity, allocate, layer_sensitivities
from .config import PruneConfig
from .errors import ConfigError, MemoryLimitError
from .fitting import fit_criterion, fit_sensitivity
from .journal import Journal, Record
from .masks import NM, Choice, Evidence, Pattern, PerLayer, Unstructured, choose, parse_pattern
from .memory import until_it_fits


T = TypeVar("T")


def one_pattern(config: PruneConfig) -> NM | Unstructured:
    """The pattern of all layers, where it is one; unstructured, as the allocation wants it shared out."""
    pattern = parse_pattern(config.pattern)
    scope = "layer" if config.allocation == "uniform" else "global"
    return replace(pattern, scope=scope) if isinstance(pattern, Unstructured) else pattern


def order_for(config: PruneConfig, candidates: Sequence[Candidate]) -> NM | None:
    """The N:M that channels are put in order for, the sparsest where layers may have several; None where they keep
    their order.

    Raises:
        ConfigError: an order was asked for where there is no N:M, or groups are of different sizes, or the masks come
            from a file.
    """
    patterns = [candidate for candidate in candidates if candidate is not None]
    several = [pattern for pattern in patterns if isinstance(pattern, NM)]
    sparsest = max(several, key=lambda pattern: pattern.sparsity, default=None)
    fits = sparsest is not None and len(several) == len(patterns) and len({pattern.m for pattern in several}) == 1
    from_file = config.mask.endswith(".safetensors")
    if not config.permute:
        alone = config.permute is None and fits and len(candidates) == 1 and not from_file
        return sparsest if alone and sparsest is not None and sparsest.relaxed() is not None else None
    if not fits:
        names = ", ".join(map(str, patterns))
        raise ConfigError(
            f"Channels cannot be ordered for {names}: expected N:M, all of one M.", "Leave out --permute."
        )
    if from_file:
        raise ConfigError(
            f"Masks from a file ({config.mask}) are for the channels as they are, not for another order.",
            "Leave out --permute.",
        )
    return sparsest


def measure_sensitivities(
    evidence: Evidence,
    candidates: Sequence[Candidate],
    flops: Mapping[str, int],
    left: int | None,
    on_stage: Callable[[str], None],
    on_layer: Callable[[Sensitivity], None] = lambda sensitivity: None,
) -> list[Sensitivity]:
    """:func:`layer_sensitivities` in batches that fit into memory.

    Raises:
        ConfigError: not even one image fits.
        MemoryLimitError: a single image is too much.
    """
    steps = evidence.config.repair_steps
    given = fit_criterion(fit_sensitivity(evidence, candidates, left, on_stage), left, on_stage)
    return in_smaller_batches(
        lambda fitting: layer_sensitivities(fitting, candidates, flops, steps, on_layer), given, on_stage
    )


def find_allocation(
    journal: Journal,
    evidence: Evidence,
    candidates: Sequence[Candidate],
    flops: Mapping[str, int],
    left: int | None,
    on_stage: Callable[[str], None],
) -> tuple[Evidence, dict[str, Any]]:
    """The evidence with a pattern for each layer, and how these were chosen, by an earlier run where there was one."""
    config = evidence.config

    def decide() -> Record:
        started = time.perf_counter()
        on_stage(f"Measuring the sensitivity of the layers under {len(candidates)} patterns")
        table = measure_sensitivities(evidence, candidates, flops, left, on_stage)
        patterns = {name: str(own or "dense") for name, own in allocate(table, config).patterns.items()}
        return Record({}, {"patterns": patterns, "seconds": time.perf_counter() - started})

    facts = journal.once("allocation", decide).facts
    pattern = PerLayer.parse(facts["patterns"], config.pattern)
    return replace(evidence, pattern=pattern), {"kind": "sensitivity", "budget": config.budget, **facts}


def find_choice(
    journal: Journal,
    evidence: Evidence,
    left: int | None,
    on_stage: Callable[[str], None],
    record: str = "choice",
) -> tuple[Choice, float]:
    """Masks (and weights) by the criterion, and the seconds that it took: an earlier run's where there was one."""

    def decide() -> Record:
        started = time.perf_counter()
        on_stage(f"Choosing masks by {Path(evidence.config.mask).name} for {evidence.pattern}")
        choice = in_smaller_batches(choose, fit_criterion(evidence, left, on_stage), on_stage)
        tensors = {f"mask {name}": mask.cpu() for name, mask in choice.masks.items()}
        tensors |= {f"weight {name}": weight.cpu() for name, weight in choice.weights.items()}
        return Record(tensors, {"facts": dict(choice.facts), "seconds": time.perf_counter() - started})

    kept = journal.once(record, decide)
    found: dict[str, dict[str, Tensor]] = {"mask": {}, "weight": {}}
    for name, weight in evidence.weights.items():  # in their order
        for kind, tensors in found.items():
            if f"{kind} {name}" in kept.tensors:
                tensors[name] = kept.tensors[f"{kind} {name}"].to(weight.device)
    return Choice(found["mask"], found["weight"], kept.facts["facts"]), kept.facts["seconds"]


def in_smaller_batches(run: Callable[[Evidence], T], evidence: Evidence, on_stage: Callable[[str], None]) -> T:
    """``run(evidence)``, with batches of half the size, and half of that, where memory does not suffice.

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
        on_stage(f"{name}: out of memory; again in batches of {size} images")

    return until_it_fits(lambda: run(replace(evidence, config=evidence.config.updated(batch_size=size))), shrink)


def find_first_masks(
    journal: Journal, evidence: Evidence, choice: Choice, left: int | None, on_stage: Callable[[str], None]
) -> tuple[Choice, Pattern | None]:
    """What a prune begins with, and the pattern that its masks thin out to: with gradual steps, the criterion's choice
    for twice as many weights; else ``choice`` as it is, and None."""
    config, relaxed = evidence.config, evidence.pattern.relaxed()
    if not config.gradual_steps or relaxed is None or config.mask.endswith(".safetensors"):
        return choice, None
    first, _ = find_choice(journal, replace(evidence, pattern=relaxed), left, on_stage, "choice-relaxed")
    masks = {name: first.masks.get(name, torch.ones_like(mask)) for name, mask in choice.masks.items()}
    return Choice(masks, first.weights), evidence.pattern


def alone(choice: Choice, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full weights of a criterion without SNOWS: its own update where it has one, else the dense weights masked."""
    return {
        # Not a product, which would leave zeros of negative weights negative.
        name: choice.weights.get(name, original[name]).to(mask.device).where(mask, 0)
        for name, mask in choice.masks.items()
    }
