"""Algorithm 2: steps, line search and bookkeeping, on objectives whose minima are known."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from snows_hf.method.newton import Expansion, NewtonResult, NewtonState, NewtonStatus, armijo, newton
from snows_hf.settings import SolverConfig


CONFIG = SolverConfig(
    curvature="hessian",
    damping=0.0,
    beta=1e-5,
    backtrack=0.5,
    max_backtracks=30,
    passes=1,
    patience=1000,
    min_gain=0.0,
    cg_rtol=1e-13,
    cg_atol=0.0,
    cg_max_iter=200,
    cg_stall=0.0,
)


def config(**changes: object) -> SolverConfig:
    return SolverConfig(**{**CONFIG.__dict__, **changes})


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HARD_START = torch.tensor([3.0, -4.0, 5.0], dtype=torch.float64)


@dataclass
class Function:
    """An objective from a differentiable function w (m,) -> scalar, with its dense Hessian."""

    f: Callable[[Tensor], Tensor]

    def value(self, w: Tensor) -> float:
        return float(self.f(w))

    def expand(self, w: Tensor) -> Expansion:
        H = torch.func.hessian(self.f)(w)
        return Expansion(self.value(w), torch.func.grad(self.f)(w), lambda p: H @ p)


@dataclass
class Recorded:
    """Notes every call to an objective in a log that several share."""

    name: str
    inner: Function
    log: list[tuple[str, str, Tensor, float]]

    def value(self, w: Tensor) -> float:
        value = self.inner.value(w)
        self.log.append((self.name, "value", w, value))
        return value

    def expand(self, w: Tensor) -> Expansion:
        expansion = self.inner.expand(w)
        self.log.append((self.name, "expand", w, expansion.value))
        return expansion


def quadratic(x: Tensor, seed: int = 0) -> Function:
    A = randn(2 * len(x), len(x), seed=seed)
    return Function(lambda w: (A @ (w - x)).square().mean())


def rosenbrock(w: Tensor) -> Tensor:
    return (100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2).sum()


def soft_absolute(w: Tensor) -> Tensor:
    """Σ √(1 + w²): a full Newton step maps w to −w³, which overshoots wherever |w| > 1."""
    return (1 + w.square()).sqrt().sum()


@dataclass
class Uphill(Function):
    """A gradient of the wrong sign: whatever the solver makes of it, the value can only grow."""

    def expand(self, w: Tensor) -> Expansion:
        right = super().expand(w)
        return Expansion(right.value, -right.gradient, right.product)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_one_full_step_solves_a_quadratic(n):
    x = randn(n)
    objective = quadratic(x)
    result = newton([objective], objective, randn(n, seed=5), CONFIG)
    torch.testing.assert_close(result.w, x, rtol=1e-10, atol=1e-10)
    assert (result.status, result.steps, result.rejected) == (NewtonStatus.IMPROVED, 1, 0)
    assert result.loss_end == pytest.approx(0, abs=1e-18)
    assert result.loss_start == objective.value(randn(n, seed=5))


def test_repeated_steps_reach_the_minimum_of_rosenbrock():
    objective = Function(rosenbrock)
    w = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    result = newton([objective] * 30, objective, w, CONFIG)
    torch.testing.assert_close(result.w, torch.ones(2, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert result.steps == len(result.cg_statuses)


@pytest.mark.parametrize("backtrack", [0.5, 0.9])
@pytest.mark.parametrize("w0", [0.5, 1.5, 3.0, 30.0])
def test_armijo_accepts_the_first_sufficient_decrease(w0, backtrack):
    """A.1.3: L(w + αδ) ≤ L(w) + αβ δᵀg, with the largest such α of 1, τ, τ², …"""
    settings_ = config(backtrack=backtrack, max_backtracks=200)
    w, objective = torch.tensor([w0], dtype=torch.float64), Function(soft_absolute)
    local = objective.expand(w)
    delta = -local.gradient / local.product(torch.ones_like(w))
    slope = float(delta @ local.gradient)

    alpha = armijo(objective.value, w, delta, local.value, slope, settings_)

    def sufficient(a: float) -> bool:
        return objective.value(w + a * delta) <= local.value + a * 1e-5 * slope

    assert 0 < alpha <= 1
    assert sufficient(alpha)
    assert alpha == 1 or not sufficient(alpha / backtrack)
    assert (alpha < 1) == (w0 > 1)


def test_armijo_gives_up_after_its_trials():
    w, trials = torch.zeros(1, dtype=torch.float64), []

    def value(trial: Tensor) -> float:
        trials.append(float(trial))
        return 1.0

    assert armijo(value, w, torch.ones_like(w), 0.5, -1.0, config(max_backtracks=3)) == 0
    assert trials == [1.0, 0.5, 0.25, 0.125]


def test_armijo_holds_at_every_accepted_step_on_the_batch_of_that_step():
    log: list = []
    batches = [Recorded(f"batch {i}", Function(lambda w, i=i: rosenbrock(w - 0.1 * i)), log) for i in range(6)]
    w = torch.tensor([-1.2, 1.0, 2.0], dtype=torch.float64)
    newton(batches, Recorded("held out", Function(rosenbrock), log), w, CONFIG)

    accepted = 0
    for batch in batches:
        start, loss = next((w, v) for name, what, w, v in log if (name, what) == (batch.name, "expand"))
        trials = [(w, v) for name, what, w, v in log if (name, what) == (batch.name, "value")]
        slopes = [float((trial - start) @ batch.inner.expand(start).gradient) for trial, _ in trials]
        sufficient = [v <= loss + 1e-5 * slope + 1e-12 for (_, v), slope in zip(trials, slopes, strict=True)]
        assert not any(sufficient[:-1])  # every trial before the last was refused rightly
        accepted += sufficient[-1]
    assert accepted == len(batches)


def test_line_search_never_uses_the_slope_or_loss_of_another_batch():
    log: list = []
    batches = [Recorded(f"batch {i}", Function(lambda w, i=i: soft_absolute(w - i)), log) for i in range(4)]
    newton(batches, Recorded("held out", Function(soft_absolute), log), 3 * randn(5), config(passes=2))
    current = None
    for name, what, _, _ in log:
        if what == "expand":
            current = name
        elif name != "held out":
            assert name == current
    assert [name for name, what, _, _ in log if what == "expand"][:4] == [f"batch {i}" for i in range(4)]
    assert "expand" not in [what for name, what, _, _ in log if name == "held out"]


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        pytest.param(Uphill(rosenbrock), {}, id="gradient of the wrong sign"),
        pytest.param(Function(soft_absolute), {"max_backtracks": 0}, id="full step overshoots, no backtracking"),
        pytest.param(Function(lambda w: (w - HARD_START).square().sum()), {}, id="already at the minimum"),
    ],
)
def test_step_that_cannot_decrease_is_rejected(objective, changes):
    w, before = HARD_START.clone(), HARD_START
    result = newton([objective] * 3, objective, w, config(**changes))
    assert result.status is NewtonStatus.NOT_IMPROVED
    assert (result.steps, result.rejected) == (3, 3)
    assert torch.equal(result.w, before)
    assert torch.equal(w, before)
    assert result.loss_end == result.loss_start == objective.value(before)
    assert result.status.remedy


def test_backtracking_rescues_the_step_that_overshoots():
    objective, w = Function(soft_absolute), HARD_START
    result = newton([objective], objective, w, config(max_backtracks=30))
    assert (result.status, result.rejected) == (NewtonStatus.IMPROVED, 0)
    assert result.loss_end < result.loss_start


@given(
    seed=st.integers(0, 10_000),
    batches=st.integers(1, 4),
    passes=st.integers(1, 3),
    kind=st.sampled_from([rosenbrock, soft_absolute, torch.cos, None]),
)
@settings(max_examples=40, deadline=None)
def test_never_worse_than_the_start_on_held_out(seed, batches, passes, kind):
    def objective(offset: int) -> Function:
        shift = randn(4, seed=seed + offset)
        return quadratic(shift, seed + offset) if kind is None else Function(lambda w: kind(w - shift).sum())

    held_out, w = objective(99), randn(4, seed=seed + 50)
    result = newton([objective(i) for i in range(batches)], held_out, w, config(passes=passes, max_backtracks=10))
    assert result.loss_start == held_out.value(w)
    assert result.loss_end == held_out.value(result.w) <= result.loss_start
    assert (result.status is NewtonStatus.IMPROVED) == (result.loss_end < result.loss_start)
    if result.status is NewtonStatus.NOT_IMPROVED:
        assert torch.equal(result.w, w)


@dataclass
class Broken(Function):
    """A quadratic whose value or gradient is not finite."""

    value_is: float | None = None
    gradient_is: float | None = None

    def value(self, w: Tensor) -> float:
        return super().value(w) if self.value_is is None else self.value_is

    def expand(self, w: Tensor) -> Expansion:
        right = super().expand(w)
        gradient = right.gradient if self.gradient_is is None else torch.full_like(w, self.gradient_is)
        return Expansion(self.value(w), gradient, right.product)


NAN, INF = float("nan"), float("inf")
BROKEN = [{"value_is": NAN}, {"value_is": INF}, {"gradient_is": NAN}, {"gradient_is": INF}]


@pytest.mark.parametrize("how", BROKEN)
def test_non_finite_batch_keeps_the_start(how):
    good = quadratic(randn(4))
    w = randn(4, seed=1)
    result = newton([Broken(good.f, **how)], good, w.clone(), CONFIG)
    assert result.status is NewtonStatus.NON_FINITE
    assert torch.equal(result.w, w)
    assert result.status.remedy


@pytest.mark.parametrize("value", [NAN, INF])
def test_non_finite_held_out_loss_keeps_the_start(value):
    good = quadratic(randn(4))
    w = randn(4, seed=1)
    result = newton([good], Broken(good.f, value_is=value), w.clone(), CONFIG)
    assert result.status is NewtonStatus.NON_FINITE
    assert torch.equal(result.w, w)


@pytest.mark.parametrize("how", BROKEN)
def test_non_finite_later_batch_keeps_the_best_so_far(how):
    good = quadratic(randn(4))
    result = newton([good, Broken(good.f, **how)], good, randn(4, seed=1), CONFIG)
    assert result.status is NewtonStatus.NON_FINITE
    torch.testing.assert_close(result.w, randn(4), rtol=1e-10, atol=1e-10)
    assert result.loss_end == good.value(result.w)


def test_non_finite_trial_is_backtracked_over():
    # log is undefined where the full step lands: 1 - log w has its minimum at infinity, w - log w at 1.
    objective = Function(lambda w: (w - w.log()).sum())
    w = torch.tensor([2.5], dtype=torch.float64)  # the full Newton step goes to 2w - w² < 0, where log is NaN
    result = newton([objective], objective, w, CONFIG)
    assert result.status is NewtonStatus.IMPROVED
    assert bool(torch.isfinite(result.w).all())


def test_counts_products_and_reports_progress():
    objective, seen, products = Function(rosenbrock), [], 0

    def counts(result: NewtonResult) -> tuple[int, float, float]:
        return result.cg_iterations, result.loss_start, result.loss_end

    @dataclass
    class Counted(Function):
        def expand(self, w: Tensor) -> Expansion:
            inner = super().expand(w)

            def product(p: Tensor) -> Tensor:
                nonlocal products
                products += 1
                return inner.product(p)

            return Expansion(inner.value, inner.gradient, product)

    w = torch.tensor([-1.2, 1.0, 2.0], dtype=torch.float64)
    result = newton([Counted(rosenbrock)] * 5, objective, w, CONFIG, lambda s: seen.append(counts(s.result)))
    assert result.cg_iterations == products
    assert seen[-1] == (products, result.loss_start, result.loss_end)
    assert [start for _, start, _ in seen] == [result.loss_start] * len(seen)
    assert [best for _, _, best in seen] == sorted((best for _, _, best in seen), reverse=True)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_every_pass_takes_one_step_per_batch(passes):
    batches = [Function(lambda w, i=i: rosenbrock(w - 0.1 * i)) for i in range(3)]
    result = newton(batches, batches[0], torch.tensor([-1.2, 1.0], dtype=torch.float64), config(passes=passes))
    assert result.steps == len(result.cg_statuses) == 3 * passes


@dataclass
class Slow(Function):
    """½‖w‖² that claims five times its curvature: every step leaves 0.64 of the loss."""

    def expand(self, w: Tensor) -> Expansion:
        return Expansion(self.value(w), w, lambda p: 5 * p)


@pytest.mark.parametrize(
    ("objective", "patience", "min_gain", "steps"),
    [
        pytest.param(Uphill(rosenbrock), 4, 0.1, 4, id="no step is accepted"),
        pytest.param(Function(lambda w: (w - HARD_START).square().sum()), 4, 0.1, 4, id="nothing is left to gain"),
        pytest.param(Slow(lambda w: 0.5 * w.square().sum()), 1, 0.3, 20, id="every step gains enough"),
        pytest.param(Slow(lambda w: 0.5 * w.square().sum()), 1, 0.4, 1, id="one step gains too little"),
        pytest.param(Slow(lambda w: 0.5 * w.square().sum()), 5, 0.9, 5, id="five steps gain too little together"),
        pytest.param(Slow(lambda w: 0.5 * w.square().sum()), 6, 0.9, 20, id="six steps gain enough together"),
    ],
)
def test_stops_once_patience_steps_gain_less_than_min_gain(objective, patience, min_gain, steps):
    result = newton([objective] * 20, objective, HARD_START, config(patience=patience, min_gain=min_gain))
    assert result.steps == steps


def test_a_perfect_layer_stops_too():
    """A held-out loss of exactly zero cannot shrink, relative or not."""
    objective = Function(lambda w: (w - HARD_START).square().sum())
    assert newton([objective] * 20, objective, HARD_START, config(patience=2, min_gain=0.0)).steps == 2


def test_the_running_mean_has_less_of_the_batches_noise_than_any_iterate():
    minimisers = randn(40, 6, seed=1)
    batches = [Function(lambda w, m=m: (w - m).square().sum()) for m in minimisers]
    held_out = Function(lambda w: (w - minimisers.mean(0)).square().sum())
    start = 5 * torch.ones(6, dtype=torch.float64)

    last = newton(batches, held_out, start, config())
    mean = newton(batches, held_out, start, config(average=40))
    # One exact Newton step ends at its batch's own minimiser: the mean of all iterates is that of the minimisers.
    torch.testing.assert_close(mean.w, minimisers.mean(0))
    assert last.loss_end == pytest.approx(min(map(held_out.value, minimisers)))
    assert mean.loss_end < 1e-20


@pytest.mark.parametrize(("window", "mean"), [(2, 4.5), (3, 5.0)])
def test_the_running_mean_looks_back_on_its_window(window, mean):
    """Iterates 8, 4, 3: the means are 8, 6, then 6 + (3 - 6) / 2 or, of all three, 5."""
    minimisers = torch.tensor([[8.0], [4.0], [3.0]], dtype=torch.float64)
    batches = [Function(lambda w, m=m: (w - m).square().sum()) for m in minimisers]
    held_out = Function(lambda w: (w - mean).square().sum())
    result = newton(batches, held_out, torch.zeros(1, dtype=torch.float64), config(average=window))
    assert float(result.w) == pytest.approx(mean)


@pytest.mark.parametrize("average", [0, 3])
@pytest.mark.parametrize("ended_after", [1, 3, 7])
def test_a_run_that_continues_from_a_state_is_the_run_that_never_ended(ended_after, average):
    """Rejected steps, the patience's counters, the running mean and the best iterate go along."""
    batches = [Function(lambda w, i=i: rosenbrock(w - 0.05 * i)) for i in range(8)]
    w = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    settings_ = config(patience=6, min_gain=0.2, max_backtracks=2, average=average)
    states: list[NewtonState] = []

    def keep(state: NewtonState) -> None:
        states.append(replace(state, result=replace(state.result, cg_statuses=list(state.result.cg_statuses))))

    whole = newton(batches, batches[0], w, settings_, keep)
    state = states[min(ended_after, len(states)) - 1]
    rest = newton(batches[state.result.steps :], batches[0], w * float("nan"), settings_, state=state)
    assert torch.equal(rest.w, whole.w)
    assert {**rest.__dict__, "w": 0} == {**whole.__dict__, "w": 0}


def test_products_that_are_never_finite():
    """Loss and gradient are numbers, the curvature is not: the start stays, and the reason is said."""

    class Broken(Function):
        def expand(self, w: Tensor) -> Expansion:
            return replace(super().expand(w), product=lambda p: p * float("nan"))

    objective = Broken(lambda w: w.square().sum())
    result = newton([objective], objective, HARD_START, config(passes=2))
    assert result.status is NewtonStatus.NON_FINITE and result.rejected == 2
    assert torch.equal(result.w, HARD_START)
