"""JSON text: one object a line (JSONL), or one array of objects, or objects one after another.

Read piece by piece, so that memory does not grow with the rows. A UTF-8 byte order mark is passed over, because Windows
programs write one. Numbers with a point stay as they are written
(Decimal), NaN and Infinity are refused, and so is a name that an object has twice.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, quoted, shown
from kvdistill.data.sources.files import MAX_ROW_BYTES, DataFile, Lines, check_file, not_utf8, nul_byte, too_long
from kvdistill.data.sources.rows import RawRow

_CHUNK = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")
# A JSON error this far before the end of what was read cannot be mended by reading on (longest token: an escaped pair).
_UNDECIDED = 16


def read_jsonl(path: Path, *, place: str) -> Iterator[RawRow]:
    """The rows of a JSONL file, read as they are asked for; blank lines are passed over. A row's number is its line.

    place: the recipe key that named the file. DataError at once for a file that is none (`check_file`), and at the
    line for bytes that are not UTF-8, a broken row, a row that is not an object; at the end where there was no row.
    """
    return _lines(check_file(path, place, utf8_bom=True))


def _lines(file: DataFile) -> Iterator[RawRow]:
    where = ""
    with file.open() as opened:
        lines = Lines(opened, file.path)
        for text in lines:
            if not text.strip(" \t\r\n\v\f"):
                continue
            where = at_line(file.path, lines.number)
            try:
                value = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                begins = text.lstrip()[:1]
                fix = "write one JSON object a line"
                fix += ", not one JSON array (which `.json` files may hold)" if begins == "[" else ""
                fix += "; for a table use `name: csv`" if begins not in ("[", "{") else ""
                raise DataError(f"broken JSON ({shown(error)})", place=where, fix=fix) from None
            yield RawRow(_object(value, where, "write one JSON object a line"), where, lines.number)
    if not where:
        raise DataError("the file has no rows", place=at_line(file.path), fix="give a file with one JSON object a line")


def _object(value: object, where: str, fix: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"the row is a JSON {type(value).__name__}, not an object", place=where, fix=fix)
    return value


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{quoted(twice)} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)


def read_json_objects(path: Path, *, place: str) -> Iterator[RawRow]:
    """The rows of one JSON array of objects, or of objects one after another (however many lines each takes).

    A row's place is the line on which its object begins. DataError as `read_jsonl`, and for a torn array.
    """
    return _objects(check_file(path, place, utf8_bom=True))


def _objects(file: DataFile) -> Iterator[RawRow]:
    number = 0
    with file.open() as opened:
        text = _Text(opened, file.path)
        is_array = text.next_is("[")
        if is_array:
            text.step()
        while not text.ended() and not (is_array and text.next_is("]")):
            where = text.where()
            number += 1
            yield RawRow(_object(text.take_value(where), where, "write one JSON object a row"), where, number)
            if is_array and not text.next_is("]"):
                where, is_comma = text.where(), text.next_is(",")
                if is_comma:
                    text.step()
                if not is_comma or text.ended() or text.next_is("]"):
                    what = "broken JSON array (cut off, or a comma too few or too many)"
                    raise DataError(what, place=where, fix="mend it there")
        if is_array and text.next_is("]"):
            where = text.where()
            text.step()
            if not text.ended():
                raise DataError("text after the end of the array", place=where, fix="one array a file")
    if not number:
        raise DataError("the file has no rows", place=at_line(file.path), fix="give a file with JSON objects")


class _Text:
    """The text of a file, as much of it as is needed; what was used up is dropped, and its lines are counted."""

    def __init__(self, opened: BinaryIO, path: Path) -> None:
        self._opened, self._path = opened, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line, self._counted = 1, 0
        self._num_lines_read = 0
        self._all_read, self._is_first = False, True

    def where(self) -> str:
        """Place of the next character that is no space."""
        self.ended()
        return at_line(self._path, self._line_of(self._at))

    def ended(self) -> bool:
        """Whether only space is left."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or not self._read_on():
                return self._at == len(self._text)

    def next_is(self, sign: str) -> bool:
        return not self.ended() and self._text[self._at] == sign

    def step(self) -> None:
        self._at += 1

    def take_value(self, where: str) -> Any:
        """The JSON value that begins here. DataError at the line of the fault."""
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                could_go_on = error.pos > len(self._text) - _UNDECIDED or error.msg.startswith("Unterminated string")
                if could_go_on and self._read_on():
                    if len(self._text) > MAX_ROW_BYTES:
                        raise too_long("JSON object", where) from None
                    continue
                raise DataError(
                    f"broken JSON ({shown(error.msg)})",
                    place=at_line(self._path, self._line_of(error.pos)),
                    fix="mend the JSON there (the file may be cut off)",
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"broken JSON ({shown(error)})", place=where, fix="write one JSON object a row"
                ) from None

    def _line_of(self, at: int) -> int:
        if at >= self._counted:
            self._line += self._text.count("\n", self._counted, at)
            self._counted = at
            return self._line
        return self._line - self._text.count("\n", at, self._counted)

    def _read_on(self) -> bool:
        """More text behind what is left, at least twice as much; False at the end of the file."""
        if self._all_read:
            return False
        self._line_of(self._at)
        rest = self._text[self._at :]
        data = self._opened.read(max(_CHUNK, len(rest)))
        self._all_read = not data
        if b"\x00" in data:
            raise nul_byte(self._path, self._num_lines_read + data.count(b"\n", 0, data.index(b"\x00")) + 1)
        try:
            more = self._decoder.decode(data, final=self._all_read)
        except UnicodeDecodeError as error:
            line = self._num_lines_read + error.object.count(b"\n", 0, error.start) + 1
            raise not_utf8(self._path, line) from None
        self._num_lines_read += data.count(b"\n")
        self._text, self._at, self._counted = rest + more, 0, 0
        if self._is_first and self._text:
            self._text, self._is_first = self._text.removeprefix("\ufeff"), False
        return bool(data)
