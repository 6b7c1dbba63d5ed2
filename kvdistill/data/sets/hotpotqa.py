"""HotpotQA (Yang et al. 2018): two-step questions, closed book; the reasoning is the supporting sentences.

Three shapes: the original (lists of pairs), the hub's (lists side by side), and question with answer alone, which
serves style `direct` only. Answers are compared as HotpotQA's own evaluation does (exact match: case, punctuation
and articles do not count), but a decimal point counts, and two numbers are compared as numbers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from kvdistill.data.answers.numbers import fold_width, normalise_number, normalise_text, unwrap
from kvdistill.data.problems import ANSWER_MARK, Problem
from kvdistill.data.sets.base import extract_marked
from kvdistill.data.sets.held_out import with_own_template
from kvdistill.data.sets.published import Layout, Published
from kvdistill.data.sources import RawRow

_PUNCTUATION = re.compile(rf"(?!(?<=[0-9])\.[0-9])[{re.escape(string.punctuation)}]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `question` and `answer`, and `supporting_facts` with `context` where the copy has them."""
    answer = row.text("answer")
    if "\n" in answer or ANSWER_MARK in answer:
        raise row.error("the answer must be one line without `####`", fix="take the row out")
    has_facts = "supporting_facts" in row.columns or "context" in row.columns
    reasoning = " ".join(_supporting_sentences(row)) if has_facts else ""
    if ANSWER_MARK in reasoning:
        raise row.error(f"`{ANSWER_MARK}` marks the answer and stands in a fact", fix="take it out")
    return Problem("hotpotqa", id, row.text("question"), reasoning, answer)


def _supporting_sentences(row: RawRow) -> list[str]:
    facts = _pairs(row, "supporting_facts", "sent_id")
    paragraphs = dict(_pairs(row, "context", "sentences"))
    found: list[str] = []
    for title, number in facts:
        sentences = paragraphs.get(title, [])
        # a few published facts point behind the end of their paragraph; the others still say something
        if isinstance(number, int) and isinstance(sentences, list) and 0 <= number < len(sentences):
            found.append(" ".join(str(sentences[number]).split()))
    if not any(found):
        raise row.error("no supporting fact stands in the context", fix="mend `supporting_facts`")
    return [sentence for sentence in found if sentence]


def _pairs(row: RawRow, column: str, second: str) -> list[tuple[str, Any]]:
    """`[[title, x], …]` of the original shape, or `{title: […], second: […]}` of the hub's."""
    value = row.columns.get(column)
    if isinstance(value, Mapping):
        titles, others = value.get("title"), value.get(second)
        if isinstance(titles, list) and isinstance(others, list) and len(titles) == len(others):
            value = [list(pair) for pair in zip(titles, others, strict=True)]
    if isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in value):
        return [(title, other) for title, other in value]
    raise row.error(
        f"field {column!r} is not pairs of a title and a {second}",
        fix=f"write [[title, {second}], …] or {{title: […], {second}: […]}}",
    )


def same(first: str, second: str) -> bool:
    first, second = unwrap(first), unwrap(second)
    numbers = normalise_number(first), normalise_number(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    folded = _fold(first), _fold(second)
    return folded[0] == folded[1] if any(folded) else normalise_text(first) == normalise_text(second)


def _fold(text: str) -> str:
    text = fold_width(text).casefold().translate({0x2013: "-", 0x2014: "-"})  # 2013–14 is 2013-14
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", text)).split())


_FOLDER = "hotpotqa"
_DATA = Published(
    name="hotpotqa",
    hub="hotpotqa/hotpot_qa",
    hub_config="distractor",
    hub_splits={"train": "train", "test": "validation"},
    layouts=(
        Layout(train=f"{_FOLDER}/hotpot_train_v1.1.json", test=f"{_FOLDER}/hotpot_dev_distractor_v1.json"),
        Layout(pool=f"{_FOLDER}/dev_v1_simplified.json", reasoning=False),
        Layout(pool=f"{_FOLDER}/dev_distractor_v1_first103.json"),
        Layout(pool=f"{_FOLDER}/distractor_hub_schema_first100.json"),
    ),
    problem=read_row,
)
HOTPOTQA = with_own_template(_DATA, "HotpotQA (closed book)", extract_marked, same)
