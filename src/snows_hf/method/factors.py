"""Factors of bᵣ G + λI on the active weights of each row r of one parameter, for the preconditioner.

A bias that moves with a row is an input more, which is constant. It is eliminated first: what is factorised then is
as of centred inputs, and cutting it into blocks loses less.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


FACTOR_ENTRIES = 2**28
"""Most numbers in the factors of one parameter (1 GB in float32), where nothing else is said; rows are cut into blocks
to stay below."""

CHUNK_ENTRIES = 2**22
"""Numbers that are gathered and factorised at a time."""

WIDE = 320
"""Inputs of an output from which on a row's own system is solved by iterations: factors of thousands of systems take
many times as long as the curvature products between which they are used (docs/results.md)."""

ITERATIONS = 6
"""Of conjugate gradients on the rows of a wide layer. They leave about a tenth of the way, which is little beside what
G leaves out of the curvature, and take about as long as a curvature product of 32 images."""


def iterated(mask: Tensor) -> bool:
    """Whether rows that have systems of their own get :class:`IteratedRows`."""
    return mask[0].numel() >= WIDE


def layout(mask: Tensor, entries: int) -> tuple[int, int, int]:
    """Rows of a mask, blocks that each row's active weights are cut into, and the size of a block."""
    width = max(int(mask.flatten(1).sum(1).max()), 1)  # a mask may keep nothing
    pieces = max(1, -(-len(mask) * width * width // entries))
    size = -(-width // pieces)
    return len(mask), -(-width // size), size


def shared_entries(mask: Tensor, groups: int) -> int | None:
    """Numbers in :class:`SharedRows` of a mask; None where rows that keep anything keep different columns than others
    of their group, or have no others."""
    rows = mask.flatten(1).unflatten(0, (groups, -1))
    columns = rows.any(1, keepdim=True)
    if rows.shape[1] == 1 or not ((rows == columns).all(2) | ~rows.any(2)).all():
        return None
    width = max(int(columns.sum(2).max()), 1)
    return groups * width**2 + len(mask) * width


def factor_bytes(
    masks: Mapping[str, Tensor],
    entries: int = FACTOR_ENTRIES,
    groups: Mapping[str, int] | None = None,
    sharing: int = 1,
) -> int:
    """Memory of the float32 factors of a group of parameters, in each of ``sharing`` processes.

    Args:
        entries: no parameter has more than about so many numbers.
        groups: of the convolutions, as of all other layers 1; None: masks thin out, rows that share their columns may
            not for long, and each row's factors are needed.
    """
    total = 0
    for name, mask in masks.items():
        shared = shared_entries(mask, groups[name]) if groups else None
        if shared is not None and shared <= entries:
            total += 4 * shared
        elif groups and iterated(mask):
            total += 4 * 8 * mask.numel()  # vectors of the iteration
        else:
            rows, blocks, size = layout(mask, entries)
            total += 4 * rows * blocks * size**2 // sharing
    return total


def floor_of(g: Tensor, b: Tensor, damping: float) -> float:
    """λ, and a relative term that keeps constant or dead inputs factorisable."""
    return damping + 1e-4 * float(g.diagonal(dim1=-2, dim2=-1).mean() * b.mean())


@dataclass(frozen=True)
class Shift:
    """The curvature of a bias that moves with each row, and what is beside it.

    Attributes:
        s: Σ x over images and positions, (groups, d).
        cross: (rows,): the second derivatives by the bias and the row's weights are crossᵣ s.
        pivot: (rows,): that by the bias itself, λ included.
    """

    s: Tensor
    cross: Tensor
    pivot: Tensor

    @property
    def root(self) -> Tensor:
        """What the bias takes from a row's system is the outer product of rootᵣ s with itself, (rows,)."""
        return self.cross / self.pivot.sqrt()


class Rows(ABC):
    """The inverse of bᵣ G + λI, less what a bias takes, for a part of a parameter's rows; ``span`` is where their
    active weights are among the parameter's."""

    def __init__(self, mask: Tensor, g: Tensor, part: slice | None) -> None:
        self.part, self.rows = part or slice(0, len(mask)), len(mask)
        self.owner = torch.arange(self.part.start, self.part.stop, device=mask.device) // (len(mask) // len(g))
        self.active = mask[self.part].flatten(1)
        before = int(mask[: self.part.start].sum())
        self.span = slice(before, before + int(self.active.sum()))

    def times(self, x: Tensor, q: Tensor) -> Tensor:
        """x q (rows, width), each row with the q of its group, of q (groups, width, width)."""
        others = (self.part.start, self.rows - self.part.stop)  # in the groups of this part's first and last row
        return (F.pad(x, (0, 0, *others)).unflatten(0, (len(q), -1)) @ q).flatten(0, 1)[self.part]

    @abstractmethod
    def solve(self, r: Tensor) -> Tensor:
        """(bG + λI)⁻¹ r for the active weights of these rows, (m,) → (m,)."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of (bG + λI)⁻¹, (m,)."""

    def saliency(self, w: Tensor) -> Tensor:
        """½wᵢ²/[(bG + λI)⁻¹]ᵢᵢ (m,): what it costs to remove one active weight, the others of its block making up for
        it (Hassibi and Stork, 1993, Eq. 5)."""
        return w.square() / (2 * self.inverse_diagonal().to(w.dtype))


class RowBlocks(Rows):
    """Cholesky factors of every row, in blocks where they would have more than so many ``entries``."""

    def __init__(
        self,
        mask: Tensor,
        g: Tensor,
        b: Tensor,
        damping: float,
        entries: int = FACTOR_ENTRIES,
        part: slice | None = None,
        shift: Shift | None = None,
    ) -> None:
        super().__init__(mask, g, part)
        _, count, size = layout(mask, entries)
        owner, active, b_own = self.owner, self.active, b[self.part]
        # Kept columns of each row first, in their order; what is past a row's count is padding.
        order = active.int().argsort(dim=1, descending=True, stable=True)[:, : count * size]
        order = F.pad(order, (0, count * size - order.shape[1])).unflatten(1, (count, size))
        self.valid = torch.arange(count * size, device=mask.device)[None] < active.sum(1)[:, None]
        self.factor = g.new_empty(len(active), count, size, size)
        self.chunk = max(1, CHUNK_ENTRIES // (count * size**2))
        floor = floor_of(g, b, damping)
        for some in torch.arange(len(active), device=mask.device).split(self.chunk):
            o, valid = order[some], self.valid[some].unflatten(1, (count, size))
            blocks = g[owner[some, None, None, None], o[..., :, None], o[..., None, :]]
            blocks *= b_own[some, None, None, None] * valid[..., :, None] * valid[..., None, :]
            if shift is not None:
                taken = shift.root[self.part][some, None, None] * valid
                taken = taken * shift.s[owner[some, None, None], o]
                blocks -= taken[..., :, None] * taken[..., None, :]
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            diagonal += torch.where(valid, floor, 1.0)  # padding gets a unit diagonal
            factor, failed = torch.linalg.cholesky_ex(blocks)
            # A block that rounding has made indefinite is preconditioned by its diagonal.
            by_diagonal = diagonal.clamp_min(1e-30).sqrt().diag_embed() if failed.any() else factor
            self.factor[some] = torch.where((failed == 0)[..., None, None], factor, by_diagonal)

    def solve(self, r: Tensor) -> Tensor:
        padded = torch.zeros_like(self.valid, dtype=r.dtype).masked_scatter(self.valid, r)
        blocks = padded.unflatten(1, self.factor.shape[1:3])[..., None]
        solved = torch.cholesky_solve(blocks.to(self.factor.dtype), self.factor)
        return solved[..., 0].flatten(1)[self.valid].to(r.dtype)

    def inverse_diagonal(self) -> Tensor:
        inverses = map(torch.cholesky_inverse, self.factor.split(self.chunk))
        diagonal = torch.cat([inverse.diagonal(dim1=-2, dim2=-1).flatten(1) for inverse in inverses])
        return diagonal[self.valid]


class SharedRows(Rows):
    """The same where the rows of a group keep the same columns or nothing: of G on these, one eigendecomposition
    QΛQᵀ does for all of them, since (bᵣG + λI)⁻¹ = Q(bᵣΛ + λI)⁻¹Qᵀ; what a bias takes has rank one."""

    def __init__(
        self,
        mask: Tensor,
        g: Tensor,
        b: Tensor,
        damping: float,
        part: slice | None = None,
        shift: Shift | None = None,
    ) -> None:
        super().__init__(mask, g, part)
        columns = mask.flatten(1).unflatten(0, (len(g), -1)).any(1)
        width = max(int(columns.sum(1).max()), 1)
        order = columns.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        kept = columns.gather(1, order)
        shared = g[torch.arange(len(g), device=g.device)[:, None, None], order[:, :, None], order[:, None]]
        eigenvalues, self.q = torch.linalg.eigh(shared * kept[:, :, None] * kept[:, None])
        self.valid = kept[self.owner] & self.active.any(1, keepdim=True)
        self.scale = b[self.part, None] * eigenvalues.clamp_min(0)[self.owner] + floor_of(g, b, damping)
        self.taken = torch.zeros_like(self.scale)  # Qᵀ of what is taken, over the scale
        self.left = torch.ones_like(self.scale[:, :1])
        if shift is not None:
            s = ((shift.s.gather(1, order) * kept)[:, None] @ self.q)[self.owner, 0]
            taken = shift.root[self.part, None] * s
            self.taken = taken / self.scale
            self.left = (1 - (taken * self.taken).sum(1, keepdim=True)).clamp_min(torch.finfo(g.dtype).eps)

    def solve(self, r: Tensor) -> Tensor:
        padded = torch.zeros_like(self.scale).masked_scatter(self.valid, r.to(self.scale.dtype))
        x = self.times(padded, self.q)
        x = x / self.scale + self.taken * (self.taken * x).sum(1, keepdim=True) / self.left
        return self.times(x, self.q.mT)[self.valid].to(r.dtype)

    def inverse_diagonal(self) -> Tensor:
        diagonal = self.times(1 / self.scale, self.q.square().mT)
        return (diagonal + self.times(self.taken, self.q.mT).square() / self.left)[self.valid]


class IteratedRows(Rows):
    """The same without factors: ``ITERATIONS`` of conjugate gradients, in all rows side by side, each a product of all
    rows with G. What solves is not quite linear in r; :func:`snows_hf.method.cg.cg` allows for that."""

    def __init__(
        self,
        mask: Tensor,
        g: Tensor,
        b: Tensor,
        damping: float,
        entries: int = FACTOR_ENTRIES,
        part: slice | None = None,
        shift: Shift | None = None,
    ) -> None:
        super().__init__(mask, g, part)
        self.factorise = partial(RowBlocks, mask, g, b, damping, entries, part, shift)
        self.g, self.b, self.floor = g, b[self.part, None], floor_of(g, b, damping)
        taken = torch.zeros_like(self.active, dtype=g.dtype)
        if shift is not None:
            taken = self.active * shift.root[self.part, None] * shift.s[self.owner]
        self.taken = taken
        diagonal = self.b * g.diagonal(dim1=1, dim2=2)[self.owner] - taken.square()
        self.diagonal = diagonal.clamp_min(0) + self.floor

    def _product(self, x: Tensor) -> Tensor:
        """(bG + λI) x, less what a bias takes, (rows, width)."""
        taken = self.taken * (self.taken * x).sum(1, keepdim=True)
        return (self.b * self.times(x, self.g) - taken) * self.active + self.floor * x

    def solve(self, r: Tensor) -> Tensor:
        left = torch.zeros_like(self.diagonal).masked_scatter(self.active, r.to(self.diagonal.dtype))
        x, least = torch.zeros_like(left), torch.finfo(left.dtype).tiny
        p = z = left / self.diagonal
        energy = (left * z).sum(1, keepdim=True)
        for _ in range(ITERATIONS):
            Ap = self._product(p)
            step = energy / (p * Ap).sum(1, keepdim=True).clamp_min(least)
            x, left = x + step * p, left - step * Ap
            z = left / self.diagonal
            before, energy = energy, (left * z).sum(1, keepdim=True)
            p = z + energy / before.clamp_min(least) * p
        return x[self.active].to(r.dtype)

    def inverse_diagonal(self) -> Tensor:
        return self.factorise().inverse_diagonal()


class WithBiases:
    """Rows, less what their biases take, and the biases: of a vector (m,), the rows' active weights come first."""

    def __init__(self, rows: Rows, shift: Shift) -> None:
        self.rows, self.pivot = rows, shift.pivot[rows.part]
        self.counts = rows.active.sum(1)
        self.cross = (shift.cross[rows.part, None] * shift.s[rows.owner])[rows.active]

    def solve(self, r: Tensor) -> Tensor:
        """The inverse of [[bG + λI, a], [aᵀ, pivot]] on r, (m,) → (m,)."""
        weights, biases = r.to(self.cross.dtype).split((len(self.cross), len(self.pivot)))
        shifts = (biases / self.pivot).repeat_interleave(self.counts, output_size=len(self.cross))
        x = self.rows.solve(weights - self.cross * shifts)
        sums = torch.segment_reduce(self.cross * x, "sum", lengths=self.counts, unsafe=True)
        return torch.cat([x, (biases - sums) / self.pivot]).to(r.dtype)

    def saliency(self, w: Tensor) -> Tensor:
        """:meth:`Rows.saliency`; biases are never removed."""
        weights, biases = w.split((len(self.cross), len(self.pivot)))
        return torch.cat([self.rows.saliency(weights), torch.full_like(biases, torch.inf)])
