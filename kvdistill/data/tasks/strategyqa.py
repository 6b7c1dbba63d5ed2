"""StrategyQA (Geva et al. 2021): yes/no questions with implicit steps; the reasoning is the annotators' facts."""

from __future__ import annotations

import re

from kvdistill.core.errors import DataError
from kvdistill.data.fields import text_field, texts_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks.base import Layout, Published, Task
from kvdistill.data.values import fold_width, normalise_text, text_after

_WORDS = {"yes": "yes", "true": "yes", "no": "no", "false": "no", "是": "yes", "否": "no"}
# The word alone or with more behind a punctuation mark: "no one knows" and "yes and no" are not answers.
_WORD = re.compile(rf"[\"'(\[*]*({'|'.join(_WORDS)})(?=$|[\"')\]*.,;:!。,])")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `question`, `answer` (true or false) and `facts` (a list, or one text)."""
    answer = row.columns.get("answer")
    if not isinstance(answer, bool):
        raise DataError(f"field 'answer' is {answer!r}, not true or false", place=row.place, fix="write true or false")
    facts = [text_field(row, "facts")] if isinstance(row.columns.get("facts"), str) else texts_field(row, "facts")
    reasoning = " ".join(fact if fact.endswith((".", "!", "?")) else f"{fact}." for fact in facts)
    if ANSWER_MARK in reasoning:
        raise DataError(f"`{ANSWER_MARK}` marks the answer and stands in a fact", place=row.place, fix="take it out")
    return Problem("strategyqa", id, text_field(row, "question"), reasoning, "yes" if answer else "no")


def extract(completion: str) -> str | None:
    """`yes` or `no` where the line after the first `####` begins with such a word; else that line as it is."""
    answer = text_after(ANSWER_MARK, completion)
    if answer is None:
        return None
    match = _WORD.match(fold_width(answer).casefold())
    return _WORDS[match[1]] if match else answer


def same(first: str, second: str) -> bool:
    return normalise_text(first) == normalise_text(second)


_SOURCE = Published(
    name="strategyqa",
    hub="ChilleD/StrategyQA",
    hub_config=None,
    hub_splits={"train": "train", "test": "test"},
    layouts=(Layout(train="strategyqa/train.json", test="strategyqa/dev.json"),),
    read=read_row,
)
STRATEGYQA = Task("strategyqa", _SOURCE.load, write_plain, extract, same)
