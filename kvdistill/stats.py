"""Paired statistics over training runs. The confirmatory unit is the run (one seed), not the question.

Numbers in, numbers out, on NumPy and SciPy. Knows nothing of files, recipes, budgets or pages; which runs may be
compared at all, and the declared family as a whole, are `report/compare.py`.

An undefined statistic (too few values, no variance, a value that is not finite) is NaN and carries a reason: never 0,
never a crash. Letters: S seeds, Q questions.

Why the t-test over seeds is the test, and not something on questions: with three seeds a bootstrap interval over seeds
covers 70-79 %, and tests on questions alone call a tenth to four fifths of all null effects significant (the more
questions, the more), because they take the noise between training runs for an effect. What is computed on questions
is labelled with what it includes. `docs/statistics.md` has the figures; `tests/test_stats_simulation.py` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from kvdistill.core.errors import StatisticsRefused

NAN = float("nan")
_BLOCK = 250  # bootstrap draws at once
MOST_SEEDS = 10_000  # beyond, "seeds needed" is no plan


class MeanStd(NamedTuple):
    """Mean and sample standard deviation (ddof 1) of n values, in the values' unit."""

    mean: float
    std: float
    n: int
    reason: str = ""


class PairedT(NamedTuple):
    """Mean of the paired differences, its standard deviation, t, degrees of freedom, two-sided p, t-interval."""

    difference: float
    std: float
    t: float
    df: int
    p: float
    low: float
    high: float
    reason: str = ""


class Effect(NamedTuple):
    """Cohen's d_z = mean(d) / std(d) and Hedges' g = J(n-1) * d_z; both without unit."""

    d_z: float
    hedges_g: float
    reason: str = ""


class Tost(NamedTuple):
    """Two one-sided t-tests against +-margin; p is the larger of the two."""

    p: float
    p_lower: float
    p_upper: float
    reason: str = ""


class PValue(NamedTuple):
    p: float
    reason: str = ""


class Interval(NamedTuple):
    """An estimate with its standard error (NaN for a bootstrap) and interval."""

    difference: float
    se: float
    low: float
    high: float
    reason: str = ""


def mean_and_std(values: Sequence[float]) -> MeanStd:
    """Mean and standard deviation (ddof 1). One value has a mean and no standard deviation."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return MeanStd(NAN, NAN, 0, "no values")
    if not np.isfinite(x).all():
        return MeanStd(NAN, NAN, int(x.size), "a value is not finite")
    if x.size == 1:
        return MeanStd(float(x[0]), NAN, 1, "one value has no standard deviation")
    return MeanStd(float(x.mean()), float(x.std(ddof=1)), int(x.size))


def _differences(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, str]:
    """a - b, and why its spread says nothing ('' if it does). Raises StatisticsRefused on unequal lengths."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise StatisticsRefused(
            f"{x.size} values cannot be paired with {y.size}", fix="give one value per seed for both arms, same order"
        )
    d = x - y
    if d.size < 2:
        return d, f"{d.size} pair(s): a paired test needs at least 2"
    if not np.isfinite(d).all():
        return d, "a value is not finite"
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bit: rounding is no variance
    if np.ptp(d) <= 1e-12 * max(np.abs(x).max(), np.abs(y).max(), 1e-300):
        return d, "zero variance: every seed shows the same difference"
    return d, ""


def paired_t(a: Sequence[float], b: Sequence[float], alpha: float = 0.05) -> PairedT:
    """Two-sided paired t-test of mean(a - b) = 0 and the 1 - alpha t-interval.

    a, b: one value per seed, paired by position. Raises StatisticsRefused if their lengths differ.
    """
    d, reason = _differences(a, b)
    if reason:
        mean = float(d.mean()) if d.size else NAN
        return PairedT(mean, NAN, NAN, max(d.size - 1, 0), NAN, NAN, NAN, reason)
    df, mean, std = d.size - 1, float(d.mean()), float(d.std(ddof=1))
    se = std / math.sqrt(d.size)
    t = mean / se
    half = float(stats.t.isf(alpha / 2, df)) * se
    return PairedT(mean, std, t, df, float(2 * stats.t.sf(abs(t), df)), mean - half, mean + half)


def effect_size(a: Sequence[float], b: Sequence[float]) -> Effect:
    """Cohen's d_z and its small-sample correction, Hedges' g = J(df) * d_z with df = n - 1 and the exact
    J(df) = Gamma(df/2) / (sqrt(df/2) * Gamma((df-1)/2)) (Hedges 1981, eq. 6e); J does not exist for n = 2."""
    d, reason = _differences(a, b)
    if reason:
        return Effect(NAN, NAN, reason)
    d_z, df = float(d.mean() / d.std(ddof=1)), d.size - 1
    if df < 2:
        return Effect(d_z, NAN, "Hedges' correction needs at least 3 pairs")
    j = math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    return Effect(d_z, d_z * j)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment over the family as declared.

    A NaN (a comparison that was refused) stays NaN but is still counted: the family is what was declared beforehand,
    and leaving failures out would make the others easier to pass.
    """
    m = len(p_values)
    order = sorted(range(m), key=lambda i: math.inf if math.isnan(p_values[i]) else p_values[i])
    adjusted, highest = [NAN] * m, 0.0
    for rank, i in enumerate(order):
        if not math.isnan(p_values[i]):
            highest = max(highest, min(1.0, (m - rank) * p_values[i]))
            adjusted[i] = highest
    return adjusted


def paired_power(d_z: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t-test with n >= 2 pairs at true effect d_z >= 0: the noncentral t, exactly.

    P(|Z + s| > c * sqrt(V / df)) = integral of phi(z) * F_chi2(df * ((z + s) / c)^2) dz, with shift s = d_z * sqrt(n)
    and critical value c; smooth, so Gauss-Legendre is exact to rounding. scipy's own nct gives NaN from s = 14 up,
    and statsmodels' TTestPower is wrong at n = 3.
    """
    df, shift = n - 1, d_z * math.sqrt(n)
    critical = float(stats.t.isf(alpha / 2, df))
    # panels of width 0.5, one edge on the integrand's corner at z = -shift
    edges = np.union1d(np.linspace(-10, 10, 41), [max(-shift, -10.0)])
    nodes, weights = np.polynomial.legendre.leggauss(32)
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    z = (half[:, None] * nodes + middle[:, None]).ravel()
    inside = stats.chi2.cdf(df * ((z + shift) / critical) ** 2, df)
    return float((half[:, None] * weights).ravel() @ (stats.norm.pdf(z) * inside))


@lru_cache(maxsize=64)
def smallest_detectable_d(n: int, alpha: float = 0.05, power: float = 0.8) -> tuple[float, str]:
    """The d_z that n pairs detect with the given power, and '' or why there is none."""
    if n < 2:
        return NAN, f"{n} pair(s): a paired test needs at least 2"
    high = 1.0
    while paired_power(high, n, alpha) < power and high < 1e4:
        high *= 2
    if not paired_power(high, n, alpha) >= power:
        return NAN, f"no effect is detectable with {n} pairs at alpha {alpha:g}"
    return float(optimize.brentq(lambda d: paired_power(d, n, alpha) - power, 0.0, high, xtol=1e-10)), ""


def seeds_needed(d_z: float, alpha: float = 0.05, power: float = 0.8) -> tuple[float, str]:
    """How many pairs find a true effect of this d_z (of either sign) with the given power: the smallest whole n.

    NaN with a reason where there is none. Put in the effect that was seen, this plans the next study; it says nothing
    about how sure the present one is (an effect that three seeds show is on the average larger than the true one).
    """
    d = abs(d_z)
    if not math.isfinite(d):
        return NAN, "no effect size is known"
    most = 2
    while most <= MOST_SEEDS and paired_power(d, most, alpha) < power:
        most *= 2
    if most > MOST_SEEDS:
        return NAN, f"more than {MOST_SEEDS:,} seeds"
    least = max(2, most // 2)  # power grows with n
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if paired_power(d, middle, alpha) >= power else (middle + 1, most)
    return float(least), ""


def tost(a: Sequence[float], b: Sequence[float], margin: float) -> Tost:
    """TOST: is |mean(a - b)| < margin? margin > 0, in the values' unit, set before the data were seen."""
    d, reason = _differences(a, b)
    if not reason and not (math.isfinite(margin) and margin > 0):
        reason = "no margin was declared for this figure"
    if reason:
        return Tost(NAN, NAN, NAN, reason)
    se, df = float(d.std(ddof=1)) / math.sqrt(d.size), d.size - 1
    p_lower = float(stats.t.sf((d.mean() + margin) / se, df))
    p_upper = float(stats.t.cdf((d.mean() - margin) / se, df))
    return Tost(max(p_lower, p_upper), p_lower, p_upper)


def mcnemar(only_a: int, only_b: int, *, exact: bool = False) -> PValue:
    """McNemar's test on the questions that exactly one of two models answers correctly; two-sided.

    Chi-squared with Edwards' continuity correction, or the exact binomial. Conditional on these two checkpoints.
    """
    n = only_a + only_b
    if n == 0:
        return PValue(NAN, "both models answer the same questions correctly")
    if exact:
        return PValue(min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), n, 0.5))))
    return PValue(float(stats.chi2.sf(max(abs(only_a - only_b) - 1, 0) ** 2 / n, 1)))


def _task_columns(tasks_Q: Sequence[str]) -> list[np.ndarray]:
    names = np.asarray(tasks_Q)
    return [np.flatnonzero(names == task) for task in sorted(set(tasks_Q))]


def question_level(delta_SQ: Float[np.ndarray, "S Q"], tasks_Q: Sequence[str], alpha: float = 0.05) -> Interval:
    """Difference of the macro means with a standard error over questions, clustered by question.

    delta: arm - baseline per seed and question. The seeds of one question are averaged first, so they count as one
    cluster; tasks are strata: SE = sqrt(sum_t var_t / Q_t) / num_tasks. Conditional on these checkpoints: it says how
    these very models would differ on other questions, not what another training run would give.
    """
    delta_Q, parts = delta_SQ.mean(axis=0), _task_columns(tasks_Q)
    if not parts or not np.isfinite(delta_Q).all():
        return Interval(NAN, NAN, NAN, NAN, "no questions" if not parts else "a value is not finite")
    difference = float(np.mean([delta_Q[q].mean() for q in parts]))
    if min(len(q) for q in parts) < 2:
        return Interval(difference, NAN, NAN, NAN, "a task with one question has no standard error")
    se = math.sqrt(sum(delta_Q[q].var(ddof=1) / len(q) for q in parts)) / len(parts)
    half = float(stats.norm.isf(alpha / 2)) * se
    return Interval(difference, se, difference - half, difference + half)


@lru_cache(maxsize=1)
def _draws(num_seeds: int, sizes: tuple[int, ...], draws: int, seed: int) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """How often each seed, and each question of each task, is drawn: [draws, seeds], and by block and task
    [draws of the block, questions]. In blocks, so that memory stays small with many questions; kept for the next
    comparison, since all of a study are over the same questions and drawing is what takes the time."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)
    blocks = []
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        blocks.append(
            [rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.uint8) for n in sizes]
        )  # about 1 each
    return of_seeds, blocks


def bootstrap_two_stage(
    delta_SQ: Float[np.ndarray, "S Q"], tasks_Q: Sequence[str], alpha: float = 0.05, draws: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of the macro difference; seeds, then questions within tasks, drawn with replacement.

    It includes both: what another training run and what other questions would give. It keeps no level: three seeds say
    too little of the noise between runs, and the noise of questions, which is in every run already, is drawn once more.
    Where nothing differs it covered between 71 % (runs differ more than questions) and 99 % (the reverse) at three
    seeds, so it is not the confirmatory interval.
    """
    parts = _task_columns(tasks_Q)
    if not parts or not np.isfinite(delta_SQ).all():
        return Interval(NAN, NAN, NAN, NAN, "no questions" if not parts else "a value is not finite")
    difference = float(np.mean([delta_SQ[:, q].mean() for q in parts]))
    num_seeds = delta_SQ.shape[0]
    if num_seeds < 2:
        return Interval(difference, NAN, NAN, NAN, "one seed cannot be resampled")
    values = np.empty(draws)
    of_seeds_RS, blocks = _draws(num_seeds, tuple(len(q) for q in parts), draws, seed)
    weight_RS = of_seeds_RS / num_seeds
    for start, drawn in zip(range(0, draws, _BLOCK), blocks, strict=True):
        block = slice(start, min(start + _BLOCK, draws))
        total = np.zeros(block.stop - block.start)
        for q, counts in zip(parts, drawn, strict=True):
            total += np.einsum("rs,rs->r", weight_RS[block], (counts / len(q)) @ delta_SQ[:, q].T)
        values[block] = total / len(parts)
    low, high = np.quantile(values, [alpha / 2, 1 - alpha / 2])
    return Interval(difference, NAN, float(low), float(high))


@dataclass(frozen=True)
class Verdict:
    """`word`: better | worse | equivalent | inconclusive | refused. `sentence`: the same, in words with the figure."""

    word: str
    sentence: str


def give_verdict(
    t: PairedT,
    p_holm: float,
    p_equivalent: float,
    *,
    margin: float,
    detectable: float,
    alpha: float,
    needed: float = NAN,
    higher_is_better: bool = True,
    scale: float = 100.0,
    unit: str = "points",
) -> Verdict:
    """The comparison in words, from the adjusted p-values. `scale` turns the figure into `unit`.

    detectable: the smallest effect that so many seeds find; needed: seeds that find the effect seen. NaN: not said.
    """
    size = f"{abs(scale * t.difference):.{2 if scale == 1 else 1}f} {unit}"
    limit = f"±{scale * margin:g} {unit}"
    within = p_equivalent < alpha
    if p_holm < alpha:
        word = "better" if (t.difference > 0) == higher_is_better else "worse"
        note = f", though by less than the margin of {limit}: a real but small difference" if within else ""
        return Verdict(word, f"{word} by {size}{note}")
    if within:
        return Verdict("equivalent", f"equivalent within the margin of {limit}")
    seen = f"; smallest detectable effect {scale * detectable:.{2 if scale == 1 else 1}f} {unit}"
    plan = f"; {needed:.0f} seeds would find the effect seen" if math.isfinite(needed) else ""
    return Verdict("inconclusive", "inconclusive" + (seen if math.isfinite(detectable) else "") + plan)
