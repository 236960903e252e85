"""Choices under a budget against all combinations."""

import itertools
import math

import pytest
from hypothesis import given, strategies as st

from snows_hf.errors import ConfigError
from snows_hf.patterns import budget
from snows_hf.patterns.budget import spend


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], int]:
    layers = draw(st.integers(1, 4))
    counts = [draw(st.integers(1, 4)) for _ in range(layers)]
    losses = [[draw(st.integers(0, 50)) / 7 for _ in range(n)] for n in counts]
    costs = [[draw(st.integers(0, 12)) for _ in range(n)] for n in counts]
    slack = draw(st.integers(0, 20))
    return losses, costs, sum(map(min, costs)) + slack


def total(values: list[list], choice: tuple[int, ...] | list[int]) -> float:
    return sum(each[i] for each, i in zip(values, choice, strict=True))


def best_of_all(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    choices = itertools.product(*(range(len(each)) for each in losses))
    return min(total(losses, choice) for choice in choices if total(costs, choice) <= budget)


@given(problems())
def test_least_loss_of_all_combinations(problem) -> None:
    losses, costs, budget = problem
    choice = spend(losses, costs, budget)
    assert total(costs, choice) <= budget
    assert total(losses, choice) == pytest.approx(best_of_all(losses, costs, budget))


@given(problems())
def test_costs_that_are_rounded_never_exceed_the_budget(problem) -> None:
    losses, costs, budget_ = problem
    bins, budget.BINS = budget.BINS, 3
    try:
        assert total(costs, spend(losses, costs, budget_)) <= budget_
    finally:
        budget.BINS = bins


@given(problems())
def test_costs_of_a_common_unit_are_not_rounded(problem) -> None:
    losses, costs, budget = problem
    found = spend(losses, [[10**7 * cost for cost in each] for each in costs], 10**7 * budget + 1)
    assert total(losses, found) == pytest.approx(best_of_all(losses, costs, budget))


@given(problems())
def test_an_unlimited_budget_takes_every_layers_best(problem) -> None:
    losses, costs, _ = problem
    assert total(losses, spend(losses, costs, 10**9)) == pytest.approx(sum(map(min, losses)))


def test_losses_that_are_no_numbers_are_taken_only_where_they_must_be() -> None:
    assert spend([[math.inf, 3.0], [math.nan, 5.0]], [[1, 2], [1, 2]], 4) == [1, 1]
    assert sorted(spend([[math.inf, 3.0], [math.inf, 5.0]], [[1, 2], [1, 2]], 3)) == [0, 1]
    assert spend([[math.inf, 3.0], [math.inf, 5.0]], [[1, 2], [1, 2]], 2) == [0, 0]


def test_a_budget_below_the_sparsest_candidates_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep 30, and the budget is 29.*lower sparsity"):
        spend([[1.0, 0.0], [1.0, 0.0]], [[10, 40], [20, 40]], 29)
