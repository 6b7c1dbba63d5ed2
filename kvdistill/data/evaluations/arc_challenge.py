"""ARC-Challenge (Clark et al. 2018) as lm-eval asks it: which choice's text is likeliest; or a letter, when generated.

Choices are lettered A to E whatever the publisher's labels (1 to 4 in some rows). Questions, with their choices, are
written as the training task of the same name writes them, so that a leak between the two is the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvdistill.data.evaluations.base import Evaluation
from kvdistill.data.evaluations.letters import Lettered, read_letter, write_lettered
from kvdistill.data.evaluations.rows import Member, PublishedRows, gold_column, text_column
from kvdistill.data.problems import Problem
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks import arc_challenge as task


def read_row(member: Member, row: RawRow) -> dict[str, Any]:
    """Columns `question`, `choices` {text, label} and `answerKey`; or ARC's first form, `question` {stem, choices}."""
    columns = dict(row.columns)
    if isinstance(columns.get("question"), Mapping):
        inside = columns["question"]
        pairs = [choice for choice in inside.get("choices", ()) if isinstance(choice, Mapping)]
        columns["question"] = inside.get("stem")
        columns["choices"] = {name: [pair.get(name) for pair in pairs] for name in ("text", "label")}
    flat = RawRow(columns, row.place, row.number)
    key = gold_column(flat, "answerKey")
    task.read_row(flat, "")  # refuses whatever is wrong with it
    choices = columns["choices"]
    labels = [label.strip() for label in choices["label"]]
    return {
        "question": text_column(flat, "question"),
        "choices": {"text": list(choices["text"]), "label": labels},
        "answerKey": key,
    }


def _problem(row: dict[str, Any]) -> Problem:
    return task.read_row(RawRow(row, "", 0), "")


def _lettered(member: Member, row: dict[str, Any]) -> Lettered:
    choices = row["choices"]
    return write_lettered(row["question"], choices["text"], choices["label"].index(row["answerKey"]), "en")


ARC_CHALLENGE = Evaluation(
    name="arc_challenge",
    title="ARC-Challenge",
    language="en",
    rows=PublishedRows(
        hub="allenai/ai2_arc",
        members=(Member("arc_challenge", "arc/arc_challenge.yaml", "ARC-Challenge"),),
        hub_splits={"test": "test", "fewshot": "train"},
        paths={
            "test": (
                "arc_challenge/test.jsonl",
                "arc_challenge/hf_test.jsonl",
                "arc_challenge/ARC-Challenge/test.parquet",
                "arc_challenge/ARC-Challenge-Test.jsonl",
            ),
            "fewshot": (
                "arc_challenge/train.jsonl",
                "arc_challenge/hf_train.jsonl",
                "arc_challenge/ARC-Challenge/train.parquet",
                "arc_challenge/ARC-Challenge-Train.jsonl",
                "arc_challenge/train_subset.jsonl",
            ),
        },
        read=read_row,
    ),
    num_fewshot=25,
    native="likelihood",
    fewshot_from="rows",
    splits={"train": "fewshot", "test": "test"},
    question=lambda row: _problem(row).question,
    stem=lambda row: str(row["question"]),
    gold=lambda member, row: _problem(row).answer,
    extract=lambda member, completion: read_letter(completion, "ABCDE", digits=True),
    same=lambda member, answer, gold: answer == gold,
    published_gold=lambda member, row: f" {_problem(row).answer}",
    lettered=_lettered,
)
