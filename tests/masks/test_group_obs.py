"""Group OBS against brute force, and its repair against least squares."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from snows_hf.masks.group_obs import Moments, Reader, repair, units_left, variance


def inputs(count: int, d: int, seed: int) -> Tensor:
    """Correlated, and of a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(d, d, generator=generator, dtype=torch.float64) + 1


def moments_of(x: Tensor) -> Moments:
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return Moments.of(ones.T @ ones)


def brute_force(layers: list[tuple[Tensor, Moments, float]], units: int, keep: int) -> list[int]:
    """One unit at a time, every candidate tried with the best repair that there is for it."""
    left = list(range(units))

    def cost(stays: list[int]) -> float:
        total = 0.0
        for W, moments, share in layers:
            q = W.shape[1] // units
            columns = torch.zeros(units, dtype=torch.bool).index_fill_(0, torch.tensor(stays), True)
            lost = W - repair(W, moments, columns.repeat_interleave(q))[0]
            total += share * float(((lost @ moments.ridged()) * lost).sum())
        return total

    while len(left) > keep:
        left = min(([u for u in left if u != gone] for gone in left), key=cost)
    return left


@settings(max_examples=12, deadline=None)
@given(q=st.sampled_from([1, 2, 3]), units=st.integers(4, 9), readers=st.integers(1, 2), seed=st.integers(0, 99))
def test_units_left_are_those_of_brute_force(q: int, units: int, readers: int, seed: int) -> None:
    layers = []
    for i in range(readers):
        moments = moments_of(inputs(200, units * q, seed + i))
        W = torch.randn(5, units * q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        layers.append((W, moments, 1 / variance(W, moments)))
    keep = units // 2
    found = units_left([Reader(W, moments, units, share) for W, moments, share in layers], keep)
    assert found.tolist() == brute_force(layers, units, keep)


def test_what_waits_for_a_block_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(300, 40, 0)
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = units_left([Reader(W, moments_of(x), 40)], 11)
    monkeypatch.setattr("snows_hf.masks.group_obs.BLOCK", 3)
    assert torch.equal(units_left([Reader(W, moments_of(x), 40)], 11), whole)


def test_repair_is_least_squares_with_a_bias() -> None:
    """But for the ridge, which is a ten-thousandth."""
    x = inputs(400, 12, 2)
    W = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kept = torch.arange(12) % 3 > 0
    repaired, shift = repair(W, moments_of(x), kept)
    ones = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(ones, x @ W.T).solution

    def error(got: Tensor) -> float:
        return float((got - x @ W.T).square().mean())

    assert (repaired[:, ~kept] == 0).all()
    assert error(x @ repaired.T + shift) == pytest.approx(error(ones @ best), rel=1e-3)


def test_inputs_that_never_vary_cost_nothing() -> None:
    x = inputs(100, 6, 4)
    x[:, 2] = 3.0
    W = torch.ones(2, 6, dtype=torch.float64)
    assert 2 not in units_left([Reader(W, moments_of(x), 6)], 5).tolist()


def test_variances_that_float32_has_lost_leave_an_inverse() -> None:
    x = 100 + 1e-3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.ones(50, 1)], 1)
    moments = Moments.of(x.T @ x)
    assert moments.covariance.diagonal().min() < 0
    assert torch.linalg.eigvalsh(moments.ridged()).min() > 0
