"""SparseGPT's masks, refined by swaps: a kept weight and a pruned one of its group change places wherever that brings
the layer's output closer to the dense one, the other weights making up for both.

Greedy criteria never take a decision back. Here each kept weight of a row in turn goes, and of the free places of its
group the best takes it, by the formulas of OBS (Hassibi and Stork, 1993), until no swap helps or ``SWEEPS`` are over.
"""

import torch
from torch import Tensor

from ...patterns import NM
from ..evidence import Evidence
from .base import Choice
from .obc import Kept, chunks, layer_by_layer, refit, support, system
from .sparsegpt import sweep


SWEEPS = 5
"""Over the kept weights of a row, at most."""

BLOCK = 256
"""Columns whose weights make up for a swap while it is weighed; all others do between sweeps."""

WIDTH = 16
"""Columns of a group, where the pattern has none."""

MARGIN = 1e-6
"""By which share a swap must be better than none, so that rounding undoes none and repeats none."""


def swap(evidence: Evidence) -> Choice:
    def decide(W: Tensor, H: Tensor, pattern: NM | None, zeros: int) -> Kept:
        rows = W.unflatten(0, (len(H), -1))
        first = sweep(rows, H, pattern, zeros)[0]
        width = pattern.m if pattern else WIDTH
        kept = torch.cat([refined(w, h, k, width) for w, h, k in zip(rows, H, first, strict=True)])
        return kept, refit(W, H, kept), int((kept & ~first.flatten(0, 1)).sum())

    return layer_by_layer(evidence, decide)


def refined(W: Tensor, H: Tensor, kept: Tensor, width: int) -> Tensor:
    """Kept weights (bool, as W) after swaps: as many in every group of ``width`` columns, and no row's error larger.

    W and ``kept`` are (rows, d), input channels innermost, and H = X Xᵀ + damping (d, d).
    """
    kept, q = kept.clone(), W @ H
    moving = torch.arange(len(W), device=W.device)
    for _ in range(SWEEPS):
        before = kept[moving]
        x = refit(W[moving], H[None], before)
        for block in torch.arange(W.shape[1], device=W.device).split(width * max(1, BLOCK // width)):
            k, H_B = kept[moving][:, block], H[block][:, block]
            # What the block's weights should add up to, the others being what they are.
            q_B = q[moving][:, block] - x @ H[:, block] + x[:, block] @ H_B
            for some in chunks(len(k), int(k.sum(1).max()), W.device):
                x[some[:, None], block], k[some] = swaps(q_B[some], H_B, k[some], width)
            kept[moving[:, None], block] = k
        moving = moving[(kept[moving] != before).any(1)]
        if not len(moving):
            break
    return kept


def swaps(q: Tensor, H: Tensor, kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """One sweep over the kept weights of every row: the weights x (rows, d) that minimise ½ xᵀHx − qᵀx where they are
    not zero, and where that is (bool).

    P is the inverse of H on what a row keeps, x its weights there, a a slot of both. Without the weight in slot a they
    are P − P_a P_aᵀ / P_aa and x − P_a x_a / P_aa; column j in its place lowers the objective by half of r_j² / c_j,
    r_j being what q_j then lacks and c_j the pivot of j.
    """
    kept = kept.clone()
    columns, valid = support(kept)
    rows, d = torch.arange(len(q), device=q.device), q.shape[1]
    P = torch.cholesky_inverse(torch.linalg.cholesky(system(H[None], torch.zeros_like(rows), columns, valid)))
    x = (P @ (q.gather(1, columns) * valid)[..., None])[..., 0]
    for a in range(columns.shape[1]):
        i, P_a = columns[:, a], P[:, :, a].clone()
        others = x - P_a * (x[:, a] / P_a[:, a])[:, None]
        group = (i // width * width)[:, None] + torch.arange(width, device=q.device)
        j = group.clamp_max(d - 1)
        H_j = H[j[:, :, None], columns[:, None]] * valid[:, None]
        H_j[:, :, a] = 0
        v = H_j @ P
        v -= v[:, :, a, None] * (P_a / P_a[:, a, None])[:, None]
        c = H.diagonal()[j] - (H_j * v).sum(2)
        r = q.gather(1, j) - (H_j * others[:, None]).sum(2)
        own = group == i[:, None]
        gain = r.square() / c * torch.where(own, 1 + MARGIN, 1.0)
        gain[(kept.gather(1, j) & ~own) | (group >= d)] = -1
        best = gain.argmax(1)
        at = (~own[rows, best] & valid[:, a]).nonzero()[:, 0]
        if not len(at):
            continue
        new, pivot = j[at, best[at]], c[at, best[at]][:, None]
        u, P_a = v[at, best[at]], P_a[at]
        u[:, a] = -1  # the slot's own row and column of the inverse, up to the sign
        left, right = torch.stack([u, P_a], 2), torch.stack([u / pivot, -P_a / P_a[:, a, None]], 1)
        P[at] = torch.baddbmm(P[at], left, right)
        x[at] = others[at] - u * (r[at, best[at]][:, None] / pivot)
        kept[at, i[at]], kept[at, new] = False, True
        columns[at, a] = new
    # Added, as padding may name a column that has been taken meanwhile.
    return torch.zeros_like(q).scatter_add_(1, columns, x * valid), kept
