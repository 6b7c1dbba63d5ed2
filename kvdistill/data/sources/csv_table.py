"""CSV and TSV with a header, read row by row.

Texts may hold line breaks and delimiters inside quotes; quoting is checked strictly, so that a quote that is never
closed is an error and not one giant text. A UTF-8 byte order mark is passed over, because Excel writes one into every
`CSV UTF-8` it saves. All values are text.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, quoted, shown
from kvdistill.data.sources.files import MAX_ROW_BYTES, DataFile, Lines, check_file, too_long
from kvdistill.data.sources.rows import Column, RawRow

_DELIMITERS = (",", ";", "\t")
_TAB_SUFFIXES = (".tsv", ".tab")
_QUOTING_FIX = (
    "put texts that hold the delimiter, a quote or a line break in double quotes, and write quotes inside twice"
)


class _Header(NamedTuple):
    names: list[str]
    delimiter: str
    line: int


def read_csv(path: Path, *, place: str, columns: Sequence[Column] = ()) -> Iterator[RawRow]:
    """The rows of a CSV or TSV file as texts, read as they are asked for. A row's place is its first line.

    The delimiter is a tab for `.tsv`, else that of comma, semicolon and tab with which the header has the most of
    `columns` (then, the most columns). DataError at once for a file that is none (`check_file`), and for a header
    without a required column or with one twice; at the row for anything else.
    """
    file = check_file(path, place, utf8_bom=True)
    header = _read_header(file, [column.name for column in columns])
    where = at_line(path, header.line)
    for column in columns:
        column.refuse_missing(header.names, where)
    twice = next((name for name, count in Counter(header.names).items() if name and count > 1), None)
    if twice is not None:
        raise DataError(f"the header names {quoted(twice)} twice", place=where, fix="rename one of the columns")
    return _rows(file, header)


def _read_header(file: DataFile, wanted: Sequence[str]) -> _Header:
    delimiters = ("\t",) if file.path.suffix.lower() in _TAB_SUFFIXES else _DELIMITERS
    with file.open() as opened:
        lines = Lines(opened, file.path)
        first = next((line for line in lines if line.strip()), "")
        begins = lines.number
        if not first:
            raise DataError("the file has no rows", place=at_line(file.path), fix="give a file with a header and rows")
        if first.startswith('{"') or first.strip() in ("[", "{"):
            raise DataError(
                "the file is JSON, not a table", place=at_line(file.path, begins), fix="use `name: jsonl` for it"
            )
        # a name in the header may hold line breaks, so a few more lines are at hand
        text = [first, *islice(lines, 20)]
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's own limit, for all of the process, is 128 KiB
    found = []
    for delimiter in delimiters:
        try:
            names = [name.strip() for name in next(csv.reader(text, delimiter=delimiter, strict=True))]
        except csv.Error as error:
            where = at_line(file.path, begins)
            raise DataError(f"broken header ({shown(error)})", place=where, fix=_QUOTING_FIX) from None
        found.append(_Header(names, delimiter, begins))
    return max(found, key=lambda header: (len({*wanted} & {*header.names}), len(header.names)))


def _rows(file: DataFile, header: _Header) -> Iterator[RawRow]:
    number = 0
    with file.open() as opened:
        lines = Lines(opened, file.path)
        for _ in range(header.line - 1):
            next(lines)
        reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
        next(reader)
        while True:
            where = at_line(file.path, lines.number + 1)
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise _broken(error, where) from None
            if not any(cells) or (len(cells) == 1 and not cells[0].strip()):
                continue  # a blank line, or a row of empty cells as spreadsheets leave them at the end
            if len(cells) != len(header.names):
                raise DataError(
                    f"the row has {len(cells)} cells, the header {len(header.names)} "
                    f"(delimiter {quoted(header.delimiter)})",
                    place=where,
                    fix=f"{_QUOTING_FIX}; write empty cells too",
                )
            number += 1
            columns = {name: cell.replace("\r\n", "\n") for name, cell in zip(header.names, cells, strict=True) if name}
            yield RawRow(columns, where, number)
    if not number:
        raise DataError("the file has no rows but the header", place=at_line(file.path), fix="give a file with rows")


def _broken(error: csv.Error, where: str) -> DataError:
    reason = str(error)
    if "field limit" in reason:
        return too_long("text", where)
    if "unexpected end" in reason:
        return DataError("a quote is opened here and never closed", place=where, fix=_QUOTING_FIX)
    if "new-line character" in reason:
        fix = "save the file with Unix or Windows line ends"
        return DataError("a carriage return alone ends a line", place=where, fix=fix)
    return DataError(f"broken CSV ({shown(reason)})", place=where, fix=_QUOTING_FIX)
