"""A block preconditioner for the K-step curvature, from the layer's own inputs.

For one output channel r of a linear layer or convolution with input x and output z, the Gauss-Newton block of the
K-step loss is Σ gᵣ² x xᵀ over images and positions, with gᵣ the loss's sensitivity to zᵣ. It is replaced by bᵣ G,
where G = Σ x xᵀ is the Gram matrix of the inputs and bᵣ the mean of gᵣ², estimated with one random cotangent: the
Kronecker factors of Martens and Grosse (2015), with the diagonal of the output factor only. On the active weights of
each row it is factorised exactly; at K = 0 it is the Hessian itself, and conjugate gradients need one iteration.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import Chain
from ..runtime.distributed import Share, own_part


FACTOR_ENTRIES = 2**28
"""Most numbers in the factors of one parameter (1 GB in float32), where nothing else is said; rows are cut into blocks
to stay below."""

CHUNK_ENTRIES = 2**22
"""Numbers that are gathered and factorised at a time."""

SAMPLES = 16
"""Inputs that a Gram matrix is estimated from, at least, as a multiple of its size; and of ``MIN_IMAGES`` images."""

MIN_IMAGES = 32


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


def gram(module: nn.Module, x: Tensor) -> Tensor | None:
    """Σ x xᵀ over images and positions, (groups, d, d) with d the inputs of one output; None for other modules.

    ``x`` is a Linear's input (n, …, in) or a Conv2d's (n, c, h, w). Half precision is summed in float32.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(module, nn.Linear):
        x = x.flatten(0, -2)
        return (x.T @ x)[None]
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
        block = columns @ columns.mT
        total = block if total is None else total + block
    return total


def sampled(mask: Tensor, z: Tensor, share: Share) -> tuple[slice, float]:
    """Images of this process from which a layer's Gram matrix is estimated, evenly spread over the whole batch, and
    what the sum over them is to be multiplied by.

    ``z`` is the layer's output: all of it but rows and images are positions, each with an input of its own.
    """
    positions = z[0].numel() // len(mask)
    wanted = max(MIN_IMAGES, -(-SAMPLES * mask[0].numel() // positions))
    stride = max(1, share.total // wanted)
    return slice(-share.start % stride, None, stride), share.total / len(range(0, share.total, stride))


def layout(mask: Tensor, entries: int) -> tuple[int, int, int]:
    """Rows of a mask, blocks that each row's active weights are cut into, and the size of a block."""
    width = max(int(mask.flatten(1).sum(1).max()), 1)  # a mask may keep nothing
    pieces = max(1, -(-len(mask) * width * width // entries))
    size = -(-width // pieces)
    return len(mask), -(-width // size), size


def factor_bytes(masks: Mapping[str, Tensor], entries: int = FACTOR_ENTRIES) -> int:
    """Memory of the float32 factors of a group, no parameter having more than about so many ``entries``."""
    layouts = (layout(mask, entries) for mask in masks.values())
    return sum(4 * rows * blocks * size**2 for rows, blocks, size in layouts)


class RowBlocks:
    """Cholesky factors of bᵣ G + λI on the active weights of each row r of one parameter, for a part of its rows;
    ``span`` is where their active weights are among the parameter's."""

    def __init__(
        self,
        mask: Tensor,
        g: Tensor,
        b: Tensor,
        damping: float,
        entries: int = FACTOR_ENTRIES,
        part: slice | None = None,
    ) -> None:
        rows, count, size = layout(mask, entries)
        part = part or slice(0, rows)
        owner = torch.arange(part.start, part.stop, device=mask.device) // (rows // g.shape[0])
        active, b_own = mask[part].flatten(1), b[part]
        before = int(mask[: part.start].sum())
        self.span = slice(before, before + int(active.sum()))
        # Kept columns of each row first, in their order; what is past a row's count is padding.
        order = active.int().argsort(dim=1, descending=True, stable=True)[:, : count * size]
        order = F.pad(order, (0, count * size - order.shape[1])).unflatten(1, (count, size))
        self.valid = torch.arange(count * size, device=mask.device)[None] < active.sum(1)[:, None]
        self.factor = g.new_empty(len(active), count, size, size)
        self.chunk = max(1, CHUNK_ENTRIES // (count * size**2))
        # The relative term keeps constant or dead inputs factorisable.
        floor = damping + 1e-4 * float(g.diagonal(dim1=-2, dim2=-1).mean() * b.mean())
        for some in torch.arange(len(active), device=mask.device).split(self.chunk):
            o, valid = order[some], self.valid[some].unflatten(1, (count, size))
            blocks = g[owner[some, None, None, None], o[..., :, None], o[..., None, :]]
            blocks *= b_own[some, None, None, None] * valid[..., :, None] * valid[..., None, :]
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            diagonal += torch.where(valid, floor, 1.0)  # padding gets a unit diagonal
            factor, failed = torch.linalg.cholesky_ex(blocks)
            # A block that rounding has made indefinite is preconditioned by its diagonal.
            by_diagonal = diagonal.clamp_min(1e-30).sqrt().diag_embed() if failed.any() else factor
            self.factor[some] = torch.where((failed == 0)[..., None, None], factor, by_diagonal)

    def solve(self, r: Tensor) -> Tensor:
        """(bG + λI)⁻¹ r for the active weights of these rows, (m,) → (m,)."""
        padded = torch.zeros_like(self.valid, dtype=r.dtype).masked_scatter(self.valid, r)
        blocks = padded.unflatten(1, self.factor.shape[1:3])[..., None]
        solved = torch.cholesky_solve(blocks.to(self.factor.dtype), self.factor)
        return solved[..., 0].flatten(1)[self.valid].to(r.dtype)

    def saliency(self, w: Tensor) -> Tensor:
        """½wᵢ²/[(bG + λI)⁻¹]ᵢᵢ (m,): what it costs to remove one active weight, the others of its block making up for
        it (Hassibi and Stork, 1993, Eq. 5)."""
        inverses = map(torch.cholesky_inverse, self.factor.split(self.chunk))
        diagonal = torch.cat([inverse.diagonal(dim1=-2, dim2=-1).flatten(1) for inverse in inverses])
        return w.square() / (2 * diagonal[self.valid].to(w.dtype))


class RowPreconditioner:
    """r (m,) → M⁻¹ r for a group, M having a block of rows for each of its parameters; of several processes each holds
    the factors of its own rows, and what these give is summed."""

    def __init__(self, masks: Sequence[Tensor], blocks: Sequence[RowBlocks], share: Share) -> None:
        self.sizes, self.blocks, self.share = [int(mask.sum()) for mask in masks], blocks, share

    def __call__(self, r: Tensor) -> Tensor:
        return self._each(RowBlocks.solve, r)

    def saliency(self, w: Tensor) -> Tensor:
        """:meth:`RowBlocks.saliency` of all active weights, (m,)."""
        return self._each(RowBlocks.saliency, w)

    def _each(self, of: Callable[[RowBlocks, Tensor], Tensor], vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector)
        for block, part, out in zip(self.blocks, vector.split(self.sizes), result.split(self.sizes), strict=True):
            out[block.span] = of(block, part[block.span])
        return self.share.sum(result)


def row_preconditioner(
    masks: Mapping[str, Tensor],
    seen: Mapping[str, tuple[nn.Module, Tensor, Tensor]],
    outputs: Sequence[tuple[float, Tensor]],
    damping: float,
    share: Share,
    entries: int = FACTOR_ENTRIES,
) -> RowPreconditioner | None:
    """The preconditioner of a group, or None where a module is neither Linear nor plain Conv2d.

    Args:
        seen: what :func:`recorded` noted while ``outputs`` were computed.
        outputs: those of the segment, still attached to their graph, each with the loss's curvature in it.
        damping: λ.
        entries: most numbers in the factors of one parameter.
    """
    grams = []
    for name, mask in masks.items():
        module, *both = seen[name]
        # Windows of attention come in the place of images, an image's one after the other.
        x, z = (tensor.unflatten(0, (share.stop - share.start, -1)) for tensor in both)
        images, scale = sampled(mask, z, share)
        g = gram(module, x[images].flatten(0, 1))
        if g is None:
            return None
        grams.append(share.sum(g * (share.weight * scale)))
    device = outputs[0][1].device
    generator = torch.Generator(device).manual_seed(0)
    u = []
    for h, o in outputs:  # drawn for the whole batch: every image has its own, whoever has the image
        signs = torch.randint(2, (share.total, *o.shape[1:]), generator=generator, device=device, dtype=o.dtype)
        u.append(signs[share.start : share.stop].mul(2 * h**0.5).sub_(h**0.5))  # a copy, without the others'
    f = [o for _, o in outputs]
    sensitivities = torch.autograd.grad(f, [seen[name][2] for name in masks], u, retain_graph=True)
    blocks = []
    for (name, mask), x_gram, g in zip(masks.items(), grams, sensitivities, strict=True):
        # A Linear's channels are last, on windows or feature maps (n, …, …, out) too.
        per_row = (g.movedim(1, -1) if isinstance(seen[name][0], nn.Conv2d) else g).flatten(0, -2)
        b = share.mean(per_row.to(x_gram.dtype).square().mean(0))
        b = b.clamp_min(1e-3 * float(b.mean()))
        blocks.append(RowBlocks(mask, x_gram, b, damping, entries, own_part(len(mask))))
    return RowPreconditioner(list(masks.values()), blocks, share)
