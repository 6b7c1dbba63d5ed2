"""Arms that think in latents: what an answer costs, what is left of it without its latents, twins without KV, the tail.

From tables in memory (`latent.json` of each run, as the evaluate stage measured it) to rows and two figures. Knows
nothing of pages, and runs no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvdistill import stats
from kvdistill.core.arms import arm_recipe
from kvdistill.core.family import MIN_SEEDS
from kvdistill.core.files import sha256_of
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.stages.report.ablations import find_ablations, leaves
from kvdistill.stages.report.canvas import SOFT, label, line_style, new_grid, percent_axis
from kvdistill.stages.report.collect import Row, RunTables
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.tail import KINDS, tail_of
from kvdistill.stats import NAN

COSTS = ("forward_passes", "seconds_alone", "seconds", "cache_bytes")
DRAWN = {"forward_passes": 1.0, "seconds_alone": 1000.0, "cache_bytes": 1 / 1024}  # and in which units
CHANGES = ("zero", "mean", "shuffle")
NEAR_ZERO = 0.05  # an accuracy that cannot fall
MARGIN = 0.05  # accuracy that counts as none lost, where the study declares no margin of accuracy
PASSES = "latent.passes"
_OF_KV = ("teachers", "control", "latent.self_weight")  # keys that steer the KV term alone, and sections
_SECTIONS_OF_KV, _LOSS_BESIDE = ("align.", "compress.", "fuse.", "loss."), ("loss.ce_weight", "loss.ce_on")
_LENGTH = ("train.steps", "times", "latent.start_after")


def latent_summary(recipe: Recipe, tables: RunTables) -> Row | None:
    """None where no arm thinks in latents.

    rows: per arm what an answer takes, means over seeds. written: the arm whose passes others are a share of. causal:
    per arm that thinks, each change beside the latents as they are. twins: arms whose latents learn from keys and
    values beside those that differ in nothing else (their steps may). passes: arms that differ in T alone. tail.
    """
    arms = {name: arm_recipe(recipe, name) for name in tables.arms}
    if not any(arm.thinks for arm in arms.values()):
        return None
    written = next((name for name, arm in arms.items() if arm.reasoning == "written"), None)
    alpha = recipe.report.alpha
    margin = recipe.report.margin if recipe.report.primary == "accuracy" else MARGIN
    rows = [_row(tables, name, arm) for name, arm in arms.items()]
    whole = next((row["forward_passes"]["mean"] for row in rows if row["arm"] == written), NAN)
    for row in rows:
        row["share"] = row["forward_passes"]["mean"] / whole
    tails = {name: [tail_of(run) for run in tables.runs[name].values()] for name in arms}
    keys = ("nll", "worst", "degenerate", *KINDS)
    return {
        "percent": f"{100 * (1 - alpha):.4g}",
        "margin": margin,
        "written": written,
        "rows": rows,
        "causal": [_causal(tables.latents[name], name, alpha, margin) for name, arm in arms.items() if arm.thinks],
        "twins": [_beside_twin(tables, pair, alpha) for pair in find_twins(arms)],
        "passes": find_passes(arms),
        "alike": selectors_alike(recipe, tables),
        "tail": [{"arm": name, **{key: _spread([one[key] for one in tails[name]]) for key in keys}} for name in arms],
    }


def _spread(values: Sequence[float | None]) -> Row:
    found = stats.mean_and_std([NAN if value is None else value for value in values])
    return {"mean": found.mean, "std": found.std}


def _row(tables: RunTables, name: str, arm: ArmRecipe) -> Row:
    costs = [found["cost"] for found in tables.latents[name].values()]
    return {
        "arm": name,
        "reasoning": arm.reasoning,
        "latents": arm.latent.tokens if arm.thinks else None,
        "passes": arm.latent.passes if arm.thinks else None,
        "batch_size": max((one["batch_size"] for one in costs), default=None),
        **{cost: _spread([one[cost] for one in costs]) for cost in COSTS},
    }


# -- causal checks --------------------------------------------------------------------------------------


def _causal(measured: Mapping[int, Row], name: str, alpha: float, margin: float) -> Row:
    """The arm with its latents changed, beside itself. verdict: reasoning, where every change costs it accuracy;
    partly, where some do; regularisation, where none is shown to and none can cost as much as `margin`; untold, where
    none is shown to and one may; floor, where it is hardly ever right; unknown: not measured."""
    found: Row = {"arm": name, "seeds": len(measured), "questions": 0, "as_is": _spread([]), "changes": []}
    runs = [one["causal"] for one in measured.values()]
    every = [dict(zip(map(tuple, one["questions"]), range(len(one["questions"])), strict=True)) for one in runs]
    shared = [question for question in (every[0] if every else ()) if all(question in one for one in every)]
    if not shared:
        return found | {"verdict": "unknown"}
    tasks_Q = [task for task, *_ in shared]

    def of(kind: str) -> np.ndarray:
        """Right (1) or wrong (0) [seeds, questions]."""
        rows = zip(runs, every, strict=True)
        return np.array([[one["correct"][kind][places[q]] for q in shared] for one, places in rows], dtype=float)

    as_is_SQ = of("none")
    found |= {"questions": len(shared), "as_is": _spread(_macros(as_is_SQ, tasks_Q))}
    for kind in CHANGES:
        changed_SQ = of(kind)
        pairs = [(int((x > y).sum()), int((x < y).sum())) for x, y in zip(as_is_SQ, changed_SQ, strict=True)]
        found["changes"].append({
            "change": kind, **_spread(_macros(changed_SQ, tasks_Q)), **_apart(changed_SQ, as_is_SQ, tasks_Q, alpha),
            "mcnemar": [{"only_as_is": x, "only_changed": y, "p": stats.mcnemar(x, y, exact=True).p} for x, y in pairs],
        })  # fmt: skip
    falls = [one["high"] < 0 for one in found["changes"]]
    if found["as_is"]["mean"] < NEAR_ZERO:
        return found | {"verdict": "floor"}
    if any(falls):
        return found | {"verdict": "reasoning" if all(falls) else "partly"}
    stays = all(one["low"] > -margin for one in found["changes"])
    return found | {"verdict": "regularisation" if stays else "untold"}


def _macros(values_SQ: np.ndarray, tasks_Q: Sequence[str]) -> list[float]:
    """Per seed the mean over tasks of the mean over their questions."""
    tasks = np.asarray(tasks_Q)
    means = [values_SQ[:, tasks == task].mean(1) for task in sorted(set(tasks_Q))]
    return [float(value) for value in np.mean(means, axis=0)]


def _apart(mine_SQ: np.ndarray, theirs_SQ: np.ndarray, tasks_Q: Sequence[str], alpha: float) -> Row:
    """Difference of the macro means with its t-interval over runs; over questions (for these checkpoints) where they
    are too few or all show the same difference."""
    t = stats.paired_t(_macros(mine_SQ, tasks_Q), _macros(theirs_SQ, tasks_Q), alpha)
    if len(mine_SQ) >= MIN_SEEDS and not t.reason:
        return {"difference": t.difference, "low": t.low, "high": t.high, "p_value": t.p, "over": "runs"}
    q = stats.question_level(mine_SQ - theirs_SQ, tasks_Q, alpha)
    return {"difference": t.difference, "low": q.low, "high": q.high, "p_value": NAN, "over": "questions"}


def causal_verdicts(causal: Sequence[Row]) -> list[Row]:
    """The verdicts, each with its arms: {"arms", "verdict", "falls", "stays"}, changes by name."""
    found: dict[tuple[str, ...], Row] = {}
    for one in causal:
        falls = [change["change"] for change in one["changes"] if change["high"] < 0]
        stays = [change["change"] for change in one["changes"] if not change["high"] < 0]
        new = {"arms": [], "verdict": one["verdict"], "falls": falls, "stays": stays}
        found.setdefault((one["verdict"], *falls), new)["arms"].append(one["arm"])
    return list(found.values())


# -- arms that belong together, found in the recipe -----------------------------------------------------


def find_twins(arms: Mapping[str, ArmRecipe]) -> list[tuple[str, str]]:
    """(arm, twin): both think; the arm's latents learn from keys and values, the twin's do not, and whatever else they
    are told is the same but for how long the twin is trained. A control has no twin."""

    def kind(arm: ArmRecipe) -> str:
        flat = dict(leaves(arm.model_dump(mode="json")))
        beside = {
            key: value
            for key, value in flat.items()
            if key.split(".")[0] != "match"
            and key not in (*_OF_KV, *_LENGTH)
            and (key in _LOSS_BESIDE or not key.startswith(_SECTIONS_OF_KV))
        }
        logits = [arm.teachers, *(flat[key] for key in sorted(flat) if key.startswith("loss.logit_"))]
        return sha256_of([beside, logits if arm.needs_logits else []])

    def learns_kv(arm: ArmRecipe) -> bool:
        return arm.needs_kv or arm.learns_from_itself

    thinking = {name: (arm, kind(arm)) for name, arm in arms.items() if arm.thinks}
    return [
        (name, other)
        for name, (arm, its_kind) in thinking.items()
        if learns_kv(arm) and arm.control is None
        for other, (twin, twin_kind) in thinking.items()
        if its_kind == twin_kind and not learns_kv(twin) and _starts_no_later(arm, twin)
    ]


def _starts_no_later(arm: ArmRecipe, twin: ArmRecipe) -> bool:
    """Whether a twin of as many steps begins with latents at the same one; a longer one has as many with them."""
    begins = [one.latent.start(one.train.steps) for one in (arm, twin)]
    if arm.train.steps == twin.train.steps:
        return begins[0] == begins[1]
    return twin.train.steps - begins[1] >= arm.train.steps - begins[0]


def find_passes(arms: Mapping[str, ArmRecipe]) -> list[dict[str, int]]:
    """Groups of arms that differ in the number of passes T alone: arm -> T, rising."""
    groups: dict[str, dict[str, int]] = {}
    for name, arm in arms.items():
        if arm.thinks:
            flat = {key: value for key, value in leaves(arm.model_dump(mode="json")) if key != PASSES}
            groups.setdefault(sha256_of(flat), {})[name] = arm.latent.passes
    ordered = [dict(sorted(group.items(), key=lambda pair: pair[1])) for group in groups.values()]
    return [group for group in ordered if len(set(group.values())) > 1]


def selectors_alike(recipe: Recipe, tables: RunTables) -> list[list[str]]:
    """Groups of arms that differ in which tokens are selected alone, where no selector drops any."""

    def drops(arm: str) -> list[float]:
        return [share for run in tables.runs[arm].values() for share in (run.ledger.get("drops") or {}).values()]

    groups = [list(one.arms) for one in find_ablations(recipe) if one.keys == ("compress.kv_compression",)]
    found = [[arm for arm in group if arm in tables.runs and drops(arm) and not any(drops(arm))] for group in groups]
    return [group for group in found if len(group) > 1]


def _beside_twin(tables: RunTables, pair: tuple[str, str], alpha: float) -> Row:
    """An arm beside its twin without KV: accuracies on all test questions, paired by seed and question."""
    mine, theirs = (tables.runs[name] for name in pair)
    seeds = [seed for seed in tables.seeds if seed in mine and seed in theirs and mine[seed].keys == theirs[seed].keys]
    found: Row = {"arm": pair[0], "twin": pair[1], "seeds": len(seeds)}
    if not seeds:
        return found | {"difference": NAN, "low": NAN, "high": NAN, "p_value": NAN, "over": "", "longer": NAN}
    mine_SQ, theirs_SQ = (np.array([runs[seed].correct_Q for seed in seeds]) for runs in (mine, theirs))
    steps = [np.mean([runs[seed].costs.get("steps", NAN) for seed in seeds]) for runs in (mine, theirs)]
    apart = _apart(mine_SQ, theirs_SQ, mine[seeds[0]].tasks_Q, alpha)
    return found | apart | {"longer": float(steps[1] / steps[0])}


# -- read-out -------------------------------------------------------------------------------------------


def read_outs(tables: RunTables, first: Sequence[str]) -> list[Row]:
    """Of every arm that thinks, in its first seed: {"arm", "seed", "questions"}. first: arms that go before others."""
    found = []
    for arm, measured in tables.latents.items():
        seed = min(measured, default=None)
        if arm in tables.arms and seed is not None and measured[seed].get("readout"):
            found.append({"arm": arm, "seed": seed, "questions": measured[seed]["readout"]})
    return sorted(found, key=lambda one: one["arm"] not in first)


# -- figures --------------------------------------------------------------------------------------------


def draw_latent_costs(summary: Row, words: Words = ENGLISH) -> Figure | str:
    """Accuracy against what an answer takes, a mark per arm, whiskers one standard deviation over seeds."""
    rows = [row for row in summary["latents"]["rows"] if np.isfinite(row["forward_passes"]["mean"])]
    if not rows:
        return words("reasons.no_answer_cost")
    figure, grid = new_grid(len(DRAWN), height=3.0, sharey=True)
    for (cost, scale), axes in zip(DRAWN.items(), grid, strict=True):
        for row in rows:
            score, style = summary["arms"][row["arm"]], line_style(list(summary["arms"]).index(row["arm"]))
            axes.errorbar(scale * row[cost]["mean"], score["mean"], yerr=np.nan_to_num(score["std"]), capsize=3,
                          label=label(row["arm"]), **{**style, "linestyle": ""}, markersize=7,
                          markerfacecolor=style["color"] if row["reasoning"] == "latent" else "white")  # fmt: skip
        axes.set(xlabel=words(f"labels.answer_{cost}"), ylim=(-0.04, 1.04))
        most = max((scale * row[cost]["mean"] for row in rows if np.isfinite(row[cost]["mean"])), default=1)
        axes.set_xlim(0, 1.1 * most or 1)
        percent_axis(axes)
    grid[0].set_ylabel(words("labels.accuracy"))
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def draw_passes(summary: Row, words: Words = ENGLISH) -> Figure | str:
    """Accuracy against the number of passes T: a line per group of arms; arms without latents as levels."""
    groups = summary["latents"]["passes"]
    if not groups:
        return words("reasons.no_passes")
    figure, [axes] = new_grid(1, height=3.2)
    for index, group in enumerate(groups):
        points = [(T, summary["arms"][arm]["mean"], summary["arms"][arm]["std"]) for arm, T in group.items()]
        T_P, mean_P, std_P = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        axes.errorbar(T_P, mean_P, yerr=np.nan_to_num(std_P), capsize=3, label=label(", ".join(group), 40),
                      **line_style(index))  # fmt: skip
    _levels(axes, summary)
    every = sorted({T for group in groups for T in group.values()})
    axes.set_xticks(every)
    axes.set(xlabel=words("labels.passes"), ylabel=words("labels.accuracy"), ylim=(-0.04, 1.04))
    percent_axis(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _levels(axes: Axes, summary: Row) -> None:
    """The first arm that writes its reasoning and the first that answers directly, as lines across."""
    for kind, dashes in (("written", (0, (6, 2))), ("none", (0, (1, 2)))):
        arm = next((row["arm"] for row in summary["latents"]["rows"] if row["reasoning"] == kind), None)
        if arm is not None and np.isfinite(summary["arms"][arm]["mean"]):
            axes.axhline(summary["arms"][arm]["mean"], color=SOFT, linestyle=dashes, linewidth=1.2, label=label(arm))
