"""Exact leaks: the same question in two splits, whatever task it came under.

Questions are compared by a hash of their folded text (case, whitespace, width of punctuation), so a leak that
differs in spacing is found. Near duplicates (MinHash) are another check. Pure; writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.data.problems import Problem
from kvdistill.data.values import fold_width


@dataclass(frozen=True)
class Place:
    """Where a question stands."""

    split: str
    task: str
    id: str

    def __str__(self) -> str:
        return f"{self.split} / {self.task} / {self.id}"


@dataclass(frozen=True)
class Leak:
    """One question in two splits: its first place in each."""

    doc_hash: str
    first: Place
    second: Place
    question: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fold_question(text: str) -> str:
    """Lower case, narrow punctuation, single spaces."""
    return " ".join(fold_width(text).casefold().split())


def question_hash(text: str) -> str:
    """128 bits of SHA-256 of the folded question, in hex: what a problem is known by (`doc_hash`)."""
    return hashlib.sha256(fold_question(text).encode()).hexdigest()[:32]


def find_leaks(splits: Mapping[str, Sequence[Problem]]) -> list[Leak]:
    """Every question that stands in more than one split, once per pair of splits, in the order of `splits`."""
    places: dict[str, dict[str, Problem]] = {}
    for split, problems in splits.items():
        for problem in problems:
            places.setdefault(question_hash(problem.question), {}).setdefault(split, problem)
    return [
        Leak(doc_hash, _place(first, found), _place(second, found), found[first].question)
        for doc_hash, found in places.items()
        if len(found) > 1
        for first, second in combinations(found, 2)
    ]


def refuse_leaks(leaks: Sequence[Leak]) -> None:
    """DataError that names the first pair."""
    if leaks:
        leak = leaks[0]
        more = f" (and {len(leaks) - 1} more pairs)" if len(leaks) > 1 else ""
        raise DataError(
            f"the same question is in two splits: {leak.first} and {leak.second}: {_short(leak.question)!r}{more}",
            place="data.tasks",
            fix="take the row out of one source; `data.allow_leaks=true` goes on all the same (never for results)",
        )


def _place(split: str, found: Mapping[str, Problem]) -> Place:
    return Place(split, found[split].task, found[split].id)


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
