"""Rows into train / val / test: by problem, seeded, disjoint.

A task with a publisher's test (or validation) file takes test (or val) from it and the rest from the train file;
any other task is split by the seed. A problem goes to one split whatever the styles it is written in, and a question
that is repeated inside a source is kept once. Reads through the tasks; writes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import SPLITS, Problem, Row, Split, Style
from kvdistill.data.sources import Source
from kvdistill.data.tasks import TASKS, Task, find_task

# Test is dealt first, so that asking for more training problems leaves the held-out ones as they were.
_DEAL_ORDER = ("test", "val", "train", "teach")


@dataclass
class Splits:
    """The problems of every split in task order, what they were read from, and what was asked for and found.

    rules: task key -> Task. asked: task -> split -> problems asked for. duplicates: task -> repeated questions dropped.
    """

    problems: dict[str, list[Problem]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    sources: list[Source] = field(default_factory=list)
    rules: dict[str, Task] = field(default_factory=dict)
    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)


def load_splits(data: DataRecipe, progress: Progress = silent) -> Splits:
    """Load, check and split every task of the data section. DataError for anything wrong with names, files or rows."""
    found = [(task, find_task(task.name, place=f"data.tasks[{i}].name")) for i, task in enumerate(data.tasks)]
    _check_keys(data.tasks)
    splits = Splits()
    for i, (task, rules) in enumerate(found):
        progress("loading tasks", i, len(found))
        loaded = rules.load(task, data)
        pool, num_repeated = _drop_repeats(loaded.problems)
        published = {"val": loaded.val, "test": loaded.test}
        own = {split: _drop_repeats(rows) for split, rows in published.items() if rows is not None}
        if not loaded.in_order:
            random.Random(derive_seed(data.seed, task.key, "pool")).shuffle(pool)
            for split, (rows, _) in own.items():
                random.Random(derive_seed(data.seed, task.key, split)).shuffle(rows)
        asked: dict[str, int] = {split: getattr(task, split) for split in SPLITS}
        dealt = _deal(pool, asked | {split: 0 for split in own})
        dealt |= {split: rows[: asked[split]] for split, (rows, _) in own.items()}
        refuse_empty({split: len(dealt[split]) for split in SPLITS}, asked, task.key)
        for split in SPLITS:
            splits.problems[split].extend(dealt[split])
        splits.sources.extend(loaded.sources)
        splits.rules[task.key], splits.asked[task.key] = rules, asked
        splits.duplicates[task.key] = num_repeated + sum(number for _, number in own.values())
        progress("loading tasks", i + 1, len(found))
    return splits


def refuse_empty(found: Mapping[str, int], asked: Mapping[str, int], task: str) -> None:
    """DataError naming task and split where problems were asked for and there is none."""
    for split in SPLITS:
        if asked[split] > 0 and found[split] == 0:
            raise DataError(
                f"split {split} of task {task} is empty, {asked[split]} problems were asked for",
                place=f"data.tasks ({task}).{split}",
                fix=f"give the task more rows, ask for fewer in the other splits, or set {split}: 0",
            )


def share_out(asked: Mapping[str, int], available: int) -> dict[str, int]:
    """`asked` where there is enough; else `available` in the same proportions, at least one for each that asked.

    The shares add up to min(sum(asked), available), and no share is above what was asked.
    """
    total = sum(asked.values())
    if total <= available:
        return dict(asked)
    wanting = [name for name, count in asked.items() if count]
    shares = {name: available * count // total for name, count in asked.items()}
    by_rest = sorted(wanting, key=lambda name: -(available * asked[name] % total))
    for name in by_rest[: available - sum(shares.values())]:
        shares[name] += 1
    for name in wanting:
        largest = max(wanting, key=lambda other: shares[other])
        if shares[name] == 0 and shares[largest] > 1:
            shares[name], shares[largest] = 1, shares[largest] - 1
    return shares


def load_multi_task_dataset(
    dataset_names: Sequence[str],
    styles: Sequence[Style] = ("cot",),
    *,
    split: Split = "train",
    num_problems: int = 1000,
    root: str | Path | None = None,
    seed: int = 0,
) -> list[Row]:
    """Written rows of `num_problems` problems (or as many as there are) of each named task, in each of `styles`.

    root: folder with local copies; None: the hub. A thin way in for scripts; runs use `prepare`.
    """
    for style in styles:
        if style not in ("cot", "direct"):
            raise DataError(f"unknown style {style!r}", place="styles", fix="use cot, direct, or both in a list")
    wanted = {name: num_problems if name == split else 0 for name in SPLITS}
    section = {"tasks": [{"name": name, **wanted} for name in dataset_names], "root": root and str(root), "seed": seed}
    loaded = load_splits(DataRecipe.model_validate(section))
    return [loaded.rules[p.task].write(p, style) for p in loaded.problems[split] for style in styles]


def _check_keys(tasks: Sequence[TaskRecipe]) -> None:
    seen: set[str] = set()
    for task in tasks:
        place = f"data.tasks ({task.name})"
        if task.key in seen:
            raise DataError(f"two tasks are called {task.key!r}", place=place, fix="rename one file, or merge the two")
        if task.file is not None and task.key in TASKS:
            raise DataError(
                f"the file's name makes a task called {task.key!r}, which is a built-in one",
                place=place,
                fix="rename the file: its stem is the task's name in every record",
            )
        seen.add(task.key)


def _drop_repeats(problems: Sequence[Problem]) -> tuple[list[Problem], int]:
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(question_hash(problem.question), problem)
    return list(first.values()), len(problems) - len(first)


def _deal(pool: Sequence[Problem], asked: Mapping[str, int]) -> dict[str, list[Problem]]:
    shares, start = share_out(asked, len(pool)), 0
    dealt: dict[str, list[Problem]] = {}
    for split in _DEAL_ORDER:
        dealt[split] = list(pool[start : start + shares[split]])
        start += shares[split]
    return dealt
