"""The data sets, by name, for training and for evaluation. A new one is one small file here and one entry below.

base.py       what a task and an evaluation are
published.py  a publisher's rows: files in several layouts, or the hub
held_out.py   evaluation of training tasks by our own templates
letters.py    lettered multiple choice, and which letter a text gives
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import quoted
from kvdistill.data.leaks import question_hash
from kvdistill.data.sets.arc_challenge import ARC_CHALLENGE
from kvdistill.data.sets.base import DataSet, Evaluation, Task
from kvdistill.data.sets.bbh import BBH
from kvdistill.data.sets.generated import AFFINE, CHAIN, DIGITS, PERMUTE, PRODUCT, QUOTIENT
from kvdistill.data.sets.gpqa import GPQA, GPQA_DIAMOND
from kvdistill.data.sets.gsm8k import GSM8K
from kvdistill.data.sets.hotpotqa import HOTPOTQA
from kvdistill.data.sets.letters import Lettered
from kvdistill.data.sets.math import MATH, MATH500
from kvdistill.data.sets.math23k import MATH23K
from kvdistill.data.sets.own_file import CSV, JSONL, PARQUET
from kvdistill.data.sets.published import Loaded, Member
from kvdistill.data.sets.rules import RULES
from kvdistill.data.sets.strategyqa import STRATEGYQA
from kvdistill.data.sets.subjects import CEVAL, CMMLU
from kvdistill.data.sets.svamp import SVAMP
from kvdistill.data.sets.truthfulqa import TRUTHFULQA

_SETS: tuple[DataSet, ...] = (
    *(
        CHAIN,
        PRODUCT,
        DIGITS,
        QUOTIENT,
        AFFINE,
        PERMUTE,
        GSM8K,
        JSONL,
        CSV,
        PARQUET,
        SVAMP,
        STRATEGYQA,
        MATH23K,
        MATH,
        MATH500,
        BBH,
        GPQA,
        GPQA_DIAMOND,
    ),
    *(TRUTHFULQA, CMMLU, CEVAL, ARC_CHALLENGE, HOTPOTQA),
)
TASKS: dict[str, Task] = {one.task.name: one.task for one in _SETS if one.task is not None}
# Those by lm-eval's definitions come first, then those by our own templates.
EVALUATIONS: dict[str, Evaluation] = {
    found.name: found
    for own in (False, True)
    for one in _SETS
    if (found := one.evaluation) is not None and (found.rules is not None) == own
}


def find_task(name: str, *, place: str) -> Task:
    """The task of that name; DataError with the nearest name otherwise."""
    if name not in TASKS:
        folded = name.casefold().replace("-", "_")
        near = difflib.get_close_matches(folded, TASKS, n=1, cutoff=0.5) or [t for t in TASKS if t.startswith(folded)]
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown task {quoted(name)}", place=place, fix=f"{meant}there are: {', '.join(TASKS)}")
    return TASKS[name]


def find_rules(key: str, rule: str = "") -> Task:
    """The task of a row's task key: one that is not built in is the stem of a user's file, which has jsonl's rules.

    rule: the rule of RULES by which its answers are read and compared; empty: the task's own.
    """
    task = TASKS.get(key, TASKS["jsonl"])
    return replace(task, extract=RULES[rule].extract, same=RULES[rule].same) if rule else task


def find_evaluation(name: str, *, place: str) -> Evaluation:
    """The evaluation of that name; DataError with the nearest name otherwise."""
    if name in EVALUATIONS:
        return EVALUATIONS[name]
    owners = [e.name for e in EVALUATIONS.values() if name in {member.name for member in e.data.members}]
    near = difflib.get_close_matches(name.lower(), EVALUATIONS, n=1, cutoff=0.5)
    meant = f"that is a part of {owners[0]!r}; " if owners else f"did you mean {near[0]!r}? " if near else ""
    known = ", ".join(EVALUATIONS)
    raise DataError(f"unknown evaluation {quoted(name)}", place=place, fix=f"{meant}there are: {known}")


def evaluation_questions(root: str | Path | None) -> Iterator[tuple[str, str, str, str]]:
    """What `questions_of` gives, of every evaluation that is below `root`, for the leak check."""
    if root is None:
        return
    folder = Path(root).expanduser()
    for evaluation in EVALUATIONS.values():
        if evaluation.is_there(folder):
            yield from questions_of(evaluation, folder)


def missing_evaluations(root: str | Path | None) -> list[str]:
    """Evaluations with no rows to score below `root`; without a root all of them."""
    return [name for name, one in EVALUATIONS.items() if root is None or not one.is_there(Path(root).expanduser())]


def questions_of(evaluation: Evaluation, root: Path | None) -> Iterator[tuple[str, str, str, str]]:
    """(evaluation, member, row number from 1, question) of all that is scored, from below `root` or (None) the hub.

    Questions come with their choices, as training tasks write them. A question that stands in its evaluation once comes
    a second time without them, as row `17/stem`, so that a copy of it alone is found too.
    """
    members = [member for member in evaluation.members(root) if member.name not in evaluation.repeated]
    rows = [
        (member.name, str(number), row)
        for member in members
        for number, row in enumerate(evaluation.load(member, root, "test"), start=1)
    ]
    for member_name, number, row in rows:
        yield evaluation.name, member_name, number, evaluation.question(row)
    if evaluation.stem is not None:
        times = Counter(question_hash(evaluation.stem(row)) for _, _, row in rows)
        for member_name, number, row in rows:
            stem = evaluation.stem(row)
            if times[question_hash(stem)] == 1:
                yield evaluation.name, member_name, f"{number}/stem", stem


__all__ = [
    "EVALUATIONS",
    "RULES",
    "TASKS",
    "DataSet",
    "Evaluation",
    "Lettered",
    "Loaded",
    "Member",
    "Task",
    "evaluation_questions",
    "find_evaluation",
    "find_rules",
    "find_task",
    "missing_evaluations",
    "questions_of",
]
