"""SparseGPT: one sweep over a layer's columns, each pruned and its error spread over the columns to its right (Frantar
and Alistarh, 2023, Algorithm 1).

The inputs are the dense network's: every layer is reconstructed on what it reads before any pruning, where the authors
feed each block what the pruned ones before it give. Unstructured, every layer loses the same share of its weights.
"""

import torch
from torch import Tensor

from ...patterns import NM
from ..aims import Aim
from ..evidence import Evidence
from .base import Choice
from .obc import Kept, layer_by_layer, without_lowest


BLOCK = 128
"""Columns after which errors reach the rest of the matrix, and among which an unstructured mask is chosen (section
3.3: B and Bs)."""


def sparsegpt(evidence: Evidence) -> Choice:
    def decide(aim: Aim, pattern: NM | None, zeros: int) -> Kept:
        kept, updated = sweep(aim.W.unflatten(0, (len(aim.H), -1)), aim.H, pattern, zeros)
        return kept.flatten(0, 1), updated.flatten(0, 1)

    return layer_by_layer(evidence, decide)


def sweep(W: Tensor, H: Tensor, pattern: NM | None, zeros: int) -> tuple[Tensor, Tensor]:
    """Kept weights (bool) and updated weights, both (groups, rows, d).

    Args:
        W: (groups, rows, d), input channels innermost.
        H: X Xᵀ + damping, (groups, d, d).
        pattern: N:M along d; None prunes ``zeros`` weights, in every block of columns its share.
        zeros: how many weights go, of all groups and rows together.
    """
    W, d = W.clone(), W.shape[-1]
    kept = torch.ones_like(W, dtype=torch.bool)
    # H⁻¹ = UᵀU: row i of U holds row i of the inverse that is left when the columns before i are gone, over √ of its
    # pivot (section 3.2).
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    pivots = U.diagonal(dim1=-2, dim2=-1)[:, None]  # (groups, 1, d)
    step = BLOCK if pattern is None else pattern.m * max(1, BLOCK // pattern.m)
    for start in range(0, d, step):
        stop = min(start + step, d)
        if pattern is None:
            share = round(zeros * stop / d) - round(zeros * start / d)
            scores = (W[..., start:stop] / pivots[..., start:stop]).square()
            kept[..., start:stop] = without_lowest(scores, share)
        errors = torch.zeros_like(W[..., start:stop])
        for i in range(start, stop):
            if pattern is not None and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                scores = (W[..., group] / pivots[..., group]).square()
                kept[..., group] = pattern.mask(scores.flatten(0, 1)).view_as(scores)
            errors[..., i - start] = W[..., i] * ~kept[..., i] / pivots[..., i]
            W[..., i:stop] -= errors[..., i - start, None] * U[:, None, i, i:stop]
        W[..., stop:] -= errors @ U[:, start:stop, stop:]
    return kept, W * kept
