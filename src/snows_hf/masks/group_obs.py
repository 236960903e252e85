"""Group OBS: units of a width go one by one, each time the one that costs the layers which read it least, once the
units left and the layers' biases have made up for it (Hassibi and Stork, 1993; a unit has several columns where it is
a head, or where a kernel reads it).

For a layer W (rows, d) that reads x, removal of the columns J costs ½ tr(W_J [(C⁻¹)_JJ]⁻¹ W_Jᵀ). C is the covariance
of x: with a bias that is free, what a unit adds on average is made up for exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


RIDGE = 1e-4
"""What is added to the diagonal of a covariance, as a share of its mean, so that inputs which never vary, or always
together, leave it invertible."""

BLOCK = 128
"""Columns whose removal reaches all of C⁻¹ and W together."""


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of a layer's inputs, over images and positions, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Moments":
        """From Σ [x, 1][x, 1]ᵀ, (d + 1, d + 1)."""
        gram = gram.double()
        mean, count = gram[:-1, -1] / gram[-1, -1], gram[-1, -1]
        return cls(mean, gram[:-1, :-1] / count - mean.outer(mean))

    def ridged(self) -> Tensor:
        """C with the ridge on its diagonal: a higher one where sums in float32 have left nothing of small variances
        around large means (pooled channels), and C would not be positive."""
        scale = self.covariance.diagonal().mean()
        ridge = RIDGE * torch.where(scale > 0, scale, 1.0) * torch.eye(len(self.mean)).to(self.covariance)
        for _ in range(10):
            if not torch.linalg.cholesky_ex(self.covariance + ridge).info:
                break
            ridge *= 10
        return self.covariance + ridge


def variance(W: Tensor, moments: Moments) -> float:
    """Of all outputs of W (rows, d) together."""
    W = W.double()
    return float(((W @ moments.covariance) * W).sum())


def repair(W: Tensor, moments: Moments, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (rows, d), zero in the columns that are not ``kept`` (bool, (d,)), and a shift of the bias (rows,), that
    keep the outputs for W best in the mean square: W C_·S (C_SS)⁻¹, where removals one by one lead, too."""
    C, W = moments.ridged(), W.double()
    factor = torch.linalg.cholesky(C[kept][:, kept])
    repaired = torch.zeros_like(W)
    repaired[:, kept] = torch.cholesky_solve(C[kept] @ W.T, factor).T
    return repaired, (W - repaired) @ moments.mean


class Reader:
    """A layer that reads the units, while these go: W (rows, d) and C⁻¹ (d, d), of which unit j has the columns
    [jq, (j + 1)q).

    Removal of columns J takes ω hᵀ from W and h hᵀ from C⁻¹, where h = C⁻¹_·J L⁻ᵀ, ω = W_J L⁻ᵀ and LLᵀ = C⁻¹_JJ. Both
    wait until there are ``BLOCK`` of them; what scores need, the blocks of WᵀW and of C⁻¹ on the diagonal, is kept up
    to date.
    """

    def __init__(self, W: Tensor, moments: Moments, units: int, share: float = 1.0) -> None:
        """``share``: what costs are multiplied with, of one layer beside others."""
        self.W = W.double()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.ridged()))
        self.units, self.q, self.share = units, W.shape[1] // units, share
        blocks = self.W.unflatten(1, (units, self.q))
        self.products = torch.einsum("rui,ruj->uij", blocks, blocks)  # (units, q, q)
        self.pivots = self._blocks(self.inverse)
        self.H = self.W.new_empty(len(self.inverse), 0)
        self.omega = self.W.new_empty(len(W), 0)

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
        J = slice(unit * self.q, (unit + 1) * self.q)
        L = torch.linalg.cholesky(self.pivots[unit])
        h = self.inverse[J].T - self.H @ self.H[J].T
        omega = self.W[:, J] - self.omega @ self.H[J].T
        h, omega = (torch.linalg.solve_triangular(L.mT, part, upper=True, left=False) for part in (h, omega))
        A = self.W.T @ omega - self.H @ (self.omega.T @ omega)  # Wᵀω of the W that is now, (d, q)
        h_blocks, A_blocks = (part.unflatten(0, (self.units, self.q)) for part in (h, A))
        cross = h_blocks @ A_blocks.mT
        self.products += h_blocks @ (omega.T @ omega) @ h_blocks.mT - cross - cross.mT
        self.pivots -= h_blocks @ h_blocks.mT
        # What has gone takes no part any more, whatever rounding has left of it.
        self.pivots[unit] = torch.eye(self.q, dtype=h.dtype, device=h.device)
        self.H, self.omega = torch.cat([self.H, h], 1), torch.cat([self.omega, omega], 1)

    def catch_up(self, stays: Tensor) -> None:
        """Takes from C⁻¹ and W what has waited, and leaves out the units that do not stay (bool, (units,))."""
        columns = stays.repeat_interleave(self.q).nonzero().flatten()
        H = self.H[columns]
        self.inverse = self.inverse.index_select(0, columns).index_select(1, columns).addmm_(H, H.T, alpha=-1)
        self.W = self.W.index_select(1, columns).addmm_(self.omega, H.T, alpha=-1)
        self.products, self.pivots, self.units = self.products[stays], self.pivots[stays], int(stays.sum())
        self.H, self.omega = H[:, :0], self.omega[:, :0]


def units_left(readers: Sequence[Reader], keep: int) -> Tensor:
    """Which units stay, (keep,) in order, once all others have gone, always the one of the lowest cost, of all readers
    together."""
    left = torch.arange(readers[0].units, device=readers[0].W.device)
    while len(left) > keep:
        stays = torch.ones_like(left, dtype=torch.bool)
        for _ in range(min(len(left) - keep, max(1, BLOCK // readers[0].q))):
            costs = torch.stack([reader.costs() for reader in readers]).sum(0)
            unit = int(torch.where(stays, costs, torch.inf).argmin())
            stays[unit] = False
            for reader in readers:
                reader.remove(unit)
        left = left[stays]
        for reader in readers:
            reader.catch_up(stays)
    return left
