"""The K-step objective (Eq. 3/6) of one batch, as a function of a layer's active weights.

L(w) = Σ_k mean((Y^{l+k} − f^{l:l+k}(X^l, w))²) for k = 0 … K: the paper's squared norms, each divided by its number of
entries, so that no operation outweighs another by size and λ means the same for every batch size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd import grad

from ..adapters.base import Chain, Group, State
from ..runtime.distributed import Share, processes, whole
from ..settings import PruneConfig
from .newton import Expansion
from .preconditioner import Bias, mean_grams, recorded, row_preconditioner


@dataclass(frozen=True)
class ActiveWeights:
    """The m weights of a group that its masks keep, as one flat vector w; its parameters without a mask have none.

    Attributes:
        masks: parameter name → bool mask, those of weights and, all True, those of biases that move with them.
        biases: of weights, the biases that do.
    """

    masks: Mapping[str, Tensor]
    biases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, group: Group, masks: Mapping[str, Tensor], device: torch.device, biases: bool = False
    ) -> "ActiveWeights":
        """Those of a group, by the masks that there are for its parameters; with their ``biases``, or without."""
        own = {name: masks[name].to(device) for name in group.parameters if name in masks}
        moving = {weight: bias for weight, bias in group.biases if biases and weight in own}
        rows = {bias: own[weight].new_ones(len(own[weight])) for weight, bias in moving.items()}
        return cls(own | rows, moving)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The masks of weights alone."""
        biases = {*self.biases.values()}
        return {name: mask for name, mask in self.masks.items() if name not in biases}

    @property
    def size(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def gather(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Full weights → w (m,), where the masks are."""
        return torch.cat([weights[name].to(mask.device)[mask] for name, mask in self.masks.items()])

    def within(self, chain: Chain) -> Tensor:
        """w (m,) of the weights that the chain's model has now, detached."""
        return self.gather({name: chain.weight(name).detach() for name in self.masks})

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


def hessian_expansion(
    loss: Tensor,
    w: Tensor,
    total: Callable[[Tensor], Tensor] = lambda part: part,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Expansion:
    """A loss around w (m,), with its own Hessian; ``total`` sums over processes what each has a part of."""
    (gradient,) = grad(loss, w, create_graph=True)

    def product(p: Tensor) -> Tensor:
        return total(grad(gradient, w, p, retain_graph=True)[0])

    return Expansion(float(total(loss.detach())), total(gradient.detach()), product, preconditioner)


class KStepObjective:
    """Value and second-order expansion of Eq. 6 on one batch.

    Args:
        state: what enters the layer in the pruned network.
        config: weighting of the operations, ``emphasis`` of late ones (where the segment is the whole network),
            curvature, preconditioner and its damping.
        targets: Y^{l+k}, one tensor per operation of the segment, None of those that are not compared. None: what
            they are with the model's own weights.
        share: which images of the batch ``state`` and ``targets`` hold; value and expansion are those of the whole
            batch. None: all of them.
        autocast: matrix products and convolutions of the segment, and of its derivatives, are in bfloat16.
        turn: whose turn it is among the parts of the batch from which curvature is taken (``config.curvature_size``).
    """

    def __init__(
        self,
        segment: Segment,
        active: ActiveWeights,
        state: State,
        config: PruneConfig,
        targets: Sequence[Tensor | None] | None = None,
        share: Share | None = None,
        autocast: bool = False,
        turn: int = 0,
    ) -> None:
        self.segment, self.active, self.state, self.solver = segment, active, state, config.solver
        self.share, self.autocast, self.turn = share or whole(len(state[0])), autocast, turn
        least = 1 if self.share.alone else 2 * processes()  # every process has an image of each part then
        self.count = -(-self.share.total // max(config.curvature_size or self.share.total, least))
        if targets is None:
            with torch.no_grad():
                targets = segment.outputs(state)
        self.compared = [place for place, y in enumerate(targets) if y is not None]
        self.targets = [y for y in targets if y is not None]
        emphasis = config.emphasis if segment.group.kind == "joint" else 0.0
        self.weights = []
        for place, y in zip(self.compared, self.targets, strict=True):
            # One over the entries of an operation's targets in the whole batch, and over their variance.
            variance = self.share.variance(y) + 1e-12 if config.weighting == "relative" else 1.0
            weight = self.share.weight / (y[0].numel() * self.share.total * variance)
            self.weights.append(weight * ((place + 1) / len(targets)) ** emphasis)

    def _outputs(self, w: Tensor) -> list[Tensor]:
        with torch.autocast(w.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.segment.outputs(self.state, self.active.scatter(w))
        return [outputs[place] for place in self.compared]

    @torch.no_grad()
    def value(self, w: Tensor) -> float:
        """L(w)."""
        return sum(share * float(part.share.sum(part._loss(part._outputs(w)))) for share, part in self._parts())

    def _loss(self, outputs: Sequence[Tensor]) -> Tensor:
        # Sums are no numbers for half precision: its largest is 65,504, and bfloat16 has three digits.
        wide = torch.promote_types(outputs[0].dtype, torch.float32)
        terms = zip(self.weights, outputs, self.targets, strict=True)
        squares = (c * (o - y).to(wide).square().sum() for c, o, y in terms)
        return sum(squares, start=torch.zeros((), device=outputs[0].device))

    def expand(self, w: Tensor) -> Expansion:
        """Value, gradient and curvature product at w (Eq. 4, 5, 7): value and gradient of the whole batch, part by
        part, products on one part alone, whose graphs are built once and kept (Byrd et al., 2011, section 2)."""
        if self.count == 1:
            return self._expand(w)
        value, gradient, grams = self.first_order(w)
        local = self._part(self.turn % self.count)._expand(w, grams)
        return replace(local, value=value, gradient=gradient)

    def first_order(self, w: Tensor) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Value and gradient (m,) at w of the whole batch, part by part, and, for the preconditioner, the Gram
        matrices of what its layers read."""
        w = w.detach().requires_grad_()
        value, gradient, grams = 0.0, torch.zeros_like(w), dict[str, Tensor]()
        for share, part in self._parts():
            with recorded(self.segment.chain, self.active.weights) as seen:
                loss = part._loss(part._outputs(w))
            value += share * float(part.share.sum(loss.detach()))
            gradient += share * grad(loss, w)[0]
            if self.solver.preconditioner == "gram":
                own = mean_grams(seen, self.active.weights, part.share, self.active.biases, self.count)
                grams = {name: share * g + grams.get(name, 0.0) for name, g in own.items()}
        return value, self.share.sum(gradient), grams

    def _parts(self) -> Iterator[tuple[float, "KStepObjective"]]:
        """All parts of the batch, each with its share of it."""
        for place in range(self.count):
            part = self._part(place)
            yield part.share.total / self.share.total, part

    def _part(self, place: int) -> "KStepObjective":
        """Of the batch's images each ``count``-th, from ``place`` on: on average its loss is that of the batch."""
        part, own = copy(self), slice((place - self.share.start) % self.count, None, self.count)
        part.share = self.share.every(self.count, place)
        part.state, part.targets = tuple(tensor[own] for tensor in self.state), [y[own] for y in self.targets]
        part.weights = [c * (self.share.total / part.share.total) for c in self.weights]
        return part

    def _expand(self, w: Tensor, grams: Mapping[str, Tensor] | None = None) -> Expansion:
        """:meth:`expand` on graphs of all images; the preconditioner's Gram matrices may come from more than these."""
        w = w.detach().requires_grad_()
        with recorded(self.segment.chain, self.active.weights) as seen:
            outputs = self._outputs(w)
        total, loss = self.share.sum, self._loss(outputs)
        # Outputs that w does not reach (a shortcut's convolution beside it) have no part in the derivatives.
        residuals = [t for t in zip(self.weights, outputs, self.targets, strict=True) if t[1].requires_grad]
        moving = [(2 * c, o) for c, o, _ in residuals]
        precondition = None
        if self.solver.preconditioner == "gram":
            model, given = self.segment.chain.model, (self.solver.damping, self.share, self.solver.factor_entries)
            biases = {weight: Bias.of(model, weight, name) for weight, name in self.active.biases.items()}
            precondition = row_preconditioner(self.active.masks, seen, moving, *given, biases, grams)
        if self.solver.curvature == "hessian":
            return hessian_expansion(loss, w, total, precondition)

        # Jᵀu is linear in u, so its derivative along u is J at any u: the tangent pass by reverse mode alone, over a
        # graph that is built once per batch, where forward mode would run the primal again for every product. At u of
        # the residuals, Jᵀu is the gradient besides.
        f = [o for _, o in moving]
        u = [(2 * c * (o - y)).detach().requires_grad_() for c, o, y in residuals]
        (gradient,) = grad(f, w, u, create_graph=True)

        def gauss_newton(p: Tensor) -> Tensor:
            Jp = grad(gradient, u, p, retain_graph=True)
            return total(grad(f, w, [h * t for (h, _), t in zip(moving, Jp, strict=True)], retain_graph=True)[0])

        return Expansion(float(total(loss.detach())), total(gradient.detach()), gauss_newton, precondition)
