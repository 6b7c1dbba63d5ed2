"""What every reader gives: a row with its place, of which a field is taken out or said to be wrong; and what is
remembered of where rows came from. Nothing of a row is printed but a short piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import missing, quoted

_WRITTEN_OUT = 40  # digits up to which a number is written without an exponent


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

    def text(self, column: str, *, number_too: bool = False, fix: str = "") -> str:
        """The stripped, non-empty text of `column`; with `number_too` a number is taken as it is written.

        Raises DataError at the row's place where it is missing, of another type, empty, not a number (NaN), or holds
        characters that no text has.
        """
        name = quoted(column)
        if column not in self.columns:
            raise self._refused(column, missing(column, self.columns), fix or f"add {name} to the row")
        value = self.columns[column]
        if number_too and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            return self._number(value, column)
        if not isinstance(value, str):
            kind = "null (NoneType)" if value is None else type(value).__name__
            wanted = "text or a number" if number_too else "text"
            fix = f"write {name} as a string, or take the row out"
            raise self._refused(column, f"is {kind}, not {wanted}", fix)
        text = value.strip()
        if not text:
            raise self._refused(column, "is empty", "fill it in, or take the row out")
        if "\x00" in text:
            raise self._refused(column, "holds a NUL character", "take the character out")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise self._refused(column, "has half of a surrogate pair", "write the character itself") from None
        return text

    def _refused(self, column: str, state: str, fix: str) -> DataError:
        return self.error(f"field {quoted(column)} {state}", fix=fix)

    def _number(self, value: int | float | Decimal, column: str) -> str:
        """`4`, `1.50` as written, `72` for the float 72.0, and no exponent where a person would write none."""
        if not (value.is_finite() if isinstance(value, Decimal) else isinstance(value, int) or math.isfinite(value)):
            raise self._refused(column, f"is {value}, which is no number", "fill it in, or take the row out")
        if isinstance(value, int):
            return str(value)
        exact = value if isinstance(value, Decimal) else Decimal(repr(value))
        text = format(exact, "f") if abs(exact.adjusted()) < _WRITTEN_OUT else str(exact)
        return text.removesuffix(".0") if isinstance(value, float) else text

    def texts(self, column: str, *, inside: str = "") -> list[str]:
        """The non-empty texts of a list, each stripped; with `inside` the list stands at row[inside][column].

        Raises DataError at the row's place for anything else.
        """
        found = self.columns.get(inside) if inside else self.columns
        name = f"{inside}.{column}" if inside else column
        if isinstance(found, str):
            fix = "use a copy that keeps lists (JSONL or Parquet, not CSV)"
            raise self._refused(name, f"is missing: {quoted(inside)} is text", fix)
        if not isinstance(found, Mapping) or column not in found:
            raise self._refused(name, "is missing", f"add the list {quoted(name)} to the row")
        values = found[column]
        if not isinstance(values, list) or not values:
            raise self._refused(name, "is not a list with texts", f"write {quoted(name)} as a list")
        each = (RawRow({name: value}, self.place, self.number) for value in values)
        return [one.text(name) for one in each]

    def published(self, column: str) -> str:
        """The text of a column as published (not stripped), a number as it is written. DataError where it is missing,
        empty or something else.
        """
        stripped = self.text(column, number_too=True)
        value = self.columns[column]
        return value if isinstance(value, str) else stripped

    def gold(self, column: str, *, fix: str = "") -> str:
        """The stripped text of the column with the gold answer; DataError `no gold answers` where it is not there."""
        value = self.columns.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            state = "is empty" if column in self.columns else "is missing"
            raise self.error(
                f"no gold answers: column {quoted(column)} {state}",
                fix=fix or "nothing can be scored without them: use a split whose answers are published",
            )
        return self.published(column).strip()


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
    fix: str = "`fields` maps our names to the file's columns"

    def refuse_missing(self, present: Sequence[str], place: str) -> None:
        """DataError where it is required and not there."""
        if self.required and self.name not in present:
            what = f"column {quoted(self.name)} {missing(self.name, present)}"
            raise DataError(what, place=place, fix=self.fix)
