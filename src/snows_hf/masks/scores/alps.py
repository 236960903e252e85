"""ALPS: a layer's mask by the alternating direction method of multipliers, its weights by conjugate gradients (Meng,
Behdin, Wang and Mazumder, 2024, section 3).

W may be dense, D keeps the pattern, and V draws the two together: ρ, what it weighs that they differ, grows until D
keeps its places. All rows share the eigendecompositions of H and G, so it costs little more than SparseGPT, and it
takes decisions back, as greedy criteria do not.

Two things are ours. Layers come one after the other, each fitted on what the pruned ones before it give, halfway to
the dense network (aims.py), where the authors have that network's inputs. And a layer's error counts as the network's
outputs depend on it: Δ, the pruned weights less W, by tr(Δᵀ G Δ H), where the authors' G is the identity.
"""

import torch
from torch import Tensor

from ...patterns import NM
from ..aims import Aim, Fit, aim_of, halfway_aims
from ..estimate import tell_estimate
from ..evidence import Evidence
from .base import Choice
from .obc import Kept, decide_for, layer_by_layer, without_lowest


RHO = 0.05
"""ρ at first, for inputs scaled to a variance of 1. The authors, who have no G, begin with 0.1 (section 3.2): 5 % more
error. 0.01 has 6 % less, and does worse on other images."""

EVERY = 3
"""Iterations between two values of ρ."""

GROWTH = ((0.1, 1.5), (0.005, 1.3))
"""By what ρ grows where more than this share of the kept places has changed since it last grew (Eq. 10; the authors
have 1.3 and 1.2: from a lower ρ on it takes longer, for 2 % less error)."""

SETTLED = 0.01
"""The share below which D keeps its places. The authors wait for none: twice the time for 0.2 % less error."""

ITERATIONS = 300
"""At most; 15 to 30 are usual."""

TOLERANCE = 0.01
"""Of the kept weights' residual, as a share of what the dense weights alone would leave."""

PRODUCTS = 100
"""With G and H, at most, for the kept weights."""


def alps(evidence: Evidence) -> Choice:
    zeros = evidence.pattern.zeros(evidence.weights)

    def settle(few: Evidence, fit: Fit) -> Kept:
        return decide_for(few, decide, aim_of(few, fit), zeros.get(fit.name, 0))

    seconds = tell_estimate(evidence, settle, "masks")
    return layer_by_layer(evidence, decide, halfway_aims, seconds)


def decide(aim: Aim, pattern: NM | None, zeros: int) -> Kept:
    H = aim.H.float()  # single precision says as well which weights go
    W = aim.W.unflatten(0, (len(H), -1)).float()
    G = within_groups(aim.G, W)
    kept, D = places(W, H, G, pattern, zeros)
    return kept.flatten(0, 1), fitted(W, H, G, kept, D).flatten(0, 1)


def within_groups(G: Tensor | None, W: Tensor) -> Tensor:
    """G (all rows, all rows) between the rows of each group of W (groups, rows, d), (groups, rows, rows)."""
    groups, rows = W.shape[:2]
    if G is None:
        return torch.eye(rows).to(W).expand(groups, rows, rows)
    return G.to(W).view(groups, rows, groups, rows).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def places(W: Tensor, H: Tensor, G: Tensor, pattern: NM | None, zeros: int) -> tuple[Tensor, Tensor]:
    """Which weights are kept (bool), and what they are by then, both as W (Algorithm 1, with G on the left).

    Args:
        W: (groups, rows, d), input channels innermost.
        H: X Xᵀ + damping, (groups, d, d).
        G: what errors of the rows weigh together, (groups, rows, rows).
        pattern: N:M along d; None: all but ``zeros`` weights of all groups and rows together.
        zeros: how many weights go.
    """
    scale, rows = (matrix.diagonal(dim1=-2, dim2=-1).sqrt() for matrix in (H, G))
    H, G = H / scale[:, None] / scale[..., None], G / rows[:, None] / rows[..., None]
    scale = rows[..., None] * scale[:, None]
    W = W * scale
    (h, Q), (g, P) = torch.linalg.eigh(H), torch.linalg.eigh(G)
    target, V, rho = G @ W @ H, torch.zeros_like(W), RHO
    kept = before = largest(W, pattern, zeros)
    D = W * kept
    for t in range(ITERATIONS):
        right = P.mT @ (target - V + rho * D) @ Q
        W = P @ (right / (g[..., None] * h[:, None] + rho)) @ Q.mT  # (G ⊗ H + ρI)⁻¹
        drawn = W + V / rho
        kept = largest(drawn, pattern, zeros)
        D = drawn * kept
        V = V + rho * (W - D)
        if t % EVERY == EVERY - 1:
            changed = float((kept & ~before).sum() / kept.sum().clamp_min(1))
            if changed < SETTLED:
                break
            rho *= next(growth for share, growth in GROWTH if changed > share)
            before = kept
    return kept, D / scale


def largest(W: Tensor, pattern: NM | None, zeros: int) -> Tensor:
    """The weights (bool) that the pattern, or ``zeros``, leaves of W (groups, rows, d), by magnitude."""
    if pattern is not None:
        return pattern.mask(W.abs().flatten(0, 1)).view_as(W)
    return without_lowest(W.abs(), zeros)


def fitted(W: Tensor, H: Tensor, G: Tensor, kept: Tensor, x: Tensor) -> Tensor:
    """The kept weights (groups, rows, d) that minimise ½ tr(Δᵀ G Δ H), Δ their difference to W, by conjugate gradients
    from ``x`` on, preconditioned by the diagonals of G and H (Algorithm 2, which has no G)."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)[..., None] * H.diagonal(dim1=-2, dim2=-1)[:, None]
    tiny, enough = torch.finfo(H.dtype).tiny, TOLERANCE * (G @ (W * ~kept) @ H * kept).norm()
    r = G @ (W - x) @ H * kept
    p = z = r / diagonal
    rz = (r * z).sum((1, 2), keepdim=True)
    for _ in range(PRODUCTS):
        if r.norm() <= enough:
            break
        Hp = G @ p @ H * kept
        alpha = rz / (p * Hp).sum((1, 2), keepdim=True).clamp_min(tiny)  # of a group that is exact: 0
        x, r = x + alpha * p, r - alpha * Hp
        z, before = r / diagonal, rz
        rz = (r * z).sum((1, 2), keepdim=True)
        p = z + rz / before.clamp_min(tiny) * p
    return x
