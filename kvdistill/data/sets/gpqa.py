"""GPQA (Rein et al. 2023), main and diamond: graduate-level questions, four choices, zero-shot as leaderboards run it.

The publisher gives the right and three wrong answers in columns of their own and asks that rows not be shown in public;
the hub's copy is gated. The order of the choices is `fixed_order`'s: lm-eval's zero-shot definition would shuffle them
with Python's global `random`, so that the order depended on whatever ran before.
"""

from __future__ import annotations

from kvdistill.data.sets.base import DataSet, Evaluation, fixed_order
from kvdistill.data.sets.letters import list_choices, read_letter, write_lettered
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
from kvdistill.data.sources import RawRow

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_RIGHT = "Correct Answer"
_CHOICES = ("choice1", "choice2", "choice3", "choice4")


def read_columns(member: Member, row: RawRow) -> RowDict:
    """Columns `Question`, `Correct Answer`, `Incorrect Answer 1` to `3` -> `choice1` to `4`, and `answer` as `(C)`."""
    right = row.gold(_RIGHT)
    texts = [_tidy(row.published(column)) for column in _WRONG] + [_tidy(right)]
    question = row.published("Question")
    order = fixed_order(question, texts)
    chosen = {name: texts[i] for name, i in zip(_CHOICES, order, strict=True)}
    return {"Question": question, **chosen, "answer": f"({'ABCD'[order.index(len(_WRONG))]})"}


def _tidy(text: str) -> str:
    """A choice as lm-eval's definition shows it: stripped, ` [title]` as a full stop, two spaces as one."""
    return text.strip().replace(" [title]", ". ").replace("  ", " ")


def _choices(row: RowDict) -> list[str]:
    return [row[name] for name in _CHOICES]


def _gpqa(name: str, config: str, title: str) -> DataSet:
    paths = ("gpqa/{}.csv", "gpqa/dataset/{}.csv", "gpqa/{}/train.parquet")
    evaluation = Evaluation(
        title=title,
        data=Published(
            name=name,
            hub="Idavidrein/gpqa",
            hub_splits={"test": "train"},  # the only one it has
            layouts=tuple(Layout(test=path) for path in paths),
            members=(Member(config, f"gpqa/zeroshot/{config}_zeroshot.yaml", config, config),),
            columns=read_columns,
        ),
        native="likelihood",
        question=lambda row: f"{row['Question']}\n{list_choices(_choices(row))}",
        stem=lambda row: str(row["Question"]),
        gold=lambda member, row: str(row["answer"][1]),
        extract=lambda member, completion: read_letter(completion),
        published_gold=lambda member, row: f" {row['answer']}",
        lettered=lambda member, row: write_lettered(
            row["Question"], _choices(row), "ABCD".index(row["answer"][1]), "en"
        ),
        replaced=("process_docs",),
    )
    return DataSet(evaluation=evaluation)


GPQA = _gpqa("gpqa", "gpqa_main", "GPQA (main)")
GPQA_DIAMOND = _gpqa("gpqa_diamond", "gpqa_diamond", "GPQA (diamond)")
