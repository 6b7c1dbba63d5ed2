"""Where the rows of an evaluation come from: files below a folder, in several layouts, or the hub.

Knows no answer rules. A listed file is also found in other forms (`sources.find`: `test.jsonl` as `test.parquet`, …).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, quoted
from kvdistill.data.fields import text_field
from kvdistill.data.sources import Found, RawRow, find, read_found, read_hub

Split = Literal["test", "fewshot"]
_NO_GOLD = "no gold answers"


@dataclass(frozen=True)
class Member:
    """One lm-eval task of an evaluation: a BBH task, a subject; most evaluations have one.

    name: what records carry. definition: a YAML file below lm_eval/tasks; empty for our own templates.
    local: its name in file names.
    """

    name: str
    definition: str
    hub_config: str | None = None
    local: str = ""


class AbstractRows(abc.ABC):
    """The rows of an evaluation's members."""

    hub: str
    revision: str | None
    members: tuple[Member, ...]

    @abc.abstractmethod
    def members_below(self, root: Path) -> tuple[Member, ...]:
        """The members with rows to score below `root`."""

    @abc.abstractmethod
    def load(self, evaluation: str, member: Member, root: Path | None, split: Split) -> list[dict[str, Any]]:
        """All rows of a split, checked; DataError where there are none."""

    @abc.abstractmethod
    def pinned(self, revision: str | None) -> AbstractRows:
        """The same from that revision of the hub's data set."""

    @abc.abstractmethod
    def not_found(self, evaluation: str, member: Member, root: Path, split: Split) -> DataError:
        """The error for rows that are not below `root`."""


def _one(row: RawRow) -> Iterable[RawRow]:
    return (row,)


@dataclass(frozen=True)
class PublishedRows(AbstractRows):
    """Rows of a public data set.

    hub_splits: our split -> the hub's. paths: our split -> names below the root, of which the first that is there is
    read; `{}` is the member's `local`. read: a row -> the columns of the definition, or DataError. unpack: a row of a
    local file -> the rows it holds.
    """

    hub: str
    members: tuple[Member, ...]
    hub_splits: Mapping[Split, str]
    paths: Mapping[Split, tuple[str, ...]]
    read: Callable[[Member, RawRow], dict[str, Any]]
    unpack: Callable[[RawRow], Iterable[RawRow]] = _one
    revision: str | None = None

    def members_below(self, root: Path) -> tuple[Member, ...]:
        return tuple(member for member in self.members if self._find(member, root, "test") is not None)

    def load(self, evaluation: str, member: Member, root: Path | None, split: Split) -> list[dict[str, Any]]:
        if root is None:
            return [self.read(member, row) for row in self._hub_rows(evaluation, member, split)]
        found = self._find(member, root, split)
        if found is None:
            raise self.not_found(evaluation, member, root, split)
        rows = (inner for row in read_found(found, place="data.root") for inner in self.unpack(row))
        return [self.read(member, row) for row in rows]

    def pinned(self, revision: str | None) -> PublishedRows:
        return replace(self, revision=revision)

    def not_found(self, evaluation: str, member: Member, root: Path, split: Split) -> DataError:
        if not root.is_dir():
            return DataError(f"no such folder: {at_line(root)}", place="data.root", fix="give the folder with the data")
        wanted = f"{member.name}: " if member.name != evaluation else ""
        what = "rows to score" if split == "test" else "examples for the prompt"
        no_examples = "ask for none (num_fewshot: 0), or " if split == "fewshot" else ""
        return DataError(
            f"{evaluation}: {wanted}no {what} below {at_line(root)}; looked for {self._looked_for(member, split)}",
            place="data.root",
            fix=f"put one of them there, or {no_examples}unset data.root to load {self.hub} from the hub",
        )

    def _hub_rows(self, evaluation: str, member: Member, split: Split) -> Iterable[RawRow]:
        return read_hub(
            self.hub,
            member.hub_config,
            self.hub_splits[split],
            local_layout=self._looked_for(member, split),
            revision=self.revision,
            place=f"data.root ({evaluation})",
        )

    def _find(self, member: Member, root: Path, split: Split) -> Found | None:
        return next((found for name in self.paths[split] if (found := find(root, name.format(member.local)))), None)

    def _looked_for(self, member: Member, split: Split) -> str:
        listed = " or ".join(f"DIR/{name.format(member.local)}" for name in self.paths[split])
        return f"{listed} (or .json, .parquet, .csv of the same names)"


def text_column(row: RawRow, column: str) -> str:
    """The text of a column as published (not stripped), a number as it is written. DataError where it is missing,
    empty or something else.
    """
    stripped = text_field(row, column, number_too=True)
    value = row.columns[column]
    return value if isinstance(value, str) else stripped


def gold_column(row: RawRow, column: str, *, fix: str = "") -> str:
    """The stripped text of the column with the gold answer; DataError `no gold answers` where it is not there."""
    value = row.columns.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        state = "is empty" if column in row.columns else "is missing"
        raise DataError(
            f"{_NO_GOLD}: column {quoted(column)} {state}",
            place=row.place,
            fix=fix or "nothing can be scored without them: use a split whose answers are published",
        )
    return text_column(row, column).strip()


def gold_among(row: RawRow, gold: str, choices: Iterable[str], column: str) -> str:
    """`gold` where it is one of `choices`; DataError at the row otherwise."""
    known = list(choices)
    if gold not in known:
        raise DataError(
            f"the gold answer {quoted(gold)} is not one of {', '.join(known)}",
            place=row.place,
            fix=f"mend column {quoted(column)}",
        )
    return gold
