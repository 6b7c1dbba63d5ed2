"""Curves of cost: arms at several budgets (`report.curves`), how many times faster one learns, which reaches further.

From tables in memory to rows, sentences and one figure; `factor.py` does the arithmetic. Knows nothing of pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from kvdistill import stats
from kvdistill.core.recipe import CurvesRecipe, Recipe
from kvdistill.stages.report.canvas import label, line_style, new_grid, percent_axis
from kvdistill.stages.report.collect import Row, RunTables
from kvdistill.stages.report.factor import ceiling_difference, cost_factor
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.text import number, signed
from kvdistill.stats import NAN

COSTS = {
    "steps": "steps",
    "data": "problems seen (repetitions counted)",
    "distinct": "problems at hand",
    "amortised_flops": "FLOPs, what runs share divided among them",
    "total_flops": "FLOPs, what runs share counted whole",
}
OF_STEPS, OF_PROBLEMS = ("steps", "data", "amortised_flops", "total_flops"), ("distinct",)  # what the budgets raise
DRAWN = ("steps", "data", "amortised_flops")


def curve_summary(recipe: Recipe, tables: RunTables, figure: str, baseline: str) -> Row | None:
    """Rows per arm and budget, factors, ceilings and sentences; None where the recipe asks for no curves.

    figure: accuracy or nll. baseline: held against all others, if it has a curve; else the first that has one.
    """
    curves = recipe.report.curves
    if curves is None:
        return None
    baseline = baseline if baseline in curves.arms else curves.arms[0]
    found: Row = {
        "figure": figure,
        "baseline": baseline,
        "budgets": curves.budgets,
        "of": curves.of,
        "costs": {cost: COSTS[cost] for cost in (OF_STEPS if curves.of_steps else OF_PROBLEMS)},
    }
    arms = [*curves.arms, *curves.points]
    found["rows"] = [row for arm in arms for row in _rows(curves, tables, arm, figure)]
    alpha = recipe.report.alpha
    against = [_against(curves, tables, arm, baseline, figure, alpha) for arm in arms if arm != baseline]
    return found | {"against": against, "sentences": [one["sentence"] for one in against]}


def _rows(curves: CurvesRecipe, tables: RunTables, arm: str, figure: str) -> list[Row]:
    rows = []
    for budget, name in curves.names(arm).items():
        runs = tables.runs.get(name, {})
        score = stats.mean_and_std([run.macro(figure) for run in runs.values()])
        costs = {cost: [run.costs[cost] for run in runs.values() if cost in run.costs] for cost in COSTS}
        rows.append({
            "arm": arm, "name": name, "budget": budget, "seeds": len(runs), "mean": score.mean, "std": score.std,
            **{cost: sum(known) / len(known) if known else NAN for cost, known in costs.items()},
        })  # fmt: skip
    return rows


def _curve(curves: CurvesRecipe, tables: RunTables, arm: str, figure: str, seeds: Sequence[int]) -> Row:
    """By seed and budget: score and validation figure (higher is better), and costs."""
    names, sign = list(curves.names(arm).values()), 1.0 if figure == "accuracy" else -1.0

    def validated(name: str, seed: int) -> float:
        """The last point of the learning curve; the test's own score where there is none."""
        known = [row["val"].get(figure) for row in tables.logs.get(name, {}).get(seed, ()) if row.get("val")]
        known = [value for value in known if value is not None]
        return float(known[-1]) if known else tables.runs[name][seed].macro(figure)

    grid = {cost: np.array([[tables.runs[n][s].costs.get(cost, NAN) for n in names] for s in seeds]) for cost in COSTS}
    return {
        "scores": sign * np.array([[tables.runs[n][s].macro(figure) for n in names] for s in seeds]),
        "validated": sign * np.array([[validated(n, s) for n in names] for s in seeds]),
        **grid,
    }


def _against(curves: CurvesRecipe, tables: RunTables, arm: str, baseline: str, figure: str, alpha: float) -> Row:
    found: Row = {"arm": arm, "baseline": baseline, "factors": {}, "ceiling": None}
    names = [name for one in (arm, baseline) for name in curves.names(one).values()]
    seeds = [seed for seed in tables.seeds if all(seed in tables.runs.get(name, {}) for name in names)]
    if len(seeds) < 2:
        return found | {"sentence": f"{arm} against {baseline}: no curve, since runs are missing."}
    mine, theirs = (_curve(curves, tables, one, figure, seeds) for one in (arm, baseline))
    my_budgets, their_budgets = (list(curves.names(one)) for one in (arm, baseline))
    here = my_budgets.index(1) if curves.of_steps else 0  # what it does with the fewest problems
    for cost in OF_STEPS if curves.of_steps else OF_PROBLEMS:
        given = mine[cost][:, here], mine["scores"][:, here], theirs[cost], theirs["scores"]
        if all(np.isfinite(x).all() for x in given):
            factor = cost_factor(given[0].tolist(), given[1].tolist(), given[2], given[3], alpha)
            found["factors"][cost] = {**factor._asdict(), "most": float((theirs[cost][:, -1] / given[0]).mean())}
    if np.isfinite(mine["scores"]).all() and np.isfinite(theirs["scores"]).all():
        at, other_at, t = ceiling_difference(
            mine["scores"], theirs["scores"], mine["validated"], theirs["validated"], alpha
        )
        sign = 1.0 if figure == "accuracy" else -1.0
        low, high = sorted((sign * t.low, sign * t.high))
        found["ceiling"] = {"difference": sign * t.difference, "low": low, "high": high, "p": t.p, "reason": t.reason,
                            "further": t.low > 0, "less": t.high < 0,
                            "budget": my_budgets[at], "baseline_budget": their_budgets[other_at]}  # fmt: skip
    return found | {"sentence": cost_sentence(found, figure, len(seeds))}


def cost_sentence(found: Row, figure: str, num_seeds: int) -> str:
    """`competence learns 3.1 times faster than ce (2.2 to 4.3 times the steps); it needs … fewer problems …; …`."""
    arm, baseline, factors = found["arm"], found["baseline"], found["factors"]
    said: list[str] = []
    if (distinct := factors.get("distinct")) is not None:
        said.append(_fewer(distinct, arm, baseline, num_seeds))
    steps, data = factors.get("steps"), factors.get("data")
    if steps is not None:
        said.append(f"{arm} {_faster(steps, arm, baseline, 'steps', num_seeds)}")
        if data is not None and _is_shown(data):
            said.append(f"it needs {_times(data)} times fewer problems (repetitions counted)")
    for cost, words in (("amortised_flops", "with what runs share divided among them"),
                        ("total_flops", "with all its teachers cost counted in")):  # fmt: skip
        if (flops := factors.get(cost)) is not None:
            said.append(f"in FLOPs, {words}, {baseline} needs {_amount(flops)}")
    if (ceiling := found["ceiling"]) is not None:
        said.append(_ceiling_words(ceiling, arm, baseline, figure))
    return ("; ".join(said) if said else f"{arm} against {baseline}: a score or a ledger is missing") + "."


def _is_shown(factor: Row) -> bool:
    """Whether the baseline needs more: the whole interval above 1, or not even the end of its range is enough."""
    return factor["low"] > 1 or (factor["bound"] == "more than" and factor["factor"] > 1)


def _times(factor: Row) -> str:
    return f"{factor['bound']} {number(factor['factor'], 1)}".strip()


def _missed(factor: Row, num_seeds: int) -> str:
    """Who does not get there: `any seed`, `2 of 5 seeds`."""
    return f"{factor['num_beyond']} of {num_seeds} seeds" if factor["num_beyond"] < num_seeds else "any seed"


def _faster(factor: Row, arm: str, baseline: str, what: str, num_seeds: int) -> str:
    if factor["bound"] == "more than" and factor["factor"] > 1:
        return (
            f"learns more than {number(factor['factor'], 1)} times faster than {baseline}, which does not reach it "
            f"within {number(factor['most'], 1)} times the {what} "
            f"(not reached within the range by {_missed(factor, num_seeds)})"
        )
    if factor["low"] > 1:
        return f"learns {number(factor['factor'], 1)} times faster than {baseline} ({_range(factor)} the {what})"
    if factor["high"] < 1 or (factor["bound"] == "less than" and factor["factor"] < 1):
        more = "more than " if factor["bound"] else ""
        return f"learns {more}{number(1 / factor['factor'], 1)} times slower than {baseline}"
    if math.isnan(factor["factor"]):
        return f"and {baseline} cannot be told apart in {what}: {factor['reason']}"
    return f"is not shown to learn faster or slower than {baseline} ({_range(factor)} the {what})"


def _fewer(factor: Row, arm: str, baseline: str, num_seeds: int) -> str:
    """Of the problems that are at hand, counted at the smallest number of them."""
    if factor["bound"] == "more than" and factor["factor"] > 1:
        return (
            f"{arm} needs more than {number(factor['factor'], 1)} times fewer problems than {baseline}, which does not "
            f"reach it with {number(factor['most'], 1)} times as many "
            f"(not reached within the range by {_missed(factor, num_seeds)})"
        )
    if factor["low"] > 1:
        return (
            f"{arm} needs {number(factor['factor'], 1)} times fewer problems than {baseline} ({_range(factor)} as many)"
        )
    if factor["high"] < 1 or (factor["bound"] == "less than" and factor["factor"] <= 1):
        return f"{baseline} with the fewest problems is at least where {arm} is with as many"
    if math.isnan(factor["factor"]):
        return f"{arm} and {baseline} cannot be told apart in problems: {factor['reason']}"
    return f"{arm} is not shown to need fewer or more problems than {baseline} ({_range(factor)} as many)"


def _range(factor: Row) -> str:
    """`2.2 to 4.3 times`, where the factor itself is said before it."""
    if math.isnan(factor["low"]):
        return f"{_times(factor)} times"
    return f"{number(factor['low'], 1)} to {number(factor['high'], 1)} times"


def _amount(factor: Row) -> str:
    """`3.1 (2.2 to 4.3) times`, `more than 4.0 times`."""
    if math.isnan(factor["factor"]):
        return f"no one number of times ({factor['reason']})"
    if math.isnan(factor["low"]):
        return f"{_times(factor)} times"
    return f"{number(factor['factor'], 1)} ({number(factor['low'], 1)} to {number(factor['high'], 1)}) times"


def _ceiling_words(ceiling: Row, arm: str, baseline: str, figure: str) -> str:
    scale, unit, digits = (100, "points", 1) if figure == "accuracy" else (1, "nats", 3)
    amount = f"{signed(scale * ceiling['difference'], digits)} {unit}"
    if not math.isnan(ceiling["low"]):
        amount += f", {signed(scale * ceiling['low'], digits)} to {signed(scale * ceiling['high'], digits)}"
    at = f"at ×{ceiling['budget']:g} against ×{ceiling['baseline_budget']:g}"
    if ceiling["further"]:
        return f"{arm} reaches further ({amount}; each at its best budget, {at})"
    if ceiling["less"]:
        return f"{baseline} reaches further ({amount}; each at its best budget, {at})"
    return f"which of the two reaches further is not shown ({amount}; each at its best budget, {at})"


def draw_cost_curves(summary: Row, words: Words = ENGLISH) -> Figure | str:
    """The score against steps, problems and FLOPs, one line per arm, bands of one standard deviation over seeds."""
    curves = summary.get("curves")
    if not curves:
        return words("reasons.no_curves")
    rows = [row for row in curves["rows"] if np.isfinite(row["mean"])]
    if not rows:
        return words("reasons.no_curve_arm")
    drawn = DRAWN if curves["of"] == "steps" else OF_PROBLEMS
    figure, grid = new_grid(len(drawn), height=3.0, sharey=True)
    for cost, axes in zip(drawn, grid, strict=True):
        axes.set(xlabel=words(f"labels.cost_{cost}"), xscale="log")
        for index, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            points = [row for row in rows if row["arm"] == arm and np.isfinite(row[cost])]
            x, mean = (np.array([row[key] for row in points]) for key in (cost, "mean"))
            std = np.nan_to_num(np.array([row["std"] for row in points]))
            style = line_style(index)
            axes.plot(x, mean, label=label(arm), **style)
            axes.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
        if curves["figure"] == "accuracy":
            axes.set_ylim(-0.02, 1.02)
            percent_axis(axes)
    grid[0].set_ylabel(words("labels.accuracy" if curves["figure"] == "accuracy" else "labels.nats_per_token"))
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return figure
