"""The prepared splits on disk: one parquet file each and a manifest that says what is in them.

`manifest.json` is written last by `prepare`; with it the files are complete, and each is checked against its
checksum when read. Fingerprints are taken over the rows' content, so where a row stands in its source, or how the
file is compressed, changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvdistill.core.errors import RunFolderError, StoreError
from kvdistill.core.files import read_json, replacing, sha256_file
from kvdistill.core.layout import data_folder
from kvdistill.data.encode import Example
from kvdistill.data.problems import SPLITS

MANIFEST = "manifest.json"
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("style", pa.string()),
        ("prompt", pa.string()),
        ("reasoning", pa.string()),
        ("answer", pa.string()),
        ("language", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.int8())),
        ("doc_hash", pa.string()),
        ("prompt_hash", pa.string()),
    ]
)


def split_path(run: Path, split: str) -> Path:
    return data_folder(Path(run)) / f"{split}.parquet"


def write_split(run: Path, split: str, examples: Sequence[Example]) -> str:
    """Write a split's parquet file; its SHA-256."""
    columns = {name: [getattr(example, name) for example in examples] for name in SCHEMA.names}
    path = split_path(run, split)
    with replacing(path) as part:
        pq.write_table(pa.table(columns, schema=SCHEMA), part, compression="zstd")
    return sha256_file(path)


def read_manifest(run: Path) -> dict[str, Any]:
    """What `prepare` left; RunFolderError where it has not finished."""
    path = data_folder(Path(run)) / MANIFEST
    if not path.is_file():
        raise RunFolderError("the data is not prepared", place=str(path), fix="run `kvdistill prepare` first")
    return read_json(path)


def read_split(run: Path, split: str) -> list[Example]:
    """All examples of `train`, `val` or `test`, in the order they were written.

    Raises RunFolderError where the stage has not finished, StoreError naming a file that is missing or altered.
    """
    if split not in SPLITS:
        raise RunFolderError(f"no split {split!r}", place=str(run), fix=f"use {', '.join(SPLITS)}")
    manifest = read_manifest(run)
    path = split_path(run, split)
    check_file(path, manifest["files"][path.name])
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    return [Example(**row) for row in rows]


def check_file(path: Path, sha256: str) -> None:
    """StoreError where the file is missing or its bytes are not those that were written."""
    fix = "delete the run's data/ folder and run `kvdistill prepare` again"
    if not path.is_file():
        raise StoreError("a prepared file is missing", place=str(path), fix=fix)
    if sha256_file(path) != sha256:
        raise StoreError("a prepared file was torn or altered (checksum differs)", place=str(path), fix=fix)


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over content and order of the rows (texts, style, gold answer, token ids), ids left out."""
    digest = hashlib.sha256()
    for example in examples:
        row = dataclasses.asdict(example) | {"id": ""}
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
