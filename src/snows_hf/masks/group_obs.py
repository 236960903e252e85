"""Group OBS: units of a width go one by one, each time the one that costs the layers which read it least, once the
units left and the layers' biases have made up for it (Hassibi and Stork, 1993; a unit has several columns where it is
a head, or where a kernel reads it).

For a layer W (rows, d) that reads x, removal of the columns J costs ½ tr(W_J [(C⁻¹)_JJ]⁻¹ W_Jᵀ). C is the covariance
of x: with a bias that is free, what a unit adds on average is made up for exactly.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor


BLOCK = 256
"""Columns whose removal reaches all of C⁻¹ and WᵀW together: fewer, and passes over these take the longest; more, and
what waits for them does."""


def covariance(gram: Tensor, centred: bool) -> Tensor:
    """C (d, d) in float64 of inputs, around their mean or around zero, from Σ [x, 1][x, 1]ᵀ, (d + 1, d + 1)."""
    gram = gram.double()
    mean = gram[:-1, -1] / gram[-1, -1] * centred
    return gram[:-1, :-1] / gram[-1, -1] - mean.outer(mean)


def variance(W: Tensor, C: Tensor) -> float:
    """Of all outputs of W (rows, d) together, where inputs have the covariance C (d, d)."""
    W = W.double()
    return float(((W @ C) * W).sum())


def repair(W: Tensor, C: Tensor, kept: Tensor) -> Tensor:
    """Weights (rows, d), zero in the columns that are not ``kept`` (bool, (d,)), that keep the outputs of W best in
    the mean square where inputs have the covariance C (d, d): W C_·S (C_SS)⁻¹, where removals one by one lead, too."""
    W, repaired = W.double(), torch.zeros_like(W, dtype=torch.float64)
    repaired[:, kept] = torch.cholesky_solve(C[kept] @ W.T, torch.linalg.cholesky(C[kept][:, kept])).T
    return repaired


class Reader:
    """A layer W (rows, d) that reads the units, while these go; unit j has the columns [jq, (j + 1)q). What is left of
    it are G = WᵀW and C⁻¹, both (d, d).

    With LLᵀ = (C⁻¹)_JJ, h = C⁻¹_·J L⁻ᵀ and a = G_·J L⁻ᵀ, removal of the columns J takes h hᵀ from C⁻¹, and from G
    a hᵀ + h aᵀ - h a_Jᵀ L⁻ᵀ hᵀ, which is b hᵀ + h bᵀ with b = a - ½ h a_Jᵀ L⁻ᵀ. Rows hᵀ and bᵀ wait until there are
    ``BLOCK`` of them; what scores need, the blocks on the diagonals, is kept up to date.
    """

    def __init__(self, W: Tensor, C: Tensor, units: int, share: float = 1.0) -> None:
        """C (d, d) is positive definite; costs are multiplied with the ``share``, of one layer beside others."""
        W = W.double()
        self.gram, self.inverse = W.T @ W, torch.cholesky_inverse(torch.linalg.cholesky(C))
        self.units, self.q, self.share, self.waiting = units, W.shape[1] // units, share, 0
        self.products, self.pivots = self._blocks(self.gram), self._blocks(self.inverse)  # (units, q, q)
        self.h, self.b = (W.new_empty(max(BLOCK, self.q), W.shape[1]) for _ in range(2))

    def _blocks(self, matrix: Tensor) -> Tensor:
        """The blocks on the diagonal of (d, d), (units, q, q)."""
        blocks = matrix.unflatten(0, (self.units, self.q)).unflatten(2, (self.units, self.q))
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()

    def costs(self) -> Tensor:
        """What it costs to remove each unit now, (units,)."""
        if self.q == 1:
            return self.share * (self.products / self.pivots).flatten()
        solved = torch.linalg.solve(self.pivots, self.products)
        return self.share * solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        J, waiting = slice(unit * self.q, (unit + 1) * self.q), slice(self.waiting, self.waiting + self.q)
        L = torch.linalg.cholesky(self.pivots[unit])
        H, B = self.h[: self.waiting], self.b[: self.waiting]
        h, a = (torch.cat([H[:, J], B[:, J]], 1).T @ H).split(self.q)  # in one pass over H
        h, a = self.inverse[J] - h, self.gram[J] - a - H[:, J].T @ B
        h, a = (torch.linalg.solve_triangular(L, part, upper=False) for part in (h, a))  # hᵀ and aᵀ, (q, d)
        b = a - 0.5 * torch.linalg.solve_triangular(L, a[:, J].T, upper=False) @ h
        self.h[waiting], self.b[waiting], self.waiting = h, b, waiting.stop
        h, b = (part.T.unflatten(0, (self.units, self.q)) for part in (h, b))
        cross = h @ b.mT
        self.products -= cross + cross.mT
        self.pivots -= h @ h.mT
        # What has gone takes no part any more, whatever rounding has left of it.
        self.pivots[unit] = torch.eye(self.q, dtype=h.dtype, device=h.device)

    def catch_up(self, stays: Tensor) -> None:
        """Takes from C⁻¹ and G what has waited, and leaves out the units that do not stay (bool, (units,))."""
        columns = stays.repeat_interleave(self.q).nonzero().flatten()
        H, B = self.h[: self.waiting, columns], self.b[: self.waiting, columns]
        own = columns[:, None], columns
        self.inverse = self.inverse[own].addmm_(H.T, H, alpha=-1)
        self.gram = self.gram[own].addmm_(H.T, B, alpha=-1).addmm_(B.T, H, alpha=-1)
        self.products, self.pivots, self.units = self.products[stays], self.pivots[stays], int(stays.sum())
        self.h, self.b, self.waiting = self.h[:, columns], self.b[:, columns], 0


def removals(readers: Sequence[Reader]) -> Iterator[tuple[int, float]]:
    """All units in the order in which they go, each time the one of the lowest cost, of all readers together; and that
    cost."""
    left = torch.arange(readers[0].units, device=readers[0].gram.device)
    while len(left):
        stays = torch.ones_like(left, dtype=torch.bool)
        for _ in range(min(len(left), max(1, BLOCK // readers[0].q))):
            costs = torch.stack([reader.costs() for reader in readers]).sum(0)
            cost, unit = torch.where(stays, costs, torch.inf).min(0)
            yield int(left[unit]), float(cost)
            stays[unit] = False
            for reader in readers:
                reader.remove(int(unit))
        left = left[stays]
        for reader in readers:
            reader.catch_up(stays)


def units_left(readers: Sequence[Reader], keep: int) -> Tensor:
    """Which units stay, (keep,) in order, once all others have gone."""
    stays = torch.ones(readers[0].units, dtype=torch.bool, device=readers[0].gram.device)
    for unit, _ in islice(removals(readers), len(stays) - keep):
        stays[unit] = False
    return stays.nonzero().flatten()
