"""SVAMP (Patel et al. 2021): arithmetic word problems of one or two steps; the reasoning is the equation.

A row has a story (`Body`), a question and an equation over floats, `( 76.0 - 25.0 )`; written here without the outer
brackets and the `.0`. One published row's equation does not give its answer (chal-680); rows are taken as published.
"""

from __future__ import annotations

import re

from kvdistill.core.quoting import quoted
from kvdistill.data.answers.numbers import normalise_number, same_number
from kvdistill.data.problems import Problem
from kvdistill.data.sets.gsm8k import extract
from kvdistill.data.sets.held_out import with_own_template
from kvdistill.data.sets.published import Layout, Published
from kvdistill.data.sources import RawRow

_WHOLE = re.compile(r"(?<=[0-9])\.0+(?![0-9])")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `Body`, `Question`, `Equation` and `Answer` (a number, or text of one)."""
    body, question = row.text("Body"), row.text("Question")
    answer = row.text("Answer", number_too=True)
    number = normalise_number(answer)
    if number is None:
        raise row.error(f"the answer {quoted(answer)} is not one number", fix="write it as 51 or 51.0")
    story = body if body.endswith((".", "?", "!", ",")) else f"{body}."
    equation = _WHOLE.sub("", " ".join(row.text("Equation").split())).replace("( ", "(").replace(" )", ")")
    equation = equation[1:-1] if _is_wrapped(equation) else equation  # `((13 + 15) / 28)` -> `(13 + 15) / 28`
    return Problem("svamp", id, f"{story} {question}", equation, number)


def _is_wrapped(equation: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    if not (equation.startswith("(") and equation.endswith(")")):
        return False
    depth = 0
    for i, sign in enumerate(equation):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return i == len(equation) - 1
    return False


_DATA = Published(
    name="svamp",
    hub="ChilleD/SVAMP",
    layouts=(Layout(pool="svamp/SVAMP.json"), Layout(pool="svamp/qwen_eval_test.jsonl")),
    problem=read_row,
)
SVAMP = with_own_template(_DATA, "SVAMP", extract, same_number)
