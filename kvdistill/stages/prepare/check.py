"""What is learned from against what is held out: the leak check of a whole data section, and its report.

Knows where the public evaluations come from (`data/sets`); knows no tokenizer and no run folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import Recipe
from kvdistill.data.leaks import LEARNED, LeakReport, find_leaks, question_hash, refuse_leaks
from kvdistill.data.sets import (
    EVALUATIONS,
    evaluation_questions,
    find_evaluation,
    missing_evaluations,
    questions_of,
)
from kvdistill.data.splits import Splits

_MOST_SHOWN = 1000  # pairs in the report; all are counted
METHOD = {
    "exact": "equal after folding case, whitespace and width of punctuation (SHA-256)",
    "near": "MinHash candidates over words, then the order of the words and the numbers (kvdistill/data/leaks/near.py)",
    "variant": "the same sentences with other numbers: another problem, shown and no leak",
}


def check_splits(recipe: Recipe, splits: Splits, progress: Progress) -> tuple[LeakReport, dict[str, Any]]:
    """What leaks were found, and the problems dropped (from `splits`, in place): split -> task -> number taken out
    (`data.leaks: drop`). DataError for the first leak under `refuse`."""
    report = find_split_leaks(recipe, splits, progress)
    if recipe.data.leaks == "allow":
        return report, {}
    require_checked(splits, report)
    if recipe.data.leaks == "refuse":
        refuse_leaks(report.leaks)
        return report, {}
    return report, drop_leaks(splits, report)


def find_split_leaks(recipe: Recipe, splits: Splits, progress: Progress) -> LeakReport:
    """The leaks among the splits, and between them and every public evaluation at hand."""
    if all(rules.generated for rules in splits.rules.values()):
        return find_leaks(splits.problems, missing=sorted(EVALUATIONS), progress=progress)
    root = None if recipe.data.root is None else Path(recipe.data.root).expanduser()
    if root is not None:
        questions, missing = evaluation_questions(root), missing_evaluations(root)
    else:
        # Those that the recipe asks for; the others are not downloaded for the check's sake.
        named = [find_evaluation(name, place="evaluate.tasks") for name in recipe.evaluate.tasks]
        questions = (question for evaluation in named for question in questions_of(evaluation, None))
        missing = sorted(set(EVALUATIONS) - set(recipe.evaluate.tasks))
    shown = _counted(questions, len(EVALUATIONS) - len(missing), progress)
    return find_leaks(splits.problems, shown, missing=missing, progress=progress)


def _counted(
    questions: Iterator[tuple[str, str, str, str]], total: int, progress: Progress
) -> Iterator[tuple[str, str, str, str]]:
    seen: set[str] = set()
    for question in questions:
        if question[0] not in seen:
            progress("reading evaluations", len(seen), total)
            seen.add(question[0])
        yield question
    progress("reading evaluations", total, total)


def require_checked(splits: Splits, report: LeakReport) -> None:
    """DataError where published test rows are learned from and the evaluation taken from them was not at hand."""
    for key in splits.pools:
        for name in splits.rules[key].spoils:
            if name not in report.checked and any(splits.asked[key][split] for split in LEARNED):
                raise DataError(
                    f"{key} has no train file here, and {name}, which is taken from its test rows, is not here to be "
                    "kept out of training",
                    place=f"data.tasks ({key})",
                    fix=f"add the published train file of {key}, or the rows of {name}, below data.root; or set its "
                    "train and val to 0",
                )


def drop_leaks(splits: Splits, report: LeakReport) -> dict[str, dict[str, int]]:
    """Take the leaking problems out of what is learned from (in place); split -> task -> how many."""
    dropped = count_leaks(splits, report)
    for split, positions in report.leaking.items():
        chosen = splits.problems[split]
        splits.problems[split] = chosen.without({chosen.numbers[position] for position in positions})
    return dropped


def count_leaks(
    splits: Splits, report: LeakReport, *, without: Mapping[str, Collection[str]] | None = None
) -> dict[str, dict[str, int]]:
    """Split -> task -> leaking problems; without: hashes of questions, by split, that are not counted."""
    counts: dict[str, dict[str, int]] = {}
    for split, positions in report.leaking.items():
        for position in sorted(positions):
            problem = splits.problems[split][position]
            if without is None or question_hash(problem.question) not in without[split]:
                tasks = counts.setdefault(split, {})
                tasks[problem.task] = tasks.get(problem.task, 0) + 1
    return counts


def report_as_dict(report: LeakReport, dropped: dict[str, Any], policy: str, *, num_left: int) -> dict[str, Any]:
    """What `validation_report.json` holds. num_left: pairs that are still in the data."""
    return {
        "method": METHOD,
        "policy": policy,
        "problems": report.problems,
        "held_against": {"splits": ["val", "test"], "evaluations": report.checked},
        "evaluations_not_at_hand": report.missing,
        "num_leaks": num_left,
        "num_pairs_found": len(report.leaks),
        "pairs_by_kind": report.counts(),
        "dropped": dropped,
        "leaks": [asdict(leak) for leak in report.leaks[:_MOST_SHOWN]],
        "num_variants": report.num_variants,
        "variants": [asdict(leak) for leak in report.variants],
    }
