"""SVAMP (Patel et al. 2021): arithmetic word problems of one or two steps; the reasoning is the equation.

A row has a story (`Body`), a question and an equation over floats, `( 76.0 - 25.0 )`; written here without the outer
brackets and the `.0`. One published row's equation does not give its answer (chal-680); rows are taken as published.
"""

from __future__ import annotations

import re
from itertools import accumulate

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
    depths = list(accumulate((sign == "(") - (sign == ")") for sign in equation))
    if equation.startswith("(") and depths[-1] == 0 and 0 not in depths[:-1]:
        equation = equation[1:-1]  # `((13 + 15) / 28)` -> `(13 + 15) / 28`
    return Problem("svamp", id, f"{story} {question}", equation, number)


_DATA = Published(
    name="svamp",
    hub="ChilleD/SVAMP",
    layouts=(Layout(pool="svamp/SVAMP.json"), Layout(pool="svamp/qwen_eval_test.jsonl")),
    problem=read_row,
)
SVAMP = with_own_template(_DATA, "SVAMP", extract, same_number)
