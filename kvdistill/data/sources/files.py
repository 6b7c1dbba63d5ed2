"""Opening a data file: what is no plain text file is named for what it is before the first row is read.

`check_file` looks at the file and its first bytes and gives a `DataFile`; that one opens it later, when the rows are
wanted, and notices if the file has changed since. Knows no format but by its mark.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, shown

_HEAD_BYTES = 1024
# One row, text or object longer than this is taken for a mistake (a quote or bracket that is never closed).
MAX_ROW_BYTES = 1 << 28

_UNPACK = "unpack it, and name the file inside"
_PARQUET = "use `name: parquet` for a file of your own; a published copy keeps its suffix .parquet"
_ROWS = "give the rows themselves, as JSONL, CSV or Parquet"
# how a file begins -> what that is, and what to do about it
_KINDS = tuple(
    (re.compile(mark, re.DOTALL), kind, fix)
    for mark, kind, fix in (
        (rb"PK\x03\x04", "a zip archive (or an Excel workbook)", f"{_UNPACK}; save a workbook as `CSV UTF-8`"),
        (rb"PK\x05\x06", "an empty zip archive", "make the archive anew"),
        (rb"\x1f\x8b", "a gzip archive", f"{_UNPACK} (gunzip)"),
        (rb"\xfd7zXZ\x00", "an xz archive", f"{_UNPACK} (unxz)"),
        (rb"\x28\xb5\x2f\xfd", "a zstd archive", f"{_UNPACK} (unzstd)"),
        (rb"\x04\x22\x4d\x18", "an lz4 archive", f"{_UNPACK} (unlz4)"),
        (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
        (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
        (rb".{257}ustar", "a tar archive", f"{_UNPACK} (tar -xf)"),
        (rb"BZh.\x31\x41\x59\x26\x53\x59", "a bzip2 archive", f"{_UNPACK} (bunzip2)"),
        (rb"PAR1", "a Parquet file", _PARQUET),
        (rb"ARROW1\x00\x00", "an Arrow file", "save it as Parquet or JSONL"),
        (rb"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
        (rb"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc)", "save it as `CSV UTF-8`"),
        (rb"%PDF-", "a PDF", _ROWS),
        (rb"\x7fELF|\xcf\xfa\xed\xfe|MZ.*\x00", "an executable", "name the data file"),
        (rb"\x93NUMPY", "a NumPy array", _ROWS),
        (rb"\x89PNG", "a picture", "name the data file"),
        (rb"\x89HDF", "an HDF5 file", _ROWS),
        (rb"\x80[\x02-\x05]", "a Python pickle, which is never opened", "give the rows as JSONL, CSV or Parquet"),
        (rb"version https://git-lfs", "a Git LFS pointer, not the data itself", "fetch the data (`git lfs pull`)"),
        (rb"\s*(?i:<!doctype html|<html)", "a web page, not data", "download the file itself (its raw form)"),
    )
)
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True)
class DataFile:
    """A plain file as it was when it was checked."""

    path: Path
    size: int
    mtime_ns: int

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file, to read. DataError where it cannot be, or is another one than was checked."""
        try:
            with self.path.open("rb") as file:
                try:
                    yield file
                except DataError:
                    self.refuse_changed()  # the better reason, where it is one
                    raise
                self.refuse_changed()
        except OSError as error:
            raise unreadable(self.path, error, str(self.path)) from error

    def refuse_changed(self) -> None:
        """DataError where the file has changed since it was checked."""
        now = self.path.stat()
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(
                "the file changed while it was read",
                place=at_line(self.path),
                fix="wait until whatever writes it is done, and give the command again",
            )


def check_file(path: Path, place: str, *, magic: bytes = b"", utf8_bom: bool = False) -> DataFile:
    """The file at `path`, or DataError: missing, a folder, no plain file, not readable, empty, or of another kind.

    place: the recipe key that named the file. magic: the bytes that its format begins with; b"": UTF-8 text.
    utf8_bom: whether a UTF-8 byte order mark may stand first.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"{at_line(path)} is a folder, not a file", place=place, fix="name the file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"{at_line(path)} is not a plain file", place=place, fix="copy its content to a file and name that"
            )
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise unreadable(path, error, place) from None
    if not head:
        raise DataError("the file has no rows (it is empty)", place=at_line(path), fix="give a file with rows")
    if magic and head.startswith(magic):
        return DataFile(path, status.st_size, status.st_mtime_ns)
    for mark, kind, fix in _KINDS:
        if mark.match(head):
            raise DataError(f"the file is {kind}", place=at_line(path), fix=fix)
    if magic:
        raise DataError(
            "the file is text or of an unknown kind, not a Parquet file",
            place=at_line(path),
            fix="use `name: jsonl` or `name: csv` for text; a file that was cut off at its start must be copied anew",
        )
    _refuse_other_text(path, head, utf8_bom=utf8_bom)
    return DataFile(path, status.st_size, status.st_mtime_ns)


def unreadable(path: Path, error: Exception, place: str) -> DataError:
    """The error for a file that is not there or that the system does not let us read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if path.is_symlink():
            target = shown(os.readlink(path))
            return DataError(
                f"{at_line(path)} is a symbolic link to {target}, which is not there",
                place=place,
                fix="mend the link, or name the file itself",
            )
        return DataError(
            f"file not found: {at_line(path)}", place=place, fix="check the path (relative to where you start)"
        )
    if isinstance(error, PermissionError):
        return DataError(f"{at_line(path)} may not be read", place=place, fix="change its permissions (chmod +r)")
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{at_line(path)} cannot be read: {shown(reason)}", place=place, fix="check the path and the disk")


def _refuse_other_text(path: Path, head: bytes, *, utf8_bom: bool) -> None:
    if head.startswith(_WIDE_BOMS):
        raise DataError(
            "the file begins with the byte order mark of UTF-16 or UTF-32",
            place=at_line(path, 1),
            fix="save it as UTF-8 (in Excel: `CSV UTF-8`)",
        )
    if head.startswith(codecs.BOM_UTF8) and not utf8_bom:
        raise DataError(
            "the file begins with a byte order mark", place=at_line(path, 1), fix="save it as UTF-8 without BOM"
        )
    if b"\x00" in head:
        raise nul_byte(path, head.count(b"\n", 0, head.index(b"\x00")) + 1)


def nul_byte(path: Path, line: int) -> DataError:
    """The error for a NUL byte in a text file."""
    return DataError(
        "a NUL byte: binary data, or UTF-16 without its mark",
        place=at_line(path, line),
        fix="give a UTF-8 text file, or take the byte out",
    )


class Lines(Iterator[str]):
    """The lines of an open text file with their ends. number: of the line given last.

    DataError with the line's number for other encodings, NUL bytes, and a line that is too long to be one.
    """

    def __init__(self, opened: BinaryIO, path: Path) -> None:
        self._opened, self._path = opened, path
        self.number = 0

    def __next__(self) -> str:
        line = self._opened.readline(MAX_ROW_BYTES + 1)  # splits at \n only: U+2028 may stand inside a text
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_ROW_BYTES:
            raise too_long("line", at_line(self._path, self.number))
        if b"\x00" in line:
            raise nul_byte(self._path, self.number)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self._path, self.number, f" (byte {error.start + 1} of the line)") from None


def too_long(what: str, where: str) -> DataError:
    """The error for a row that must be a mistake."""
    return DataError(
        f"one {what} of more than {MAX_ROW_BYTES >> 20} MiB: perhaps a quote or bracket is never closed",
        place=where,
        fix="mend it, or take the row out",
    )


def not_utf8(path: Path, line: int, where: str = "") -> DataError:
    """The error for bytes that are no UTF-8."""
    return DataError(
        f"not UTF-8{where}",
        place=at_line(path, line),
        fix="convert the whole file to UTF-8 (`iconv -f GBK -t UTF-8`, `iconv -f ISO-8859-1 -t UTF-8`, …)",
    )
