"""Algorithm 1 against dense solves."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from snows_hf.method.cg import CGStatus, cg


EXACT = {"rtol": 1e-14, "atol": 0.0, "stall": 0.0}


class Product:
    """p -> H p, and how often it was asked for."""

    def __init__(self, H: Tensor) -> None:
        self.H, self.calls = H, 0

    def __call__(self, p: Tensor) -> Tensor:
        self.calls += 1
        return self.H @ p


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    Q, _ = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))
    H = Q @ torch.diag(eigenvalues.double()) @ Q.T
    return (H + H.T) / 2


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    return symmetric(torch.logspace(0, -torch.tensor(condition).log10().item(), n), seed)


def no_preconditioner(H: Tensor, damping: float) -> None:
    return None


def diagonal(H: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    scale = H.diagonal() + damping
    return lambda r: r / scale


def dense(H: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    inverse = torch.linalg.inv(H + damping * torch.eye(len(H), dtype=H.dtype))
    return lambda r: inverse @ r


def quadratic(H: Tensor, g: Tensor, delta: Tensor, damping: float = 0.0) -> float:
    return float(0.5 * delta @ (H @ delta + damping * delta) + g @ delta)


@pytest.mark.parametrize("preconditioner", [no_preconditioner, diagonal])
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.5])
@pytest.mark.parametrize(("n", "condition"), [(1, 1.0), (2, 10.0), (5, 100.0), (30, 10.0), (30, 1e3)])
def test_solves_damped_system(n, condition, damping, preconditioner):
    H, x = spd(n, condition, seed=n), randn(n, seed=n + 1)
    damped = H + damping * torch.eye(n, dtype=H.dtype)
    g = -damped @ x

    result = cg(Product(H), g, damping=damping, max_iter=10 * n, preconditioner=preconditioner(H, damping), **EXACT)

    assert result.status is CGStatus.CONVERGED
    torch.testing.assert_close(result.delta, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.delta, torch.linalg.solve(damped, -g), rtol=1e-10, atol=1e-10)


def test_diagonal_preconditioner_mends_bad_scaling():
    scale = torch.logspace(0, 4, 40, dtype=torch.float64)
    H = spd(40, 3.0) * scale.sqrt()[:, None] * scale.sqrt()
    g = randn(40)
    plain = cg(Product(H), g, damping=0.0, max_iter=2000, rtol=1e-8)
    scaled = cg(Product(H), g, damping=0.0, max_iter=2000, rtol=1e-8, preconditioner=diagonal(H, 0.0))
    assert scaled.iterations < plain.iterations / 2


def test_exact_preconditioner_needs_one_product():
    H, g = spd(20, 1e3), randn(20)
    result = cg(Product(H), g, damping=0.1, max_iter=20, rtol=1e-10, preconditioner=dense(H, 0.1))
    assert (result.status, result.iterations) == (CGStatus.CONVERGED, 1)


@pytest.mark.parametrize("preconditioner", [no_preconditioner, diagonal])
@pytest.mark.parametrize(("rtol", "atol"), [(1e-1, 0.0), (1e-3, 0.0), (0.0, 1e-2), (0.0, 1e-5), (1e-6, 1e-1)])
def test_stops_at_first_residual_below_tolerance(rtol, atol, preconditioner):
    H, g = spd(40, 100.0), 7 * randn(40)
    limit = max(rtol * float(g.norm()), atol)

    def run(max_iter: int):
        return cg(
            Product(H),
            g,
            damping=0.1,
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
            preconditioner=preconditioner(H, 0.1),
        )

    def residual(delta: Tensor) -> float:
        return float((H @ delta + 0.1 * delta + g).norm())

    result = run(200)
    before = run(result.iterations - 1)
    assert (result.status, before.status) == (CGStatus.CONVERGED, CGStatus.MAX_ITER)
    assert residual(result.delta) <= limit * (1 + 1e-9) < residual(before.delta)
    assert result.residual == pytest.approx(residual(result.delta) / float(g.norm()), rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])  # powers of two scale without rounding
def test_relative_tolerance_does_not_depend_on_the_scale_of_the_loss(scale):
    H, g = spd(30, 100.0), randn(30)
    plain, scaled = (
        cg(Product(H), g, damping=0.0, rtol=1e-4),
        cg(Product(scale * H), scale * g, damping=0.0, rtol=1e-4),
    )
    assert scaled.iterations == plain.iterations
    assert torch.equal(scaled.delta, plain.delta)


@pytest.mark.parametrize("max_iter", [1, 3, 10])
def test_spends_at_most_max_iter_products(max_iter):
    product = Product(spd(50, 1e4))
    result = cg(product, randn(50), damping=0.0, max_iter=max_iter, **EXACT)
    assert (result.status, result.iterations, product.calls) == (CGStatus.MAX_ITER, max_iter, max_iter)


@given(n=st.integers(1, 12), seed=st.integers(0, 1000), max_iter=st.integers(1, 15), definite=st.booleans())
@settings(max_examples=60, deadline=None)
def test_counts_products_and_always_descends(n, seed, max_iter, definite):
    eigenvalues = randn(n, seed=seed)
    H, g = symmetric(eigenvalues.abs() + 0.01 if definite else eigenvalues, seed), randn(n, seed=seed + 1)
    product = Product(H)
    result = cg(product, g, damping=0.0, max_iter=max_iter, rtol=1e-8)
    assert result.iterations == product.calls <= max_iter
    assert float(result.delta @ g) < 0
    if definite:
        assert result.status is not CGStatus.NEGATIVE_CURVATURE
        assert quadratic(H, g, result.delta) < 0


@pytest.mark.parametrize("preconditioner", [no_preconditioner, diagonal])
def test_zero_gradient_needs_no_product(preconditioner):
    H = spd(10, 10.0)
    product = Product(H)
    result = cg(product, torch.zeros(10, dtype=torch.float64), preconditioner=preconditioner(H, 0.0))
    assert (result.status, result.iterations, product.calls, result.residual) == (CGStatus.CONVERGED, 0, 0, 0.0)
    assert torch.equal(result.delta, torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_indefinite_matrix_ends_with_descent_direction(seed):
    H, g = symmetric(torch.linspace(-1, 4, 30), seed), randn(30, seed=seed)
    result = cg(Product(H), g, damping=1e-4, max_iter=100, **EXACT)
    assert result.status is CGStatus.NEGATIVE_CURVATURE
    assert result.iterations > 1
    assert float(result.delta @ g) < 0
    assert quadratic(H, g, result.delta) < 0  # the iterate before the bad direction, not the bad direction itself


def test_first_direction_of_negative_curvature_gives_the_negative_gradient():
    H, g = -spd(10, 10.0), randn(10)
    assert torch.equal(cg(Product(H), g, damping=1e-4).delta, -g)
    scaled = cg(Product(H), g, damping=1e-4, preconditioner=lambda r: r / 2)
    assert (scaled.status, scaled.iterations) == (CGStatus.NEGATIVE_CURVATURE, 1)
    torch.testing.assert_close(scaled.delta, -g / 2)


def test_damping_can_make_a_matrix_definite():
    H, x = symmetric(torch.linspace(-1, 4, 20)), randn(20)
    damped = H + 2.0 * torch.eye(20, dtype=torch.float64)
    result = cg(Product(H), -damped @ x, damping=2.0, max_iter=200, **EXACT)
    assert result.status is CGStatus.CONVERGED
    torch.testing.assert_close(result.delta, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [1, 4])
def test_non_finite_product_keeps_the_iterate_before_it(at, bad):
    H, g = spd(20, 100.0), randn(20)
    product = Product(H)

    def faulty(p: Tensor) -> Tensor:
        return torch.where(torch.tensor(product.calls + 1 < at), product(p), torch.full_like(p, bad))

    result = cg(faulty, g, damping=0.0, max_iter=20, **EXACT)
    assert (result.status, result.iterations) == (CGStatus.NON_FINITE, at)
    if at == 1:
        assert torch.equal(result.delta, torch.zeros_like(g))
    else:
        assert torch.equal(result.delta, cg(Product(H), g, damping=0.0, max_iter=at - 1, **EXACT).delta)


@pytest.mark.parametrize("stall", [1e-2, 1e-3, 1e-4])
def test_stall_stops_at_the_first_iteration_that_martens_rule_allows(stall):
    H, g = spd(200, 1e3), randn(200)

    def model(iterations: int) -> float:
        return quadratic(H, g, cg(Product(H), g, damping=0.0, max_iter=iterations, **EXACT).delta)

    result = cg(Product(H), g, damping=0.0, max_iter=100, rtol=0.0, stall=stall)
    assert result.status is CGStatus.STALLED

    values = {i: model(i) for i in range(1, result.iterations + 1)}

    def stalled(i: int) -> bool:
        window = max(10, i // 10)
        return i > window and values[i - window] - values[i] < window * stall * -values[i]

    assert next(i for i in values if stalled(i)) == result.iterations
    assert cg(Product(H), g, damping=0.0, max_iter=100, rtol=0.0, stall=0.0).status is CGStatus.MAX_ITER
