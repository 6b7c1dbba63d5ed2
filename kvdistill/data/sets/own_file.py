"""A user's own file: JSONL (or a .json array), CSV or Parquet with question, reasoning, answer, id and language.

Other columns through `fields` (our name: column). A row without `id` is known by its line or row. `reasoning` may be
absent where only style `direct` is asked for. Read row by row; the only thing that is kept of each row is eight bytes
or so of its id.
"""

from __future__ import annotations

import difflib
import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import missing, quoted
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.answers.numbers import same_value
from kvdistill.data.fields import text_field
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sets.base import DataSet, Loaded, Task, extract_marked
from kvdistill.data.sources import Column, RawRow, file_source, read_csv, read_json_objects, read_jsonl, read_parquet

_FIELDS = ("id", "question", "reasoning", "answer", "language")
_OPTIONAL = ("id", "language")
_NUMBERS_TOO = ("id", "answer")
_TITLES = {"jsonl": "JSON", "csv": "CSV", "parquet": "Parquet"}
_TASK_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@dataclass(frozen=True)
class _Reading:
    """What a file is read for. columns: our name -> its column. given: our names that the recipe maps itself."""

    task: str
    path: Path
    columns: Mapping[str, str]
    given: frozenset[str]
    need_reasoning: bool

    def is_optional(self, name: str) -> bool:
        return name in _OPTIONAL or (name == "reasoning" and not self.need_reasoning)


def load(task: TaskRecipe, data: DataRecipe) -> Loaded:
    """All rows of `file`, read when they are asked for; DataError at the first row that cannot be used.

    What can be known beforehand is an error at once: the recipe's mistakes, the file, a table's columns.
    """
    place = f"data.tasks ({task.name}).file"
    if task.file is None:
        example = {"csv": "rows.csv", "parquet": "rows.parquet"}.get(task.name, "rows.jsonl")
        raise DataError(f"{task.name} needs a file", place=place, fix=f"add `file: path/to/{example}` to the task")
    if task.revision is not None:
        raise DataError(
            "`revision` belongs to data sets on the hub, not to a file",
            place=f"data.tasks ({task.name}).revision",
            fix="take it out: the file's checksum is recorded",
        )
    path = Path(task.file).expanduser()
    _check_suffix(path, task.name, place)
    columns = _columns(task)
    reading = _Reading(task.key, path, columns, frozenset(task.fields), data.style != "direct")
    rows, unit = _open(task.name, reading, place)
    again = partial(_reopen, task.name, reading, place)
    return Loaded(_problems(rows, reading, unit, again), [file_source(task.key, path, task.file)])


def _check_suffix(path: Path, name: str, place: str) -> None:
    suffix = path.suffix.lower()
    other = _TASK_OF_SUFFIX.get(suffix, name)
    if other != name:
        raise DataError(
            f"task {name} reads {_TITLES[name]}, and {quoted(path.name)} is called a {_TITLES[other]} file",
            place=place,
            fix=f"use `name: {other}`, or give the file the suffix that its content has",
        )


def _columns(task: TaskRecipe) -> dict[str, str]:
    place = f"data.tasks ({task.name}).fields"
    for name in task.fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(
                f"unknown field {quoted(name)}",
                place=place,
                fix=f"{meant}fields map {', '.join(_FIELDS)} to the columns of the file",
            )
    return {name: task.fields.get(name, name) for name in _FIELDS}


def _open(name: str, reading: _Reading, place: str) -> tuple[Iterator[RawRow], str]:
    """The file's rows, and whether they are counted by line or by row."""
    wanted = [_wanted(ours, reading) for ours in _FIELDS]
    if name == "csv":
        return read_csv(reading.path, place=place, columns=wanted), "row"
    if name == "parquet":
        return read_parquet(reading.path, place=place, columns=wanted), "row"
    if reading.path.suffix.lower() == ".json":
        return read_json_objects(reading.path, place=place), "row"
    return read_jsonl(reading.path, place=place), "line"


def _reopen(name: str, reading: _Reading, place: str) -> Iterator[RawRow]:
    return _open(name, reading, place)[0]


def _wanted(ours: str, reading: _Reading) -> Column:
    required = ours in reading.given or not reading.is_optional(ours)
    return Column(reading.columns[ours], required, ours in _NUMBERS_TOO, _fix(ours, reading))


def _fix(ours: str, reading: _Reading) -> str:
    if ours in reading.given:
        return f"`fields` says that {quoted(reading.columns[ours])} is the {ours}: correct it, or mend the file"
    if ours == "reasoning":
        return "add it, name its column in `fields`, or set data.style=direct"
    return f"add it, or name its column in `fields` ({ours}: COLUMN)"


def _problems(
    rows: Iterator[RawRow], reading: _Reading, unit: str, again: Callable[[], Iterator[RawRow]]
) -> Iterator[Problem]:
    seen = _Ids(reading.columns["id"], unit, again)
    unseen = {ours for ours in reading.given if reading.is_optional(ours)}
    names: Sequence[str] = ()
    for row in rows:
        problem = _read_row(row, reading, unit)
        seen.add(problem.id, row)
        if unseen:
            unseen -= {ours for ours in unseen if reading.columns[ours] in row.columns}
            names = list(row.columns)
        yield problem
    for ours in sorted(unseen):
        column = reading.columns[ours]
        raise DataError(
            f"no row has the column {quoted(column)}, which `fields` gives for {ours}: it {missing(column, names)}",
            place=f"data.tasks ({reading.task}).fields",
            fix="correct `fields`, or take the entry out",
        )


def _read_row(row: RawRow, reading: _Reading, unit: str) -> Problem:
    def field(ours: str, default: str = "") -> str:
        column = reading.columns[ours]
        if reading.is_optional(ours) and _is_absent(row.columns.get(column)):
            return default
        return text_field(row, column, number_too=ours in _NUMBERS_TOO, fix=_fix(ours, reading))

    question, reasoning, answer = field("question"), field("reasoning"), field("answer")
    if "\n" in answer or ANSWER_MARK in answer or ANSWER_MARK in reasoning:
        raise DataError(
            f"the answer must be one line, and `{ANSWER_MARK}` (which marks the answer) must not stand in the texts",
            place=row.place,
            fix="move all but the answer to the reasoning, and take the mark out",
        )
    id, language = field("id", f"{unit}-{row.number}"), field("language", "en")
    return Problem(reading.task, id, question, reasoning, answer, language)


class _Ids:
    """The ids so far, as short as can be: a repeated one is looked up in the file again, to name the first place."""

    def __init__(self, column: str, unit: str, again: Callable[[], Iterator[RawRow]]) -> None:
        self._column, self._unit, self._again = column, unit, again
        self._given: set[int] = set()
        self._without = array("Q")  # numbers of the rows that have none, and are known by their number

    def add(self, id: str, row: RawRow) -> None:
        """DataError where another row has this id."""
        if _is_absent(row.columns.get(self._column)):
            self._without.append(row.number)
            repeated = bool(self._given) and _short(id) in self._given
        else:
            short = _short(id)
            repeated = short in self._given or self._is_a_number(id)
            self._given.add(short)
        if repeated and (first := self._first_place(id, row)):
            raise DataError(
                f"id {quoted(id)} was used before, at {first}", place=row.place, fix="give each row its own id"
            )

    def _is_a_number(self, id: str) -> bool:
        """Whether the id is what an earlier row without one is known by."""
        unit, _, digits = id.partition("-")
        if unit != self._unit or not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
            return False
        at = bisect_left(self._without, int(digits))
        return at < len(self._without) and self._without[at] == int(digits)

    def _first_place(self, id: str, row: RawRow) -> str:
        """Where the id stands first; '' for two ids that only look alike when shortened."""
        for earlier in self._again():
            if earlier.number >= row.number:
                break
            if _is_absent(earlier.columns.get(self._column)):
                theirs = f"{self._unit}-{earlier.number}"
            else:
                theirs = text_field(earlier, self._column, number_too=True)
            if theirs == id:
                return earlier.place
        return ""


def _is_absent(value: object) -> bool:
    """Null, blank, or the NaN that data frames have for a missing number."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _short(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big")


JSONL, CSV, PARQUET = (
    DataSet(Task(name, load, write_plain, extract_marked, same_value, published=False))
    for name in ("jsonl", "csv", "parquet")
)
