"""How long the solves of a prune will take, from a few steps that are timed on the very model."""

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..adapters import Chain, State, frozen
from ..patterns import Masks
from ..settings import PruneConfig
from .objective import ActiveWeights, KStepObjective, Segment
from .streams import masked_operations, split_images, whole_network


T = TypeVar("T")

FEW, MORE = 4, 12
"""Images of the first two steps that are timed of a layer."""

ENOUGH, SPARED = 4.0, 0.02
"""Seconds, and share of the time of all steps, from the lesser of which on a timed step is long enough to tell it."""

REPEATED = 1.0
"""Seconds for which each is repeated, where once takes less."""

WORTH_SAYING = 20.0
"""Seconds that work takes at the least, from which on an estimate is worth the time that it takes."""


def estimated_seconds(chain: Chain, images: Tensor, count: int, masks: Masks, config: PruneConfig) -> float | None:
    """Seconds that all solves of a prune and its streams take, if no layer ends early; None where it is not long.
    Streams are the dense network's and the pruned one's, once through all layers in every sweep.

    Args:
        chain: of the network, with the weights that it has now.
        images: preprocessed (n, 3, h, w), ``MORE`` of them where there are as many.
        count: of all calibration images.
        masks: of the weights that are pruned.
    """
    start: State = (images.to(chain.device),)
    todo = set(masked_operations(chain, masks)) if config.sweeps else set[int]()
    one_pass = pass_seconds(chain, start[0], count)
    one_step = config.solver.cg_max_iter * 2 * one_pass * min(1, (config.curvature_size or config.batch_size) / count)
    if (config.sweeps * (config.k + 1) + config.joint_steps) * one_step < WORTH_SAYING:
        return None
    known: dict[tuple[object, ...], float] = {}
    total = 2 * config.sweeps * one_pass
    with frozen(chain.model):
        for index, operation, state in chain.walk(start, stop=max(todo, default=-1) + 1):
            if index in todo and operation.group is not None:
                segment = Segment.cut(chain, index, config.k)
                shapes = tuple(tuple(chain.weight(name).shape) for name in operation.group.parameters)
                key = (operation.group.kind, shapes, segment.stop - segment.start)
                if key not in known:
                    known[key] = solve_seconds(segment, state, count, masks, config)
                total += config.sweeps * known[key]
        if config.joint_steps:
            total += solve_seconds(whole_network(chain, masks), start, count, masks, config, config.joint_steps)
    return total


def pass_seconds(chain: Chain, images: Tensor, count: int) -> float:
    """Of ``count`` images once through the network, from those (n, 3, h, w) that are on its device."""
    with frozen(chain.model), torch.no_grad():
        chain((images,))
        return count / len(images) * timed(chain, lambda: chain((images,)))[1]


def solve_seconds(
    segment: Segment, state: State, count: int, masks: Masks, config: PruneConfig, steps: int | None = None
) -> float:
    """Of one group: so many ``steps``, or as many as the settings give a layer, each on one batch."""
    *batches, judge = split_images(count, config.batch_size, config.held_out)
    steps = config.steps_of_a_layer(len(batches)) if steps is None else steps
    batch, judges = batches[0].stop - batches[0].start, judge.stop - judge.start
    part = min(config.curvature_size or batch, batch)
    active = ActiveWeights.of(segment.group, masks, segment.chain.device, config.biases)
    w, whole = active.within(segment.chain), config.updated(curvature_size=0)

    def objective(images: int) -> KStepObjective:
        again = torch.arange(images) % len(state[0])
        return KStepObjective(segment, active, tuple(tensor[again] for tensor in state), whole)

    step = grown(lambda images: least(partial(step_seconds, objective(images), w)), part, steps)
    few = objective(MORE)
    value, first_order = timed(segment.chain, lambda: few.value(w))[1] / MORE, 0.0
    if part < batch:
        first_order = timed(segment.chain, lambda: few.first_order(w))[1] / MORE
    return steps * (step + batch * (first_order + 2 * value) + judges * value * (2 if config.solver.average else 1))


def grown(seconds: Callable[[int], float], most: int, steps: int) -> float:
    """Seconds that one of so many ``steps`` takes on ``most`` images, from those that some take on fewer. A few images
    do not keep a processor busy, and not all of the work grows with them: so three times as many are timed for as long
    as that takes less than :data:`ENOUGH`."""
    times = {images: seconds(images) for images in (FEW, MORE)}
    while True:
        (fewer, before), (more, after) = list(times.items())[-2:]
        found = max(after, after + (after - before) / (more - fewer) * (most - more))
        if more >= most or after > min(ENOUGH, SPARED * steps * found):
            return found
        images = min(3 * more, most)
        times[images] = seconds(images)


def step_seconds(objective: KStepObjective, w: Tensor) -> float:
    """An expansion at w (m,), with all the products that a step may take."""
    chain = objective.segment.chain
    local, expand = timed(chain, lambda: objective.expand(w))
    precondition = local.preconditioner or (lambda r: r)
    _, product = timed(chain, lambda: precondition(local.product(local.gradient)))
    return expand + objective.solver.cg_max_iter * product


def least(seconds: Callable[[], float]) -> float:
    """Of repeated measurements, the first of which has to warm up: a small network's are noise by themselves."""
    found = [seconds()]
    while sum(found) < REPEATED:
        found.append(seconds())
    return min(found)


def timed(chain: Chain, work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds that it takes on the chain's device."""
    started = time.perf_counter()
    result = work()
    if chain.device.type == "cuda":
        torch.cuda.synchronize(chain.device)
    return result, time.perf_counter() - started


def in_words(seconds: float) -> str:
    """Of a time that is known roughly."""
    if seconds < 90:
        return f"{max(round(seconds, -1), 10):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
