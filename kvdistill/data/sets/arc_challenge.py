"""ARC-Challenge (Clark et al. 2018): science questions with three to five choices; the answer is a letter.

Choices are shown as A, B, C, … whatever the publisher's labels (1 to 4 in some rows). There is no published
reasoning: in style `cot` the text of the right choice comes before its letter, and nothing else. lm-eval asks which
choice's text is likeliest; or a letter, when generated. There questions, with their choices, are written as the task
writes them, so that a leak between the two is the same text.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Literal

from kvdistill.core.quoting import quoted, shown
from kvdistill.data.answers.numbers import fold_width, text_after, unwrap
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sets.base import DataSet, Evaluation, Task
from kvdistill.data.sets.letters import read_letter, write_lettered
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
from kvdistill.data.sources import RawRow

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
    texts, labels = row.texts("text", inside="choices"), row.texts("label", inside="choices")
    key = row.text("answerKey")
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(_LETTERS) or len(set(labels)) != len(labels):
        raise row.error(
            f"{len(texts)} choices with the labels {shown(', '.join(labels))}",
            fix="give each of two to five choices its own label",
        )
    if key not in labels:
        raise row.error(f"the key {quoted(key)} is not among {shown(', '.join(labels))}", fix="mend `answerKey`")
    right = labels.index(key)
    choices = [f"{letter}. {' '.join(text.split())}" for letter, text in zip(_LETTERS, texts, strict=False)]
    question = "\n".join([row.text("question"), *choices])
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


def read_columns(member: Member, row: RawRow) -> RowDict:
    """The same columns for lm-eval; also from ARC's first form, `question` {stem, choices}."""
    columns = dict(row.columns)
    if isinstance(inside := columns.get("question"), Mapping):
        pairs = [choice for choice in inside.get("choices", ()) if isinstance(choice, Mapping)]
        columns["question"] = inside.get("stem")
        columns["choices"] = {name: [pair.get(name) for pair in pairs] for name in ("text", "label")}
    flat = RawRow(columns, row.place, row.number)
    key = flat.gold("answerKey")
    read_row(flat, "")  # refuses whatever is wrong with it
    choices = columns["choices"]
    return {
        "question": flat.published("question"),
        "choices": {"text": list(choices["text"]), "label": [label.strip() for label in choices["label"]]},
        "answerKey": key,
    }


def _problem(row: RowDict) -> Problem:
    return read_row(RawRow(row, "", 0), "")


def _below(serves: Literal["both", "training", "evaluation"] = "both", **names: str) -> Layout:
    return Layout(**{split: f"arc_challenge/{name}" for split, name in names.items()}, serves=serves)  # type: ignore[arg-type]


_DATA = Published(
    name="arc_challenge",
    hub="allenai/ai2_arc",
    hub_config="ARC-Challenge",
    hub_splits={"train": "train", "val": "validation", "test": "test"},
    layouts=(
        _below(train="train.jsonl", val="validation.jsonl", test="test.jsonl"),
        _below("training", train="hf_train", val="hf_validation", test="hf_test"),
        _below("evaluation", train="hf_train.jsonl", test="hf_test.jsonl"),
        _below("evaluation", train="ARC-Challenge/train.parquet", test="ARC-Challenge/test.parquet"),
        _below("evaluation", train="ARC-Challenge-Train.jsonl", test="ARC-Challenge-Test.jsonl"),
        _below(train="train_subset.jsonl", val="hf_validation", test="test.jsonl"),
    ),
    problem=read_row,
    members=(Member("arc_challenge", "arc/arc_challenge.yaml", "ARC-Challenge"),),
    columns=read_columns,
)
ARC_CHALLENGE = DataSet(
    Task("arc_challenge", _DATA.load, write_plain, extract, operator.eq),
    Evaluation(
        title="ARC-Challenge",
        data=_DATA,
        num_fewshot=25,
        native="likelihood",
        fewshot_from="rows",
        question=lambda row: _problem(row).question,
        stem=lambda row: str(row["question"]),
        gold=lambda member, row: _problem(row).answer,
        extract=lambda member, completion: read_letter(completion, "ABCDE", digits=True),
        published_gold=lambda member, row: f" {_problem(row).answer}",
        lettered=lambda member, row: write_lettered(
            row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]), "en"
        ),
    ),
)
