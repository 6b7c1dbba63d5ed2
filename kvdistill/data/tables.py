"""The prepared splits on disk: one parquet file each and a manifest that says what is in them.

`manifest.json` is written last by `prepare`; with it the files are complete, and each is checked against its
checksum when read. Fingerprints are taken over the rows' content, so where a row stands in its source, or how the
file is compressed, changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvdistill.core.errors import RunFolderError, StoreError
from kvdistill.core.files import replacing, sha256_file
from kvdistill.core.layout import data_folder
from kvdistill.core.marks import read_sealed
from kvdistill.data.encode import Example
from kvdistill.data.problems import SPLITS

MANIFEST = "manifest.json"
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("task", "id", "style", "question", "prompt", "reasoning", "answer")),
        ("language", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.int8())),
        *((name, pa.string()) for name in ("doc_hash", "prompt_hash", "rule")),
    ]
)
_LISTS = ("input_ids", "segments")
_TEXTS = sorted(field.name for field in dataclasses.fields(Example) if field.name not in ("id", "rule", *_LISTS))


def split_path(run: Path, split: str) -> Path:
    return data_folder(Path(run)) / f"{split}.parquet"


class SplitWriter:
    """Examples of one split, chunk by chunk, into a file without a name; `keep` puts it into the run folder.

    So nothing stands in the run folder before everything has been checked, and memory holds one chunk.
    Also counts: rows, longest row in tokens, and the fingerprint of what was written.
    """

    def __init__(self, folder: Path) -> None:
        """folder: an existing folder on the disk to use."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by keep, or with the process)
        self._table = pq.ParquetWriter(self._file, SCHEMA, compression="zstd")
        self._digest = hashlib.sha256()
        self.num_rows = 0
        self.max_tokens = 0

    def write(self, examples: Sequence[Example]) -> None:
        if not examples:
            return
        columns = {name: [getattr(example, name) for example in examples] for name in SCHEMA.names}
        self._table.write_table(pa.table(columns, schema=SCHEMA))
        self.num_rows += len(examples)
        self.max_tokens = max(self.max_tokens, *(len(example.input_ids) for example in examples))
        for example in examples:  # as bytes that are the same on every machine
            said = [getattr(example, name) for name in _TEXTS] + [example.rule] * bool(example.rule)
            texts = json.dumps(said, ensure_ascii=False).encode()
            numbers = (np.asarray(getattr(example, name), dtype="<i4").tobytes() for name in _LISTS)
            self._digest.update(b"\n".join((texts, *numbers, b"")))

    def fingerprint(self) -> str:
        """SHA-256 over content and order of the rows (texts, style, gold answer, token ids), ids left out."""
        return self._digest.hexdigest()

    def keep(self, path: Path) -> str:
        """Finish the file and give it its name; its SHA-256."""
        self._table.close()
        self._file.seek(0)
        with replacing(path) as part, open(part, "wb") as out:
            shutil.copyfileobj(self._file, out, 1 << 20)
        self._file.close()
        return sha256_file(path)


def read_manifest(run: Path) -> dict[str, Any]:
    """What `prepare` left; RunFolderError where it has not finished."""
    path = data_folder(Path(run)) / MANIFEST
    if not path.is_file():
        raise RunFolderError("the data is not prepared", place=str(path), fix="run `kvdistill prepare` first")
    return read_sealed(path, fix="delete the run's data/ folder and run `kvdistill prepare` again")


def read_split(run: Path, split: str) -> Sequence[Example]:
    """The examples of `train`, `val`, `test` or `teach`, in the order they were written; made when they are asked for.

    Raises RunFolderError where the stage has not finished, StoreError naming a file that is missing or altered.
    """
    if split not in SPLITS:
        raise RunFolderError(f"no split {split!r}", place=str(run), fix=f"use {', '.join(SPLITS)}")
    path = split_path(run, split)
    return read_table(path, read_manifest(run)["files"][path.name])


def read_table(path: Path, sha256: str) -> Sequence[Example]:
    """The examples of one such file, made when they are asked for. StoreError where it is missing or altered."""
    check_file(path, sha256)
    return _Examples(pq.read_table(path, schema=SCHEMA))


class ExampleRows(Sequence[Example]):
    """Rows that are made when they are asked for: by number, from the end too, or several by a slice."""

    @abstractmethod
    def row(self, number: int) -> Example:
        """The row of a number from 0 to the length."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))


class _Examples(ExampleRows):
    """Rows of a table as examples: token ids stay packed, 5 bytes a token and not 70, until asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._texts = {name: table.column(name).combine_chunks() for name in SCHEMA.names if name not in _LISTS}
        self._lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # starts (rows + 1), and values
        for name in _LISTS:
            column = table.column(name)
            lengths = column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
            parts = [chunk.flatten() for chunk in column.chunks]
            values = pa.chunked_array(parts, type=column.type.value_type).to_numpy()
            self._lists[name] = np.cumsum(np.concatenate([[0], lengths])).astype(np.int64), values
        self._num_rows = table.num_rows

    def __len__(self) -> int:
        return self._num_rows

    def row(self, number: int) -> Example:
        columns: dict[str, Any] = {name: column[number].as_py() or "" for name, column in self._texts.items()}
        for name, (starts, values) in self._lists.items():
            columns[name] = values[starts[number] : starts[number + 1]].tolist()
        return Example(**columns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)


def check_file(path: Path, sha256: str) -> None:
    """StoreError where the file is missing or its bytes are not those that were written."""
    fix = "delete the run's data/ folder and run `kvdistill prepare` again"
    if not path.is_file():
        raise StoreError("a prepared file is missing", place=str(path), fix=fix)
    if sha256_file(path) != sha256:
        raise StoreError("a prepared file was torn or altered (checksum differs)", place=str(path), fix=fix)
