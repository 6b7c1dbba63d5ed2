"""A scripted lm-eval model that knows which questions to answer rightly, and how each kind of question is answered."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from kvdistill.data.sets import EVALUATIONS
from kvdistill.stages.evaluate.suite import Exams

MEMBERS = {member.name: (one, member) for one in EVALUATIONS.values() for member in one.data.members}


@functools.cache
def _rows(root: Path, name: str) -> list[Any]:
    evaluation, member = MEMBERS[name]
    return evaluation.load(member, root, "test")


class ScriptedLM(LM):
    """Answers the questions in `right` rightly and all others wrongly; `asked` counts its requests by kind.

    right: (member, row number). It knows the evaluations, and nothing of exams, folders or records.
    """

    def __init__(self, root: Path, right: Iterable[tuple[str, int]] | None = None, *, dies_after: int = -1) -> None:
        super().__init__()
        self._root, self._right = root, None if right is None else {*right}
        self._dies_after = dies_after
        self.asked = {"loglikelihood": 0, "generate_until": 0}

    def _row(self, request: Any) -> tuple[Any, Any, list[Any], int]:
        evaluation, member = MEMBERS[request.task_name]
        return evaluation, member, _rows(self._root, member.name), request.doc_id

    def _is_right(self, request: Any) -> bool:
        return self._right is None or (request.task_name, request.doc_id) in self._right

    def _count(self, kind: str, requests: list[Any]) -> None:
        if self._dies_after == 0:
            raise KeyboardInterrupt
        self._dies_after -= 1
        self.asked[kind] += len(requests)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self._count("loglikelihood", requests)
        return [(0.0 if self._chooses(request) else -1000.0, False) for request in requests]

    def _chooses(self, request: Any) -> bool:
        """Whether this choice is one of those the scripted model finds likely: the true ones, or the others."""
        evaluation, member, rows, number = self._row(request)
        row = rows[number]
        if member.name == "truthfulqa_mc2":
            true = row["mc2_targets"]["labels"][request.idx] == 1
        else:
            lettered = evaluation.lettered(member, row)
            true = lettered.natives[request.idx] == lettered.gold
        return true == self._is_right(request)

    def generate_until(self, requests: list[Any]) -> list[str]:
        self._count("generate_until", requests)
        return [self._write(request) for request in requests]

    def _write(self, request: Any) -> str:
        evaluation, member, rows, number = self._row(request)
        lettered = evaluation.lettered(member, rows[number])
        if lettered is not None:
            wrong = next(letter for letter in lettered.letters if letter != lettered.gold)
            return f" {lettered.gold if self._is_right(request) else wrong}"
        if self._is_right(request):
            return evaluation.published_gold(member, rows[number])
        gold = evaluation.gold(member, rows[number])
        other = next(row for row in rows if not evaluation.same(member, evaluation.gold(member, row), gold))
        return evaluation.published_gold(member, other)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    @property
    def tokenizer_name(self) -> str:
        return "scripted"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        said = "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)
        return said + ("<assistant>" if add_generation_prompt else "")


def some_questions(exams: Exams, limit: int | None, share: float) -> set[tuple[str, int]]:
    """Exactly `share` (to the nearest question) of the first `limit` questions of every member, drawn by a hash."""
    chosen: set[tuple[str, int]] = set()
    for members in exams.values():
        for exam in members:
            numbers = range(len(exam) if limit is None else min(limit, len(exam)))
            by_hash = sorted(numbers, key=lambda n: hashlib.sha256(f"{exam.name}/{n}".encode()).digest())
            chosen |= {(exam.name, n) for n in by_hash[: round(share * len(numbers))]}
    return chosen


def gpqa_root(folder: Path) -> Path:
    """A data root with invented GPQA rows: no real one may be published."""
    import csv

    columns = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    path = folder / "gpqa" / "gpqa_main.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(12):
            writer.writerow([f"rec{i}", f"What is {i} plus {i}?", f"{2 * i} apples", *(f"{j} pears" for j in range(3))])
    return folder
