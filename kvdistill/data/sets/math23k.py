"""Math23K (Wang et al. 2017): Chinese word problems; the reasoning is the equation, `x=44*20`.

Answers are exact rationals: `14.4`, `240%`, `((7)/(10))`, `5((7)/(10))` (which is 57/10). Two publishers split the
23,161 problems differently, so a file of one never goes with a file of the other.
"""

from __future__ import annotations

from fractions import Fraction
from string import ascii_lowercase

from kvdistill.core.quoting import quoted
from kvdistill.data.answers.numbers import leading_ratio, normalise_ratio, same_ratio, text_after
from kvdistill.data.problems import ANSWER_MARK, Problem
from kvdistill.data.sets.held_out import with_own_template
from kvdistill.data.sets.published import Layout, Published
from kvdistill.data.sources import RawRow

_FLOAT_DIGITS = 12


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `original_text`, `equation` and `ans`.

    Processed copies may have `target_template` with `num_list` for the equation, and `answer`, a float, for the answer.
    """
    processed = "ans" not in row.columns and "answer" in row.columns
    answer = row.text("answer" if processed else "ans", number_too=True)
    value = normalise_ratio(answer)
    if value is None:
        raise row.error(
            f"the answer {quoted(answer)} is not a number, percentage or fraction",
            fix="write it as 14.4, 240%, ((7)/(10)) or 5((7)/(10))",
        )
    value = _exact(value) if processed else value
    return Problem("math23k", id, row.text("original_text"), _equation(row), value, "zh")


def _exact(value: str) -> str:
    """The fraction that a long decimal is the float of: 0.3333333333333333 is 1/3."""
    if len(value.partition(".")[2]) < _FLOAT_DIGITS or value.endswith("%"):
        return value
    exact = Fraction(value)
    near = exact.limit_denominator(10_000)
    return str(near) if abs(near - exact) <= abs(exact) / 10**_FLOAT_DIGITS else value


def _equation(row: RawRow) -> str:
    if "equation" in row.columns or "target_template" not in row.columns:
        return "".join(row.text("equation").split())
    template, numbers = row.columns["target_template"], row.columns.get("num_list")
    pieces = template.split() if isinstance(template, str) else template
    if not isinstance(pieces, list) or not isinstance(numbers, list) or not all(isinstance(p, str) for p in pieces):
        raise row.error("no equation: `target_template` and `num_list` are no lists", fix="add `equation`")
    known = {
        f"temp_{letter}": RawRow({"num_list": number}, row.place, row.number).text("num_list", number_too=True)
        for letter, number in zip(ascii_lowercase, numbers, strict=False)
    }
    return "".join(known.get(piece, piece) for piece in pieces)


def extract(completion: str) -> str | None:
    """The number or fraction right after the first `####` (a Chinese unit may follow); else the rest of that line."""
    answer = text_after(ANSWER_MARK, completion)
    if answer is None:
        return None
    return leading_ratio(answer) or answer


_FOLDER = "math23k"
_DATA = Published(
    name="math23k",
    hub="Gxg/Math23K",
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
    problem=read_row,
)
MATH23K = with_own_template(_DATA, "Math23K", extract, same_ratio, language="zh")
