"""Any local JSONL file: `question`, `reasoning`, `answer` (and `id`, `language`), or other columns through `fields`.

A row without `id` is known by its line. `reasoning` may be absent where only style `direct` is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.fields import text_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sources import RawRow, file_source, read_jsonl
from kvdistill.data.tasks.base import Loaded, Task
from kvdistill.data.values import same_value, text_after

_FIELDS = ("id", "question", "reasoning", "answer", "language")


def load(task: TaskRecipe, data: DataRecipe) -> Loaded:
    """All rows of `file`; DataError at the first row that cannot be used."""
    place = f"data.tasks ({task.name}).file"
    if task.file is None:
        raise DataError("jsonl needs a file", place=place, fix="add `file: path/to/rows.jsonl` to the task")
    columns = _columns(task.fields)
    path = Path(task.file).expanduser()
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for row in read_jsonl(path, place=place):
        problem = _read_row(row, task.key, columns, need_reasoning=data.style != "direct")
        if problem.id in seen:
            raise DataError(
                f"id {problem.id!r} was used before, at {seen[problem.id]}",
                place=row.place,
                fix="give each row its own id",
            )
        seen[problem.id] = row.place
        problems.append(problem)
    return Loaded(problems, [file_source(task.key, path, task.file)])


def _columns(fields: Mapping[str, str]) -> dict[str, str]:
    for name in fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(
                f"unknown field {name!r}",
                place="data.tasks (jsonl).fields",
                fix=f"{meant}fields map {', '.join(_FIELDS)} to the columns of the file",
            )
    return {name: fields.get(name, name) for name in _FIELDS}


def _read_row(row: RawRow, key: str, columns: Mapping[str, str], *, need_reasoning: bool) -> Problem:
    def optional(name: str, default: str) -> str:
        absent = columns[name] not in row.columns or row.columns[columns[name]] in (None, "")
        return default if absent else text_field(row, columns[name], number_too=name == "id")

    if need_reasoning:
        fix = "add it, name its column in `fields`, or set data.style=direct"
        reasoning = text_field(row, columns["reasoning"], fix=fix)
    else:
        reasoning = optional("reasoning", "")
    answer = text_field(row, columns["answer"], number_too=True)
    if "\n" in answer or ANSWER_MARK in answer or ANSWER_MARK in reasoning:
        raise DataError(
            f"the answer must be one line, and `{ANSWER_MARK}` (which marks the answer) must not stand in the texts",
            place=row.place,
            fix="move all but the answer to the reasoning, and take the mark out",
        )
    question = text_field(row, columns["question"])
    return Problem(key, optional("id", f"line-{row.number}"), question, reasoning, answer, optional("language", "en"))


def extract(completion: str) -> str | None:
    """The rest of the line after the first `####`."""
    return text_after(ANSWER_MARK, completion)


JSONL = Task("jsonl", load, write_plain, extract, same_value)
