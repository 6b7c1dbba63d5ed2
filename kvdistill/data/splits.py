"""Rows into train / val / test / teach: by problem, seeded, disjoint, and by near duplicates where that is ours to say.

A task with a publisher's test (or validation) file takes test (or val) from it and the rest from the train file, and a
published file without splits has a test part that never changes (`sets/held_out.py`). Any other task is split by the
seed. A problem goes to one split whatever the styles it is written in, and a question that is repeated inside a source
is kept once. Reads through the tasks; writes nothing but an unnamed temporary file (`spool.py`).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import DataRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.data.mix import Available, mix, share_out
from kvdistill.data.problems import SPLITS, Row, Split, Style
from kvdistill.data.sets import TASKS, Task, find_rules, find_task
from kvdistill.data.sets.held_out import Dealable, read_once
from kvdistill.data.sets.own_file import rule_of
from kvdistill.data.sets.published import Noticed
from kvdistill.data.sources import Source
from kvdistill.data.spool import Selection, spool_beside

# Test is dealt first, so that asking for more training problems leaves the held-out ones as they were.
DEAL_ORDER = ("test", "val", "train", "teach")


@dataclass
class Splits:
    """The problems of every split in task order, what they were read from, and what was asked for and found.

    rules: task key -> Task. asked: task -> split -> problems asked for. duplicates: task -> repeated questions dropped.
    pools: the tasks whose test part is the fixed part of a pool. noticed: task -> what to tell of a user's own rows.
    spare: task -> split -> numbers in the spool that nobody asked for; splits that share a source share these.
    replaced: task -> split -> problems that were too long and gave way to one of them.
    """

    problems: dict[str, Selection]
    sources: list[Source] = field(default_factory=list)
    rules: dict[str, Task] = field(default_factory=dict)
    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    pools: list[str] = field(default_factory=list)
    noticed: dict[str, Noticed] = field(default_factory=dict)
    spare: dict[str, dict[str, deque[int]]] = field(default_factory=dict)
    replaced: dict[str, Counter[str]] = field(default_factory=dict)


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
    read: dict[str, Dealable] = {}
    some = {split: int(data.ratios[i] > 0) for i, split in enumerate(("train", "val", "test"))}
    for i, (task, rules) in enumerate(found):
        progress("loading tasks", i, len(found))
        if not (rules.generated and data.total is not None):  # those are made when their number is known
            # With `total` the counts are not known yet: one where there will be some, so the right files are read.
            counted = task if data.total is None else task.model_copy(update={**some, "teach": 0})
            read[task.key] = read_once(rules.load(counted, data), spool)
        progress("loading tasks", i + 1, len(found))
    if data.total is None:
        counts = {task.key: {split: getattr(task, split) for split in SPLITS} for task in data.tasks}
    else:
        counts = mix(data, {task.key: _available(read.get(task.key)) for task in data.tasks})
    splits = Splits({split: Selection(spool) for split in SPLITS})
    for task, rules in found:
        asked = counts[task.key]
        if task.key not in read:
            read[task.key] = read_once(rules.load(task.model_copy(update=asked), data), spool)
        _deal_task(task.key, read[task.key], asked, data.seed, splits)
        splits.rules[task.key] = find_rules(task.key, rule_of(task)) if task.file else rules
        splits.noticed[task.key] = read[task.key].loaded.noticed
    return splits


def _available(read: Dealable | None) -> Available | None:
    if read is None:
        return None
    shared = tuple(split for split in ("train", "val", "test") if split not in read.own)
    return Available({shared: len(read.rest)} | {(split,): len(rows) for split, rows in read.own.items()})


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


def draw_learned(splits: Splits, seed: int) -> None:
    """Draw train and teach of every task anew (in place), of all its problems that are not held out.

    Called when the held-out splits are settled, which are then the same whatever is drawn. Generated problems were
    drawn by their family. DataError where there is nothing to choose.
    """
    learned = ("train", "teach")
    mine: dict[str, dict[str, list[int]]] = {task: {split: [] for split in learned} for task in splits.asked}
    for split in learned:
        chosen = splits.problems[split]
        for number, problem in zip(chosen.numbers, chosen, strict=True):
            mine[problem.task][split].append(number)
    fixed: dict[str, int] = {}
    for task, dealt in mine.items():
        spare = splits.spare[task]["train"]
        if splits.rules[task].generated:
            continue
        if not spare and not dealt["teach"]:
            fixed[task] = len(dealt["train"])
        pool = sorted([*dealt["train"], *dealt["teach"], *spare])
        random.Random(derive_seed(seed, task, "learned")).shuffle(pool)
        for split in learned:
            size = len(dealt[split])
            dealt[split], pool = pool[:size], pool[size:]
        spare.clear()
        spare.extend(pool)
    if len(fixed) == sum(any(dealt.values()) for dealt in mine.values()):
        listed = ", ".join(f"{number} of {task}" for task, number in fixed.items())
        raise DataError(
            f"every seed would learn from the same problems: all that are not held out are asked for ({listed})",
            place="data.train_seed (replicate: data, all)",
            fix="lower `train` (or data.total), give the tasks more rows, or set replicate: student",
        )
    for split in learned:
        numbers = [number for dealt in mine.values() for number in dealt[split]]
        splits.problems[split] = Selection(splits.problems[split].spool, numbers)


def _deal_task(key: str, read: Dealable, asked: Mapping[str, int], seed: int, splits: Splits) -> None:
    rest, own = list(read.rest), {split: list(rows) for split, rows in read.own.items()}
    if not read.loaded.in_order:
        random.Random(derive_seed(seed, key, "pool")).shuffle(rest)
        for split, rows in own.items():
            random.Random(derive_seed(seed, key, split)).shuffle(rows)
    shares, start = share_out({split: 0 if split in own else asked[split] for split in SPLITS}, len(rest)), 0
    dealt: dict[str, list[int]] = {}
    for split in DEAL_ORDER:
        dealt[split] = rest[start : start + shares[split]]
        start += shares[split]
    dealt |= {split: rows[: asked[split]] for split, rows in own.items()}
    shared = deque(rest[start:])
    splits.spare[key] = {split: deque(own[split][asked[split] :]) if split in own else shared for split in SPLITS}
    refuse_empty({split: len(dealt[split]) for split in SPLITS}, asked, key)
    for split in SPLITS:
        splits.problems[split].numbers.extend(dealt[split])
    splits.sources.extend(read.loaded.sources)
    splits.asked[key], splits.duplicates[key] = dict(asked), read.num_repeated
    if read.loaded.pool:
        splits.pools.append(key)
