"""Terms of the loss against automatic differentiation, in float64."""

import pytest
import torch
from torch import Tensor

from snows_hf.distance import Distance, Divergence, SquaredError


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


o, y = 2 * randn(3, 4, seed=0), 2 * randn(3, 4, seed=1)
TERMS = [SquaredError(y, 0.3), Divergence(y, 0.3)]
each = pytest.mark.parametrize("distance", TERMS, ids=lambda distance: type(distance).__name__)


def test_values():
    assert float(SquaredError(y, 0.3).value(o)) == pytest.approx(0.3 * sum(float(v) ** 2 for v in (o - y).flatten()))
    p, q = y.exp() / y.exp().sum(1, keepdim=True), o.exp() / o.exp().sum(1, keepdim=True)
    assert float(Divergence(y, 0.3).value(o)) == pytest.approx(0.3 * float((p * (p / q).log()).sum()))
    assert float(Divergence(y, 1.0).value(y)) == pytest.approx(0, abs=1e-15)


@each
def test_gradients_and_curvatures_are_the_derivatives(distance: Distance):
    """Both are convex in o, so that Gauss-Newton's C is the Hessian itself."""
    gradient = torch.func.grad(distance.value)(o)
    torch.testing.assert_close(distance.gradient(o), gradient, rtol=1e-12, atol=1e-12)
    H = torch.func.hessian(distance.value)(o).reshape(12, 12)
    t = randn(3, 4, seed=2)
    torch.testing.assert_close(distance.curvature(o, t).flatten(), H @ t.flatten(), rtol=1e-12, atol=1e-12)


@each
def test_roots_times_their_transposes_are_the_curvature(distance: Distance):
    """√C s is linear in s; its matrix, column by column."""
    root = torch.stack([distance.root(o, unit.reshape(3, 4)).flatten() for unit in torch.eye(12).double()], dim=1)
    H = torch.func.hessian(distance.value)(o).reshape(12, 12)
    torch.testing.assert_close(root @ root.T, H, rtol=1e-12, atol=1e-12)
