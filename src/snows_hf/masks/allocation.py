"""Allocation by sensitivity: what each layer costs the network under each candidate pattern, alone, and the choice of
one candidate a layer under a budget.

A layer's mask costs far more before SNOWS than after, and not by the same factor in every layer. So each layer takes
``repair_steps`` Newton steps on a few images first (0: none), and then the rest of the network is run on others. The
losses of all layers are added up as if they were independent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..adapters import State, frozen
from ..errors import ConfigError, NumericsError
from ..method.newton import newton
from ..method.objective import ActiveWeights, KStepObjective, Segment
from ..method.streams import masked_operations
from ..patterns import PerLayer, Unstructured, parse_candidates
from ..patterns.budget import spend
from ..patterns.plan import Candidate
from ..settings import PruneConfig
from . import Evidence, choose


IMAGES = 256
"""Most images that are used: a quarter repairs, which is what costs, the others judge."""


FINE = 200
"""Sparsities between two measured ones are chosen from so many in all, their losses interpolated."""


@dataclass(frozen=True)
class Sensitivity:
    """One layer under one candidate pattern, with all other layers dense.

    Attributes:
        layer: name of the group.
        parameters: of the group.
        pattern: None for dense.
        weights: of the layer, in all.
        kept: how many of them stay.
        flops: operations of the dense layer on one image.
        loss: mean squared error of the logits over their variance, on images that the repair did not see.
    """

    layer: str
    parameters: tuple[str, ...]
    pattern: Candidate
    weights: int
    kept: int
    flops: int
    loss: float


def layer_sensitivities(
    evidence: Evidence,
    candidates: Sequence[Candidate],
    flops: Mapping[str, int],
    repair_steps: int,
    on_layer: Callable[[Sensitivity], None] = lambda sensitivity: None,
) -> list[Sensitivity]:
    """The sensitivity of every layer to every candidate that fits it, layer by layer, the sparsest first.

    Args:
        evidence: of the dense network, with images; ``config.mask`` chooses each layer's mask.
        candidates: None is not measured: its loss is 0.
        flops: of every module on one image, by name.
        repair_steps: Newton steps of each layer before it is judged.
        on_layer: called with each result.

    Raises:
        ConfigError: fewer than two images.
        NumericsError: the dense network's logits are not finite.
    """
    chain, config = evidence.network, evidence.config
    device = chain.device
    images = evidence.images
    if images is None or len(images) < 2:
        raise ConfigError("A sensitivity takes two images at least: one that repairs, and one that judges.")
    count = min(len(images), IMAGES)
    learners = max(1, count // 4)
    size = config.batch_size
    starts: list[State] = [(images[i : min(i + size, learners)].cpu(),) for i in range(0, learners, size)]
    judging = len(starts)
    starts += [(images[i : min(i + size, count)].cpu(),) for i in range(learners, count, size)]
    groups = dict(chain.groups())
    rows: list[Sensitivity] = []
    for candidate in candidates:
        if candidate is None:
            continue
        own = replace(evidence, pattern=candidate, images=images[:count])
        if own.labels is not None:
            own = replace(own, labels=own.labels[:count])
        choice = choose(own)
        todo = masked_operations(chain, choice.masks)
        states = list(starts)
        with frozen(chain.model):
            for index, operation in enumerate(chain.operations[: todo[-1] + 1]):
                if index in todo:
                    group = groups[index]
                    active = ActiveWeights.of(group, choice.masks, device)
                    dense = {name: chain.weight(name).detach() for name in active.masks}
                    segment = Segment.cut(chain, index, config.k)
                    w = active.gather({name: choice.weights.get(name, dense[name]).to(dense[name]) for name in dense})
                    learned, judged = states[:judging], states[judging:]
                    w = repaired(segment, active, w, learned, judged[0], config, repair_steps)
                    loss = logits_error(segment, active.scatter(w), judged)
                    weights = sum(chain.weight(name).numel() for name in group.parameters)
                    masked = sum(mask.numel() for mask in active.masks.values())
                    operations = sum(flops[name.removesuffix(".weight")] for name in group.parameters)
                    kept = weights - masked + active.size
                    row = Sensitivity(group.name, group.parameters, candidate, weights, kept, operations, loss)
                    rows.append(row)
                    on_layer(row)
                with torch.no_grad():
                    states = [
                        send_to_device(operation.run(send_to_device(state, device)), torch.device("cpu"))
                        for state in states
                    ]
    order = {group.name: i for i, group in groups.items()}
    return sorted(rows, key=lambda row: (order[row.layer], row.kept))


def repaired(
    segment: Segment,
    active: ActiveWeights,
    w: Tensor,
    states: Sequence[State],
    judge: State,
    config: PruneConfig,
    steps: int,
) -> Tensor:
    """w (m,) after so many Newton steps (Algorithm 2) on the dense network's activations, batch after batch; another
    batch judges, as in the cascade."""
    if not steps:
        return w
    solver = replace(config.solver, passes=1)

    def objective(state: State) -> KStepObjective:
        state = send_to_device(state, segment.chain.device)
        with torch.no_grad():
            targets = segment.outputs(state)
        relative = config.weighting == "relative"
        given = solver.curvature, solver.preconditioner, solver.damping, relative
        return KStepObjective(segment, active, state, targets, *given, factor_entries=solver.factor_entries)

    batches = (objective(states[i % len(states)]) for i in range(steps))
    return newton(batches, objective(judge), w, solver).w


@torch.no_grad()
def logits_error(segment: Segment, weights: dict[str, Tensor], states: Sequence[State]) -> float:
    """Mean squared error of the logits with a layer's weights replaced, over the variance of the dense ones.

    Raises:
        NumericsError: the dense logits are not finite.
    """
    chain, stop = segment.chain, len(segment.chain.operations)

    def logits(replaced: dict[str, Tensor]) -> Tensor:
        on_device = (send_to_device(state, chain.device) for state in states)
        return torch.cat([chain.outputs(state, segment.start, stop, replaced)[-1] for state in on_device])

    target, output = logits({}), logits(weights)
    if not target.isfinite().all():
        raise NumericsError("The dense network's logits are not all finite numbers.", "Use --dtype float32.")
    loss = float((output - target).square().mean() / (target.var() + 1e-12))
    return loss if math.isfinite(loss) else math.inf


def allocate(table: Sequence[Sensitivity], config: PruneConfig) -> PerLayer:
    """The pattern of each layer whose losses sum to the least, under the budget that ``config`` sets.

    Of N:M candidates by :func:`spend`; of sparsities likewise, with losses interpolated between the measured ones.

    Args:
        table: what :func:`layer_sensitivities` gives.
        config: pattern, sparsity and budget; a set of patterns with ``dense`` lets layers stay dense.

    Raises:
        ConfigError: the budget is below what the sparsest candidates keep.
    """
    named = parse_candidates(config.pattern)
    layers = [list(rows) for _, rows in groupby(table, key=lambda row: row.layer)]
    total = named[0].sparsity if isinstance(named[0], Unstructured) else config.sparsity
    options = [interpolated(rows) for rows in layers] if isinstance(named[0], Unstructured) else layers
    if isinstance(named[0], Unstructured) or None in named:
        options = [[*rows, replace(rows[0], pattern=None, kept=rows[0].weights, loss=0.0)] for rows in options]
    unit = [(rows[0].flops if config.budget == "flops" else rows[0].weights) / rows[0].weights for rows in layers]
    costs = [[math.ceil(row.kept * each - 1e-6) for row in rows] for rows, each in zip(options, unit, strict=True)]
    whole = sum(rows[0].weights * each for rows, each in zip(layers, unit, strict=True))
    budget = round(whole - round(total * whole))
    taken = spend([[row.loss for row in rows] for rows in options], costs, budget)
    chosen = [rows[i] for rows, i in zip(options, taken, strict=True)]
    if isinstance(named[0], Unstructured):  # what the steps of the interpolation have left over
        left = budget - sum(cost[i] for cost, i in zip(costs, taken, strict=True))
        i = max(range(len(chosen)), key=lambda i: (unit[i] > 0) * (chosen[i].weights - chosen[i].kept))
        if unit[i] > 0 and chosen[i].kept < chosen[i].weights:
            chosen[i] = keeping(chosen[i], min(chosen[i].kept + int(left / unit[i]), chosen[i].weights - 1))
    return PerLayer({name: row.pattern for row in chosen for name in row.parameters}, config.pattern)


def keeping(row: Sensitivity, kept: int, loss: float = math.nan) -> Sensitivity:
    """A row for another, unstructured number of weights kept."""
    return replace(row, pattern=Unstructured(1 - kept / row.weights, "layer"), kept=kept, loss=loss)


def interpolated(rows: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Rows for :data:`FINE` numbers of weights kept, from the least to the most that were measured.

    Between measured points the logarithm of the loss is linear in the logarithm of the share kept, as of a power law,
    and a loss never grows with the weights kept, as measured ones may by chance.
    """
    kept = np.array([max(row.kept, 1) for row in rows], float)
    losses = np.minimum.accumulate(np.array([max(row.loss, 1e-30) for row in rows]))
    fine = np.unique(np.geomspace(kept[0], kept[-1], FINE).round())
    between = np.exp(np.interp(np.log(fine), np.log(kept), np.log(losses)))
    whole = rows[0].weights
    return [keeping(rows[0], int(n), float(loss)) for n, loss in zip(fine, between, strict=True) if n < whole]
