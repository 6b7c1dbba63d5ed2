"""MATH (Hendrycks et al. 2021): competition problems; the reasoning is the solution, the answer its last \\boxed{}.

A local copy without a train file is a pool: 30 % of its test rows stay test, and the rest may be trained on only where
MATH500, which is taken from the test rows, is at hand to be taken out (Lightman et al. 2023 split it the same way).
"""

from __future__ import annotations

from kvdistill.core.errors import DataError
from kvdistill.data.answers.latex import last_boxed, same_latex
from kvdistill.data.answers.numbers import text_after
from kvdistill.data.fields import text_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks.base import Layout, Published, Task


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `problem` and `solution`. DataError at the row for a solution without a boxed answer."""
    problem, solution = text_field(row, "problem"), text_field(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        raise DataError("the solution boxes no answer", place=row.place, fix="write the answer as \\boxed{…}")
    if ANSWER_MARK in solution:
        raise DataError(
            f"`{ANSWER_MARK}` marks the answer and stands in the solution", place=row.place, fix="remove it"
        )
    return Problem("math", id, problem, solution, answer)


def extract(completion: str) -> str | None:
    """The rest of the line after the first `####`, of which a box's content; without the mark, the last box."""
    answer = text_after(ANSWER_MARK, completion)
    return last_boxed(completion) if answer is None else last_boxed(answer) or answer


_SOURCE = Published(
    name="math",
    hub="DigitalLearningGmbH/MATH-lighteval",
    hub_config="default",
    hub_splits={"train": "train", "test": "test"},
    layouts=(
        Layout(train="math/train.jsonl", test="math/test.jsonl"),
        Layout(train="math/train.jsonl", test="math/test_first1000.jsonl"),
        Layout(train="math/*/train.parquet", test="math/*/test.parquet"),  # the hub's copies with a folder a subject
        Layout(train="math/train/*/*.json", test="math/test/*/*.json"),  # the publisher's archive, a file a problem
        # 12,000 of the 12,500 rows, test rows among them, are fair to train on where MATH500 is held apart (PRM800K)
        Layout(pool="math/test.jsonl"),
        Layout(pool="math/test_first1000.jsonl"),
    ),
    read=read_row,
)
MATH = Task("math", _SOURCE.load, write_plain, extract, same_latex, spoils=("math500",))
