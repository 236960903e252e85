"""Which candidate each layer takes, so that the sum of their losses is least and what they keep stays in a budget."""

from collections.abc import Sequence
from itertools import chain
from math import gcd, inf

import numpy as np

from ..errors import ConfigError


BINS = 20_000
"""Steps in which a budget is counted, at most; where fewer do, it is counted exactly."""


def spend(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The number of each layer's candidate, by dynamic programming (a multiple-choice knapsack): exact, but that what
    candidates cost above the cheapest of their layer is rounded up to 1/:data:`BINS` of what can be chosen about,
    where that is more than their greatest common divisor. The budget is never exceeded.

    Args:
        losses: of every layer, the loss of each of its candidates; infinite ones are taken only if they must be.
        costs: of every layer, what each of its candidates keeps, in the budget's unit.

    Raises:
        ConfigError: the cheapest candidates together cost more than the budget.
    """
    floor = sum(map(min, costs))
    if floor > budget:
        raise ConfigError(
            f"The sparsest patterns of all layers together keep {floor:,}, and the budget is {budget:,}.",
            "Give a lower sparsity, or sparser patterns to choose from.",
        )
    ceiling = sum(map(max, costs))
    room = min(budget, ceiling) - floor
    above = [[cost - min(each) for cost in each] for each in costs]
    grain = gcd(*chain.from_iterable(above)) or 1
    step = grain * max(1, -(-room // (grain * BINS)))
    size = room // step + 1
    # Losses that are no finite numbers are worse than all others together.
    finite = [loss for each in losses for loss in each if loss < inf]
    worst = 1 + 2 * len(losses) * max(map(abs, finite), default=0)
    best = np.zeros(size)  # of the layers so far, by what they spend above the floor, at most
    taken = np.zeros((len(losses), size), dtype=np.int64)
    extras = [[-(-more // step) for more in each] for each in above]
    for i, (each, extra) in enumerate(zip(losses, extras, strict=True)):
        options = np.full((len(each), size), np.inf)
        for j, (loss, more) in enumerate(zip(each, extra, strict=True)):
            if more < size:
                options[j, more:] = best[: size - more] + (loss if loss < inf else worst)
        taken[i] = options.argmin(0)
        best = options.min(0)
    left, choice = size - 1, []
    for i in reversed(range(len(losses))):
        choice.append(int(taken[i, left]))
        left -= extras[i][choice[-1]]
    return choice[::-1]
