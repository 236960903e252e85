"""Adam (Kingma and Ba 2015) on the active weights: cheap steps that see many images, for a loss of which one batch
says too little for a Newton step (docs/results.md, "Predictions")."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .newton import NewtonResult, NewtonStatus, Objective


JUDGED_EVERY = 10
"""Steps between two looks at the held-out loss."""


def adam(
    batches: Iterable[Objective],
    held_out: Objective,
    w: Tensor,
    rate: float,
    steps: int,
    progress: Callable[[NewtonResult], None] = lambda result: None,
) -> NewtonResult:
    """Minimises the mean of ``batches`` from w by one step per batch.

    The weights returned are the best by the ``held_out`` loss, of the start and of every tenth iterate.

    Args:
        batches: ``steps`` objectives.
        held_out: objective on images that no batch holds.
        w: active weights to start from, shape (m,).
        rate: how far a step moves a weight, as a share of the root mean square of w; it grows over the first
            twentieth of the steps and falls to zero by half a cosine.
        steps: their number, which the rate's course depends on.
        progress: called whenever the held-out loss was looked at.
    """
    start = held_out.value(w)
    result = NewtonResult(w, NewtonStatus.KEPT_MASKED, start, start)
    if not math.isfinite(start):
        result.status = NewtonStatus.NON_FINITE
        return result
    largest = rate * float(w.square().mean().sqrt())
    moving = w.detach().clone()
    optimizer = torch.optim.Adam([moving], betas=(0.9, 0.99))
    for step, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = (
            largest * min(1.0, 20 * step / steps) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        )
        loss, moving.grad = batch.gradient(moving)
        if not math.isfinite(loss) or not torch.isfinite(moving.grad).all():
            result.status = NewtonStatus.NON_FINITE
            break
        optimizer.step()
        result.steps = step
        if step % JUDGED_EVERY == 0 or step == steps:
            loss = held_out.value(moving)
            if loss < result.loss_end:
                result.w, result.loss_end, result.status = moving.clone(), loss, NewtonStatus.IMPROVED
            result.losses.append(result.loss_end)
            progress(result)
    return result
