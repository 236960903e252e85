"""Masks that thin out while the weights move: gradual pruning (Zhu and Gupta, 2017), a step of Newton at a time.

A mask that is chosen at once is chosen for the dense network. One that loses its weights little by little is chosen
for the network that the others, moving, have become.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .config import SolverConfig
from .masks import Masks, Pattern
from .objective import KStepObjective
from .preconditioner import RowPreconditioner
from .solver import Step, newton_step


def surplus(step: int, steps: int) -> float:
    """Of the weights that are too many for the pattern, the share that outlasts a step (from 1 on): those left are as
    the square of the steps to go, so that many go at first, when they cost little, and few at the end."""
    return ((steps - step) / (steps - step + 1)) ** 2


def thinning_step(
    batch: KStepObjective, weights: Mapping[str, Tensor], config: SolverConfig, pattern: Pattern, share: float
) -> tuple[Step | None, dict[str, Tensor]]:
    """One Newton step on one batch, and the weights after it, of which those with the lowest saliencies have gone.

    Where loss or gradient are not finite there is no step, and the weights that were there come to the pattern at
    once, by magnitude.

    Args:
        batch: with all weights active that are left.
        weights: full weights, zero where they have gone.
        config: settings of the step, whose preconditioner must be ``gram``.
        pattern: see :func:`thinned`.
        share: see :func:`thinned`.
    """
    active = batch.active
    taken = newton_step(batch, active.gather(weights), config)
    if taken is None:
        masks = thinned(active.masks, {name: weight.abs() for name, weight in weights.items()}, pattern, share=0)
    else:
        assert isinstance(taken.preconditioner, RowPreconditioner)
        weights = active.scatter(taken.w)
        masks = thinned(active.masks, active.scatter(taken.preconditioner.saliency(taken.w)), pattern, share)
    return taken, {name: torch.where(masks[name], weight, 0.0) for name, weight in weights.items()}


def thinned(masks: Mapping[str, Tensor], saliencies: Mapping[str, Tensor], pattern: Pattern, share: float) -> Masks:
    """Masks on their way to a pattern: of the weights that it would remove now, ``share`` still stay, those with the
    highest saliencies; with 0 the pattern is reached.

    Args:
        masks: of which each keeps what the pattern keeps, and more.
        saliencies: of the weights' shapes, not negative; those of what is gone are not read.
        pattern: the one to come to.
        share: from 0 to 1.
    """
    scores = {name: torch.where(mask, saliencies[name], -1.0) for name, mask in masks.items()}
    final = pattern.masks(scores)
    leaving = {name: mask & ~final[name] for name, mask in masks.items()}
    order = torch.cat([scores[name][gone] for name, gone in leaving.items()]).argsort(descending=True, stable=True)
    stays = torch.zeros_like(order, dtype=torch.bool)
    stays[order[: round(share * len(order))]] = True
    parts = stays.split([int(gone.sum()) for gone in leaving.values()])
    return {
        name: final[name].masked_scatter(gone, part) for (name, gone), part in zip(leaving.items(), parts, strict=True)
    }
