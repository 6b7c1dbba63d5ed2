"""Tables -> the numbers of the report: per arm, per comparison, and what they cost. No files, no pictures.

`summarise` gives what `summary.json` holds; `statistics_document` what `statistical_results.json` holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvdistill import stats
from kvdistill.core.declared import compare_declared
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.collect import RunTables
from kvdistill.stages.report.compare import Comparison, compare_family, describe_comparison
from kvdistill.stages.report.language import ENGLISH, Words
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
    "conditional_on_these_checkpoints": "question-level intervals and McNemar say how these very models would differ "
    "on other questions, not what another training run would give; no verdict rests on them",
}


def compare_all(recipe: Recipe, tables: RunTables) -> dict[str, list[Comparison]]:
    """The declared family for the primary figure (with margin) and for the other one (without: none was declared)."""
    rules, other = recipe.report, "nll" if recipe.report.primary == "accuracy" else "accuracy"
    pairs = [(a, b) for a, b in rules.comparisons]
    return {
        "primary": compare_family(
            tables.runs, pairs, tables.seeds, figure=rules.primary, alpha=rules.alpha, margin=rules.margin
        ),
        "secondary": compare_family(tables.runs, pairs, tables.seeds, figure=other, alpha=rules.alpha),
    }


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
    spec = recipe.arms[arm]

    def setting(section: str, key: str) -> Any:
        changes = spec.get(section)
        return changes[key] if isinstance(changes, dict) and key in changes else getattr(getattr(recipe, section), key)

    teachers = spec.get("teachers")
    names = [t.name for t in recipe.teachers] if teachers is None else list(teachers)
    kv = bool(names) and setting("loss", "kv_weight") > 0
    logits = bool(names) and setting("loss", "logit_weight") > 0
    if not kv and not logits:
        return words("describe.no_teacher")
    what = words("describe.and").join([words("describe.kv")] * kv + [words("describe.logits")] * logits)
    said = words("describe.teachers", n=len(names), what=what, teachers=words("page.comma").join(map(str, names)))
    if len(names) > 1:
        strategy = setting("fuse", "fusion_strategy")
        said += words.get(f"describe.{strategy}") or words("describe.other", strategy=strategy)
    said += words("describe.placebo") if spec.get("placebo") else ""
    changes = [(f"{part}.{key}", value) for part, changed in spec.items() if isinstance(changed, dict)
               for key, value in changed.items()]  # fmt: skip
    told = [
        ("loss.kv_weight", 0),
        ("loss.logit_weight", 0),
        ("fuse.fusion_strategy", setting("fuse", "fusion_strategy")),
    ]
    return words("page.semicolon").join(
        [said, *(f"{key} = {value}" for key, value in changes if (key, value) not in told)]
    )


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
    """Mean over seeds of every figure of the ledger; {} if no run has one. FLOPs as floats, teachers by name."""
    ledgers = [run.ledger for run in tables.runs[arm].values() if run.ledger]
    if not ledgers:
        return {}
    flops = [ledger.get("flops") or {} for ledger in ledgers]
    teachers = sorted({name for f in flops for name in f.get("teachers") or {}})
    keys = ("optimiser_steps", "tokens_nonpadding", "tokens_loss", "seconds", "cpu_seconds", "peak_memory_bytes")
    out: dict[str, Any] = {key: _mean([ledger.get(key) for ledger in ledgers]) for key in keys}
    out["student_flops"] = _mean([(f.get("student_forward") or 0) + (f.get("student_backward") or 0) for f in flops])
    out["aligner_flops"] = _mean([f.get("aligner") or 0 for f in flops])
    out["teacher_flops"] = {name: _mean([(f.get("teachers") or {}).get(name, 0) for f in flops]) for name in teachers}
    return out


def _mean(values: Sequence[float | None]) -> float:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else NAN


def budgets(recipe: Recipe, tables: RunTables) -> dict[str, dict[str, Any]]:
    """Per arm its mean ledger and the parities against the reference arm.

    student-matched: tokens and steps relative to the reference. total-compute: all FLOPs relative to the reference,
    with the teachers' FLOPs whole, and amortised over the runs (arms x seeds) that read the same teacher's store.
    """
    ledgers = {arm: mean_ledger(tables, arm) for arm in tables.arms}
    shares: Counter[str] = Counter()
    for arm, ledger in ledgers.items():
        for name, flops in (ledger.get("teacher_flops") or {}).items():
            shares[name] += len(tables.runs[arm]) if flops > 0 else 0
    shared = recipe.capture.source == "store"
    for ledger in ledgers.values():
        if ledger:
            own = ledger["student_flops"] + ledger["aligner_flops"]
            teachers = ledger["teacher_flops"]
            ledger["total_flops"] = own + sum(teachers.values())
            ledger["amortised_flops"] = own + sum(f / max(shares[n], 1) if shared else f for n, f in teachers.items())
    reference = ledgers.get(reference_arm(recipe)) or {}
    for ledger in ledgers.values():
        if ledger:
            for ratio, key in PARITIES.items():
                base = reference.get(key)
                ledger[ratio] = ledger[key] / base if base else NAN
    return ledgers


def reference_arm(recipe: Recipe) -> str:
    """The baseline of most declared comparisons (first named wins a tie); without any, the first arm."""
    named = Counter(b for _, b in recipe.report.comparisons if b in recipe.arms)
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
    ledgers = [run.ledger for runs in tables.runs.values() for run in runs.values()]
    declared = compare_declared(recipe, tables.path)
    comparisons = {kind: [describe_comparison(c) for c in family[kind]] for kind in ("primary", "secondary")}
    for one in (*comparisons["primary"], *comparisons["secondary"]):
        one["after_results"] = [one["arm"], one["baseline"]] in declared["late"]
    return {
        "schema": 1, "declared": declared, "name": recipe.name,
        "title": recipe.title or recipe.name, "primary": recipe.report.primary,
        "seeds": tables.seeds, "tasks": tables.tasks, "arms": arms,
        "comparisons": comparisons["primary"],
        "secondary_comparisons": comparisons["secondary"],
        "accuracy_near_zero": bool(known) and max(known) < NEAR_ZERO,
        "seconds": _total([tables.provenance], "seconds"), "cpu_seconds": _total([tables.provenance], "cpu_seconds"),
        "student_seconds": _total(ledgers, "seconds"),
        "teacher_seconds": _total(list(tables.teachers.values()), "seconds"),
        "leaks_allowed": recipe.data.leaks == "allow" or bool(tables.manifest.get("num_leaks")),
        "leaks_found": tables.validation.get("num_leaks"),
        "not_asked": not_asked(tables),
        "notes": tables.notes,
    }  # fmt: skip


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
        "family": [list(pair) for pair in rules.comparisons], "method": METHOD,
        "declared": summary["declared"], "comparisons": summary["comparisons"],
        "secondary_comparisons": summary["secondary_comparisons"],
        "secondary_note": "exploratory: the recipe declares one primary figure, and no margin for this one",
    }  # fmt: skip
