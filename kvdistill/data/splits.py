"""Rows into train / val / test / teach: by problem, seeded, disjoint, and by near duplicates where that is ours to say.

A task with a publisher's test (or validation) file takes test (or val) from it and the rest from the train file. A
published file without splits (a *pool*) has a test part that never changes: 30 % of its problems, chosen by their
content, near duplicates together; so whatever the seed, no model trained here has seen it. Any other task is split by
the seed. A problem goes to one split whatever the styles it is written in, and a question that is repeated inside a
source is kept once. Reads through the tasks; writes nothing but an unnamed temporary file (`spool.py`).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.data.leaks import question_hash
from kvdistill.data.leaks.near import NearIndex
from kvdistill.data.mix import Available, mix, share_out
from kvdistill.data.problems import SPLITS, Problem, Row, Split, Style
from kvdistill.data.sets import TASKS, Loaded, Task, find_task
from kvdistill.data.sources import Source
from kvdistill.data.spool import Selection, Spool, spool_beside

HELD_OUT_SHARE = 0.3  # of a pool
# Test is dealt first, so that asking for more training problems leaves the held-out ones as they were.
_DEAL_ORDER = ("test", "val", "train", "teach")


@dataclass
class Splits:
    """The problems of every split in task order, what they were read from, and what was asked for and found.

    rules: task key -> Task. asked: task -> split -> problems asked for. duplicates: task -> repeated questions dropped.
    pools: the tasks whose test part is the fixed part of a pool.
    """

    problems: dict[str, Selection]
    sources: list[Source] = field(default_factory=list)
    rules: dict[str, Task] = field(default_factory=dict)
    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    pools: list[str] = field(default_factory=list)


@dataclass
class _Read:
    """One task's problems as numbers in the spool. own: splits with a source of their own; rest: all others' source."""

    loaded: Loaded
    rest: array
    own: dict[str, array]
    num_repeated: int

    def available(self) -> Available:
        shared = tuple(split for split in ("train", "val", "test") if split not in self.own)
        return Available({shared: len(self.rest)} | {(split,): len(rows) for split, rows in self.own.items()})


def load_splits(data: DataRecipe, progress: Progress = silent, *, beside: Path | None = None) -> Splits:
    """Load, check and split every task of the data section. DataError for anything wrong with names, files or rows.

    beside: the folder (which need not exist) on whose disk problems may be kept for the moment.
    """
    found = [(task, find_task(task.name, place=f"data.tasks[{i}].name")) for i, task in enumerate(data.tasks)]
    seen: set[str] = set()
    for task in data.tasks:
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
    spool = spool_beside(beside)
    read: dict[str, _Read] = {}
    some = {split: int(data.ratios[i] > 0) for i, split in enumerate(("train", "val", "test"))}
    for i, (task, rules) in enumerate(found):
        progress("loading tasks", i, len(found))
        if not (rules.generated and data.total is not None):  # those are made when their number is known
            # With `total` the counts are not known yet: one where there will be some, so the right files are read.
            counted = task if data.total is None else task.model_copy(update={**some, "teach": 0})
            read[task.key] = _read(rules.load(counted, data), spool)
        progress("loading tasks", i + 1, len(found))
    if data.total is None:
        counts = {task.key: {split: getattr(task, split) for split in SPLITS} for task in data.tasks}
    else:
        has = {task.key: read[task.key].available() if task.key in read else None for task in data.tasks}
        counts = mix(data, has)
    splits = Splits({split: Selection(spool) for split in SPLITS})
    for task, rules in found:
        asked = counts[task.key]
        if task.key not in read:
            read[task.key] = _read(rules.load(task.model_copy(update=asked), data), spool)
        _deal_task(task.key, read[task.key], asked, data.seed, splits)
        splits.rules[task.key] = rules
    return splits


def load_held_out(name: str, root: str | Path | None, revision: str | None = None) -> list[Problem]:
    """The problems of a published task that no model trained here may have seen, in the publisher's order.

    The publisher's test rows, or the fixed part of a pool. root: folder with local copies; None: the hub.
    """
    rules = find_task(name, place="tasks")
    if rules.generated or not rules.published:
        raise DataError(f"{name} has no published test rows", place="tasks", fix="evaluate a model of the run instead")
    task = TaskRecipe(name=name, train=0, val=0, test=1, revision=revision)
    data = DataRecipe(tasks=[task], root=None if root is None else str(root), style="direct")
    spool = spool_beside(None)
    read = _read(rules.load(task, data), spool)
    return list(Selection(spool, read.own["test"]))


def refuse_empty(found: Mapping[str, int], asked: Mapping[str, int], task: str) -> None:
    """DataError naming task and split where problems were asked for and there is none."""
    for split in SPLITS:
        if asked[split] > 0 and found[split] == 0:
            raise DataError(
                f"split {split} of task {task} is empty, {asked[split]} problems were asked for",
                place=f"data.tasks ({task}).{split}",
                fix=f"give the task more rows, ask for fewer in the other splits, or set {split}: 0",
            )


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


def _read(loaded: Loaded, spool: Spool) -> _Read:
    """Every problem once into the spool; of a pool, its fixed test part apart from the rest."""
    rest, num_repeated = _without_repeats(loaded.problems, spool)
    own: dict[str, array] = {}
    for split, problems in (("val", loaded.val), ("test", loaded.test)):
        if problems is not None:
            own[split], repeated = _without_repeats(problems, spool)
            num_repeated += repeated
    if loaded.pool:
        held_out = _held_out_part(Selection(spool, rest))
        own["test"] = array("Q", (number for number in rest if number in held_out))
        rest = array("Q", (number for number in rest if number not in held_out))
    return _Read(loaded, rest, own, num_repeated)


def _without_repeats(problems: Iterable[Problem], spool: Spool) -> tuple[array, int]:
    seen: set[bytes] = set()
    numbers, repeated = array("Q"), 0
    for problem in problems:
        known_by = bytes.fromhex(question_hash(problem.question))
        if known_by in seen:
            repeated += 1
        else:
            seen.add(known_by)
            numbers.append(spool.append(problem))
    return numbers, repeated


def _held_out_part(pool: Selection) -> set[int]:
    """The numbers of the test part: whole groups of near duplicates, each chosen by a hash of its content."""
    group = {number: number for number in pool.numbers}

    def first_of(number: int) -> int:
        while group[number] != number:
            group[number] = number = group[group[number]]
        return number

    index = NearIndex()
    known_by: dict[int, str] = {}
    for number, problem in zip(pool.numbers, pool, strict=True):
        index.add(number, problem.question)
        known_by[number] = question_hash(problem.question)
    for number, problem in zip(pool.numbers, pool, strict=True):
        for match in index.matches(problem.question):
            group[first_of(number)] = first_of(int(match.key))  # type: ignore[call-overload]
    smallest: dict[int, str] = {}
    for number, hash in known_by.items():
        first = first_of(number)
        smallest[first] = min(hash, smallest.get(first, hash))
    # min() of many hashes is small, so the group's name is hashed again before it is compared
    held_out = {first for first, name in smallest.items() if int(question_hash(name)[:8], 16) < HELD_OUT_SHARE * 2**32}
    return {number for number in pool.numbers if first_of(number) in held_out}


def _deal_task(key: str, read: _Read, asked: Mapping[str, int], seed: int, splits: Splits) -> None:
    rest, own = list(read.rest), {split: list(rows) for split, rows in read.own.items()}
    if not read.loaded.in_order:
        random.Random(derive_seed(seed, key, "pool")).shuffle(rest)
        for split, rows in own.items():
            random.Random(derive_seed(seed, key, split)).shuffle(rows)
    shares, start = share_out({split: 0 if split in own else asked[split] for split in SPLITS}, len(rest)), 0
    dealt: dict[str, list[int]] = {}
    for split in _DEAL_ORDER:
        dealt[split] = rest[start : start + shares[split]]
        start += shares[split]
    dealt |= {split: rows[: asked[split]] for split, rows in own.items()}
    refuse_empty({split: len(dealt[split]) for split in SPLITS}, asked, key)
    for split in SPLITS:
        splits.problems[split].numbers.extend(dealt[split])
    splits.sources.extend(read.loaded.sources)
    splits.asked[key], splits.duplicates[key] = dict(asked), read.num_repeated
    if read.loaded.pool:
        splits.pools.append(key)
