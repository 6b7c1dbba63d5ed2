"""Rows from a local file (JSONL, JSON), a saved data set folder or the Hugging Face hub, with the place of every row.

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
from kvdistill.core.files import sha256_file, sha256_of

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
    """A file with its checksum; of a saved data set's folder, the checksum over those of its files."""
    if path.is_dir():
        parts = {part.name: sha256_file(part) for part in sorted(path.iterdir()) if part.is_file()}
        return Source(task, "folder", shown_as, sha256_of(parts))
    return Source(task, "file", shown_as, sha256_file(path))


def read_rows(path: Path, *, place: str) -> list[RawRow]:
    """All rows of a folder saved by `datasets`, a `.json` file (array, or objects one after another), or JSONL."""
    if path.is_dir():
        return read_saved_folder(path, place=place)
    return read_json_objects(path, place=place) if path.suffix == ".json" else read_jsonl(path, place=place)


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


def read_json_objects(path: Path, *, place: str) -> list[RawRow]:
    """All rows of one JSON array of objects, or of objects one after another (however many lines each takes).

    A row's place is the line on which its object begins. DataError as `read_jsonl`, and for a torn array.
    """
    text = _decode(_read_bytes(path, place), path)
    decoder = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant)
    is_array = text.lstrip().startswith("[")
    rows: list[RawRow] = []
    at, line, counted = _skip_space(text, text.find("[") + 1 if is_array else 0), 1, 0
    while at < len(text) and not (is_array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            fix = "mend the JSON there (the file may be cut off)"
            raise DataError(f"broken JSON ({error.msg})", place=f"{path}:{error.lineno}", fix=fix) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"broken JSON ({error})", place=where, fix="write one JSON object a row") from None
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise DataError(f"the row is a JSON {kind}, not an object", place=where, fix="write one JSON object a row")
        rows.append(RawRow(value, where, len(rows) + 1))
        at = _skip_space(text, at)
        if is_array:
            at = _skip_comma(text, at, path)
    if is_array and text[at + 1 :].strip():
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        raise DataError("text after the end of the array", place=where, fix="one array a file")
    if not rows:
        raise DataError("the file has no rows", place=str(path), fix="give a file with JSON objects")
    return rows


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _skip_comma(text: str, at: int, path: Path) -> int:
    """Past the comma between two elements; stays at the closing bracket. DataError for anything else."""
    if at < len(text) and text[at] == "]":
        return at
    after = _skip_space(text, at + 1)
    if at >= len(text) or text[at] != "," or after >= len(text) or text[after] == "]":
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        raise DataError("broken JSON array (cut off, or a comma too few or too many)", place=where, fix="mend it there")
    return after


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("not UTF-8", place=f"{path}:{line}", fix="convert the file to UTF-8") from None


def read_saved_folder(path: Path, *, place: str) -> list[RawRow]:
    """All rows of one split that `datasets` saved (`save_to_disk`): arrow files and `state.json`."""
    import datasets

    fix = "give the folder of one split, as `Dataset.save_to_disk` writes it"
    if not (path / "state.json").is_file():
        raise DataError(f"{path} is not a saved data set (it holds no state.json)", place=place, fix=fix)
    try:
        table = datasets.Dataset.load_from_disk(str(path))
        rows = [RawRow(row, f"{path}:{number}", number) for number, row in enumerate(_plain(table), start=1)]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"cannot read the saved data set: {reason}", place=str(path), fix=fix) from error
    if not rows:
        raise DataError("the saved data set has no rows", place=str(path), fix=fix)
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
