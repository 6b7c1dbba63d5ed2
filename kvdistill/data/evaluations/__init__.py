"""The evaluations, by name. A new one is one small file here and one entry below.

base.py      what an evaluation is
rows.py      where its rows come from: files in several layouts, or the hub
letters.py   lettered multiple choice, and which letter a text gives
own.py       training tasks by our own templates
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import quoted
from kvdistill.data.evaluations.arc_challenge import ARC_CHALLENGE
from kvdistill.data.evaluations.base import Evaluation
from kvdistill.data.evaluations.bbh import BBH
from kvdistill.data.evaluations.gpqa import GPQA, GPQA_DIAMOND
from kvdistill.data.evaluations.gsm8k import GSM8K
from kvdistill.data.evaluations.letters import Lettered
from kvdistill.data.evaluations.math500 import MATH500
from kvdistill.data.evaluations.own import HOTPOTQA, MATH, MATH23K, STRATEGYQA, SVAMP
from kvdistill.data.evaluations.rows import Member
from kvdistill.data.evaluations.subjects import CEVAL, CMMLU
from kvdistill.data.evaluations.truthfulqa import TRUTHFULQA
from kvdistill.data.leaks import question_hash

_ALL = (
    *(GSM8K, MATH500, BBH, GPQA, GPQA_DIAMOND, TRUTHFULQA, CMMLU, CEVAL, ARC_CHALLENGE),
    *(SVAMP, STRATEGYQA, MATH23K, MATH, HOTPOTQA),
)
EVALUATIONS: dict[str, Evaluation] = {evaluation.name: evaluation for evaluation in _ALL}


def find_evaluation(name: str, *, place: str) -> Evaluation:
    """The evaluation of that name; DataError with the nearest name otherwise."""
    if name in EVALUATIONS:
        return EVALUATIONS[name]
    owners = [e.name for e in _ALL if name in {member.name for member in e.all_members}]
    near = difflib.get_close_matches(name.lower(), EVALUATIONS, n=1, cutoff=0.5)
    meant = f"that is a part of {owners[0]!r}; " if owners else f"did you mean {near[0]!r}? " if near else ""
    known = ", ".join(EVALUATIONS)
    raise DataError(f"unknown evaluation {quoted(name)}", place=place, fix=f"{meant}there are: {known}")


def evaluation_questions(root: str | Path | None) -> Iterator[tuple[str, str, str, str]]:
    """What `questions_of` gives, of every evaluation that is below `root`, for the leak check."""
    if root is None:
        return
    folder = Path(root).expanduser()
    for evaluation in _ALL:
        if evaluation.is_there(folder):
            yield from questions_of(evaluation, folder)


def missing_evaluations(root: str | Path | None) -> list[str]:
    """Evaluations with no rows to score below `root`; without a root all of them."""
    if root is None:
        return list(EVALUATIONS)
    folder = Path(root).expanduser()
    return [evaluation.name for evaluation in _ALL if not evaluation.is_there(folder)]


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
    "Evaluation",
    "Lettered",
    "Member",
    "evaluation_questions",
    "find_evaluation",
    "missing_evaluations",
    "questions_of",
]
