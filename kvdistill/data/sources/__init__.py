"""Rows from local files, saved data set folders and the Hugging Face hub, with the place of every row.

    files.py      opening: missing, no plain file, archives and other kinds, encodings
    jsonl.py      JSON objects: one a line, in an array, or one after another
    csv_table.py  CSV and TSV
    parquet.py    Parquet
    hub.py        the hub, and folders that `datasets` saved
    find.py       which files below `data.root` stand for a split

Data files are other people's: each thing that can be wrong with one is a DataError with `file:line` and a fix. A file
that cannot be opened is one at once; a row that cannot be read is one when it is reached, because rows are read as they
are asked for and memory does not grow with them. Knows what a row is (named values), not what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from kvdistill.core.files import sha256_file, sha256_of
from kvdistill.core.quoting import at_line
from kvdistill.data.sources.csv_table import read_csv
from kvdistill.data.sources.files import unreadable
from kvdistill.data.sources.find import Found, find
from kvdistill.data.sources.hub import read_hub, read_saved_folder
from kvdistill.data.sources.jsonl import read_json_objects, read_jsonl
from kvdistill.data.sources.parquet import read_parquet
from kvdistill.data.sources.rows import Column, RawRow, Source

_READERS: dict[str, Callable[..., Iterator[RawRow]]] = {
    ".json": read_json_objects,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def read_rows(path: Path, *, place: str) -> Iterator[RawRow]:
    """The rows of a folder saved by `datasets`, or of a file by its suffix: JSON, CSV, TSV, Parquet, else JSONL.

    place: the recipe key that named it. DataError at once where it cannot be opened, else at the row.
    """
    if path.is_dir():
        return read_saved_folder(path, place=place)
    return _READERS.get(path.suffix.lower(), read_jsonl)(path, place=place)


def read_found(found: Found, *, place: str) -> Iterator[RawRow]:
    """The rows of all files of `found`, numbered through where there are several."""
    each = [read_rows(path, place=place) for path in found.paths]  # all of them are opened before a row is read
    if len(each) == 1:
        return each[0]
    return (RawRow(row.columns, row.place, n) for n, row in enumerate(chain.from_iterable(each), start=1))


def found_source(task: str, found: Found) -> Source:
    """What a task is read from, with its checksum; of several files, the checksum over theirs, in order."""
    if len(found.paths) > 1:
        return Source(task, "folder", found.shown, sha256_of([_checksum(path) for path in found.paths]))
    (path,) = found.paths
    return Source(task, "folder" if path.is_dir() else "file", found.shown, _checksum(path))


def _checksum(path: Path) -> str:
    """Of a file; of a saved data set's folder, the checksum over those of its files."""
    try:
        if path.is_dir():
            return sha256_of({part.name: sha256_file(part) for part in sorted(path.iterdir()) if part.is_file()})
        return sha256_file(path)
    except OSError as error:
        raise unreadable(path, error, at_line(path)) from error


__all__ = [
    "Column",
    "Found",
    "RawRow",
    "Source",
    "find",
    "found_source",
    "read_found",
    "read_hub",
    "read_rows",
    "read_saved_folder",
]
