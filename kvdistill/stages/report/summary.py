"""Tables -> the numbers of the report: per arm, per comparison, and what they cost. No files, no pictures.

`summarise` gives what `summary.json` holds; `statistics_document` what `statistical_results.json` holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kvdistill import stats
from kvdistill.core.arms import arm_recipe
from kvdistill.core.costs import SHARED, student_flops
from kvdistill.core.declared import compare_declared, family_of, parities_of
from kvdistill.core.family import BEST_SINGLE, best_single_rule, single_arms
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.best_single import Choice, choose_best_single
from kvdistill.stages.report.collect import RunTables
from kvdistill.stages.report.compare import Comparison, compare_family, describe_comparison
from kvdistill.stages.report.controls import describe_controls
from kvdistill.stages.report.cost import curve_summary
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.latents import latent_summary
from kvdistill.stages.report.text import CONTROLS
from kvdistill.stats import NAN

NEAR_ZERO = 0.05
PARITIES = {"tokens_ratio": "tokens_nonpadding", "steps_ratio": "optimiser_steps",
            "total_ratio": "total_flops", "amortised_ratio": "amortised_flops"}  # fmt: skip
METHOD = {
    "unit": "the training run; arms are paired by seed (same data, order, initial weights and questions)",
    "figure": "per run the macro mean: mean over tasks of the mean over a task's test questions",
    "std": "sample standard deviation over seeds (ddof 1)",
    "test": "two-sided paired t-test over seeds; p_holm: Holm over the declared family, refused comparisons counted",
    "ci": "t-interval of the mean paired difference at 1 - alpha, not adjusted for the family",
    "d_z": "mean difference / standard deviation of the differences",
    "hedges_g": "J(n-1) * d_z, J(f) = Gamma(f/2) / (sqrt(f/2) * Gamma((f-1)/2))",
    "smallest_detectable_effect": "true difference found with power 0.8 at alpha / family size (exact noncentral t), "
    "given the observed spread of the differences",
    "tost": "two one-sided t-tests against the margin declared in the recipe; tost_p_holm: Holm over the family",
    "seeds_needed_for_the_effect_seen": "smallest number of seeds that finds the difference seen, were it the true "
    "one, with power 0.8 at alpha / family size; a plan for another study, no figure of this one's certainty",
    "conditional_on_these_checkpoints": "question-level intervals and McNemar say how these very models would differ "
    "on other questions, not what another training run would give; no verdict rests on them",
}
# which variance a figure includes: what would differ, were it all done once more
INCLUDES = {
    "std, ci, p, p_holm, tost_p": "training runs (seeds), on these questions",
    "question_se, question_ci": "questions, for these checkpoints; no training runs",
    "bootstrap_ci": "training runs and questions (two stages: seeds, then questions within tasks); keeps no level with "
    "few seeds (at three it covers 71 to 99 %, by how much runs differ beside questions), so no verdict rests on it",
    "mcnemar": "questions, for one pair of checkpoints (one seed)",
}


def best_single(recipe: Recipe, tables: RunTables) -> Choice | None:
    """What the family's `best-single` stands for; None where the family does not have the word."""
    if not any(BEST_SINGLE in pair for pair in family_of(recipe).pairs):
        return None
    candidates = single_arms({name: arm_recipe(recipe, name) for name in recipe.arms})
    return choose_best_single(candidates, _logs_to_kept(tables), tables.seeds, recipe.report.primary)


def _logs_to_kept(tables: RunTables) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Logs up to the step whose weights were kept: the last point is that of the student that was evaluated."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for arm, logs in tables.logs.items():
        for seed, rows in logs.items():
            ledger = tables.runs[arm][seed].ledger if seed in tables.runs[arm] else {}
            kept = (ledger.get("selection") or {}).get("chosen_step")
            found.setdefault(arm, {})[seed] = [row for row in rows if kept is None or row["step"] <= kept]
    return found


def compare_all(recipe: Recipe, tables: RunTables) -> dict[str, list[Comparison]]:
    """The declared family for the primary figure (with margin) and for the other one (without: none was declared)."""
    rules, other = recipe.report, "nll" if recipe.report.primary == "accuracy" else "accuracy"
    declared, choice = family_of(recipe).pairs, best_single(recipe, tables)
    pairs = declared if choice is None else [choice.stands_in(pair) for pair in declared]
    parities = list(parities_of(recipe, tables.path).values())
    found = {
        "primary": compare_family(
            tables.runs,
            pairs,
            tables.seeds,
            figure=rules.primary,
            alpha=rules.alpha,
            margin=rules.margin,
            parities=parities,
        ),
        "secondary": compare_family(
            tables.runs, pairs, tables.seeds, figure=other, alpha=rules.alpha, parities=parities
        ),
    }
    for comparisons in found.values():
        for one, pair in zip(comparisons, declared, strict=True):
            one.declared = pair
            if choice is not None and choice.arm is None and BEST_SINGLE in pair:
                one.refuse([choice.reason])
    return found


def _spread(tables: RunTables, arm: str, figure: str, task: str | None = None) -> dict[str, Any]:
    """mean, std, per_seed (recipe order, NaN where missing) and the reason of what is undefined.

    task: of this one; unset: the mean over tasks.
    """
    values = {
        seed: run.macro(figure) if task is None else run.by_task(figure).get(task, NAN)
        for seed, run in tables.runs[arm].items()
    }
    result = stats.mean_and_std([values[seed] for seed in tables.seeds if seed in values])
    per_seed = [values.get(seed, NAN) for seed in tables.seeds]
    out: dict[str, Any] = {"mean": result.mean, "std": result.std, "per_seed": per_seed}
    if result.reason:
        out["reasons"] = {k: result.reason for k in ("mean", "std") if math.isnan(out[k])}
    return out


def _figure(tables: RunTables, arm: str, name: str) -> dict[str, Any]:
    tasks = sorted({t for run in tables.runs[arm].values() for t in run.by_task(name)})
    return {
        **_spread(tables, arm, name),
        "by_task": {task: _spread(tables, arm, name, task) for task in tasks},
    }


def describe_arm(recipe: Recipe, arm: str, words: Words = ENGLISH) -> str:
    """What an arm does, in words, from the recipe: `KV of 2 teachers (a, b), weighted by competence`."""
    spec = recipe.every_arm[arm]
    made = arm_recipe(recipe, arm)

    def setting(section: str, key: str) -> Any:
        changes = spec.get(section)
        return changes[key] if isinstance(changes, dict) and key in changes else getattr(getattr(recipe, section), key)

    longer = words("describe.longer", times=f"{spec['times']:g}") if spec.get("times", 1) != 1 else ""
    thinking = ""
    if made.reasoning != "written":
        thinking = words(f"describe.{made.reasoning}", latents=made.latent.tokens, passes=made.latent.passes)
    if made.learns_from_itself:
        thinking += words("describe.itself")
    teachers = spec.get("teachers")
    names = [t.name for t in recipe.teachers] if teachers is None else list(teachers)
    kv = bool(names) and setting("loss", "kv_weight") > 0
    logits = bool(names) and setting("loss", "logit_weight") > 0
    if not kv and not logits:
        texts = spec.get("texts")
        if texts in CONTROLS:
            return words.message(CONTROLS[texts][0]) + longer + thinking
        kind = "itself" if made.learns_from_itself else made.reasoning
        return words(f"describe.alone_{kind}", latents=made.latent.tokens, passes=made.latent.passes) + longer
    what = words("describe.and").join([words("describe.kv")] * kv + [words("describe.logits")] * logits)
    said = words("describe.teachers", n=len(names), what=what, teachers=words("page.comma").join(map(str, names)))
    if len(names) > 1:
        strategy = setting("fuse", "fusion_strategy")
        said += words.get(f"describe.{strategy}") or words("describe.other", strategy=strategy)
    changes = [(f"{part}.{key}", value) for part, changed in spec.items() if isinstance(changed, dict)
               for key, value in changed.items() if part != "match"]  # fmt: skip
    told = [
        ("loss.kv_weight", 0),
        ("loss.logit_weight", 0),
        ("fuse.fusion_strategy", setting("fuse", "fusion_strategy")),
    ]
    more = [f"{key} = {value}" for key, value in changes if (key, value) not in told]
    if (control := spec.get("control")) in CONTROLS:
        more.insert(0, words("describe.control", control=control, what=words.message(CONTROLS[control][0])))
    return words("page.semicolon").join([said + longer + thinking, *more])


def dead_channels(tables: RunTables, arm: str) -> dict[str, dict[str, int]]:
    """By teacher how many channels of its mapped keys and values never vary: {"keys", "values", "channels"}."""
    found: dict[str, dict[str, int]] = {}
    for run in tables.runs[arm].values():
        for teacher, extra in (run.ledger.get("alignment") or {}).items():
            counts = extra.get("dead_channels")
            if counts and (counts["keys"] or counts["values"]):
                found[teacher] = counts
    return found


def mean_ledger(tables: RunTables, arm: str) -> dict[str, Any]:
    """Mean over seeds of every figure of the ledger; {} if no run has one. FLOPs as floats, teachers by name.

    kept_steps: between which steps the weights are that validation chose, None where it did not.
    """
    ledgers = [run.ledger for run in tables.runs[arm].values() if run.ledger]
    if not ledgers:
        return {}
    flops = [ledger.get("flops") or {} for ledger in ledgers]
    teachers = sorted({name for f in flops for name in f.get("teachers") or {}})
    keys = ("optimiser_steps", "tokens_nonpadding", "tokens_loss", "seconds", "cpu_seconds", "peak_memory_bytes")
    out: dict[str, Any] = {key: _mean([ledger.get(key) for ledger in ledgers]) for key in keys}
    out["student_flops"] = _mean([student_flops(f) for f in flops])
    out["aligner_flops"] = _mean([f.get("aligner") or 0 for f in flops])
    out["teacher_flops"] = {name: _mean([(f.get("teachers") or {}).get(name, 0) for f in flops]) for name in teachers}
    for part in SHARED[1:]:
        out[f"{part}_flops"] = _mean([sum((f.get(part) or {}).values()) for f in flops])
    chosen = [ledger["selection"]["chosen_step"] for ledger in ledgers if ledger.get("selection")]
    out["kept_steps"] = span(chosen) if chosen else None
    for key in ("total_flops", "amortised_flops"):
        out[key] = _mean([run.costs.get(key) for run in tables.runs[arm].values() if run.ledger])
    return out


def _mean(values: Sequence[float | None]) -> float:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else NAN


def budgets(recipe: Recipe, tables: RunTables) -> dict[str, dict[str, Any]]:
    """Per arm its mean ledger and the parities against the reference arm.

    student-matched: tokens and steps relative to the reference. total-compute: all FLOPs relative to the reference
    (`core/costs.py`), with what runs share whole, and divided among them.
    """
    ledgers = {arm: mean_ledger(tables, arm) for arm in tables.arms}
    reference = ledgers.get(reference_arm(recipe)) or {}
    for ledger in ledgers.values():
        if ledger:
            for ratio, key in PARITIES.items():
                base = reference.get(key)
                ledger[ratio] = ledger[key] / base if base else NAN
    return ledgers


def reference_arm(recipe: Recipe) -> str:
    """The baseline of most declared comparisons (first named wins a tie); without any, the first arm."""
    named = Counter(b for _, b in family_of(recipe).pairs if b in recipe.every_arm)
    return named.most_common(1)[0][0] if named else next(iter(recipe.arms))


def summarise(
    recipe: Recipe, tables: RunTables, family: dict[str, list[Comparison]], words: Words = ENGLISH
) -> dict[str, Any]:
    """What `summary.json` holds. Accuracies are shares (0 to 1), nll nats per answer token, per_seed in seed order."""
    arms = {}
    for arm in tables.arms:
        nll, tokens = _figure(tables, arm, "nll"), _spread(tables, arm, "tokens_out")
        arms[arm] = {
            **_figure(tables, arm, "accuracy"), "nll": nll, "tokens_out": tokens,
            "questions": max((len(run.keys) for run in tables.runs[arm].values()), default=0),
            "missing_seeds": [s for s in tables.seeds if s not in tables.runs[arm]],
            "description": describe_arm(recipe, arm, words),
            "nll_reasoning": _spread(tables, arm, "nll_reasoning"), "dead_channels": dead_channels(tables, arm),
        }  # fmt: skip
    known = [a["mean"] for a in arms.values() if not math.isnan(a["mean"])]
    near_zero = bool(known) and max(known) < NEAR_ZERO
    ledgers = [run.ledger for runs in tables.runs.values() for run in runs.values()]
    declared, rule, choice = compare_declared(recipe, tables.path), family_of(recipe), best_single(recipe, tables)
    comparisons = {kind: [describe_comparison(c) for c in family[kind]] for kind in ("primary", "secondary")}
    for one in (*comparisons["primary"], *comparisons["secondary"]):
        one["after_results"] = one["declared"] in declared["late"]
        one["by_rule"] = tuple(one["declared"]) in rule.by_rule
        if one["parity"] == "steps" and one["arm"] in recipe.every_arm:  # each as many as its validation asks for
            ended = arm_recipe(recipe, one["arm"]).train.patience is not None
            one["at_equal"] = "problems at hand" if ended else one["at_equal"]
    summary = {
        "schema": 1, "declared": declared, "name": recipe.name,
        "title": recipe.title or recipe.name, "primary": recipe.report.primary,
        "seeds": tables.seeds, "tasks": tables.tasks, "arms": arms,
        "comparisons": comparisons["primary"],
        "secondary_comparisons": comparisons["secondary"],
        "best_single": choice and {**choice._asdict(), "rule": best_single_rule(recipe.report.primary)},
        "family_notes": rule.notes,
        "accuracy_near_zero": near_zero,
        "curves": curve_summary(
            recipe, tables, "nll" if near_zero else recipe.report.primary, reference_arm(recipe), words
        ),
        "seconds": _total([tables.provenance], "seconds"), "cpu_seconds": _total([tables.provenance], "cpu_seconds"),
        "student_seconds": _total(ledgers, "seconds") - sum(
            (ledger.get("went_on_from") or {}).get("seconds", 0.0) for ledger in ledgers
        ),
        "teacher_seconds": _total(list(tables.teachers.values()), "seconds"),
        "leaks_allowed": recipe.data.leaks == "allow"
        or bool(tables.manifest.get("num_leaks") or tables.leaks_of_seeds),
        "leaks_found": (tables.validation.get("num_leaks") or 0) + tables.leaks_of_seeds
        if tables.validation
        else None,
        "replicate": recipe.replicate, "variance": variance(recipe),
        "not_asked": not_asked(tables),
        "notes": [*tables.notes, *selection_notes(tables)],
    }  # fmt: skip
    texts = {
        arm: one.ledger["texts"] for arm, runs in tables.runs.items() for one in runs.values() if "texts" in one.ledger
    }
    if (latents := latent_summary(recipe, tables)) is not None:
        summary["latents"] = latents
    return summary | {"controls": describe_controls(recipe, summary, reference_arm(recipe), texts, words)}


def variance(recipe: Recipe) -> str:
    """What differs from seed to seed, in words: what ± and p include, and what they do not."""
    fixed = [teacher.name for teacher in recipe.teachers if teacher.scratch is None]
    published = f" (but for published ones: {', '.join(fixed)})" if fixed and recipe.varies_teachers else ""
    teachers = ", with the same teachers" if recipe.teachers else ""
    return {
        "student": f"over students (initial weights, order), on the same training problems{teachers}",
        "data": f"over students and data (training problems drawn by each seed){teachers}",
        "teacher": f"over students and teachers{published}, on the same training problems",
        "all": f"over students, data and teachers{published}",
    }[recipe.replicate]


def selection_notes(tables: RunTables) -> list[str]:
    """Where validation chose weights or ended trainings: by which rule, and between which steps those that were kept
    are. Each arm's own stand in the table of budgets."""
    found: dict[str, dict[str, list[Any]]] = {}  # rule -> arm -> ledgers
    for arm, runs in tables.runs.items():
        for run in runs.values():
            if run.ledger.get("selection"):
                found.setdefault(run.ledger["selection"]["rule"], {}).setdefault(arm, []).append(run.ledger)
    notes = []
    for rule, arms in found.items():
        ledgers = [ledger for of_arm in arms.values() for ledger in of_arm]
        kept = span(ledger["selection"]["chosen_step"] for ledger in ledgers)
        trained = span(ledger["optimiser_steps"] for ledger in ledgers)
        whose = "" if len(arms) == len(tables.runs) else f" for {', '.join(arms)}"
        notes.append(f"Validation chose{whose}: {rule}. Steps kept: {kept} of {trained}; of each arm: see its budget.")
    every = [ledger["selection"] for arms in found.values() for ledgers in arms.values() for ledger in ledgers]
    if any(selection["patience"] is not None for selection in every):
        notes.append(
            "Arms took as many steps as validation asked for: they are compared at equal data, not equal steps."
        )
    return notes


def span(numbers: Iterable[int]) -> str:
    """`320–480`, or the one number that all are."""
    known = sorted(numbers)
    return f"{known[0]:,}" if known[0] == known[-1] else f"{known[0]:,}–{known[-1]:,}"


def not_asked(tables: RunTables) -> list[str]:
    """What of the test questions no model was asked, in words: an accuracy is that of the others."""
    tasks = tables.manifest.get("tasks") or {}
    counts = {task: (splits.get("test") or {}) for task, splits in tasks.items()}
    return [
        f"{task}: {left} of {left + test['problems']} test questions were not asked: their prompts are longer than "
        "data.max_length"
        for task, test in counts.items()
        if (left := test.get("too_long") or 0)
    ]


def _total(rows: Sequence[Any], key: str) -> float:
    known = [float(row[key]) for row in rows if row.get(key) is not None]
    return sum(known) if known else NAN


def statistics_document(recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    """What `statistical_results.json` holds: rules, method in words, every comparison of both figures."""
    rules = recipe.report
    return {
        "schema": 1, "primary": rules.primary, "alpha": rules.alpha, "margin": rules.margin,
        "seeds": list(recipe.seeds), "language": rules.language,
        "family": [list(pair) for pair in family_of(recipe).pairs], "method": METHOD, "includes": INCLUDES,
        "best_single": summary["best_single"], "family_notes": summary["family_notes"],
        "variance": summary["variance"], "declared": summary["declared"], "comparisons": summary["comparisons"],
        "secondary_comparisons": summary["secondary_comparisons"],
        "curves": summary["curves"],
        "secondary_note": "exploratory: the recipe declares one primary figure, and no margin for this one",
    }  # fmt: skip
