"""Masks that thin out while the weights move: gradual pruning (Zhu and Gupta, 2017), a step of Newton at a time.

A mask that is chosen at once is chosen for the dense network. One that loses its weights little by little is chosen
for the network that the others, moving, have become.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..patterns import Masks, Pattern
from ..settings import SolverConfig
from .newton import NewtonResult, NewtonState, NewtonStatus, Objective, Step, newton_step
from .objective import KStepObjective
from .preconditioner import RowPreconditioner
from .streams import Batches


def thin_out(
    batches: Batches,
    held_out: Objective,
    state: NewtonState,
    config: SolverConfig,
    pattern: Pattern,
    progress: Callable[[NewtonState], None],
) -> NewtonResult:
    """One Newton step per batch, each followed by the removal of some weights; the last one by that of all which the
    pattern removes. The weights returned are those of the end, zero where they have gone.

    Args:
        batches: with the weights active that there are at first.
        held_out: objective on images that no batch holds; it measures, and decides nothing.
        state: where to go on, with as many weights as are active at first.
        progress: called after each step, with where the run is.
    """
    start, result = batches.active, state.result
    steps = result.steps + len(batches.order)
    for step, index in batches.order:
        weights = start.scatter(state.w)
        left = {name: weights[name] != 0 for name in start.weights}
        active = replace(start, masks={**start.masks, **left})
        batch = replace(batches, active=active).objective(index, step)
        taken, weights = thinning_step(batch, weights, config, pattern, surplus(result.steps + 1, steps))
        state.w = state.mean = result.w = start.gather(weights)
        result.steps, result.loss_end = result.steps + 1, held_out.value(state.w)
        result.losses.append(result.loss_end)
        if taken is None:
            result.status = NewtonStatus.NON_FINITE
            break
        result.cg_iterations += taken.direction.iterations
        result.cg_statuses.append(taken.direction.status)
        result.rejected += taken.alpha == 0.0
        del taken  # its preconditioner, before the next one is made
        progress(state)
    return result


def surplus(step: int, steps: int) -> float:
    """Of the weights that are too many for the pattern, the share that outlasts a step (from 1 on): those left are as
    the square of the steps to go, so that many go at first, when they cost little, and few at the end."""
    return ((steps - step) / (steps - step + 1)) ** 2


def thinning_step(
    batch: KStepObjective, weights: Mapping[str, Tensor], config: SolverConfig, pattern: Pattern, share: float
) -> tuple[Step | None, dict[str, Tensor]]:
    """One Newton step on one batch, with all weights active that are left, and the full weights after it,
    :func:`thinned` by the saliencies of the preconditioner, which must be ``gram``.

    Where loss or gradient are not finite there is no step, and the weights that were there come to the pattern at
    once, by magnitude. Biases all stay.
    """
    active = batch.active
    taken = newton_step(batch, active.gather(weights), config)
    if taken is None:
        masks = thinned(active.weights, {name: weight.abs() for name, weight in weights.items()}, pattern, share=0)
    else:
        assert isinstance(taken.preconditioner, RowPreconditioner)
        weights = active.scatter(taken.w)
        masks = thinned(active.weights, active.scatter(taken.preconditioner.saliency(taken.w)), pattern, share)
    return taken, {**weights, **{name: torch.where(mask, weights[name], 0.0) for name, mask in masks.items()}}


def thinned(masks: Mapping[str, Tensor], saliencies: Mapping[str, Tensor], pattern: Pattern, share: float) -> Masks:
    """Masks on their way to a pattern, from such as keep more: of the weights that it would remove now, a ``share``
    from 0 to 1 still stay, those with the highest saliencies (of the weights' shapes, not negative; those of what is
    gone are not read); with 0 the pattern is reached."""
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
