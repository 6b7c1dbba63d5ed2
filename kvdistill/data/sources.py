"""Rows from a local JSONL file or from the Hugging Face hub, with the place of every row.

Data files are other people's: each thing that can be wrong with one is a DataError with `file:line` and a fix.
Knows what a row is (a JSON object), not what is in it.
"""

from __future__ import annotations

import codecs
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvdistill.core.errors import DataError
from kvdistill.core.files import sha256_file

_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RawRow:
    """One row as it was read: its columns, where it stands, and its number in the source (from 1)."""

    columns: Mapping[str, Any]
    place: str
    number: int


@dataclass(frozen=True)
class Source:
    """What a split was read from, for the manifest: `kind` is file, hub or generated."""

    task: str
    kind: str
    place: str
    sha256: str = ""


def file_source(task: str, path: Path, shown_as: str) -> Source:
    return Source(task, "file", shown_as, sha256_file(path))


def read_jsonl(path: Path, *, place: str) -> list[RawRow]:
    """All rows of a JSONL file; blank lines are passed over.

    place: the recipe key that named the file. Raises DataError for a missing, empty, non-UTF-8 or BOM-marked file,
    a folder, a broken row, a row that is not an object.
    """
    data = _read_bytes(path, place)
    rows: list[RawRow] = []
    for number, line in enumerate(data.split(b"\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            where = f"{path}:{number}"
            rows.append(RawRow(_read_object(line, where), where, number))
    if not rows:
        raise DataError("the file has no rows", place=str(path), fix="give a file with one JSON object a line")
    return rows


def _read_bytes(path: Path, place: str) -> bytes:
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file", place=place, fix="name the JSONL file inside it")
    if not path.exists():
        raise DataError(f"file not found: {path}", place=place, fix="check the path (relative to where you start)")
    if not path.is_file():
        raise DataError(f"{path} is not a plain file", place=place, fix="name a JSONL file")
    try:
        data = path.read_bytes()
    except PermissionError:
        raise DataError(f"{path} may not be read", place=place, fix="change its permissions (chmod +r)") from None
    if data.startswith(_BOMS):
        raise DataError("the file begins with a byte order mark", place=f"{path}:1", fix="save it as UTF-8 without BOM")
    return data


def _read_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1})", place=where, fix="convert the file to UTF-8") from None
    try:
        value = json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        fix = "write one JSON object a line" + (", not one JSON array" if text.lstrip().startswith("[") else "")
        raise DataError(f"broken JSON ({error})", place=where, fix=fix) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"the row is a JSON {kind}, not an object", place=where, fix="write one JSON object a line")
    return value


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def read_hub(path: str, config: str | None, split: str, *, local_layout: str) -> list[RawRow]:
    """All rows of a split of a hub data set (or of `datasets`' cache of it).

    Raises DataError naming the local alternative where the hub cannot be reached or has no such data set.
    """
    fix = f"set data.root=DIR with a local copy ({local_layout}), or check the network"
    import datasets

    cached = Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")
    if not cached.exists() and not hub_reachable():
        raise DataError(f"the Hugging Face hub cannot be reached to load {path}", place="data.root", fix=fix)
    try:
        table = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"cannot load {path} from the hub: {reason}", place="data.root", fix=fix) from error
    return [RawRow(row, f"{path}:{split}:{number}", number) for number, row in enumerate(_plain(table), start=1)]


def _plain(table: Any) -> Iterator[Mapping[str, Any]]:
    yield from table


def hub_reachable() -> bool:
    """Whether the hub answers within seconds. The hub's own client retries for minutes before it gives up.

    Behind a proxy the question cannot be asked this way, so the answer is yes.
    """
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(hub.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True
