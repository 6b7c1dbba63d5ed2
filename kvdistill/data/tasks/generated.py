"""The built-in tasks `chain` and `product`: nothing is downloaded, every problem is made from the seed."""

from __future__ import annotations

from functools import partial

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data import synthetic
from kvdistill.data.answers.numbers import normalise_number, same_number, text_after
from kvdistill.data.problems import Problem, Row, Style
from kvdistill.data.sources import Source
from kvdistill.data.tasks.base import Loaded, Task

_MARK = "="
_ENDINGS: dict[Style, str] = {"cot": ":", "direct": "?"}


def load_generated(task: TaskRecipe, data: DataRecipe, *, family: synthetic.AbstractFamily) -> Loaded:
    """As many different problems as all splits need together, held-out ones first, so that they cannot overlap."""
    if task.file is not None:
        raise DataError(
            f"`file` does not go with the built-in task {family.name}",
            place="data.tasks",
            fix="use name: jsonl for a file",
        )
    problems = family.draw(task.test + task.val, task.train + task.teach, data.seed)
    return Loaded(problems, [Source(family.name, "generated", repr(family))], in_order=True)


def write_symbols(problem: Problem, style: Style) -> Row:
    """`3*4+5*6:` `12,30` `=42`; style direct asks with `?` in place of `:`."""
    reasoning = problem.reasoning if style == "cot" else ""
    return Row(problem, style, problem.question + _ENDINGS[style], reasoning, _MARK + problem.answer)


def extract_symbols(completion: str) -> str | None:
    """All that follows the first `=`; text after the number is kept and makes the answer wrong."""
    answer = text_after(_MARK, completion, to_line_end=False)
    return (normalise_number(answer) or answer) if answer is not None else None


def _generated(family: synthetic.AbstractFamily) -> Task:
    load = partial(load_generated, family=family)
    return Task(family.name, load, write_symbols, extract_symbols, same_number, published=False, generated=True)


CHAIN = _generated(synthetic.CHAIN)
PRODUCT = _generated(synthetic.PRODUCT)
