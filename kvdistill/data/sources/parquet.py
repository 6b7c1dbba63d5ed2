"""Parquet files, read in small batches; nothing but the wanted columns is read.

Numbers become what a person would write: a float without a fraction has no point, and a 32-bit float its shortest form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line, quoted, shown
from kvdistill.data.sources.files import DataFile, check_file
from kvdistill.data.sources.rows import Column, RawRow

_MAGIC = b"PAR1"
_BATCH_BYTES, _BATCH_ROWS = 4 << 20, 500
_READ_BYTES = 1 << 16
_TORN_FIX = "copy or download the file anew"


def read_parquet(path: Path, *, place: str, columns: Sequence[Column] = ()) -> Iterator[RawRow]:
    """The rows of a Parquet file, read as they are asked for; a row's place is `file:row`.

    columns: those to read, of text (or of numbers where a column says so); none: all, of any type. DataError at once
    for a file that is none or is torn, has no rows, or lacks a column; at the row for values that cannot be read.
    """
    file = check_file(path, place, magic=_MAGIC)
    with _opened(file) as table:
        if not table.metadata.num_rows:
            raise DataError("the file has no rows", place=at_line(path), fix="give a file with rows")
        schema = table.schema_arrow
    for column in columns:
        _check_column(schema, column, path)
    present = [column.name for column in columns if column.name in schema.names]
    return _rows(file, present if columns else None)


def parquet_columns(path: Path, place: str) -> list[str]:
    """The names of all columns of a Parquet file. DataError as `read_parquet`."""
    with _opened(check_file(path, place, magic=_MAGIC)) as table:
        return list(table.schema_arrow.names)


@contextmanager
def _opened(file: DataFile) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    with file.open() as opened:
        try:
            with pyarrow.parquet.ParquetFile(
                opened,
                buffer_size=_READ_BYTES,
                pre_buffer=False,  # which would hold a whole row group, often the whole file
                page_checksum_verification=True,
            ) as table:
                yield table
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise DataError(f"torn Parquet file ({shown(error)})", place=at_line(file.path), fix=_TORN_FIX) from error


def _check_column(schema: Any, column: Column, path: Path) -> None:
    import pyarrow.types as types

    place, count = at_line(path), schema.names.count(column.name)
    if count > 1:
        raise DataError(f"two columns are called {quoted(column.name)}", place=place, fix="rename one of them")
    column.refuse_missing(schema.names, place)
    if not count:
        return
    kind = schema.field(column.name).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    is_number = types.is_integer(value) or types.is_floating(value) or types.is_decimal(value)
    if not (is_text or types.is_null(value) or (column.number_too and is_number)):
        wanted = "text or numbers" if column.number_too else "text"
        raise DataError(
            f"column {quoted(column.name)} holds {shown(kind)}, not {wanted}",
            place=place,
            fix=f"write it as {wanted}, one value a row, or name another column in `fields`",
        )


def _rows(file: DataFile, names: list[str] | None) -> Iterator[RawRow]:
    import numpy
    import pyarrow
    import pyarrow.types as types

    number, name = 0, at_line(file.path)
    with _opened(file) as table:
        metadata, schema = table.metadata, table.schema_arrow
        narrow = {field.name for field in schema if types.is_float16(field.type) or types.is_float32(field.type)}
        # so many rows that a batch is a few megabytes
        num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, num_bytes)))
        for batch in table.iter_batches(batch_size=size, columns=names, use_threads=False):
            for columns in _as_rows(batch, file.path, number):
                number += 1
                for column in narrow & columns.keys():
                    if (value := columns[column]) is not None:  # 0.10000000149011612, which a 32-bit 0.1 is, as 0.1
                        columns[column] = float(str(numpy.float32(value)))
                yield RawRow(columns, f"{name}:{number}", number)
            pyarrow.default_memory_pool().release_unused()  # Arrow keeps what it once had; here that adds up


def _as_rows(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):  # once more, row by row, to name the one
            try:
                batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                raise DataError(
                    "a text is not UTF-8", place=at_line(path, before + i + 1), fix="write the column as UTF-8"
                ) from None
        raise
