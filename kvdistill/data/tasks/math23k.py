"""Math23K (Wang et al. 2017): Chinese word problems; the reasoning is the equation, `x=44*20`.

Answers are exact rationals: `14.4`, `240%`, `((7)/(10))`, `5((7)/(10))` (which is 57/10). Two publishers split the
23,161 problems differently, so a file of one never goes with a file of the other.
"""

from __future__ import annotations

from kvdistill.core.errors import DataError
from kvdistill.data.fields import text_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sources import RawRow
from kvdistill.data.tasks.base import Layout, Published, Task
from kvdistill.data.values import leading_ratio, normalise_ratio, same_ratio, text_after


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `original_text`, `equation` and `ans`."""
    answer = text_field(row, "ans", number_too=True)
    value = normalise_ratio(answer)
    if value is None:
        raise DataError(
            f"the answer {answer!r} is not a number, percentage or fraction",
            place=row.place,
            fix="write it as 14.4, 240%, ((7)/(10)) or 5((7)/(10))",
        )
    equation = "".join(text_field(row, "equation").split())
    return Problem("math23k", id, text_field(row, "original_text"), equation, value, "zh")


def extract(completion: str) -> str | None:
    """The number or fraction right after the first `####` (a Chinese unit may follow); else the rest of that line."""
    answer = text_after(ANSWER_MARK, completion)
    if answer is None:
        return None
    return leading_ratio(answer.removeprefix("x=").removeprefix("x =")) or answer


_FOLDER = "math23k"
_SOURCE = Published(
    name="math23k",
    hub="Gxg/Math23K",
    hub_config=None,
    hub_splits={"train": "train", "test": "test"},
    layouts=(
        Layout(train=f"{_FOLDER}/math23k_train.json", test=f"{_FOLDER}/math23k_test.json"),
        Layout(
            train=f"{_FOLDER}/mwptoolkit_trainset.json",
            val=f"{_FOLDER}/mwptoolkit_validset.json",
            test=f"{_FOLDER}/mwptoolkit_testset.json",
        ),
        Layout(train=f"{_FOLDER}/mwptoolkit_validset.json", test=f"{_FOLDER}/mwptoolkit_testset.json"),
        Layout(pool=f"{_FOLDER}/math23k_test.json"),
    ),
    read=read_row,
)
MATH23K = Task("math23k", _SOURCE.load, write_plain, extract, same_ratio)
