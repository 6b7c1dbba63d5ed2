"""TruthfulQA (Lin et al. 2022), multiple choice: one true answer among false ones (mc1), several among several (mc2).

The publisher's files map each choice to 1 or 0, the hub's hold two lists; the hub has the first release (817
questions), the publisher's repository the present one (790). lm-eval takes the first choice of mc1 for the true one,
so it is put there. A choice without text is no answer (its likelihood would be that of nothing) and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvdistill.core.quoting import quoted
from kvdistill.data.answers.numbers import normalise_text
from kvdistill.data.sets.base import DataSet, Evaluation, fixed_order
from kvdistill.data.sets.letters import ALPHABET, Lettered, read_letter, write_lettered
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
from kvdistill.data.sources import RawRow

MC1, MC2 = "truthfulqa_mc1", "truthfulqa_mc2"
_NO_GOLD = "no gold answers:"


def read_columns(member: Member, row: RawRow) -> RowDict:
    """Columns `question`, `mc1_targets` and `mc2_targets`, in either shape; or the columns of the publisher's table."""
    if "Best Answer" not in row.columns:
        question = row.published("question")
        return _checked(row, question, _targets(row, "mc1_targets"), _targets(row, "mc2_targets"))
    # `Question`, `Best Answer`, `Correct Answers` and `Incorrect Answers` (separated by semicolons)
    question, best = row.published("Question"), row.gold("Best Answer")
    right = row.gold("Correct Answers").split(";")
    wrong = row.published("Incorrect Answers").split(";")
    false = [(choice, 0) for choice in wrong]
    return _checked(row, question, [(best, 1), *false], [*((choice, 1) for choice in right), *false])


def _checked(row: RawRow, question: str, mc1: Iterable[tuple[str, int]], mc2: Iterable[tuple[str, int]]) -> RowDict:
    """Choices with text, each once, the true one of mc1 first; DataError for anything but one true and others false."""
    one, several = ({choice.strip(): label for choice, label in its if choice.strip()} for its in (mc1, mc2))
    if sum(one.values()) != 1 or len(one) < 2:
        raise row.error(
            f"{sum(one.values()) or _NO_GOLD} true of {len(one)} choices in mc1",
            fix="give one choice the label 1 and the others 0",
        )
    if not any(several.values()):
        raise row.error(f"{_NO_GOLD} in mc2", fix="give the true choices the label 1")
    ordered = dict(sorted(one.items(), key=lambda pair: -pair[1]))
    both = {"mc1_targets": ordered, "mc2_targets": several}
    return {"question": question} | {c: {"choices": list(its), "labels": list(its.values())} for c, its in both.items()}


def _targets(row: RawRow, column: str) -> list[tuple[str, int]]:
    value = row.columns.get(column)
    pairs: Any = None
    if isinstance(value, Mapping) and {"choices", "labels"} <= set(value):
        choices, labels = value["choices"], value["labels"]
        if isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels):
            pairs = list(zip(choices, labels, strict=True))
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    if not pairs or not all(isinstance(choice, str) and label in (0, 1) for choice, label in pairs):
        raise row.error(
            f"column {quoted(column)} is {quoted(value)}, not choices with the labels 0 and 1"
            if column in row.columns
            else f"{_NO_GOLD} column {quoted(column)} is missing",
            fix="write {choice: 0 or 1, …} or {choices: […], labels: […]}",
        )
    return [(choice, int(label)) for choice, label in pairs]


def _true(member: Member, row: RowDict) -> list[str]:
    targets = row["mc2_targets" if member.name == MC2 else "mc1_targets"]
    return [choice for choice, label in zip(targets["choices"], targets["labels"], strict=True) if label]


def _lettered(member: Member, row: RowDict) -> Lettered | None:
    choices = row["mc1_targets"]["choices"]
    if member.name == MC2 or len(choices) > len(ALPHABET):
        return None
    return write_lettered(row["question"], choices, 0, "en", shown=fixed_order(row["question"], choices))


def _gold(member: Member, row: RowDict) -> str:
    lettered = _lettered(member, row)
    return lettered.gold if lettered else "\n".join(_true(member, row))


def extract(member: Member, completion: str) -> str | None:
    """The letter; of mc2 the whole text."""
    return completion.strip() or None if member.name == MC2 else read_letter(completion, ALPHABET)


def same(member: Member, answer: str, gold: str) -> bool:
    """The letter; of mc2 one of the true choices, a line each."""
    return normalise_text(answer) in [normalise_text(line) for line in gold.split("\n")]


_PATHS = (
    "truthfulqa/mc_task.json",
    "truthfulqa/data/mc_task.json",
    "truthfulqa/multiple_choice/validation.parquet",
    "truthfulqa/validation.jsonl",
    "truthfulqa/TruthfulQA.csv",
)
_DATA = Published(
    name="truthfulqa",
    hub="truthfulqa/truthful_qa",
    hub_splits={"test": "validation"},
    layouts=tuple(Layout(test=path) for path in _PATHS),
    members=tuple(Member(name, f"truthfulqa/{name}.yaml", "multiple_choice") for name in (MC1, MC2)),
    columns=read_columns,
)
TRUTHFULQA = DataSet(
    evaluation=Evaluation(
        title="TruthfulQA",
        data=_DATA,
        native="likelihood",
        question=lambda row: str(row["question"]),
        gold=_gold,
        extract=extract,
        same=same,
        published_gold=lambda member, row: f" {_true(member, row)[0] if member.name == MC2 else _gold(member, row)}",
        lettered=_lettered,
        repeated=(MC2,),
    )
)
