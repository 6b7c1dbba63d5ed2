"""How many times the cost: against a slow search on a fine grid, and against what holds whatever the numbers are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill import stats
from kvdistill.stages.report.factor import best_budget, ceiling_difference, cost_factor, first_reach

COSTS = st.lists(st.floats(1.0, 1e6), min_size=2, max_size=6, unique=True).map(sorted)
SCORES = st.floats(-1.0, 1.0).map(lambda x: round(x, 3))


@st.composite
def curves(draw):
    costs = draw(COSTS.filter(lambda c: all(b > 1.01 * a for a, b in itertools.pairwise(c))))
    return np.array(costs), np.array([draw(SCORES) for _ in costs]), draw(SCORES)


def slow_first_reach(costs, scores, level, points=20_001):
    """The first of many places, evenly spread over the logarithm of the cost and the curve's own points, where the
    curve is at `level`."""
    grid = np.linspace(math.log(costs[0]), math.log(costs[-1]), points)
    at = np.union1d(grid, np.log(costs))
    there = np.flatnonzero(np.interp(at, np.log(costs), scores) >= level - 1e-9)  # rounding
    return (math.exp(at[there[0]]) if len(there) else None), (grid[1] - grid[0])


@settings(max_examples=150, deadline=None)
@given(curves())
def test_where_a_curve_first_reaches_a_level_is_where_a_slow_search_finds_it(curve):
    costs, scores, level = curve
    cost, side = first_reach(costs, scores, level)
    slow, step = slow_first_reach(costs, scores, level)
    if side == 1:
        assert slow is None and cost == costs[-1] and scores.max() < level
    elif side == -1:
        assert scores[0] > level and cost == costs[0]
    else:  # a place of the grid is at most one step behind
        assert -1e-4 <= math.log(slow) - math.log(cost) <= step + 1e-9
        assert np.interp(math.log(cost), np.log(costs), scores) == pytest.approx(level, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(curves(), st.floats(1e-3, 1e3), st.floats(0.1, 5), st.floats(-3, 3))
def test_units_of_cost_and_of_score_do_not_matter(curve, unit, scale, shift):
    costs, scores, level = curve
    cost, side = first_reach(costs, scores, level)
    other, same_side = first_reach(unit * costs, scale * np.round(scores, 3) + shift, scale * level + shift)
    if abs(scores - level).min() > 1e-6:  # rounding moves what is equal
        assert same_side == side and other == pytest.approx(unit * cost, rel=1e-6)


@given(curves())
def test_an_arm_against_itself_needs_once_the_cost_at_most(curve):
    costs, scores, _ = curve
    cost, side = first_reach(costs, scores, scores[-1])
    assert cost <= costs[-1] * (1 + 1e-12) and side <= 0
    rising = np.maximum.accumulate(scores) + np.arange(len(scores))
    assert first_reach(costs, rising, rising[1]) == (pytest.approx(costs[1]), 0)


def test_a_factor_by_hand():
    """Accuracy .2, .5, .8 at 100, 200, 400 steps: .5 is there at 200, .65 at 100 * 2^1.5, .35 at 100 * 2^0.5."""
    costs, scores = np.array([[100.0, 200, 400]] * 3), np.array([[0.2, 0.5, 0.8]] * 3)
    found = cost_factor([100, 100, 100], [0.5, 0.65, 0.35], costs, scores)
    assert found.per_seed == pytest.approx([2, 2**1.5, 2**0.5]) and found.factor == pytest.approx(2)
    t = stats.paired_t([math.log(x) for x in found.per_seed], [0, 0, 0])
    assert (found.low, found.high) == pytest.approx((math.exp(t.low), math.exp(t.high)))
    assert found.low == pytest.approx(2 ** (1 - 4.302652729911275 * 0.5 / math.sqrt(3))) and found.bound == ""


def test_what_is_not_reached_within_the_range_is_said_to_be_so():
    costs, scores = np.array([[100.0, 200, 400]] * 3), np.array([[0.2, 0.5, 0.8]] * 3)
    beyond = cost_factor([100, 100, 100], [0.9, 0.9, 0.5], costs, scores)
    assert beyond.bound == "more than" and beyond.num_beyond == 2 and math.isnan(beyond.low)
    assert (
        beyond.factor == pytest.approx((4 * 4 * 2) ** (1 / 3))
        and "not reached within the range by 2 of 3" in beyond.reason
    )
    before = cost_factor([400, 400, 400], [0.1, 0.1, 0.2], costs, scores)
    assert before.bound == "less than" and before.num_before == 2 and before.factor == pytest.approx(0.25)
    both = cost_factor([100, 100, 100], [0.9, 0.1, 0.5], costs, scores)
    assert math.isnan(both.factor) and "smallest budget by 1" in both.reason
    few = cost_factor([100, 100], [0.5, 0.5], costs[:2], scores[:2])
    assert math.isnan(few.factor) and "at least 3" in few.reason
    same = cost_factor([100, 100, 100], [0.5, 0.5, 0.5], costs, scores)
    assert same.factor == pytest.approx(2) and math.isnan(same.low) and "zero variance" in same.reason


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 8.0), st.integers(3, 6), st.integers(0, 10**6))
def test_a_baseline_that_is_so_many_times_slower_is_found_to_be(slower, num_seeds, seed):
    """Both learn along one curve in log cost, which differs from seed to seed; the baseline at `slower` times the
    cost. No noise between the two, so every seed gives the very factor."""
    rng = np.random.default_rng(seed)
    budgets = np.array([1.0, 2, 4, 8, 16])
    costs, scores, level = [], [], []
    for _ in range(num_seeds):
        start, slope = rng.uniform(0, 0.2), rng.uniform(0.1, 0.3)
        costs.append(100 * budgets)
        scores.append(start + slope * np.log(budgets / slower))
        level.append(start)  # the arm at one budget
    found = cost_factor([100.0] * num_seeds, level, np.array(costs), np.array(scores))
    if slower >= 1:
        assert found.factor == pytest.approx(slower, rel=1e-6)
    else:
        assert found.bound == "less than" and found.factor == pytest.approx(1)


def test_intervals_of_noisy_curves_cover_the_true_factor():
    """4,000 studies of five seeds, log-normal noise of the factor: 95 % intervals hold it 95 % ± 1.2."""
    rng = np.random.default_rng(3)
    costs, scores = np.array([[1.0, 1024.0]] * 5), np.array([[0.0, 10.0]] * 5)
    held = 0
    for _ in range(4000):
        level = np.log2(3 * np.exp(0.3 * rng.normal(size=5)))
        found = cost_factor([1.0] * 5, level.tolist(), costs, scores)
        held += found.low <= 3 <= found.high
    assert abs(held / 4000 - 0.95) < 0.012


def test_the_best_budget_is_chosen_on_other_figures_than_it_is_judged_by():
    tested, other = np.array([[0.1, 0.9], [0.2, 0.9], [0.3, 0.9]]), np.array([[0.4], [0.3], [0.1]])
    validated = np.array([[0.8, 0.7], [0.8, 0.7], [0.8, 0.7]])
    at, other_at, t = ceiling_difference(tested, other, validated, other)
    assert (at, other_at) == (0, 0) and t.difference == pytest.approx(-0.2 / 3)
    assert best_budget(np.array([[0.5, 0.5], [0.5, 0.5]])) == 0, "of equal ones the cheapest"
