"""Taking one field out of a row, or saying which row lacks it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from decimal import Decimal

from kvdistill.core.errors import DataError
from kvdistill.data.sources import RawRow


def text_field(row: RawRow, column: str, *, number_too: bool = False, fix: str = "") -> str:
    """The stripped, non-empty text of `column`; with `number_too` a JSON number is taken as it is written.

    Raises DataError at the row's place where it is missing, of another type, empty, or not valid Unicode.
    """
    if column not in row.columns:
        near = difflib.get_close_matches(column, [str(name) for name in row.columns], n=1)
        meant = f"; did you mean {near[0]!r}?" if near else f"; the row has {', '.join(map(repr, row.columns))}"
        raise DataError(f"field {column!r} is missing{meant}", place=row.place, fix=fix or f"add {column!r} to the row")
    value = row.columns[column]
    if number_too and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = type(value).__name__
        wanted = "text or a number" if number_too else "text"
        raise DataError(
            f"field {column!r} is {kind}, not {wanted}", place=row.place, fix=f"write {column!r} as a string"
        )
    if not value.strip():
        raise DataError(f"field {column!r} is empty", place=row.place, fix="fill it in, or take the row out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"field {column!r} has half of a surrogate pair",
            place=row.place,
            fix="write the character itself",
        ) from None
    return value.strip()


def texts_field(row: RawRow, column: str, *, inside: str = "") -> list[str]:
    """The non-empty texts of a list, each stripped; with `inside` the list stands at row[inside][column].

    Raises DataError at the row's place for anything else.
    """
    found = row.columns.get(inside) if inside else row.columns
    name = f"{inside}.{column}" if inside else column
    if not isinstance(found, Mapping) or column not in found:
        raise DataError(f"field {name!r} is missing", place=row.place, fix=f"add the list {name!r} to the row")
    values = found[column]
    if not isinstance(values, list) or not values:
        raise DataError(f"field {name!r} is not a list with texts", place=row.place, fix=f"write {name!r} as a list")
    each = (RawRow({name: value}, row.place, row.number) for value in values)
    return [text_field(one, name) for one in each]
