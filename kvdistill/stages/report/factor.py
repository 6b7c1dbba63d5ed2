"""How many times what one arm spent must another spend to get as far? And which of the two gets further in the end?

Numbers in, numbers out. An arm was trained at several budgets, with several seeds; a *curve* is, for one seed, its
score at each budget's cost. Between budgets the score is taken to be linear in the logarithm of the cost; beyond them
nothing is assumed: what is not reached within the range is said to be so. Letters: S seeds, B budgets.

Paired by seed: both arms began with the same weights and read the same texts in the same order. The interval is the
t-interval of the factor's logarithm over seeds, as the verdicts' is of differences (`kvdistill.stats` says why).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from kvdistill import stats
from kvdistill.stats import NAN

MIN_SEEDS = 3


class Factor(NamedTuple):
    """How many times the arm's cost the baseline needs to reach the arm's score.

    factor: geometric mean over seeds; low, high: its interval. bound: `` where every seed reaches it within its range;
    `more than`: some seeds do not, and count with the end of their range, so that the true factor is larger; `less
    than`: some are there with the smallest budget already. per_seed as it went in. reason: what is missing, and why.
    """

    factor: float
    low: float
    high: float
    bound: str
    per_seed: list[float]
    num_beyond: int
    num_before: int
    reason: str = ""


def first_reach(costs_B: Float[np.ndarray, "B"], scores_B: Float[np.ndarray, "B"], level: float) -> tuple[float, int]:
    """(cost, side): the smallest cost at which the curve is at `level` or above. Higher scores are better.

    side 0: within its range. 1: never, and the cost is the largest. -1: with the smallest cost already, which is above.
    costs: positive and rising. A curve that dips again has been there all the same: whoever watches stops there.
    """
    if scores_B[0] >= level:
        return float(costs_B[0]), 0 if scores_B[0] == level else -1
    for b in range(1, len(costs_B)):
        if scores_B[b] >= level:
            share = (level - scores_B[b - 1]) / (scores_B[b] - scores_B[b - 1])
            at = math.log(costs_B[b - 1]) + share * (math.log(costs_B[b]) - math.log(costs_B[b - 1]))
            return math.exp(at), 0
    return float(costs_B[-1]), 1


def cost_factor(
    costs_S: Sequence[float],
    scores_S: Sequence[float],
    curve_costs_SB: Float[np.ndarray, "S B"],
    curve_scores_SB: Float[np.ndarray, "S B"],
    alpha: float = 0.05,
) -> Factor:
    """Factor of an arm at one budget against the curve of another. Higher scores are better; paired by seed."""
    reached = [
        first_reach(costs, scores, level)
        for costs, scores, level in zip(curve_costs_SB, curve_scores_SB, scores_S, strict=True)
    ]
    per_seed = [cost / own for (cost, _), own in zip(reached, costs_S, strict=True)]
    beyond, before = (sum(side == way for _, side in reached) for way in (1, -1))
    if len(per_seed) < MIN_SEEDS:
        why = f"{len(per_seed)} seed(s), at least {MIN_SEEDS} are needed"
        return Factor(NAN, NAN, NAN, "", per_seed, beyond, before, why)
    if beyond and before:
        why = f"not reached within the range by {beyond} seed(s), and reached with the smallest budget by {before}"
        return Factor(NAN, NAN, NAN, "", per_seed, beyond, before, why)
    logs = [math.log(ratio) for ratio in per_seed]
    mean = math.exp(sum(logs) / len(logs))
    if beyond:
        why = f"not reached within the range by {beyond} of {len(logs)} seeds"
        return Factor(mean, NAN, NAN, "more than", per_seed, beyond, before, why)
    if before:
        why = f"reached with the smallest budget already by {before} of {len(logs)} seeds"
        return Factor(mean, NAN, NAN, "less than", per_seed, beyond, before, why)
    t = stats.paired_t(logs, [0.0] * len(logs), alpha)
    if t.reason:
        return Factor(mean, NAN, NAN, "", per_seed, 0, 0, t.reason)
    return Factor(mean, _exp(t.low), _exp(t.high), "", per_seed, 0, 0)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a wide interval of few seeds is wide, not an overflow


def best_budget(chosen_by_SB: Float[np.ndarray, "S B"]) -> int:
    """The budget with the best mean over seeds; of equal ones the cheapest."""
    return int(np.argmax(chosen_by_SB.mean(axis=0)))


def ceiling_difference(
    scores_SB: Float[np.ndarray, "S B"],
    other_SB: Float[np.ndarray, "S C"],
    chosen_by_SB: Float[np.ndarray, "S B"],
    other_chosen_by_SB: Float[np.ndarray, "S C"],
    alpha: float = 0.05,
) -> tuple[int, int, stats.PairedT]:
    """The best budget of each by figures of its own (validation problems: the test's luck is in no choice), and how far
    the scores there are apart, paired by seed."""
    mine, theirs = best_budget(chosen_by_SB), best_budget(other_chosen_by_SB)
    return mine, theirs, stats.paired_t(scores_SB[:, mine].tolist(), other_SB[:, theirs].tolist(), alpha)
