"""The K-step objective (Eq. 3/6) of one batch, as a function of a layer's active weights.

L(w) = Σ_k mean((Y^{l+k} − f^{l:l+k}(X^l, w))²) for k = 0 … K: the paper's squared norms, each divided by its number of
entries, so that no operation outweighs another by size and λ means the same for every batch size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from .adapters.base import Chain, Group, State
from .solver.newton import Expansion


@dataclass(frozen=True)
class ActiveWeights:
    """The m weights of a group that its masks keep, as one flat vector w.

    Attributes:
        masks: parameter name → bool mask of the parameter's shape, for the pruned parameters of the group.
    """

    masks: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def gather(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Full weights → w (m,)."""
        return torch.cat([weights[name][mask] for name, mask in self.masks.items()])

    def scatter(self, w: Tensor) -> dict[str, Tensor]:
        """w (m,) → full weights, zero where masked; differentiable."""
        parts = w.split([int(mask.sum()) for mask in self.masks.values()])
        return {
            name: torch.zeros_like(mask, dtype=w.dtype).masked_scatter(mask, part)
            for (name, mask), part in zip(self.masks.items(), parts, strict=True)
        }


@dataclass(frozen=True)
class Segment:
    """f^{l:l+k} for k = 0 … K: operations ``start`` up to ``stop``, with K capped at K_max, the last operation."""

    chain: Chain
    group: Group
    start: int
    stop: int

    @classmethod
    def cut(cls, chain: Chain, index: int, k: int) -> "Segment":
        """The segment of the group that acts in operation ``index``, for K = ``k``."""
        group = chain.operations[index].group
        assert group is not None
        return cls(chain, group, index, min(index + k + 1, len(chain.operations)))

    def outputs(self, state: State, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The K + 1 outputs from the state before operation ``start``; ``weights`` replace the group's own."""
        return self.chain.outputs(state, self.start, self.stop, dict(weights or {}))


class KStepObjective:
    """Value and second-order expansion of Eq. 6 on one batch.

    Args:
        segment: the operations whose outputs are compared.
        active: the weights that may move.
        state: what enters the layer in the pruned network.
        targets: Y^{l+k}, one tensor per operation of the segment.
        curvature: ``hessian`` or ``gauss-newton``.
    """

    def __init__(
        self, segment: Segment, active: ActiveWeights, state: State, targets: Sequence[Tensor], curvature: str
    ) -> None:
        self.segment, self.active, self.state = segment, active, state
        self.targets, self.curvature = targets, curvature

    def _outputs(self, w: Tensor) -> list[Tensor]:
        return self.segment.outputs(self.state, self.active.scatter(w))

    @torch.no_grad()
    def value(self, w: Tensor) -> float:
        """L(w)."""
        return float(self._loss(self._outputs(w)))

    def _loss(self, outputs: Sequence[Tensor]) -> Tensor:
        return sum((o - y).square().mean() for o, y in zip(outputs, self.targets, strict=True))

    def expand(self, w: Tensor) -> Expansion:
        """Value, gradient and curvature product at w (Eq. 4, 5, 7), on graphs that are built once and kept."""
        w = w.detach().requires_grad_()
        outputs = self._outputs(w)
        loss = self._loss(outputs)
        if self.curvature == "hessian":
            (gradient,) = grad(loss, w, create_graph=True)

            def product(p: Tensor) -> Tensor:
                return grad(gradient, w, p, retain_graph=True)[0]

            return Expansion(float(loss.detach()), gradient.detach(), product)

        (gradient,) = grad(loss, w, retain_graph=True)
        # Jᵀu is linear in u, so its derivative along u is J: the tangent pass by reverse mode alone, over a graph that
        # is built once per batch, where forward mode would run the primal again for every product.
        moving = [o for o in outputs if o.requires_grad]
        u = [torch.zeros_like(o).requires_grad_() for o in moving]
        (pullback,) = grad(moving, w, u, create_graph=True)

        def gauss_newton(p: Tensor) -> Tensor:
            Jp = grad(pullback, u, p, retain_graph=True)
            return grad(moving, w, [2 / t.numel() * t for t in Jp], retain_graph=True)[0]

        return Expansion(float(loss.detach()), gradient, gauss_newton)
