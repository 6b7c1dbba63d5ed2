"""A user's own file: JSONL (or a .json array), CSV or Parquet with question, reasoning, answer, id and language.

Other columns through `fields`: our name and a column, or a template of several (`question: "{body} {question}"`). Where
a row has neither, its conversation (`messages`, ShareGPT's `conversations`) or its `completion` is taken apart
(`conversation.py`). A row without `id` is known by its line or row. `reasoning` may be absent where only style `direct`
is asked for. The gold answer is read by the rule that will read the student's (`answer:` in the recipe).

Read row by row; the only thing that is kept of each row is eight bytes or so of its id. What was noticed on the way
(columns that nobody reads, numbers that were taken for text) is told to the user with the data's table.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import missing, quoted
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.answers.numbers import leading_number, normalise_number, same_value
from kvdistill.data.problems import ANSWER_MARK, Problem, write_plain
from kvdistill.data.sets.base import DataSet, Task, extract_marked
from kvdistill.data.sets.conversation import CONVERSATIONS, read_conversation, split_completion
from kvdistill.data.sets.published import Loaded, Noticed
from kvdistill.data.sets.rules import read_gold
from kvdistill.data.sources import Column, Found, RawRow, found_source
from kvdistill.data.sources.csv_table import read_csv
from kvdistill.data.sources.jsonl import read_json_objects, read_jsonl
from kvdistill.data.sources.parquet import parquet_columns, read_parquet

_FIELDS = ("id", "question", "reasoning", "answer", "completion", "language")
_OPTIONAL = ("id", "language")
_NUMBERS_TOO = ("id", "answer")
_TITLES = {"jsonl": "JSON", "csv": "CSV", "parquet": "Parquet"}
_SUFFIXES = {"jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv", ".tab"), "parquet": (".parquet", ".pq")}
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class OwnFile:
    """One file and how it is read. columns: our names -> its column, or a template of its columns.

    kind: jsonl, csv or parquet. task: the key that its problems carry. given: our names that the recipe maps itself.
    place: the recipe key that named the file. rule: of RULES, by which answers are read; empty: as they stand.
    language: of rows that do not say theirs.
    """

    kind: str
    task: str
    path: Path
    columns: Mapping[str, str]
    given: frozenset[str]
    need_reasoning: bool
    place: str
    rule: str = ""
    language: str = "en"

    @property
    def unit(self) -> str:
        """What its rows are counted by."""
        return "line" if self.kind == "jsonl" and self.path.suffix.lower() != ".json" else "row"

    def is_optional(self, ours: str) -> bool:
        return ours in _OPTIONAL or (ours == "reasoning" and not self.need_reasoning)

    def named(self, ours: str) -> tuple[str, ...]:
        """The columns that one of our fields is made of."""
        return tuple(dict.fromkeys(_PLACEHOLDER.findall(self.columns[ours]))) or (self.columns[ours],)

    @property
    def read(self) -> tuple[str, ...]:
        """Our fields that a row with columns of its own is made of."""
        apart = ("completion",) if "completion" in self.given else ("reasoning", "answer")
        return ("id", "question", *apart, "language")

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
        if self.kind == "parquet" and self._holds_conversations(parquet_columns(self.path, self.place)):
            return read_parquet(self.path, place=self.place)
        columns = [
            Column(name, o in self.given or not self.is_optional(o), o in _NUMBERS_TOO or name != self.columns[o], fix)
            for o in self.read
            for name, fix in ((name, self.fix(o)) for name in self.named(o))
        ]
        columns = list({column.name: column for column in columns}.values())
        return (read_csv if self.kind == "csv" else read_parquet)(self.path, place=self.place, columns=columns)

    def _holds_conversations(self, present: Collection[str]) -> bool:
        """Whether question and answer are to be taken out of a conversation."""
        return not {"question", "answer"} & {*self.given, *present} and bool({*CONVERSATIONS} & {*present})

    def problems(self, rows: Iterator[RawRow], noticed: Noticed) -> Iterator[Problem]:
        """A problem a row. DataError for a repeated id, and at the end for a mapped column that no row has."""
        seen = _Ids(self)
        unseen = {ours for ours in self.given if self.is_optional(ours)}
        names: Sequence[str] = ()
        before: Problem | None = None
        if self.kind == "parquet":  # of which only the columns that are wanted are read
            noticed.unused.update(parquet_columns(self.path, self.place))
        for row in rows:
            problem, used = self.problem(row)
            noticed.unused.update(row.columns)
            noticed.used.update(used)
            if "style" in row.columns and problem == before:  # `export` writes a problem in each style
                continue
            seen.add(problem.id, row)
            if unseen:
                unseen -= {ours for ours in unseen if {*self.named(ours)} & {*row.columns}}
                names = list(row.columns)
            if not self.rule and normalise_number(problem.answer) is None and leading_number(problem.answer):
                noticed.numbers_with_words += 1
                noticed.one_of_them = noticed.one_of_them or problem.answer
            before = problem
            yield problem
        for ours in sorted(unseen):
            column = self.columns[ours]
            raise DataError(
                f"no row has the column {quoted(column)}, which `fields` gives for {ours}: it {missing(column, names)}",
                place=f"data.tasks ({self.task}).fields",
                fix="correct `fields`, or take the entry out",
            )

    def problem(self, row: RawRow) -> tuple[Problem, set[str]]:
        """The row's problem, and the columns that it is made of."""
        id, _ = self.id_of(row)
        used = {*self.named("id"), *self.named("language")}
        if self._holds_conversations(row.columns):
            column = next(name for name in CONVERSATIONS if name in row.columns)
            question, reasoning, answer = read_conversation(row, column)
            used.add(column)
        elif "completion" in self.given or (
            "answer" not in {*self.given, *row.columns} and self.columns["completion"] in row.columns
        ):
            if "question" not in {*self.given, *row.columns} and "prompt" in row.columns:
                question = row.text("prompt")
                used.add("prompt")
            else:
                question = self.field("question", row)
                used.update(self.named("question"))
            reasoning, answer = split_completion(self.field("completion", row), row)
            used.update(self.named("completion"))
        else:
            question, reasoning, answer = (self.field(ours, row) for ours in ("question", "reasoning", "answer"))
            used.update(name for ours in ("question", "reasoning", "answer") for name in self.named(ours))
        if self.need_reasoning and not reasoning:
            what = "nothing stands before the answer, and style cot needs reasoning"
            raise row.error(what, fix="write the reasoning before the mark, or set data.style=direct")
        if "\n" in answer or ANSWER_MARK in answer or ANSWER_MARK in reasoning:
            raise row.error(
                f"the answer must be one line, and `{ANSWER_MARK}` (which marks the answer) must not stand in the "
                "texts",
                fix="move all but the answer to the reasoning, and take the mark out; or, for a text with both, name "
                "its column in `fields` (completion: COLUMN)",
            )
        language = self.field("language", row, self.language)
        gold = self.gold(answer, row)
        return Problem(self.task, id, question, reasoning, gold, language, self.rule), used

    def field(self, ours: str, row: RawRow, default: str = "") -> str:
        """The text of one of our fields; `default` where it may be absent and is.

        In a template an empty cell adds nothing, and a column that is not there is an error.
        """
        names, spec = self.named(ours), self.columns[ours]
        if self.is_optional(ours) and all(_is_absent(row.columns.get(name)) for name in names):
            return default
        if names == (spec,):
            return row.text(spec, number_too=ours in _NUMBERS_TOO, fix=self.fix(ours))
        cells = {
            name: ""
            if name in row.columns and _is_absent(row.columns[name])
            else row.text(name, number_too=True, fix=self.fix(ours))
            for name in names
        }
        if not any(cells.values()):
            raise row.error(f"field {quoted(ours)} ({quoted(spec)}) is empty", fix="fill it in, or take the row out")
        return _PLACEHOLDER.sub(lambda found: cells[found[1]], spec).strip()

    def gold(self, answer: str, row: RawRow) -> str:
        """The answer as the task's rule reads it."""
        read = read_gold(self.rule, answer) if self.rule else answer
        if read is None:
            raise row.error(
                f"the answer {quoted(answer)} is none by the rule `answer: {self.rule}`",
                fix="correct it, or give the task another `answer` rule (value: numbers or any text)",
            )
        return read

    def id_of(self, row: RawRow) -> tuple[str, bool]:
        """What the row is known by, and whether it says so itself. Of what `export` wrote, with its task."""
        id = self.field("id", row)
        if not id:
            return f"{self.unit}-{row.number}", False
        task = row.columns.get("task") if "style" in row.columns and "id" not in self.given else None
        return (f"{task}/{id}" if isinstance(task, str) and task else id), True


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
        spec = task.fields[name]
        if _PLACEHOLDER.search(spec) and {"{", "}"} & {*_PLACEHOLDER.sub("", spec)}:
            raise DataError(
                f"a brace is open or closed too often in the template {quoted(spec)} for {name}",
                place=f"{place}.fields",
                fix=f"write each column as {{COLUMN}}: {name}: '{{one}} {{two}}'",
            )
    columns = {name: task.fields.get(name, name) for name in _FIELDS}
    need_reasoning = data.style != "direct"
    file = OwnFile(
        task.name,
        task.key,
        path,
        columns,
        frozenset(task.fields),
        need_reasoning,
        f"{place}.file",
        rule=rule_of(task),
        language=task.language or "en",
    )
    noticed, rows = Noticed(), file.rows()  # which looks at the file before anything else opens it
    return Loaded(file.problems(rows, noticed), [found_source(task.key, Found((path,), task.file))], noticed=noticed)


def rule_of(task: TaskRecipe) -> str:
    """The name of its answer rule; empty where its answers are numbers or any text."""
    return "" if task.answer in (None, "value") else str(task.answer)


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
        if not self._file.id_of(row)[1]:
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
        earlier = (one for one in self._file.rows() if one.number < row.number)
        return next((one.place for one in earlier if self._file.id_of(one)[0] == id), "")


def _is_absent(value: object) -> bool:
    """Null, blank, or the NaN that data frames have for a missing number."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


JSONL, CSV, PARQUET = (
    DataSet(Task(name, load, write_plain, extract_marked, same_value, published=False))
    for name in ("jsonl", "csv", "parquet")
)
