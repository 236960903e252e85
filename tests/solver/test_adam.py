"""Adam on the active weights, against torch's own on the same losses, and what it must never do."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from snows_hf.solver import NewtonStatus, adam


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Quadratic:
    """½ ‖w - x‖², times ``scale``."""

    x: Tensor
    scale: float = 1.0

    def value(self, w: Tensor) -> float:
        return float(self.scale * 0.5 * (w - self.x).square().sum())

    def gradient(self, w: Tensor) -> tuple[float, Tensor]:
        return self.value(w), self.scale * (w - self.x)


def test_it_reaches_the_minimum_of_noisy_batches():
    x = randn(5)
    batches = [Quadratic(x + 0.1 * randn(5, seed=i)) for i in range(1, 401)]
    w = x + 1.0
    result = adam(batches, Quadratic(x), w, 0.05, len(batches))
    assert result.status == NewtonStatus.IMPROVED and result.steps == 400
    assert result.loss_end == Quadratic(x).value(result.w) < 0.01 * result.loss_start
    assert result.losses == sorted(result.losses, reverse=True) and len(result.losses) == 40
    assert torch.equal(w, x + 1.0)


def test_first_step_is_as_long_as_the_rate_says():
    """Adam's first step is its rate in every weight; here a twentieth of the steps is one step, and cos 0 = 1."""
    w = randn(6)
    x = w + 1
    result = adam([Quadratic(x)] * 20, Quadratic(x), w, 1e-3, 20)
    first = adam([Quadratic(x)], Quadratic(x), w, 1e-3, 1)
    length = 1e-3 * float(w.square().mean().sqrt())
    torch.testing.assert_close(first.w, w + length, rtol=1e-6, atol=0)
    steps = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert float((result.w - w).max()) <= length * sum(steps) * (1 + 1e-6)


def test_weights_that_only_get_worse_are_not_taken():
    w = randn(4)
    result = adam([Quadratic(w + 100)] * 30, Quadratic(w), w, 0.1, 30)
    assert result.status == NewtonStatus.KEPT_MASKED and torch.equal(result.w, w)
    assert result.loss_end == result.loss_start == 0


@pytest.mark.parametrize("bad", ["start", "batch"])
def test_losses_that_are_not_finite_end_it(bad: str):
    w, broken = randn(4), Quadratic(randn(4, seed=1), float("nan"))
    good = Quadratic(randn(4, seed=1))
    result = adam([good] * 10 + [broken] * 10, broken if bad == "start" else good, w, 0.01, 20)
    assert result.status == NewtonStatus.NON_FINITE
    assert torch.isfinite(result.w).all() and result.steps == (0 if bad == "start" else 10)
