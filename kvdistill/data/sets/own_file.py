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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import missing, quoted
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.answers.numbers import same_value
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sets.base import DataSet, Task, extract_marked
from kvdistill.data.sets.published import Loaded
from kvdistill.data.sources import Column, Found, RawRow, found_source
from kvdistill.data.sources.csv_table import read_csv
from kvdistill.data.sources.jsonl import read_json_objects, read_jsonl
from kvdistill.data.sources.parquet import read_parquet

_FIELDS = ("id", "question", "reasoning", "answer", "language")
_OPTIONAL = ("id", "language")
_NUMBERS_TOO = ("id", "answer")
_TITLES = {"jsonl": "JSON", "csv": "CSV", "parquet": "Parquet"}
_SUFFIXES = {"jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv", ".tab"), "parquet": (".parquet", ".pq")}


@dataclass(frozen=True)
class OwnFile:
    """One file and how it is read. columns: our name -> its column. given: our names that the recipe maps itself.

    kind: jsonl, csv or parquet. task: the key that its problems carry. place: the recipe key that named the file.
    """

    kind: str
    task: str
    path: Path
    columns: Mapping[str, str]
    given: frozenset[str]
    need_reasoning: bool
    place: str

    @property
    def unit(self) -> str:
        """What its rows are counted by."""
        return "line" if self.kind == "jsonl" and self.path.suffix.lower() != ".json" else "row"

    def is_optional(self, ours: str) -> bool:
        return ours in _OPTIONAL or (ours == "reasoning" and not self.need_reasoning)

    def fix(self, ours: str) -> str:
        """What to do where the column is missing."""
        if ours in self.given:
            return f"`fields` says that {quoted(self.columns[ours])} is the {ours}: correct it, or mend the file"
        if ours == "reasoning":
            return "add it, name its column in `fields`, or set data.style=direct"
        return f"add it, or name its column in `fields` ({ours}: COLUMN)"

    def rows(self) -> Iterator[RawRow]:
        """All rows, read as they are asked for. DataError at once for a file or a header that is none."""
        if self.kind == "jsonl":
            read = read_jsonl if self.unit == "line" else read_json_objects
            return read(self.path, place=self.place)
        columns = [
            Column(self.columns[o], o in self.given or not self.is_optional(o), o in _NUMBERS_TOO, self.fix(o))
            for o in _FIELDS
        ]
        return (read_csv if self.kind == "csv" else read_parquet)(self.path, place=self.place, columns=columns)

    def problems(self, rows: Iterator[RawRow]) -> Iterator[Problem]:
        """A problem a row. DataError for a repeated id, and at the end for a mapped column that no row has."""
        seen = _Ids(self)
        unseen = {ours for ours in self.given if self.is_optional(ours)}
        names: Sequence[str] = ()
        for row in rows:
            problem = self.problem(row)
            seen.add(problem.id, row)
            if unseen:
                unseen -= {ours for ours in unseen if self.columns[ours] in row.columns}
                names = list(row.columns)
            yield problem
        for ours in sorted(unseen):
            column = self.columns[ours]
            raise DataError(
                f"no row has the column {quoted(column)}, which `fields` gives for {ours}: it {missing(column, names)}",
                place=f"data.tasks ({self.task}).fields",
                fix="correct `fields`, or take the entry out",
            )

    def problem(self, row: RawRow) -> Problem:
        def field(ours: str, default: str = "") -> str:
            column = self.columns[ours]
            if self.is_optional(ours) and _is_absent(row.columns.get(column)):
                return default
            return row.text(column, number_too=ours in _NUMBERS_TOO, fix=self.fix(ours))

        question, reasoning, answer = field("question"), field("reasoning"), field("answer")
        if "\n" in answer or ANSWER_MARK in answer or ANSWER_MARK in reasoning:
            raise row.error(
                f"the answer must be one line, and `{ANSWER_MARK}` (which marks the answer) must not stand in the "
                "texts",
                fix="move all but the answer to the reasoning, and take the mark out",
            )
        id, language = field("id", f"{self.unit}-{row.number}"), field("language", "en")
        return Problem(self.task, id, question, reasoning, answer, language)


def load(task: TaskRecipe, data: DataRecipe) -> Loaded:
    """All rows of `file`, read when they are asked for; DataError at the first row that cannot be used.

    What can be known beforehand is an error at once: the recipe's mistakes, the file, a table's columns.
    """
    place = f"data.tasks ({task.name})"
    if task.file is None:
        fix = f"add `file: path/to/rows{_SUFFIXES[task.name][0]}` to the task"
        raise DataError(f"{task.name} needs a file", place=f"{place}.file", fix=fix)
    if task.revision is not None:
        raise DataError(
            "`revision` belongs to data sets on the hub, not to a file",
            place=f"{place}.revision",
            fix="take it out: the file's checksum is recorded",
        )
    path = Path(task.file).expanduser()
    other = next((name for name, its in _SUFFIXES.items() if path.suffix.lower() in its), task.name)
    if other != task.name:
        raise DataError(
            f"task {task.name} reads {_TITLES[task.name]}, and {quoted(path.name)} is called a {_TITLES[other]} file",
            place=f"{place}.file",
            fix=f"use `name: {other}`, or give the file the suffix that its content has",
        )
    for name in task.fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(
                f"unknown field {quoted(name)}",
                place=f"{place}.fields",
                fix=f"{meant}fields map {', '.join(_FIELDS)} to the columns of the file",
            )
    columns = {name: task.fields.get(name, name) for name in _FIELDS}
    need_reasoning = data.style != "direct"
    file = OwnFile(task.name, task.key, path, columns, frozenset(task.fields), need_reasoning, f"{place}.file")
    return Loaded(file.problems(file.rows()), [found_source(task.key, Found((path,), task.file))])


class _Ids:
    """The ids so far, as short as can be: a repeated one is looked up in the file again, to name the first place."""

    def __init__(self, file: OwnFile) -> None:
        self._file = file
        self._given: set[int] = set()
        self._without = array("Q")  # numbers of the rows that have none, and are known by their number

    def add(self, id: str, row: RawRow) -> None:
        """DataError where another row has this id."""
        short = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big")
        repeated = short in self._given
        if _is_absent(row.columns.get(self._file.columns["id"])):
            self._without.append(row.number)
        else:
            # An earlier row without an id may be known by just this: `line-7`.
            unit, _, digits = id.partition("-")
            if unit == self._file.unit and digits.isascii() and digits.isdecimal() and len(digits) <= 18:
                at = bisect_left(self._without, int(digits))
                repeated |= at < len(self._without) and self._without[at] == int(digits)
            self._given.add(short)
        if repeated and (first := self._first_place(id, row)):
            raise row.error(f"id {quoted(id)} was used before, at {first}", fix="give each row its own id")

    def _first_place(self, id: str, row: RawRow) -> str:
        """Where the id stands first; '' for two ids that only look alike when shortened."""
        column = self._file.columns["id"]
        for earlier in self._file.rows():
            if earlier.number >= row.number:
                break
            if _is_absent(earlier.columns.get(column)):
                theirs = f"{self._file.unit}-{earlier.number}"
            else:
                theirs = earlier.text(column, number_too=True)
            if theirs == id:
                return earlier.place
        return ""


def _is_absent(value: object) -> bool:
    """Null, blank, or the NaN that data frames have for a missing number."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


JSONL, CSV, PARQUET = (
    DataSet(Task(name, load, write_plain, extract_marked, same_value, published=False))
    for name in ("jsonl", "csv", "parquet")
)
