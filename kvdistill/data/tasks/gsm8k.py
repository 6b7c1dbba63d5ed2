"""GSM8K (Cobbe et al. 2021): grade-school word problems, `reasoning #### answer`.

The publisher's solutions carry calculator marks, `48/2 = <<48/2=24>>24`; a student without a calculator should not
learn to write them, so they are taken out unless STRIP_CALCULATOR is False. Gold answers may have thousands commas.
"""

from __future__ import annotations

import re

from kvdistill.core.errors import DataError
from kvdistill.data.answers.numbers import leading_number, normalise_number, same_number, text_after
from kvdistill.data.fields import text_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks.base import Layout, Published, Task

STRIP_CALCULATOR = True
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `question` and `answer`. DataError at the row for an answer without one marked number."""
    question, answer = text_field(row, "question"), text_field(row, "answer")
    reasoning, mark, value = answer.partition(ANSWER_MARK)
    number = normalise_number(value)
    if not mark or number is None:
        raise DataError(
            f"the answer does not end in `{ANSWER_MARK} number`", place=row.place, fix="write `reasoning\\n#### 72`"
        )
    if STRIP_CALCULATOR:
        reasoning = _CALCULATOR.sub("", reasoning)
    if not reasoning.strip():
        raise DataError("no reasoning before the answer", place=row.place, fix="write `reasoning\\n#### 72`")
    return Problem("gsm8k", id, question, reasoning.strip(), number)


def extract(completion: str) -> str | None:
    """The number right after the first `####`; without a number there, the rest of that line."""
    answer = text_after(ANSWER_MARK, completion)
    return (leading_number(answer) or answer) if answer is not None else None


_SOURCE = Published(
    name="gsm8k",
    hub="openai/gsm8k",
    hub_config="main",
    hub_splits={"train": "train", "test": "test"},
    layouts=(Layout(train="gsm8k/train.jsonl", test="gsm8k/test.jsonl"),),
    read=read_row,
)
GSM8K = Task("gsm8k", _SOURCE.load, write_plain, extract, same_number)
