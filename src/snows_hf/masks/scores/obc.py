"""OBC / ExactOBS: weights go one by one, each time the one that costs the layer's output least once the others have
made up for it (Frantar, Singh and Alistarh, 2022, Algorithms 1 and 2).

The inputs are the dense network's. Unstructured, every layer loses the same share of its weights, chosen across its
rows; a score cannot be compared between layers, whose outputs matter to the network in different measure.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...patterns import NM
from ..aims import Aim, bias_for, dense_aims
from ..evidence import Evidence, unmatrix
from .base import Choice


CHUNK = {"cpu": 2**21, "cuda": 2**27}
"""Numbers in the inverses that are updated together: what a cache holds, and what keeps a GPU busy in 1 GB."""


Kept = tuple[Tensor, Tensor]
"""Which weights of a layer are kept (bool), and the values of all, zero where they are not."""

Aims = Callable[[Evidence, Mapping[str, Tensor]], Iterator[Aim]]
"""What layers are fitted to (aims.py), of all but those whose pruned weights are there; these grow meanwhile."""

Decide = Callable[[Aim, NM | None, int], Kept]
"""What a layer is fitted to, its N:M or None, and how many weights go → which are kept, as W."""


def layer_by_layer(
    evidence: Evidence, decide: Decide, aims: Aims = dense_aims, seconds: Mapping[str, float] | None = None
) -> Choice:
    """What ``decide`` makes of every layer, which is thought to take so many ``seconds`` by the layer's name; what an
    earlier run made of a layer stays."""
    journal, layers, zeros = evidence.run.journal, evidence.fitted, evidence.pattern.zeros(evidence.weights)
    records = {name: f"{evidence.record}-layer-{place:04d}" for place, name in enumerate(layers)}
    finished = {name: found.tensors for name, record in records.items() if (found := journal.get(record)) is not None}
    weights = {name: own for tensors in finished.values() for name, own in tensors.items() if name != "mask"}
    todo, masks = aims(evidence, weights), dict[str, Tensor]()
    for name in evidence.run.track(records, f"Layers of {evidence.title}", len(records), str, seconds):
        weight = layers[name]
        tensors = finished.pop(name, None)
        if tensors is None:
            aim = next(todo)  # in the same order
            kept, updated = decide_for(evidence, decide, aim, zeros.get(name, 0))
            tensors = {"mask": unmatrix(kept, weight.shape), name: unmatrix(updated, weight.shape).to(weight)}
            tensors |= bias_for(evidence, aim, updated)
            journal.put(records[name], tensors)
        masks[name] = tensors.pop("mask").to(weight.device)
        weights |= {name: tensor.to(weight) for name, tensor in tensors.items()}
    return Choice({name: mask for name, mask in masks.items() if name in evidence.weights}, weights)


def decide_for(evidence: Evidence, decide: Decide, aim: Aim, zeros: int) -> Kept:
    """What ``decide`` makes of the layer of an aim, which loses so many weights; one that is free reaches its aim."""
    if aim.name in evidence.free:
        return torch.ones_like(aim.W, dtype=torch.bool), aim.W
    pattern = evidence.pattern.of(aim.name)
    return decide(aim, pattern if isinstance(pattern, NM) else None, zeros)


def obc(evidence: Evidence) -> Choice:
    def decide(aim: Aim, pattern: NM | None, zeros: int) -> Kept:
        kept = nm_kept(aim.W, aim.H, pattern) if pattern else unstructured_kept(aim.W, aim.H, zeros)
        return kept, refit(aim.W, aim.H, kept)

    return layer_by_layer(evidence, decide)


def nm_kept(W: Tensor, H: Tensor, pattern: NM) -> Tensor:
    """The weights (bool, as W) that each row keeps once M − N of every M have gone; W has input channels innermost."""
    steps = W.shape[1] // pattern.m * (pattern.m - pattern.n)
    order = torch.cat([order for order, _ in removals(W, H, steps, pattern)])
    return torch.ones_like(W, dtype=torch.bool).scatter_(1, order, False)


def unstructured_kept(W: Tensor, H: Tensor, zeros: int) -> Tensor:
    """The weights that a layer keeps when ``zeros`` of them go, always the cheapest next one of any row (Algorithm 2).

    A row's weights go in its own order, so a cheap one may wait behind a dearer one: the running maximum along a row
    is when its turn comes.
    """
    order, cost = map(torch.cat, zip(*removals(W, H, W.shape[1], None), strict=True))
    first = cost.cummax(1).values.flatten().argsort(stable=True)[:zeros]
    taken = torch.zeros_like(cost.flatten(), dtype=torch.bool).index_fill_(0, first, True).view_as(cost)
    return torch.ones_like(taken).scatter_(1, order, ~taken)


def without_lowest(scores: Tensor, zeros: int) -> Tensor:
    """All (bool, as scores) but the ``zeros`` lowest; of equal ones the first go."""
    gone = scores.flatten().argsort(stable=True)[:zeros]
    stays = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    return stays.index_fill_(0, gone, False).view_as(scores)


def chunks(rows: int, n: int, device: torch.device) -> Sequence[Tensor]:
    """Numbers of the rows that are treated together, each with a matrix (n, n)."""
    size = CHUNK.get(device.type, CHUNK["cpu"]) // max(1, n) ** 2
    return torch.arange(rows, device=device).split(max(1, size))


def owners(W: Tensor, H: Tensor) -> Tensor:
    """The group of each row, (rows,)."""
    return torch.arange(len(W), device=W.device) // (len(W) // len(H))


def removals(W: Tensor, H: Tensor, steps: int, pattern: NM | None) -> Iterator[tuple[Tensor, Tensor]]:
    """ExactOBS (Algorithm 1) for some rows at a time: the columns that go, in order, and the cost of each.

    Both are (rows, steps). Cost is the growth of the row's ½ ΔᵀHΔ. With a pattern, no group of M loses more than
    M − N.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    d, owner = W.shape[1], owners(W, H)
    for some in chunks(len(W), d, W.device):
        w, Hinv = W[some], inverse[owner[some]]
        rows = torch.arange(len(w), device=w.device)
        columns = torch.arange(d, device=w.device).repeat(len(w), 1)  # which of the d each column left is
        available = torch.ones_like(w, dtype=torch.bool)
        order = torch.empty(len(w), steps, dtype=torch.long, device=w.device)
        costs = torch.empty(len(w), steps, dtype=w.dtype, device=w.device)
        gone = torch.zeros_like(available)
        for step in range(steps):
            if step and step % max(1, d // 8) == 0:  # rows and columns of what has gone are zero: leave them out
                left = gone.int().argsort(dim=1, stable=True)[:, : d - step]
                Hinv = Hinv[rows[:, None, None], left[:, :, None], left[:, None]]
                w, columns, available, gone = (t.gather(1, left) for t in (w, columns, available, gone))
            pivots = Hinv.diagonal(dim1=-2, dim2=-1)
            costs[:, step], p = torch.where(available, w.square() / (2 * pivots), torch.inf).min(1)
            order[:, step] = columns[rows, p]
            column = Hinv[rows, :, p]
            pivot = column[rows, p][:, None]
            w -= column * (w[rows, p][:, None] / pivot)  # Eq. 3 of the paper
            Hinv.baddbmm_(column[:, :, None], (column / pivot)[:, None], alpha=-1)  # Lemma 1
            gone[rows, p] = True
            available[rows, p] = False
            if pattern is not None:
                group = order[:, step, None] // pattern.m
                full = (order[:, : step + 1] // pattern.m == group).sum(1) == pattern.m - pattern.n
                available &= ~(full[:, None] & (columns // pattern.m == group))
        yield order, costs


def support(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that each row keeps, in their order, (rows, most of them), and which of these are not padding."""
    counts = kept.sum(1)
    columns = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return columns, torch.arange(columns.shape[1], device=kept.device) < counts[:, None]


def system(H: Tensor, owner: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
    """Each row's ``owner`` of H (groups, d, d) on its columns, those of the identity for padding: (rows, n, n)."""
    part = H[owner[:, None, None], columns[:, :, None], columns[:, None]]
    return torch.where(valid[:, :, None] & valid[:, None], part, torch.diag_embed((~valid).to(H)))


def refit(W: Tensor, H: Tensor, kept: Tensor) -> Tensor:
    """The kept weights (rows, d) that minimise ½ ΔᵀHΔ: where the updates of ExactOBS lead, in one solve a row."""
    (columns, valid), owner = support(kept), owners(W, H)
    right = (W.unflatten(0, (len(H), -1)) @ H).flatten(0, 1).gather(1, columns) * valid
    solved = []
    for some in chunks(len(columns), columns.shape[1], W.device):
        factor = torch.linalg.cholesky(system(H, owner[some], columns[some], valid[some]))
        solved.append(torch.cholesky_solve(right[some, :, None], factor))
    return torch.zeros_like(W).scatter_(1, columns, torch.cat(solved)[..., 0])
