"""Marks: files written last, which say that what stands beside them is whole, with the checksum of every file.

A mark is JSON: facts of its stage, `files` (path below the mark's folder -> bytes, sha256) and `sha256` of all that.
One that cannot be read, or whose own checksum is wrong, says nothing: what it marks is not finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import read_json, sha256_file, sha256_of, write_json


def write_mark(mark: Path, facts: Mapping[str, Any], made: Iterable[str]) -> None:
    """Mark files and folders (names beside the mark; those that are not there do not belong to it) as finished."""
    files: dict[str, Any] = {}
    for name in made:
        path = mark.parent / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                number = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                files[file.relative_to(mark.parent).as_posix()] = number
    content = {**facts, "files": files}
    write_json(mark, {**content, "sha256": sha256_of(content)})


def read_mark(mark: Path) -> dict[str, Any] | None:
    """What a mark says, or None where there is none or it is damaged."""
    try:
        content = read_json(mark)
    except (RunFolderError, UnicodeDecodeError, OSError):
        return None
    if not isinstance(content, dict) or content.pop("sha256", None) != sha256_of(content):
        return None
    return content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with its own checksum in it, for files that are read as they are."""
    return {**content, "sha256": sha256_of(content)}


def read_sealed(path: Path, *, fix: str) -> dict[str, Any]:
    """What was sealed, without the checksum. RunFolderError where it is something else or was altered; what an earlier
    version left without a checksum is taken as it is."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise RunFolderError("this file holds something else than what is written here", place=str(path), fix=fix)
    if "sha256" in content and content.pop("sha256") != sha256_of(content):
        raise RunFolderError("this file was altered: its own checksum differs", place=str(path), fix=fix)
    return content


def check_marked(mark: Path, made: str = "", *, fix: str) -> None:
    """Compare files with their mark, all or those of one file or folder (`made`). RunFolderError names the first that
    is missing or altered, and an unknown one in a folder. Without a sound mark there is nothing to compare with."""
    content = read_mark(mark)
    if content is None:
        return
    files = {name: said for name, said in content["files"].items() if name.startswith(made)}
    for name, said in files.items():
        path = mark.parent / name
        if not path.is_file():
            what = "this file is missing"
        elif path.stat().st_size != said["bytes"] or sha256_file(path) != said["sha256"]:
            what = "this file is not the one that was written here: its checksum differs"
        else:
            continue
        raise RunFolderError(what, place=str(path), fix=fix)
    for folder in {(mark.parent / name).parent for name in files} - {mark.parent}:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.relative_to(mark.parent).as_posix() not in files:
                raise RunFolderError("this file was not written here", place=str(path), fix=f"delete it, or {fix}")
