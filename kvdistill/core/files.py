"""Files written whole or not at all (temporary name, flush to disk, rename), read with clear errors, and hashed.

Every file kvdistill leaves behind is written through this module, so a kill leaves either the old file
or the new one, and a full disk is one clear error with nothing good lost. Tensors are safetensors only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvdistill.core.errors import KVDistillError, RunFolderError, StoreError, TrainingStopped

_CHUNK_BYTES = 1 << 22
_FULL = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")


def disk_full_error(error: BaseException, path: Path | str) -> TrainingStopped | None:
    """The clear error behind one that means: no space left. Else None.

    Looked for in the error and in what it was raised from: libraries put their own around an OSError, or its words.
    """
    seen: set[int] = set()
    at: BaseException | None = None if isinstance(error, KVDistillError) else error  # clear already, and has its place
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        full = getattr(at, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(at) for words in _FULL):
            return TrainingStopped(
                "the disk is full: nothing that was already complete is lost",
                place=str(path),
                fix="free space (`kvdistill doctor` shows the run folder's disk), then give the same command again",
            )
        at = at.__cause__ or at.__context__
    return None


_UNUSABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


def path_error(error: OSError) -> KVDistillError | None:
    """The clear error behind an OSError that a path, its permissions or its disk are to blame for; else None."""
    path = "" if error.filename is None else str(error.filename)
    if error.errno in _UNUSABLE and path:
        shown = path if len(path) <= 200 else f"{path[:199]}…"
        return RunFolderError(f"the system refuses this path: {error.strerror}", place=shown, fix="give another path")
    return disk_full_error(error, path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed and takes `path`'s name, else it is removed."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if clear := disk_full_error(error, path):
            raise clear from error
        raise


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; NaN and infinities become null (JSON has no word for them)."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        text = json.dumps(finite(value), indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of contiguous CPU copies."""
    from safetensors.torch import save_file

    with replacing(path) as part:
        ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_file(ready, str(part), metadata=dict(metadata or {}))


def as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file of ours."""
    return json.loads(json.dumps(finite(value)))


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """One row at the end of a JSONL file, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_text(path, json.dumps(finite(row), ensure_ascii=False) + "\n")


def append_text(path: Path, text: str, *, flushed: bool = False) -> None:
    """More text at the end of a file, in one write. flushed: on the disk when this returns."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            if flushed:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if clear := disk_full_error(error, path):
            raise clear from error
        raise


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError("file is missing", place=str(path), fix="run the stage that writes it again") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, too deep
        raise RunFolderError(
            f"not valid JSON ({error})", place=str(path), fix="delete it and run the stage again"
        ) from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a torn last line (a kill while appending) is left out."""
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:  # not JSON, or a character cut in two
            if number < len(lines) - 1:
                raise RunFolderError(
                    "broken row", place=f"{path}:{number + 1}", fix="delete the file and run again"
                ) from None
    return rows


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole JSONL file at once."""
    write_text(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))


def keep_json_lines(path: Path, keep: Any) -> None:
    """Rewrite a JSONL file with only the rows for which `keep(row)` holds (resuming drops later steps)."""
    if path.exists():
        write_json_lines(path, [row for row in read_json_lines(path) if keep(row)])


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_stamps(folder: Path) -> list[list[Any]]:
    """Name, size and time of change of a folder's own files: a quick way to see that none was replaced."""
    files = sorted(file for file in folder.glob("*") if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def sha256_of(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes `folder`'s name when everything in it was written."""
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for file in sorted(part.rglob("*")):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            os.replace(folder, old)
            os.replace(part, folder)
            shutil.rmtree(old)
        else:
            os.replace(part, folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if clear := disk_full_error(error, folder):
            raise clear from error
        raise


def open_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file, mapped and not read; a torn file is named."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise StoreError("tensor file is missing", place=str(path), fix="run the stage that writes it again") from None
    except SafetensorError as error:
        raise StoreError(
            f"torn or altered safetensors file ({error})", place=str(path), fix="delete it and run the stage again"
        ) from None


def finite(value: Any) -> Any:
    """The value with null for NaN and infinities, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
