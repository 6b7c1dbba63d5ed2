"""stats.py against published golden numbers, against scipy and statsmodels, and at its edges."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sp

from kvdistill import stats
from kvdistill.core.errors import StatisticsRefused

A, B = [0.412, 0.431, 0.405], [0.398, 0.409, 0.400]
A5, B5 = [*A, 0.420, 0.417], [*B, 0.411, 0.399]


def test_paired_t_three_seeds() -> None:
    found = stats.paired_t(A, B)
    assert found.t == pytest.approx(2.78326135653873, abs=1e-9)
    assert found.p == pytest.approx(0.108484966827, abs=1e-10)
    assert (found.low, found.high) == pytest.approx((-0.00746067752, 0.03479401085), abs=1e-10)
    assert found.df == 2 and found.reason == ""
    assert found.low < 0 < found.high  # a BCa bootstrap over three seeds would wrongly exclude 0


def test_paired_t_five_seeds() -> None:
    found = stats.paired_t(A5, B5)
    assert found.t == pytest.approx(4.469237303325, abs=1e-9)
    # exactly 1 - sin(a)(1 + cos(a)^2 / 2), a = atan(t / 2), in rational arithmetic: 0.0110811802517798.
    # shared/ENGINES.md prints 0.0110811782518, which is off in its ninth decimal.
    assert found.p == pytest.approx(0.0110811802517798, abs=1e-14)
    assert found.p == pytest.approx(0.0110811782518, abs=3e-9)
    reference = sp.ttest_rel(A5, B5)
    assert (found.t, found.p) == pytest.approx((reference.statistic, reference.pvalue), rel=1e-10)
    interval = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_tost_golden() -> None:
    found = stats.tost(A5, B5, 0.02)
    assert found.p == pytest.approx(0.0516415206743, abs=1e-10)
    assert found.p == max(found.p_lower, found.p_upper)


def test_holm_golden_and_by_statsmodels() -> None:
    assert stats.adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-12)
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(3).random(7) ** 3
    assert stats.adjust_holm(list(p)) == pytest.approx(list(multipletests(p, method="holm")[1]), abs=1e-12)


def test_holm_counts_what_was_refused() -> None:
    found = stats.adjust_holm([0.01, math.nan, 0.03])
    assert found[0] == pytest.approx(0.03) and math.isnan(found[1]) and found[2] == pytest.approx(0.06)
    assert stats.adjust_holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_holm_is_monotone_and_does_not_depend_on_order(p: list[float], random) -> None:
    adjusted = stats.adjust_holm(p)
    assert all(q <= a <= 1 for q, a in zip(p, adjusted, strict=True))
    by_p = [a for _, a in sorted(zip(p, adjusted, strict=True))]
    assert by_p == sorted(by_p)
    order = list(range(len(p)))
    random.shuffle(order)
    shuffled = stats.adjust_holm([p[i] for i in order])
    assert [adjusted[i] for i in order] == pytest.approx(shuffled)


def test_mcnemar_golden() -> None:
    assert stats.mcnemar(25, 12).p == pytest.approx(0.0485197382803, abs=1e-12)
    assert stats.mcnemar(9, 2, exact=True).p == pytest.approx(0.0654296875, abs=1e-12)
    assert stats.mcnemar(5, 5).p == 1.0 and stats.mcnemar(5, 5, exact=True).p == 1.0
    none = stats.mcnemar(0, 0)
    assert math.isnan(none.p) and none.reason


@pytest.mark.parametrize(
    ("n", "alpha", "d_z"), [(3, 0.05, 3.264), (3, 0.05 / 3, 5.667), (5, 0.05, 1.682), (10, 0.05, 0.996)]
)
def test_smallest_detectable_golden(n: int, alpha: float, d_z: float) -> None:
    found, reason = stats.smallest_detectable_d(n, alpha)
    assert found == pytest.approx(d_z, abs=5e-4) and reason == ""
    assert stats.paired_power(found, n, alpha) == pytest.approx(0.8, abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(2, 0.5), (3, 1.0), (5, 2.0), (10, 0.3), (400, 0.1), (4, 0.0)])
def test_power_by_scipys_noncentral_t(n: int, d: float) -> None:
    critical, shift = sp.t.isf(0.025, n - 1), d * math.sqrt(n)
    reference = sp.nct.sf(critical, n - 1, shift) + sp.nct.cdf(-critical, n - 1, shift)
    assert stats.paired_power(d, n) == pytest.approx(reference, abs=1e-10)


# R 4.2.2: power.t.test(n=N, delta=D, sd=1, sig.level=A, type="paired", alternative="two.sided", strict=TRUE)$power
@pytest.mark.parametrize(
    ("n", "d", "alpha", "power"),
    [
        (3, 1, 0.05, 0.179255393776663),
        (3, 3.264, 0.05, 0.799991684218348),
        (3, 4, 0.05 / 5, 0.385932447086497),
        (4, 0.5, 0.1, 0.202962894358421),
        (5, 2, 0.05, 0.90888486810127),
        (5, 1.682, 0.05 / 3, 0.523420831070465),
        (10, 0.3, 0.01, 0.0373913229867671),
        (40, 0.4, 0.05 / 6, 0.412600226575652),
    ],
)
def test_power_by_r(n: int, d: float, alpha: float, power: float) -> None:
    assert stats.paired_power(d, n, alpha) == pytest.approx(power, abs=1e-6)


# R 4.2.2: power.t.test(n=N, sd=1, sig.level=A, power=.8, type="paired", strict=TRUE, tol=1e-12)$delta
@pytest.mark.parametrize(
    ("n", "alpha", "delta"),
    [(3, 0.05, 3.26404354969677), (5, 0.05, 1.68199696595358), (5, 0.05 / 5, 2.62897376160583),
     (10, 0.05 / 2, 1.13885407079913)],
)  # fmt: skip
def test_smallest_detectable_by_r(n: int, alpha: float, delta: float) -> None:
    assert stats.smallest_detectable_d(n, alpha)[0] == pytest.approx(delta, abs=1e-6)


# R 4.2.2: power.t.test(delta=D, sd=1, sig.level=A, power=P, type="paired", strict=TRUE, tol=1e-12)$n, not yet rounded
@pytest.mark.parametrize(
    ("d", "alpha", "power", "n"),
    [
        (1.5, 0.05, 0.8, 5.68614209778803),
        (-0.8, 0.05, 0.8, 14.3027644928194),
        (2.5, 0.05 / 3, 0.8, 4.66480210293567),
        (0.5, 0.05 / 6, 0.9, 64.9732362799343),
        (0.2, 0.05, 0.8, 198.150820954208),
    ],
)
def test_seeds_needed_by_r(d: float, alpha: float, power: float, n: float) -> None:
    found, reason = stats.seeds_needed(d, alpha, power)
    assert found == math.ceil(n) and reason == ""
    assert stats.paired_power(abs(d), int(found), alpha) >= power > stats.paired_power(abs(d), int(found) - 1, alpha)


@pytest.mark.parametrize(("d", "words"), [(math.nan, "no effect"), (math.inf, "no effect"), (0.0, "more than 10,000"),
                                          (0.02, "more than 10,000")])  # fmt: skip
def test_no_number_of_seeds_is_said_with_a_reason(d: float, words: str) -> None:
    found, reason = stats.seeds_needed(d)
    assert math.isnan(found) and words in reason


@given(st.floats(0.05, 30), st.floats(1e-4, 0.2))
@settings(max_examples=40, deadline=None)
def test_a_larger_effect_never_needs_more_seeds(d: float, alpha: float) -> None:
    least, more = stats.seeds_needed(1.3 * d, alpha)[0], stats.seeds_needed(d, alpha)[0]
    assert math.isnan(more) or 2 <= least <= more


# R 4.2.2: max(t.test(A, B, paired=TRUE, alternative="greater", mu=-M)$p.value,
#              t.test(A, B, paired=TRUE, alternative="less", mu=M)$p.value), which is what TOSTER::t_TOST gives
@pytest.mark.parametrize(
    ("n", "margin", "lower", "upper"),
    [
        (3, 0.02, 0.010308426323699, 0.163069721487343),
        (5, 0.02, 0.000191251003074509, 0.051641520674312),
        (3, 0.025, 0.00787336496587874, 0.0736656168108087),
        (5, 0.025, 0.000111227163115605, 0.0100058618152823),
    ],
)
def test_tost_by_r(n: int, margin: float, lower: float, upper: float) -> None:
    found = stats.tost(A5[:n], B5[:n], margin)
    assert (found.p_lower, found.p_upper, found.p) == pytest.approx((lower, upper, max(lower, upper)), abs=1e-6)


# R 4.2.2: t.test(A, B, paired=TRUE)
@pytest.mark.parametrize(
    ("n", "t", "p", "low", "high"),
    [
        (3, 2.78326135653873, 0.108484966826963, -0.00746067751959283, 0.0347940108529262),
        (5, 4.46923730332527, 0.0110811802517798, 0.00515120865866856, 0.0220487913413314),
    ],
)
def test_paired_t_by_r(n: int, t: float, p: float, low: float, high: float) -> None:
    found = stats.paired_t(A5[:n], B5[:n])
    assert (found.t, found.p, found.low, found.high) == pytest.approx((t, p, low, high), abs=1e-12)


def test_power_by_simulation_where_scipy_gives_nan() -> None:
    d, _ = stats.smallest_detectable_d(3, 0.005)  # noncentrality 18
    draws = np.random.default_rng(0).normal(d, 1, size=(20_000, 3))
    p = sp.ttest_1samp(draws, 0, axis=1).pvalue
    assert (p < 0.005).mean() == pytest.approx(0.8, abs=0.012)  # four standard errors


def test_smallest_detectable_needs_pairs() -> None:
    found, reason = stats.smallest_detectable_d(1)
    assert math.isnan(found) and "at least 2" in reason


def test_effect_sizes() -> None:
    d = np.array(A5) - np.array(B5)
    found = stats.effect_size(A5, B5)
    assert found.d_z == pytest.approx(d.mean() / d.std(ddof=1))
    # J(4) = Gamma(2) / (sqrt(2) * Gamma(1.5))
    assert found.hedges_g / found.d_z == pytest.approx(1 / (math.sqrt(2) * math.gamma(1.5)))
    two = stats.effect_size([0.5, 0.7], [0.4, 0.3])
    assert math.isfinite(two.d_z) and math.isnan(two.hedges_g) and "3 pairs" in two.reason


def test_mean_and_std() -> None:
    assert stats.mean_and_std([1.0, 2.0, 4.0])[:3] == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1), 3))
    one, none, broken = stats.mean_and_std([2.5]), stats.mean_and_std([]), stats.mean_and_std([1.0, math.nan])
    assert one.mean == 2.5 and math.isnan(one.std) and one.reason
    assert math.isnan(none.mean) and none.reason and math.isnan(broken.mean) and broken.reason


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([0.5], [0.4], "at least 2"),
        ([], [], "at least 2"),
        ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4], "zero variance"),  # equal but for rounding
        ([0.3, 0.3, 0.3], [0.3, 0.3, 0.3], "zero variance"),
        ([0.3, math.nan, 0.5], [0.2, 0.3, 0.4], "not finite"),
    ],
)
def test_undefined_is_nan_with_a_reason(a: list[float], b: list[float], word: str) -> None:
    for found in (stats.paired_t(a, b), stats.effect_size(a, b), stats.tost(a, b, 0.02)):
        assert word in found.reason
        undefined = found.p if hasattr(found, "p") else found.d_z
        assert math.isnan(undefined)


def test_unequal_lengths_are_refused() -> None:
    for call in (stats.paired_t, stats.effect_size, lambda a, b: stats.tost(a, b, 0.1)):
        with pytest.raises(StatisticsRefused, match="cannot be paired"):
            call(A, B5)


def test_tost_without_a_margin() -> None:
    assert "margin" in stats.tost(A, B, math.nan).reason


def test_question_level_by_hand() -> None:
    delta = np.array([[1.0, 0, 0, -1, 1], [1.0, 0, 1, 0, 0]])
    tasks = ["b", "b", "b", "a", "a"]
    found = stats.question_level(delta, tasks)
    b, a = np.array([1, 0, 0.5]), np.array([-0.5, 0.5])
    se = math.sqrt(b.var(ddof=1) / 3 + a.var(ddof=1) / 2) / 2
    assert (found.difference, found.se) == pytest.approx((0.25, se))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * se, rel=1e-6)
    assert "one question" in stats.question_level(delta[:, :4], tasks[:4]).reason
    assert stats.question_level(np.zeros((2, 0)), []).reason == "no questions"


def test_bootstrap_by_a_slow_reference() -> None:
    rng = np.random.default_rng(5)
    delta, tasks = rng.integers(-1, 2, size=(4, 31)).astype(np.float64), ["a"] * 11 + ["b"] * 20
    found = stats.bootstrap_two_stage(delta, tasks, draws=4000, seed=2)
    values = []
    for _ in range(4000):
        seeds = rng.integers(0, 4, 4)
        parts = [delta[np.ix_(seeds, cols[rng.integers(0, len(cols), len(cols))])].mean()
                 for cols in (np.arange(11), np.arange(11, 31))]  # fmt: skip
        values.append(np.mean(parts))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.015)
    assert found == stats.bootstrap_two_stage(delta, tasks, draws=4000, seed=2)
    assert "one seed" in stats.bootstrap_two_stage(delta[:1], tasks).reason


@pytest.mark.parametrize(
    ("difference", "p", "p_tost", "higher", "word", "says"),
    [
        (0.31, 0.01, 1.0, True, "better", "better by 31.0 points"),
        (-0.31, 0.01, 1.0, True, "worse", "worse by 31.0 points"),
        (-0.31, 0.01, 1.0, False, "better", "better by"),
        (0.01, 0.01, 0.01, True, "better", "less than the margin of ±2 points"),
        (0.01, 0.4, 0.01, True, "equivalent", "equivalent within the margin of ±2 points"),
        (0.01, 0.4, 0.4, True, "inconclusive", "smallest detectable effect 8.4 points"),
        (0.01, math.nan, math.nan, True, "inconclusive", "inconclusive"),
    ],
)
def test_verdicts(difference: float, p: float, p_tost: float, higher: bool, word: str, says: str) -> None:
    t = stats.PairedT(difference, 0.02, 2.0, 2, p, -1, 1)
    found = stats.give_verdict(t, p, p_tost, margin=0.02, detectable=0.084, alpha=0.05, higher_is_better=higher)
    assert found.word == word and says in found.sentence


def test_an_open_verdict_says_what_would_settle_it() -> None:
    t = stats.PairedT(0.01, 0.02, 2.0, 2, 0.4, -1, 1)
    known = {"margin": 0.02, "detectable": 0.084, "alpha": 0.05}
    found = stats.give_verdict(t, 0.4, 0.4, needed=14.0, **known)
    assert found.sentence.endswith("smallest detectable effect 8.4 points; 14 seeds would find the effect seen")
    assert "seeds" not in stats.give_verdict(t, 0.4, 0.4, **known).sentence
    assert "seeds" not in stats.give_verdict(t, 0.01, 0.4, needed=14.0, **known).sentence


def test_neither_stats_nor_report_imports_torch() -> None:
    code = (
        "import sys, kvdistill.stats, kvdistill.stages.report; "
        "sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
