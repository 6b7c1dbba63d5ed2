"""Leaks: a problem that is learned from and tested on, exactly or nearly the same, whatever task it came under.

Exact: equal after folding case, whitespace and width of punctuation. Near: the same problem reworded a little
(`near.py`; what two wordings have in common is counted in `wording.py`). Training problems (train, teach) are held
against val, test and the public evaluations; val against test and the evaluations. A test problem that is also in an
evaluation is no leak: nobody learns from either. Only the held-out side is kept in memory. Pure; writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvdistill.core.errors import DataError
from kvdistill.core.progress import Progress, silent
from kvdistill.data.leaks.near import NearIndex
from kvdistill.data.leaks.wording import fold_question as fold_question
from kvdistill.data.leaks.wording import question_hash as question_hash
from kvdistill.data.problems import Problem

LEARNED = ("train", "teach", "val")  # in this order a leak is taken out of the first that has it
HELD_OUT = ("val", "test")
EVALUATION = "evaluation"
_SHOWN_VARIANTS = 20


@dataclass(frozen=True)
class Place:
    """Where a question stands: split (or `evaluation`), task, and id there."""

    split: str
    task: str
    id: str

    def __str__(self) -> str:
        return f"{self.split} / {self.task} / {self.id}"


@dataclass(frozen=True)
class Leak:
    """A question that is learned from (`first`) and held out (`second`), with both texts. kind: exact or near."""

    kind: str
    similarity: float
    first: Place
    second: Place
    question: str
    other: str


@dataclass
class LeakReport:
    """What was held against what, and what was found.

    leaking: split -> positions in it of problems that must go. variants: pairs with other numbers, which are other
    problems: counted, with a few shown. checked: evaluation -> questions. missing: evaluations that were not at hand.
    """

    leaks: list[Leak] = field(default_factory=list)
    leaking: dict[str, set[int]] = field(default_factory=lambda: {split: set() for split in LEARNED})
    variants: list[Leak] = field(default_factory=list)
    num_variants: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    checked: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """`train against test, exact` -> pairs."""
        kinds = Counter(f"{leak.first.split} against {leak.second.split}, {leak.kind}" for leak in self.leaks)
        return dict(sorted(kinds.items()))


def find_leaks(
    splits: Mapping[str, Sequence[Problem]],
    evaluations: Iterable[tuple[str, str, str, str]] = (),
    *,
    missing: Sequence[str] = (),
    progress: Progress = silent,
) -> LeakReport:
    """Every learned problem that is held out as well.

    evaluations: (evaluation, member, row, question) of every public question to hold against.
    """
    report = LeakReport(problems={split: len(problems) for split, problems in splits.items()}, missing=list(missing))
    index = NearIndex()
    texts: dict[Place, str] = {}
    for split in HELD_OUT:
        for problem in splits.get(split, ()):
            place = Place(split, problem.task, problem.id)
            texts[place] = problem.question
            index.add(place, problem.question)
    for name, member, row, question in evaluations:
        place = Place(EVALUATION, member, row)
        if "/" not in row:  # a question with its choices comes a second time, without them
            report.checked[name] = report.checked.get(name, 0) + 1
        texts[place] = question
        index.add(place, question)
    total = sum(len(splits.get(split, ())) for split in LEARNED)
    done = 0
    for split in LEARNED:
        for position, problem in enumerate(splits.get(split, ())):
            first = Place(split, problem.task, problem.id)
            for match in index.matches(problem.question):
                second = match.key
                assert isinstance(second, Place)
                if split == "val" and second.split == "val":
                    continue  # itself, or its neighbour in the same split
                leak = Leak(match.kind, round(match.similarity, 4), first, second, problem.question, texts[second])
                if match.kind != "variant":
                    report.leaks.append(leak)
                    report.leaking[split].add(position)
                    continue
                report.num_variants += 1
                if len(report.variants) < _SHOWN_VARIANTS:
                    report.variants.append(leak)
            done += 1
            if done % 100 == 0 or done == total:
                progress("checking for leaks", done, total)
    return report


def refuse_leaks(leaks: Sequence[Leak]) -> None:
    """DataError that names the first pair."""
    if leaks:
        leak = leaks[0]
        more = f" (and {len(leaks) - 1} more pairs)" if len(leaks) > 1 else ""
        same = "the same question" if leak.kind == "exact" else "nearly the same question"
        raise DataError(
            f"{same} is learned from and held out: {leak.first}: {shorten(leak.question)!r}; "
            f"{leak.second}: {shorten(leak.other)!r}{more}",
            place="data.tasks",
            fix="data.leaks=drop takes them out of training and counts them (`kvdistill validate` lists all pairs); "
            "data.leaks=allow goes on all the same (never for results)",
        )


def shorten(text: str, length: int = 80) -> str:
    """One line of at most `length` characters, for messages."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
