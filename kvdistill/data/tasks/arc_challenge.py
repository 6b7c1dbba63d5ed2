"""ARC-Challenge (Clark et al. 2018): science questions with three to five choices; the answer is a letter.

Choices are shown as A, B, C, … whatever the publisher's labels (1 to 4 in some rows). There is no published
reasoning: in style `cot` the text of the right choice comes before its letter, and nothing else.
"""

from __future__ import annotations

import re

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import quoted, shown
from kvdistill.data.answers.numbers import fold_width, text_after, unwrap
from kvdistill.data.fields import text_field, texts_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks.base import Layout, Published, Task

_LETTERS = "ABCDE"
# A letter or number alone, in brackets, or before a punctuation mark or a reason: not the article "A", not "4.5".
_LABEL = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+)?[\"'(\[*_]*(?P<label>[A-Ea-e1-5])"
    r"(?:$|[\"')\]*_<]|\s*[.:,;!](?![0-9A-Za-z])|\s+(?:[-–—]\s|(?:because|since|as|is\s+(?:correct|right|the))\b))"
)
_SECOND = re.compile(
    r"[\"')\]*_.]*\s*(?:[,;/&]|and\b|or\b)\s*[(\[*]*(?:[A-E]|[1-5](?=\W|$))(?![A-Za-z0-9'])(?!\s+[a-z])"
)


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `question`, `choices` {`text`, `label`} and `answerKey`."""
    texts, labels = texts_field(row, "text", inside="choices"), texts_field(row, "label", inside="choices")
    key = text_field(row, "answerKey")
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(_LETTERS) or len(set(labels)) != len(labels):
        raise DataError(
            f"{len(texts)} choices with the labels {shown(', '.join(labels))}",
            place=row.place,
            fix="give each of two to five choices its own label",
        )
    if key not in labels:
        raise DataError(
            f"the key {quoted(key)} is not among {shown(', '.join(labels))}", place=row.place, fix="mend `answerKey`"
        )
    right = labels.index(key)
    choices = [f"{letter}. {' '.join(text.split())}" for letter, text in zip(_LETTERS, texts, strict=False)]
    question = "\n".join([text_field(row, "question"), *choices])
    return Problem("arc_challenge", id, question, " ".join(texts[right].split()), _LETTERS[right])


def extract(completion: str) -> str | None:
    """The letter after the first `####` (`B`, `(b)`, `B. text`; 1 to 5 for A to E); else the rest of that line."""
    answer = text_after(ANSWER_MARK, completion)
    if answer is None:
        return None
    text = fold_width(unwrap(answer))
    match = _LABEL.match(text)
    if match is None or _SECOND.match(text, match.end("label")):
        return answer
    label = match["label"].upper()
    return _LETTERS[int(label) - 1] if label.isdigit() else label


def same(first: str, second: str) -> bool:
    return first == second


_FOLDER = "arc_challenge"
_SOURCE = Published(
    name="arc_challenge",
    hub="allenai/ai2_arc",
    hub_config="ARC-Challenge",
    hub_splits={"train": "train", "val": "validation", "test": "test"},
    layouts=(
        Layout(train=f"{_FOLDER}/train.jsonl", val=f"{_FOLDER}/validation.jsonl", test=f"{_FOLDER}/test.jsonl"),
        Layout(train=f"{_FOLDER}/hf_train", val=f"{_FOLDER}/hf_validation", test=f"{_FOLDER}/hf_test"),
        Layout(train=f"{_FOLDER}/train_subset.jsonl", val=f"{_FOLDER}/hf_validation", test=f"{_FOLDER}/test.jsonl"),
    ),
    read=read_row,
)
ARC_CHALLENGE = Task("arc_challenge", _SOURCE.load, write_plain, extract, same)
