"""GSM8K (Cobbe et al. 2021), the 1,319 test problems: what follows the first `####` is the answer."""

from __future__ import annotations

from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.data.answers.numbers import normalise_number, same_number, text_after
from kvdistill.data.evaluations.base import Evaluation
from kvdistill.data.evaluations.rows import Member, PublishedRows, gold_column, text_column
from kvdistill.data.problems import ANSWER_MARK
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks.gsm8k import extract


def read_row(member: Member, row: RawRow) -> dict[str, Any]:
    """Columns `question` and `answer` (which ends in `#### number`)."""
    answer = gold_column(row, "answer")
    if normalise_number(text_after(ANSWER_MARK, answer) or "") is None:
        raise DataError(
            f"the answer does not end in `{ANSWER_MARK} number`", place=row.place, fix="write `reasoning\\n#### 72`"
        )
    return {"question": text_column(row, "question"), "answer": answer}


def _gold(member: Member, row: dict[str, Any]) -> str:
    number = extract(row["answer"])
    assert number is not None, "read_row lets no other row through"
    return number


GSM8K = Evaluation(
    name="gsm8k",
    title="GSM8K",
    language="en",
    rows=PublishedRows(
        hub="openai/gsm8k",
        members=(Member("gsm8k", "gsm8k/gsm8k.yaml", "main"),),
        hub_splits={"test": "test", "fewshot": "train"},
        paths={
            "test": ("gsm8k/test.jsonl", "gsm8k/main/test.parquet"),
            "fewshot": ("gsm8k/train.jsonl", "gsm8k/main/train.parquet"),
        },
        read=read_row,
    ),
    num_fewshot=5,
    native="generation",
    fewshot_from="rows",
    splits={"train": "fewshot", "test": "test"},
    question=lambda row: str(row["question"]),
    gold=_gold,
    extract=lambda member, completion: extract(completion),
    same=lambda member, answer, gold: same_number(answer, gold),
    published_gold=lambda member, row: f" {row['answer']}",
)
