"""What every reader gives: a row with its place; and what is remembered of where rows came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvdistill.core.errors import DataError


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read: its columns, where it stands, and its number in the source (from 1).

    The number counts lines in JSONL files and rows everywhere else.
    """

    columns: Mapping[str, Any]
    place: str
    number: int

    def error(self, what: str, fix: str) -> DataError:
        """What is wrong with this row, at its place."""
        return DataError(what, place=self.place, fix=fix)


@dataclass(frozen=True)
class Source:
    """What a split was read from, for the manifest: `kind` is file, folder (several files), hub or generated.

    sha256: of the file, or over those of several. revision: the hub's commit that was read, where it is known.
    """

    task: str
    kind: str
    place: str
    sha256: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Column:
    """A column that is wanted of a table. number_too: whether a column of numbers will do. fix: what else to do."""

    name: str
    required: bool = True
    number_too: bool = False
    fix: str = ""
