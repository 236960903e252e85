"""A block preconditioner for the K-step curvature, from the layer's own inputs.

For one output channel r of a linear layer or convolution with input x and output z, the Gauss-Newton block of the
K-step loss is Σ gᵣ² x xᵀ over images and positions, with gᵣ the loss's sensitivity to zᵣ. It is replaced by bᵣ G,
where G = Σ x xᵀ is the Gram matrix of the inputs and bᵣ the mean of gᵣ², estimated with one random cotangent: the
Kronecker factors of Martens and Grosse (2015), with the diagonal of the output factor only. On the active weights of
each row it is factorised exactly; at K = 0 it is the Hessian itself, and conjugate gradients need one iteration.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import Chain
from ..runtime.distributed import Share, own_part
from .factors import (
    FACTOR_ENTRIES,
    IteratedRows,
    RowBlocks,
    Rows,
    SharedRows,
    Shift,
    WithBiases,
    floor_of,
    iterated,
    shared_entries,
)


SAMPLES = 16
"""Inputs that a Gram matrix is estimated from, at least, as a multiple of its size; and of ``MIN_IMAGES`` images."""

MIN_IMAGES = 32

STRIP = 128
"""Rows of a Gram matrix that are computed together, with what is right of them."""

LEAST = 1e-3
"""Least sensitivity of a row, as a share of the mean."""


@contextmanager
def recorded(chain: Chain, parameters: Iterable[str]) -> Iterator[dict[str, tuple[nn.Module, Tensor, Tensor]]]:
    """While open, notes (module, input, output) of every module that owns one of the parameters."""
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    handles = []
    for name in parameters:

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[name] = (module, inputs[0].detach(), output)

        handles.append(chain.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gram(module: nn.Module, x: Tensor, constant: bool = False, weights: Tensor | None = None) -> Tensor | None:
    """Σ x xᵀ over images and positions, (groups, d, d) with d the inputs of one output; None for other modules.

    ``x`` is a Linear's input (n, …, in) or a Conv2d's (n, c, h, w). Half precision is summed in float32. With a
    ``constant``, there is one input more, the last, which is 1. ``weights`` are those of an image's positions.
    """
    x = x if x.dtype == torch.float64 else x.float()
    root = None if weights is None else weights.to(x).sqrt()
    if isinstance(module, nn.Linear):
        x = x.flatten(0, -2)
        x = F.pad(x, (0, 1), value=1.0) if constant else x
        x = x if root is None else x * root.repeat(len(x) // len(root))[:, None]
        return outer(x.T[None])
    if not isinstance(module, nn.Conv2d):
        return None
    padding: Any = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        # What unfold does not know is put around the image first, as the module itself does.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    total: Tensor | None = None
    for part in x.split(64):  # unfolding multiplies memory by the kernel's size
        columns = F.unfold(part, module.kernel_size, module.dilation, padding, module.stride)
        columns = columns.unflatten(1, (module.groups, -1)).permute(1, 2, 0, 3).flatten(2)
        columns = F.pad(columns, (0, 0, 0, 1), value=1.0) if constant else columns
        columns = columns if root is None else columns * root.repeat(len(part))
        block = outer(columns)
        total = block if total is None else total + block
    return total


def outer(X: Tensor) -> Tensor:
    """X Xᵀ, (…, d, d), of X (…, d, n): what is below the diagonal is copied, a third of the time for wide layers."""
    d = X.shape[-2]
    total = X.new_empty(*X.shape[:-1], d)
    for start in range(0, d, STRIP):
        rows = slice(start, start + STRIP)
        strip = X[..., rows, :] @ X[..., start:, :].mT
        total[..., rows, start:], total[..., start:, rows] = strip, strip.mT
    return total


def sampled(mask: Tensor, z: Tensor, share: Share, parts: int = 1) -> tuple[slice, float]:
    """Images of this process from which a layer's Gram matrix is estimated, evenly spread over the whole batch, and
    what the sum over them is to be multiplied by.

    ``z`` is the layer's output: all of it but rows and images are positions, each with an input of its own. There are
    so many ``parts`` from which the estimate is made.
    """
    positions = z[0].numel() // len(mask)
    wanted = -(-max(MIN_IMAGES, -(-SAMPLES * mask[0].numel() // positions)) // parts)
    stride = max(1, share.total // wanted)
    return slice(-share.start % stride, None, stride), share.total / len(range(0, share.total, stride))


Seen = Mapping[str, tuple[nn.Module, Tensor, Tensor]]
"""What :func:`recorded` noted."""


def mean_grams(
    seen: Seen, masks: Mapping[str, Tensor], share: Share, biases: Container[str], parts: int = 1
) -> dict[str, Tensor]:
    """:func:`gram` of what each layer reads, per image of a batch, or of one of so many ``parts`` of it; with a
    constant where there are ``biases``. Modules that have none are left out."""
    means = dict[str, Tensor]()
    for name, mask in masks.items():
        module, *both = seen[name]
        # Windows of attention come in the place of images, an image's one after the other.
        x, z = (tensor.unflatten(0, (share.stop - share.start, -1)) for tensor in both)
        images, scale = sampled(mask, z, share, parts)
        g = gram(module, x[images].flatten(0, 1), constant=name in biases)
        if g is not None:
            means[name] = share.sum(g * (share.weight * scale / share.total))
    return means


class Bias(NamedTuple):
    """A bias that moves with a layer's rows.

    Attributes:
        column: by how much the layer's output z would have to change for what the bias adds, (rows,).
        after: whether it is added to what is computed from z: z itself, where the loss reads it, does not change.
    """

    name: str
    column: Tensor
    after: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, weight: str, name: str) -> "Bias":
        """The bias of this name, the layer's own or that of the batch norm after it, which scales z."""
        owner = name.rpartition(".")[0]
        if owner == weight.rpartition(".")[0]:
            return cls(name, torch.ones_like(model.get_parameter(name)), after=False)
        norm: Any = model.get_submodule(owner)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        least = (LEAST * scale.square().mean()).sqrt().clamp_min(1e-12)  # as of sensitivities, which have its square
        return cls(name, torch.where(scale < 0, -1.0, 1.0) / scale.abs().clamp_min(least), after=True)


class RowPreconditioner:
    """r (m,) → M⁻¹ r for a group, M having a block for each row of its parameters; of several processes each holds the
    factors of its own rows, and what these give is summed. ``factors`` come with the places of their weights, and of
    their biases, among the m."""

    def __init__(self, factors: Sequence[tuple[Rows | WithBiases, Sequence[slice]]], share: Share) -> None:
        self.factors, self.share = factors, share

    def __call__(self, r: Tensor) -> Tensor:
        return self._each(lambda rows, part: rows.solve(part), r)

    def saliency(self, w: Tensor) -> Tensor:
        """:meth:`Rows.saliency` of all active weights, (m,)."""
        return self._each(lambda rows, part: rows.saliency(part), w)

    def _each(self, of: Callable[[Rows | WithBiases, Tensor], Tensor], vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector)
        for rows, places in self.factors:
            parts = [vector[place] for place in places]
            found = of(rows, torch.cat(parts)).split([len(part) for part in parts])
            for place, part in zip(places, found, strict=True):
                result[place] = part
        return self.share.sum(result)


def row_preconditioner(
    masks: Mapping[str, Tensor],
    seen: Seen,
    outputs: Sequence[tuple[float, Tensor]],
    damping: float,
    share: Share,
    entries: int = FACTOR_ENTRIES,
    biases: Mapping[str, Bias] | None = None,
    grams: Mapping[str, Tensor] | None = None,
) -> RowPreconditioner | None:
    """The preconditioner of a group, or None where a module is neither Linear nor plain Conv2d.

    Args:
        masks: of weights, and of biases that move with them, in the order in which they are active.
        seen: what :func:`recorded` noted of the weights while ``outputs`` were computed.
        outputs: those of the segment, still attached to their graph, each with the loss's curvature in it.
        damping: λ.
        entries: most numbers in the factors of one parameter.
        biases: those that move, by their weights.
        grams: of what the weights' layers read, per image, if it comes from more images than these.
    """
    biases = biases or {}
    moving = {bias.name for bias in biases.values()}
    weights = {name: mask for name, mask in masks.items() if name not in moving}
    grams = grams or mean_grams(seen, weights, share, biases)
    if len(grams) < len(weights):
        return None
    f, u = [o for _, o in outputs], cotangents(outputs, share)
    sensitivities = torch.autograd.grad(f, [seen[name][2] for name in weights], u, retain_graph=True)
    starts = dict(zip(masks, accumulate((int(mask.sum()) for mask in masks.values()), initial=0), strict=False))
    factors: list[tuple[Rows | WithBiases, list[slice]]] = []
    for name, cotangent in zip(weights, sensitivities, strict=True):
        (module, _, z), mask, g = seen[name], masks[name], grams[name] * share.total
        b = mean_square(module, cotangent, share, g.dtype)
        if name not in biases:
            rows = factorised(mask, g, b, damping, entries)
            factors.append((rows, [moved_by(rows.span, starts[name])]))
            continue
        bias, through = biases[name], b
        if bias.after:
            direct = [own for own, o in zip(u, f, strict=True) if o is z]
            through = mean_square(module, sum(direct, start=-cotangent), share, g.dtype).minimum(b)
        g, shift = shift_of(g, b, through, bias.column.to(g), damping)
        rows = factorised(mask, g, b, damping, entries, shift)
        places = [moved_by(rows.span, starts[name]), moved_by(rows.part, starts[bias.name])]
        factors.append((WithBiases(rows, shift), places))
    return RowPreconditioner(factors, share)


def cotangents(outputs: Sequence[tuple[float, Tensor]], share: Share) -> list[Tensor]:
    """Random ones of the outputs, whose squares are on average the loss's curvature in each."""
    device = outputs[0][1].device
    generator = torch.Generator(device).manual_seed(0)
    u = []
    for h, o in outputs:  # drawn for the whole batch: every image has its own, whoever has the image
        signs = torch.randint(2, (share.total, *o.shape[1:]), generator=generator, device=device, dtype=o.dtype)
        u.append(signs[share.start : share.stop].mul(2 * h**0.5).sub_(h**0.5))  # a copy, without the others'
    return u


def channels_in_end(module: nn.Module, z: Tensor) -> Tensor:
    """A layer's output with its channels last: a Linear's are there, on windows or feature maps (n, …, …, out) too."""
    return z.movedim(1, -1) if isinstance(module, nn.Conv2d) else z


def mean_square(module: nn.Module, cotangent: Tensor, share: Share, dtype: torch.dtype) -> Tensor:
    """Of a cotangent of a layer's output, over images and positions, (rows,): none far below their mean, since it may
    be nearly zero by chance."""
    per_row = channels_in_end(module, cotangent).flatten(0, -2)
    b = share.mean(per_row.to(dtype).square().mean(0))
    return b.clamp_min(LEAST * float(b.mean()))


def shift_of(g: Tensor, b: Tensor, through: Tensor, column: Tensor, damping: float) -> tuple[Tensor, Shift]:
    """G (groups, d, d) of a layer's inputs alone, from that with a constant, and what its biases add: they have these
    columns, and of the sensitivities b (rows,) those ``through`` what they shift."""
    g, s, n = g[:, :-1, :-1], g[:, :-1, -1], g[0, -1, -1]
    cross = through * column
    return g, Shift(s, cross, (cross * column * n + floor_of(g, b, damping)).clamp_min(1e-30))


def factorised(mask: Tensor, g: Tensor, b: Tensor, damping: float, entries: int, shift: Shift | None = None) -> Rows:
    """What solves this process's rows: one factor for all of a group where they share their columns, iterations where
    they do not and are wide."""
    shared, part = shared_entries(mask, len(g)), own_part(len(mask))
    if shared is not None and shared <= entries and g.isfinite().all():
        return SharedRows(mask, g, b, damping, part, shift)
    kind = IteratedRows if iterated(mask) else RowBlocks
    return kind(mask, g, b, damping, entries, part, shift)


def moved_by(span: slice, start: int) -> slice:
    return slice(start + span.start, start + span.stop)
