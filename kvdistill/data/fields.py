"""Taking one field out of a row, or saying which row lacks it. Nothing of a row is printed but a short piece."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from kvdistill.core.quoting import missing, quoted
from kvdistill.data.sources import RawRow

_WRITTEN_OUT = 40  # digits up to which a number is written without an exponent


def text_field(row: RawRow, column: str, *, number_too: bool = False, fix: str = "") -> str:
    """The stripped, non-empty text of `column`; with `number_too` a number is taken as it is written.

    Raises DataError at the row's place where it is missing, of another type, empty, not a number (NaN), or holds
    characters that no text has.
    """
    if column not in row.columns:
        raise row.error(
            f"field {quoted(column)} {missing(column, row.columns)}", fix=fix or f"add {quoted(column)} to the row"
        )
    value = row.columns[column]
    if number_too and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _number_text(value, column, row)
    if not isinstance(value, str):
        kind = "null (NoneType)" if value is None else type(value).__name__
        wanted = "text or a number" if number_too else "text"
        raise row.error(
            f"field {quoted(column)} is {kind}, not {wanted}",
            fix=f"write {quoted(column)} as a string, or take the row out",
        )
    text = value.strip()
    if not text:
        raise row.error(f"field {quoted(column)} is empty", fix="fill it in, or take the row out")
    if "\x00" in text:
        raise row.error(f"field {quoted(column)} holds a NUL character", fix="take the character out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        what = f"field {quoted(column)} has half of a surrogate pair"
        raise row.error(what, fix="write the character itself") from None
    return text


def _number_text(value: int | float | Decimal, column: str, row: RawRow) -> str:
    """`4`, `1.50` as written, `72` for the float 72.0, and no exponent where a person would write none."""
    if not (value.is_finite() if isinstance(value, Decimal) else isinstance(value, int) or math.isfinite(value)):
        raise row.error(f"field {quoted(column)} is {value}, which is no number", fix="fill it in, or take the row out")
    if isinstance(value, int):
        return str(value)
    exact = value if isinstance(value, Decimal) else Decimal(repr(value))
    text = format(exact, "f") if abs(exact.adjusted()) < _WRITTEN_OUT else str(exact)
    return text.removesuffix(".0") if isinstance(value, float) else text


def texts_field(row: RawRow, column: str, *, inside: str = "") -> list[str]:
    """The non-empty texts of a list, each stripped; with `inside` the list stands at row[inside][column].

    Raises DataError at the row's place for anything else.
    """
    found = row.columns.get(inside) if inside else row.columns
    name = f"{inside}.{column}" if inside else column
    if isinstance(found, str):
        raise row.error(
            f"field {quoted(name)} is missing: {quoted(inside)} is text",
            fix="use a copy that keeps lists (JSONL or Parquet, not CSV)",
        )
    if not isinstance(found, Mapping) or column not in found:
        raise row.error(f"field {quoted(name)} is missing", fix=f"add the list {quoted(name)} to the row")
    values = found[column]
    if not isinstance(values, list) or not values:
        raise row.error(f"field {quoted(name)} is not a list with texts", fix=f"write {quoted(name)} as a list")
    each = (RawRow({name: value}, row.place, row.number) for value in values)
    return [text_field(one, name) for one in each]


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
        raise row.error(
            f"no gold answers: column {quoted(column)} {state}",
            fix=fix or "nothing can be scored without them: use a split whose answers are published",
        )
    return text_column(row, column).strip()
