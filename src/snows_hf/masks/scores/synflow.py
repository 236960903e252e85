"""SynFlow: θ ⊙ ∂R/∂θ with R = 1ᵀ f_|θ|(1), the flow of ones through the network of absolute weights, in many small
steps (Tanaka et al., 2020, Algorithm 1). It reads no data.

Biases and running means are zero there, since they carry no flow (on an untrained network they are zero anyway); norms
scale by the absolute of their weights. Everything is computed in float64, where the products of many layers still fit.
Where a network takes means off again (the LayerNorms of a ViT) its flow is only a heuristic.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapters import Chain, build_chain, frozen
from ...patterns import NM, Full, Pattern, PerLayer
from ..evidence import Evidence


ROUNDS = 100
"""Steps to an unstructured sparsity (section 6: 100); N:M takes one weight of every group a step, M − N in all."""


def synflow(evidence: Evidence) -> dict[str, Tensor]:
    chain = positive(evidence.network)
    ones = torch.ones_like(next(evidence.batches())[:1], dtype=torch.float64)
    active = evidence.everything
    theta = active.within(chain)
    kept = torch.ones_like(theta)
    scores: dict[str, Tensor] = {}
    for pattern in schedule(evidence.pattern):
        w = (theta * kept).requires_grad_()
        with frozen(chain.model):
            R = chain.outputs((ones,), 0, len(chain.operations), active.scatter(w))[-1].sum()
        flow = w.detach() * torch.autograd.grad(R, w)[0]
        scores = active.scatter(torch.where(kept > 0, flow, -torch.inf))  # what is gone stays gone
        kept = active.gather(pattern.masks(scores)).to(theta)
    return scores


@torch.no_grad()
def positive(chain: Chain) -> Chain:
    """Of a copy of the model, in float64: every weight its absolute; shifts zero; and functions that have bounds,
    beyond which no gradient comes through, without them."""
    model = copy.deepcopy(chain.model).double()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "running_mean")):
            tensor.zero_()
        elif tensor.is_floating_point():
            tensor.abs_()
    return build_chain(model, None if chain.image is None else chain.image.double(), UNBOUNDED)


def unchanged(x: Tensor) -> Tensor:
    return x


UNBOUNDED = {
    "hardtanh": lambda x, *bounds: x.relu(),  # what ReLU6 is a case of
    "relu6": torch.relu,
    "sigmoid": unchanged,
    "hardsigmoid": unchanged,
}


def schedule(pattern: Pattern) -> list[Any]:
    """The patterns of the rounds: densities falling exponentially to the last (Algorithm 1, line 3)."""
    if isinstance(pattern, PerLayer):  # each layer by its own schedule, all beginning and ending together
        own = {name: schedule(p) for name, p in pattern.patterns.items() if p}
        longest = max(map(len, own.values()))
        rounds = ({name: s[k * len(s) // longest] for name, s in own.items()} for k in range(longest))
        return [PerLayer(each, pattern.title) for each in rounds]
    if isinstance(pattern, Full):
        return [pattern]
    if isinstance(pattern, NM):
        return [NM(n, pattern.m) for n in range(pattern.m - 1, pattern.n - 1, -1)]
    densities = [(1 - pattern.sparsity) ** (k / ROUNDS) for k in range(1, ROUNDS)]
    return [*(replace(pattern, sparsity=1 - density, layer_cap=pattern.cap) for density in densities), pattern]
