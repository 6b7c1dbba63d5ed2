"""Folders that `datasets` saved: one split, as Arrow files that are mapped into memory and not read at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, shown
from kvdistill.data.sources.rows import RawRow

_FIX = "give the folder of one split, as `Dataset.save_to_disk` writes it"


def read_saved_folder(path: Path, *, place: str) -> Iterator[RawRow]:
    """The rows of one split that `datasets` saved (`save_to_disk`), read as they are asked for. Places: `folder:row`.

    DataError at once for another folder, a torn one, one without rows.
    """
    import datasets

    if not (path / "state.json").is_file():
        splits = sorted(part.parent.name for part in path.glob("*/state.json"))
        fix = f"{_FIX}; here are: {shown(', '.join(splits))}" if splits else _FIX
        raise DataError(f"{at_line(path)} is not a saved data set (it holds no state.json)", place=place, fix=fix)
    try:
        table = datasets.Dataset.load_from_disk(str(path))
        num_rows = len(table)
    except Exception as error:  # whatever `datasets` and pyarrow make of a strange folder
        raise _unreadable(error, at_line(path)) from error
    if not num_rows:
        raise DataError("the saved data set has no rows", place=at_line(path), fix=_FIX)
    return iterate(table, at_line(path))


def iterate(table: Any, name: str) -> Iterator[RawRow]:
    """The rows of a `datasets` table, with places `name:row`."""
    rows, number = iter(table), 0
    while True:
        try:
            columns = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the Arrow file behind it is torn, or no longer there
            raise _unreadable(error, f"{name}:{number + 1}") from error
        number += 1
        yield RawRow(columns, f"{name}:{number}", number)


def _unreadable(error: Exception, place: str) -> DataError:
    return DataError(f"cannot read the saved data set: {shown(error)}", place=place, fix=_FIX)
