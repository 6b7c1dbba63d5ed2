"""GSM8K (Cobbe et al. 2021): grade-school word problems, `reasoning #### answer`.

The publisher's solutions carry calculator marks, `48/2 = <<48/2=24>>24`; a student without a calculator should not
learn to write them, so they are taken out unless STRIP_CALCULATOR is False. Gold answers may have thousands commas.
lm-eval is given the solutions as published.
"""

from __future__ import annotations

import re

from kvdistill.data.answers.numbers import leading_number, normalise_number, same_number, text_after
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sets.base import DataSet, Evaluation, Task
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
from kvdistill.data.sources import RawRow

STRIP_CALCULATOR = True
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `question` and `answer`. DataError at the row for an answer without one marked number."""
    question, answer = row.text("question"), row.text("answer")
    reasoning, number = _take_apart(answer, row)
    if STRIP_CALCULATOR:
        reasoning = _CALCULATOR.sub("", reasoning)
    if not reasoning.strip():
        raise row.error("no reasoning before the answer", fix="write `reasoning\\n#### 72`")
    return Problem("gsm8k", id, question, reasoning.strip(), number)


def read_columns(member: Member, row: RawRow) -> RowDict:
    """The same columns as published, for lm-eval; a row need not have a reasoning."""
    answer = row.gold("answer")
    _take_apart(answer, row)
    return {"question": row.published("question"), "answer": answer}


def _take_apart(answer: str, row: RawRow) -> tuple[str, str]:
    """The reasoning and the number of `reasoning #### number`."""
    reasoning, mark, value = answer.partition(ANSWER_MARK)
    number = normalise_number(value)
    if not mark or number is None:
        raise row.error(f"the answer does not end in `{ANSWER_MARK} number`", fix="write `reasoning\\n#### 72`")
    return reasoning, number


def extract(completion: str) -> str | None:
    """The number right after the first `####`; without a number there, the rest of that line."""
    answer = text_after(ANSWER_MARK, completion)
    return (leading_number(answer) or answer) if answer is not None else None


_DATA = Published(
    name="gsm8k",
    hub="openai/gsm8k",
    hub_config="main",
    layouts=(
        Layout(train="gsm8k/train.jsonl", test="gsm8k/test.jsonl"),
        Layout(train="gsm8k/main/train.parquet", test="gsm8k/main/test.parquet", serves="evaluation"),
    ),
    problem=read_row,
    members=(Member("gsm8k", "gsm8k/gsm8k.yaml", "main"),),
    columns=read_columns,
)
GSM8K = DataSet(
    Task("gsm8k", _DATA.load, write_plain, extract, same_number),
    Evaluation(
        title="GSM8K",
        data=_DATA,
        num_fewshot=5,
        native="generation",
        fewshot_from="rows",
        question=lambda row: str(row["question"]),
        gold=lambda member, row: str(extract(row["answer"])),
        extract=lambda member, completion: extract(completion),
        same=lambda member, answer, gold: same_number(answer, gold),
        published_gold=lambda member, row: f" {row['answer']}",
    ),
)
