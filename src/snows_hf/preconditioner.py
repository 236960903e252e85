"""A block preconditioner for the K-step curvature, from the layer's own inputs.

For one output channel r of a linear layer or convolution with input x and output z, the Gauss-Newton block of the
K-step loss is Σ gᵣ² x xᵀ over images and positions, with gᵣ the loss's sensitivity to zᵣ. It is replaced by bᵣ G,
where G = Σ x xᵀ is the Gram matrix of the inputs and bᵣ the mean of gᵣ², estimated with one random cotangent: the
Kronecker factors of Martens and Grosse (2015), with the diagonal of the output factor only. On the active weights of
each row it is factorised exactly; at K = 0 it is the Hessian itself, and conjugate gradients need one iteration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.base import Chain


MAX_ENTRIES = 2**28
"""Most numbers in the factors of one parameter (1 GB in float32); rows are cut into blocks to stay below."""


@contextmanager
def recorded(chain: Chain, parameters: Mapping[str, Tensor]) -> Iterator[dict[str, tuple[nn.Module, Tensor, Tensor]]]:
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
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    total: Tensor | None = None
    for part in x.split(64):  # unfolding multiplies memory by the kernel's size
        columns = F.unfold(part, module.kernel_size, module.dilation, module.padding, module.stride)
        columns = columns.unflatten(1, (module.groups, -1)).permute(1, 2, 0, 3).flatten(2)
        block = columns @ columns.mT
        total = block if total is None else total + block
    return total


class RowBlocks:
    """Cholesky factors of bᵣ G + λI on the active weights of each row r of one parameter."""

    def __init__(self, mask: Tensor, g: Tensor, b: Tensor, damping: float) -> None:
        active = mask.flatten(1)
        rows = active.shape[0]
        counts = active.sum(1)
        width = max(int(counts.max()), 1)  # a mask may keep nothing
        # Kept columns of each row first, in their order; what is past a row's count is padding.
        order = active.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        self.valid = torch.arange(width, device=mask.device)[None] < counts[:, None]
        pieces = max(1, -(-rows * width * width // MAX_ENTRIES))
        self.block = -(-width // pieces)
        pad = self.block * -(-width // self.block) - width
        self.valid = F.pad(self.valid, (0, pad))
        order = F.pad(order, (0, pad)).unflatten(1, (-1, self.block))
        valid = self.valid.unflatten(1, (-1, self.block))
        owner = torch.arange(rows, device=mask.device) // (rows // g.shape[0])
        blocks = g[owner[:, None, None, None], order[..., :, None], order[..., None, :]]
        blocks = blocks * b[:, None, None, None] * (valid[..., :, None] & valid[..., None, :])
        # Padding gets a unit diagonal; the relative term keeps constant or dead inputs factorisable.
        scale = blocks.diagonal(dim1=-2, dim2=-1).mean()
        diagonal = torch.where(valid, damping + 1e-4 * scale, 1.0)
        blocks = blocks + torch.diag_embed(diagonal)
        factor, failed = torch.linalg.cholesky_ex(blocks)
        # A block that rounding has made indefinite is preconditioned by its diagonal.
        by_diagonal = blocks.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt().diag_embed()
        self.factor = torch.where((failed == 0)[..., None, None], factor, by_diagonal)

    def solve(self, r: Tensor) -> Tensor:
        """(bG + λI)⁻¹ r for the active weights of this parameter, (m,) → (m,)."""
        padded = torch.zeros_like(self.valid, dtype=r.dtype).masked_scatter(self.valid, r)
        blocks = padded.unflatten(1, (-1, self.block))[..., None]
        solved = torch.cholesky_solve(blocks.to(self.factor.dtype), self.factor)
        return solved[..., 0].flatten(1)[self.valid].to(r.dtype)


def row_preconditioner(
    masks: Mapping[str, Tensor],
    seen: Mapping[str, tuple[nn.Module, Tensor, Tensor]],
    outputs: Sequence[tuple[float, Tensor]],
    damping: float,
) -> Callable[[Tensor], Tensor] | None:
    """The preconditioner r (m,) → M⁻¹ r of a group, or None where a module is neither Linear nor plain Conv2d.

    Args:
        masks: parameter name → mask, as in ActiveWeights.
        seen: what :func:`recorded` noted while ``outputs`` were computed.
        outputs: the outputs of the segment, still attached to their graph, each with the loss's curvature in it.
        damping: λ.
    """
    grams = []
    for name in masks:
        g = gram(seen[name][0], seen[name][1])
        if g is None:
            return None
        grams.append(g)
    device = outputs[0][1].device
    generator = torch.Generator(device).manual_seed(0)
    u = [
        h**0.5 * (2 * torch.randint(2, o.shape, generator=generator, device=device, dtype=o.dtype) - 1)
        for h, o in outputs
    ]
    f = [o for _, o in outputs]
    sensitivities = torch.autograd.grad(f, [seen[name][2] for name in masks], u, retain_graph=True)
    blocks = []
    for (name, mask), x_gram, g in zip(masks.items(), grams, sensitivities, strict=True):
        # A Linear's channels are last, on windows or feature maps (n, …, …, out) too.
        per_row = (g.movedim(1, -1) if isinstance(seen[name][0], nn.Conv2d) else g).flatten(0, -2)
        b = per_row.to(x_gram.dtype).square().mean(0)
        blocks.append(RowBlocks(mask, x_gram, b.clamp_min(1e-3 * float(b.mean())), damping))
    sizes = [int(mask.sum()) for mask in masks.values()]

    def precondition(r: Tensor) -> Tensor:
        return torch.cat([block.solve(part) for block, part in zip(blocks, r.split(sizes), strict=True)])

    return precondition
