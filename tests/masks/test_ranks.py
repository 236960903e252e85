"""Bases of heads, in which the last dimensions cost least: against Eckart and Young, and against least squares."""

import torch
from torch import Tensor

from snows_hf.adapters.widths import Slot, Width
from snows_hf.masks.ranks import of_products, of_values


def inputs(count: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(d, d, generator=generator, dtype=torch.float64)


def test_products_without_the_last_ranks_are_the_best_of_their_rank() -> None:
    heads, d, keep = 3, 7, 4
    q, k = (torch.stack([inputs(50, d, seed + 10 * head) for head in range(heads)]) for seed in (0, 1))
    A = of_products(q.mT @ q / 50, k.mT @ k / 50)
    there, back = q @ A.mT, k @ torch.linalg.inv(A)
    products = q @ k.mT
    assert torch.allclose(there @ back.mT, products)
    lost = (there[..., :keep] @ back[..., :keep].mT - products).square().sum((1, 2))
    assert torch.allclose(lost, torch.linalg.svdvals(products)[:, keep:].square().sum(1))


def test_the_last_direction_of_values_is_the_one_that_is_best_made_up_for() -> None:
    heads, d = 2, 5
    x, W = inputs(200, heads * d, 3), inputs(6, heads * d, 4)
    width = Width("attention", "ranks", d, (), (), (Slot("out.weight", 1, times=heads),))
    B = of_values(W, x.T @ x / len(x), width)
    assert torch.allclose(B @ B.mT, torch.eye(d, dtype=B.dtype).expand(heads, d, d))

    def lost(head: int, direction: Tensor) -> float:
        """Of W's outputs, once what is left of this head and all of the other have made up for a direction."""
        rest = torch.linalg.qr(torch.cat([direction[:, None], torch.eye(d, dtype=x.dtype)], 1)).Q[:, 1:]
        parts = [x[:, i * d : (i + 1) * d] for i in range(heads)]
        parts[head] = parts[head] @ rest
        left = torch.cat(parts, 1)
        return float((left @ torch.linalg.lstsq(left, x @ W.T).solution - x @ W.T).square().sum())

    generator = torch.Generator().manual_seed(5)
    for head in range(heads):
        # What stays of the head are the rows of B but the last.
        ours = lost(head, B[head, -1])
        others = torch.randn(100, d, generator=generator, dtype=x.dtype)
        assert all(ours <= lost(head, other / other.norm()) for other in others)
