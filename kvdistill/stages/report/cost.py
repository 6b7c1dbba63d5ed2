"""Curves of cost: arms at several budgets (`report.curves`), how many times faster one learns, which reaches further.

From tables in memory to rows, sentences and one figure; `factor.py` does the arithmetic. Knows nothing of pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kvdistill import stats
from kvdistill.core.costs import TOLERANCE
from kvdistill.core.recipe import CurvesRecipe, Recipe
from kvdistill.stages.report.canvas import label, line_style, new_grid, percent_axis
from kvdistill.stages.report.collect import Row, RunTables
from kvdistill.stages.report.factor import MIN_SEEDS, ceiling_difference, cost_factor
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.text import number, signed, with_prefix
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


def curve_summary(recipe: Recipe, tables: RunTables, figure: str, baseline: str, words: Words = ENGLISH) -> Row | None:
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
        "percent": f"{100 * (1 - recipe.report.alpha):.4g}",  # of all intervals here
        "costs": {cost: COSTS[cost] for cost in (OF_STEPS if curves.of_steps else OF_PROBLEMS)},
    }
    arms = [*curves.arms, *curves.points]
    found["rows"] = [row for arm in arms for row in _rows(curves, tables, arm, figure)]
    alpha = recipe.report.alpha
    against = [_against(curves, tables, arm, baseline, figure, alpha, words) for arm in arms if arm != baseline]
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


def _against(
    curves: CurvesRecipe, tables: RunTables, arm: str, baseline: str, figure: str, alpha: float, words: Words
) -> Row:
    found: Row = {"arm": arm, "baseline": baseline, "factors": {}, "ceiling": None, "lead": ""}
    names = [name for one in (arm, baseline) for name in curves.names(one).values()]
    seeds = [seed for seed in tables.seeds if all(seed in tables.runs.get(name, {}) for name in names)]
    if len(seeds) < 2:
        missing = words("curve.missing", arm=arm, baseline=baseline)
        return found | {"sentence": missing + words("page.stop")}
    mine, theirs = (_curve(curves, tables, one, figure, seeds) for one in (arm, baseline))
    my_budgets, their_budgets = (list(curves.names(one)) for one in (arm, baseline))
    here = my_budgets.index(1) if curves.of_steps else 0  # what it does with the fewest problems
    for cost in OF_STEPS if curves.of_steps else OF_PROBLEMS:
        given = mine[cost][:, here], mine["scores"][:, here], theirs[cost], theirs["scores"]
        if all(np.isfinite(x).all() for x in given):
            factor = cost_factor(given[0].tolist(), given[1].tolist(), given[2], given[3], alpha)
            apart = _apart_at_equal_cost(given[0], given[1], theirs[cost], theirs["scores"], alpha)
            most = float((theirs[cost][:, -1] / given[0]).mean())
            found["factors"][cost] = {**factor._asdict(), "most": most, "at_equal_cost": apart}
    if len(seeds) >= MIN_SEEDS and np.isfinite(mine["scores"]).all() and np.isfinite(theirs["scores"]).all():
        at, other_at, t = ceiling_difference(
            mine["scores"], theirs["scores"], mine["validated"], theirs["validated"], alpha
        )
        sign = 1.0 if figure == "accuracy" else -1.0
        low, high = sorted((sign * t.low, sign * t.high))
        found["ceiling"] = {"difference": sign * t.difference, "low": low, "high": high, "p": t.p, "reason": t.reason,
                            "further": t.low > 0, "less": t.high < 0,
                            "budget": my_budgets[at], "baseline_budget": their_budgets[other_at]}  # fmt: skip
    said = {"sentence": cost_sentence, "lead": curve_lead}
    return found | {key: write(found, figure, len(seeds), words) for key, write in said.items()}


def _apart_at_equal_cost(
    costs_S: np.ndarray, scores_S: np.ndarray, curve_costs_SB: np.ndarray, curve_scores_SB: np.ndarray, alpha: float
) -> list[float]:
    """The t-interval of how far the arm is above the baseline at the largest budget that costs the baseline no more (at
    its smallest one, where all cost more). It says whether there is a factor at all where seeds leave the range, so
    that the factor itself has no interval."""
    no_more = np.flatnonzero(curve_costs_SB.mean(axis=0) <= (1 + TOLERANCE) * costs_S.mean())
    t = stats.paired_t(scores_S.tolist(), curve_scores_SB[:, no_more[-1] if len(no_more) else 0].tolist(), alpha)
    return [t.low, t.high]


def cost_sentence(found: Row, figure: str, num_seeds: int, words: Words = ENGLISH) -> str:
    """`competence learns 3.1 times faster than ce (2.2 to 4.3 times the steps); it needs … fewer problems …; …`."""
    arm, baseline, factors = found["arm"], found["baseline"], found["factors"]
    said = _learned(found, num_seeds, words)
    if (data := factors.get("data")) is not None and "steps" in factors and data["low"] > 1:
        said.append(words("curve.fewer_seen", k=number(data["factor"], 1)))
    said += [
        words(f"curve.{cost}", baseline=baseline, amount=_amount(factors[cost], words))
        for cost in ("amortised_flops", "total_flops")
        if cost in factors
    ]
    if found["ceiling"] is not None:
        said.append(_ceiling_words(found["ceiling"], arm, baseline, figure, words))
    parts = said or [words("curve.nothing", arm=arm, baseline=baseline)]
    return words("page.semicolon").join(parts) + words("page.stop")


def curve_lead(found: Row, figure: str, num_seeds: int, words: Words = ENGLISH) -> str:
    """What a verdict begins with: how much faster (or from how many fewer problems) an arm learns than the other,
    which of them reaches further, and the factor where teachers are paid for; each said to be open where it is."""
    arm, baseline, factors = found["arm"], found["baseline"], found["factors"]
    said = _learned(found, num_seeds, words)
    if found["ceiling"] is not None:
        said.append(_ceiling_words(found["ceiling"], arm, baseline, figure, words))
    if "amortised_flops" in factors:
        amount = _amount(factors["amortised_flops"], words)
        said.append(words("curve.amortised_flops", baseline=baseline, amount=amount))
    return words("page.semicolon").join(said) + words("page.stop") if said else ""


def _learned(found: Row, num_seeds: int, words: Words) -> list[str]:
    """Of problems at hand, counted at the smallest number of them; and of steps: what a factor shows, and no more."""
    return [
        _factor_words(key, found["factors"][cost], found["arm"], found["baseline"], num_seeds, words)
        for cost, key in (("distinct", "problems"), ("steps", "steps"))
        if cost in found["factors"]
    ]


def _is_faster(factor: Row) -> bool:
    """Whether the baseline needs more: the whole interval above 1. Where some seeds do not get there within the range,
    so that there is no interval: every seed's own factor, and the arm is shown to be above at equal cost."""
    beyond = factor["bound"] == "more than" and min(factor["per_seed"]) > 1 and factor["at_equal_cost"][0] > 0
    return bool(factor["low"] > 1 or beyond)


def _is_slower(factor: Row) -> bool:
    """Whether the baseline needs less: the same, the other way round."""
    before = factor["bound"] == "less than" and max(factor["per_seed"]) <= 1 and factor["at_equal_cost"][1] < 0
    return bool(factor["high"] < 1 or before)


def _factor_words(key: str, factor: Row, arm: str, baseline: str, num_seeds: int, words: Words) -> str:
    """key: steps or problems. The words are used where the figures show them; else it says that nothing is shown."""
    beyond, before = factor["num_beyond"], factor["num_before"]
    at = {"arm": arm, "baseline": baseline, "most": number(factor["most"], 1), "seeds": num_seeds}
    if math.isnan(factor["factor"]):
        return words(f"curve.{key}_unknown", why=words.message(factor["reason"]), **at)
    k, slower = number(factor["factor"], 1), number(1 / factor["factor"], 1)
    if _is_faster(factor) and factor["bound"]:
        every = "all" if beyond == num_seeds else "some"
        least = number(min(factor["per_seed"]), 1)  # where some seeds do get there: what each of them shows
        return words(f"curve.{key}_beyond_{every}", k=least, beyond=beyond, **at)
    if _is_faster(factor):
        return words(f"curve.{key}_more", k=k, range=_range(factor, words), **at)
    if _is_slower(factor):
        return words(f"curve.{key}_less" + ("_before" if factor["bound"] else ""), k=slower, **at)
    if factor["bound"]:
        return words(f"curve.{key}_open_{'beyond' if beyond else 'before'}", some=beyond or before, **at)
    return words(f"curve.{key}_open", range=_range(factor, words), **at)


def _times(factor: Row, words: Words) -> str:
    """`3.1 times`, `more than 4.0 times`."""
    bound = {"": "times", "more than": "times_more", "less than": "times_less"}[factor["bound"]]
    return words(f"curve.{bound}", k=number(factor["factor"], 1))


def _range(factor: Row, words: Words) -> str:
    """`2.2 to 4.3 times`, where the factor itself is said before it."""
    if math.isnan(factor["low"]):
        return _times(factor, words)
    return words("curve.range", low=number(factor["low"], 1), high=number(factor["high"], 1))


def _amount(factor: Row, words: Words) -> str:
    """`3.1 times (2.2 to 4.3 times)`, `more than 4.0 times`, and what is said where that tells nothing."""
    if math.isnan(factor["factor"]):
        return words("curve.no_number", why=words.message(factor["reason"]))
    if factor["bound"] and not (_is_faster(factor) or _is_slower(factor)):  # it may need less, or more
        return words("curve.range_ends", k=number(factor["most"], 1))
    times = _times(factor, words)
    return times if math.isnan(factor["low"]) else words("curve.with_range", times=times, range=_range(factor, words))


def _ceiling_words(ceiling: Row, arm: str, baseline: str, figure: str, words: Words) -> str:
    scale, unit, digits = (100, "points", 1) if figure == "accuracy" else (1, "nats", 3)
    amount = words(f"verdict.{unit}", value=signed(scale * ceiling["difference"], digits))
    if not math.isnan(ceiling["low"]):
        low, high = (signed(scale * ceiling[side], digits) for side in ("low", "high"))
        amount = words("curve.amount", amount=amount, low=low, high=high)
    at = f"×{ceiling['budget']:g}", f"×{ceiling['baseline_budget']:g}"
    key = "further" if ceiling["further"] or ceiling["less"] else "further_open"
    ahead = baseline if ceiling["less"] else arm
    return words(f"curve.{key}", ahead=ahead, amount=amount, at=at[0], other=at[1])


def _ticks(costs: Sequence[float], most: int = 4) -> list[float]:
    """Costs that were drawn: the smallest, and each that is far enough from the one before for both their labels."""
    wide = math.log(max(costs) / min(costs)) / most if costs else 0.0
    found: list[float] = []
    for cost in sorted({*costs}):
        if not found or (math.log(cost / found[-1]) > wide and math.log(cost / found[-1]) > 0.2):
            found.append(cost)
    return found


def draw_cost_curves(summary: Row, words: Words = ENGLISH) -> Figure | str:
    """The score against steps, problems and FLOPs, one line per arm, bands of one standard deviation over seeds; of an
    arm at a single budget a bar."""
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
        ticks = _ticks([row[cost] for row in rows if np.isfinite(row[cost])])
        axes.set_xticks(ticks, [with_prefix(tick, "").strip() for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.12)  # the last label of a panel stays clear of the next one's first
        for index, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            points = [row for row in rows if row["arm"] == arm and np.isfinite(row[cost])]
            x, mean = (np.array([row[key] for row in points]) for key in (cost, "mean"))
            std = np.nan_to_num(np.array([row["std"] for row in points]))
            style = line_style(index)
            axes.plot(x, mean, label=label(arm), **style)
            if len(points) == 1:  # a band has no width there
                bar = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1.2, "capsize": 4.5, "capthick": 1.2}
                axes.errorbar(x, mean, std, **bar)
            axes.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
        if curves["figure"] == "accuracy":
            axes.set_ylim(-0.02, 1.02)
            percent_axis(axes)
    grid[0].set_ylabel(words("labels.accuracy" if curves["figure"] == "accuracy" else "labels.nats_per_token"))
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return figure
