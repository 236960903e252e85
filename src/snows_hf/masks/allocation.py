"""Allocation by sensitivity: what each layer costs the network under each candidate pattern, alone, and the choice of
one candidate a layer under a budget.

A layer's mask costs far more before SNOWS than after, and not by the same factor in every layer. So each layer takes
``repair_steps`` Newton steps on a few images first (0: none), and then the rest of the network is run on others. The
losses of all layers are added up as if they were independent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..adapters import Operation, State, frozen
from ..errors import ConfigError, NumericsError
from ..method.newton import newton
from ..method.objective import ActiveWeights, KStepObjective, Segment
from ..method.streams import masked_operations, through
from ..patterns import NM, Full, PerLayer, Unstructured, parse_candidates
from ..patterns.budget import spend
from ..patterns.plan import Candidate
from ..runtime.journal import Record
from ..settings import PruneConfig
from .choose import choose
from .evidence import Evidence
from .scores.base import Choice


IMAGES = 256
"""Most images that are used: a quarter repairs, which is what costs, the others judge."""

FINE = 200
"""Sparsities between two measured ones are chosen from so many in all, their losses interpolated."""


@dataclass(frozen=True)
class Sensitivity:
    """One layer, a group of parameters, under one candidate pattern, with all other layers dense.

    Attributes:
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
    evidence: Evidence, candidates: Sequence[Candidate], flops: Mapping[str, int]
) -> list[Sensitivity]:
    """The sensitivity of every layer to every candidate that fits it, layer by layer, the sparsest first.

    Args:
        evidence: of the dense network, with images; ``config.mask`` chooses each layer's mask, and each layer takes
            ``config.repair_steps`` Newton steps before it is judged.
        candidates: None is not measured: its loss is 0.
        flops: of every module on one image, by name.

    Raises:
        ConfigError: fewer than two images.
        NumericsError: the dense network's logits are not finite.
    """
    images, labels = evidence.images, evidence.labels
    if images is None or len(images) < 2:
        raise ConfigError("A sensitivity takes two images at least: one that repairs, and one that judges.")
    count = min(len(images), IMAGES)
    rows: list[Sensitivity] = []
    for number, candidate in enumerate(candidates):
        if candidate is not None:
            own = replace(evidence, pattern=candidate, images=images[:count], record=f"candidate-{number}")
            own = replace(own, labels=None if labels is None else labels[:count])
            rows += layers_under(candidate, own, flops)
    order = {group.name: i for i, group in evidence.network.groups()}
    return sorted(rows, key=lambda row: (order[row.layer], row.kept))


def layers_under(pattern: NM | Unstructured | Full, evidence: Evidence, flops: Mapping[str, int]) -> list[Sensitivity]:
    """The sensitivity of every layer that a pattern, the evidence's, fits."""
    chain, config, run, images = evidence.network, evidence.config, evidence.run, evidence.images
    assert images is not None
    learners, size = max(1, len(images) // 4), config.batch_size
    starts: list[State] = [(images[i : min(i + size, learners)].cpu(),) for i in range(0, learners, size)]
    judging = len(starts)
    starts += [(images[i : i + size].cpu(),) for i in range(learners, len(images), size)]
    choice = choose(evidence)
    todo = masked_operations(chain, choice.masks)
    rows: list[Sensitivity] = []

    def advance(operation: Operation, states: list[State]) -> list[State]:
        return [through(operation, state, chain.device) for state in states]

    with frozen(chain.model):
        for index, operation, states in chain.walk(starts, advance, stop=todo[-1] + 1):
            group = operation.group
            if group is None or index not in todo:
                continue
            run.tell(f"Layers under {pattern}", len(rows), len(todo), group.name)
            active = ActiveWeights.of(group, choice.masks, chain.device)

            def measure(index: int = index, active: ActiveWeights = active, states: list[State] = states) -> Record:
                segment = Segment.cut(chain, index, config.k)
                w = repaired(segment, active, choice, states[:judging], states[judging], config)
                return Record({}, {"loss": logits_error(segment, active.scatter(w), states[judging:])})

            found = run.journal.once(f"{evidence.record}-loss-{index:04d}", measure)
            weights = sum(chain.weight(name).numel() for name in group.parameters)
            kept = weights - sum(mask.numel() for mask in active.masks.values()) + active.size
            operations = sum(flops[name.removesuffix(".weight")] for name in group.parameters)
            loss = found.facts["loss"]
            rows.append(Sensitivity(group.name, group.parameters, pattern, weights, kept, operations, loss))
            run.say(f"{group.name} at {pattern}: {loss:.3g}")
    return rows


def repaired(
    segment: Segment,
    active: ActiveWeights,
    choice: Choice,
    states: Sequence[State],
    judge: State,
    config: PruneConfig,
) -> Tensor:
    """A layer's weights (m,) after ``config.repair_steps`` Newton steps (Algorithm 2) from those of a choice, on the
    dense network's activations, batch after batch; another batch judges, as in the cascade."""
    chain = segment.chain
    dense = {name: chain.weight(name).detach() for name in active.masks}
    w = active.gather({name: choice.weights.get(name, weight).to(weight) for name, weight in dense.items()})
    if not config.repair_steps:
        return w

    def objective(state: State) -> KStepObjective:
        return KStepObjective(segment, active, send_to_device(state, chain.device), config)

    batches = (objective(states[i % len(states)]) for i in range(config.repair_steps))
    return newton(batches, objective(judge), w, replace(config.solver, passes=1)).w


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

    Of N:M candidates by :func:`spend`; of sparsities likewise, with losses interpolated between the measured ones. A
    set of patterns with ``dense`` lets layers stay dense. ``table`` is of :func:`layer_sensitivities`.

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
