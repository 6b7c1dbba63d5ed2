"""Opening a data file: what is no plain text file is named for what it is before the first row is read.

`check_file` looks at the file and its first bytes and gives a `DataFile`; that one opens it later, when the rows are
wanted, and notices if the file has changed since. Knows no format but by its mark.
"""

from __future__ import annotations

import codecs
import os
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
# first bytes -> what that is, and what to do about it
_MARKS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or an Excel workbook)", f"{_UNPACK}; save a workbook as `CSV UTF-8`"),
    (b"PK\x05\x06", "an empty zip archive", "make the archive anew"),
    (b"\x1f\x8b", "a gzip archive", f"{_UNPACK} (gunzip)"),
    (b"\xfd7zXZ\x00", "an xz archive", f"{_UNPACK} (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", f"{_UNPACK} (unzstd)"),
    (b"\x04\x22\x4d\x18", "an lz4 archive", f"{_UNPACK} (unlz4)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"PAR1", "a Parquet file", _PARQUET),
    (b"ARROW1\x00\x00", "an Arrow file", "save it as Parquet or JSONL"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc)", "save it as `CSV UTF-8`"),
    (b"%PDF-", "a PDF", "give the rows themselves, as JSONL, CSV or Parquet"),
    (b"\x7fELF", "an executable", "name the data file"),
    (b"\xcf\xfa\xed\xfe", "an executable", "name the data file"),
    (b"\x93NUMPY", "a NumPy array", "give the rows themselves, as JSONL, CSV or Parquet"),
    (b"\x89PNG", "a picture", "name the data file"),
    (b"\x89HDF", "an HDF5 file", "give the rows themselves, as JSONL, CSV or Parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself", "fetch the data (`git lfs pull`)"),
)
_WEB_PAGES = (b"<!doctype html", b"<html")
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
    _refuse_other_kind(path, head)
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


def _refuse_other_kind(path: Path, head: bytes) -> None:
    for mark, kind, fix in _MARKS:
        if head.startswith(mark):
            raise DataError(f"the file is {kind}", place=at_line(path), fix=fix)
    if head[257:262] == b"ustar":
        raise DataError("the file is a tar archive", place=at_line(path), fix=f"{_UNPACK} (tar -xf)")
    if head.startswith(b"BZh") and head[4:10] == b"\x31\x41\x59\x26\x53\x59":
        raise DataError("the file is a bzip2 archive", place=at_line(path), fix=f"{_UNPACK} (bunzip2)")
    if head.startswith(b"MZ") and b"\x00" in head:
        raise DataError("the file is an executable", place=at_line(path), fix="name the data file")
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise DataError(
            "the file is a Python pickle, which is never opened",
            place=at_line(path),
            fix="give the rows as JSONL, CSV or Parquet",
        )
    if head.lstrip().lower().startswith(_WEB_PAGES):
        raise DataError(
            "the file is a web page, not data", place=at_line(path), fix="download the file itself (its raw form)"
        )


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


def decode_line(line: bytes, path: Path, number: int) -> str:
    """One line as text. DataError with the line's number for other encodings and NUL bytes."""
    if b"\x00" in line:
        raise nul_byte(path, number)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, f" (byte {error.start + 1} of the line)") from None


def not_utf8(path: Path, line: int, where: str = "") -> DataError:
    """The error for bytes that are no UTF-8."""
    return DataError(
        f"not UTF-8{where}",
        place=at_line(path, line),
        fix="convert the whole file to UTF-8 (`iconv -f GBK -t UTF-8`, `iconv -f ISO-8859-1 -t UTF-8`, …)",
    )
