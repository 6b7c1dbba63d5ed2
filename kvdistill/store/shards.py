"""Folders of safetensors shards, named by what they were made from, and refused when that is not what is asked for.

A folder is `KIND-NAME-<hash of its identity>`. The identity is a plain dict of everything its content depends
on (model weights, tokenizer, texts, options). Shards are written one by one, each noted with its checksum in
`shards.jsonl`, so that a killed writer goes on where it stopped; `manifest.json` comes last and makes the
folder complete. A reader refuses a folder whose identity, sizes or checksums differ, and names the shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from kvdistill.core.errors import KVDistillError, RunFolderError, StoreError
from kvdistill.core.files import (
    append_json_line,
    as_json,
    open_tensors,
    read_json,
    sha256_file,
    sha256_of,
    write_json,
    write_json_lines,
    write_tensors,
)
from kvdistill.core.layout import folder_lock

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "shards.jsonl"
_KEYS = {"format", "kind", "name", "identity", "shards", "extra"}


def store_folder(root: Path, kind: str, name: str, identity: Mapping[str, Any]) -> Path:
    return root / f"{kind}-{name}-{sha256_of({**identity, 'format': FORMAT})[:16]}"


class StoreWriter:
    """Writes the shards of one folder; picks up after a kill. `finish` makes it complete.

    Use as a context manager, which holds the folder's lock: what is there is looked at inside, when nobody else can
    add to it, and all decisions rest on that.

    root: the folder of all stores. kind: what is in it (`targets-train`, a fit, …). name: whose it is, a teacher's
    mostly. identity: everything its content depends on, as JSON-able values; the folder's name ends in its hash.
    """

    def __init__(self, root: Path, kind: str, name: str, identity: Mapping[str, Any]) -> None:
        self.folder = store_folder(root, kind, name, identity)
        self.kind, self.name, self.identity = kind, name, dict(identity)
        self._shards: list[dict[str, Any]] = []
        self._held = ExitStack()
        self._is_open = False

    def __enter__(self) -> StoreWriter:
        self._held.enter_context(folder_lock(self.folder, wait=True))
        try:
            self._shards = read_manifest(self.folder)["shards"] if self.complete else self._good_shards()
        except BaseException:
            self._held.close()
            raise
        self._is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._is_open = False
        self._held.close()

    @property
    def num_shards(self) -> int:
        """Shards that are already there and sound: the next one to write has this number."""
        return len(self._shards)

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard, and note it in the journal once it is whole."""
        assert self._is_open, "a store is written under its lock"
        file = shard_name(len(self._shards))
        path = self.folder / file
        write_tensors(path, tensors)
        row = {"file": file, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        append_json_line(self.folder / JOURNAL, row)
        self._shards.append(row)

    def finish(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Write the manifest, which makes the folder complete. extra: what readers need beside the tensors."""
        manifest = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "identity": self.identity,
            "shards": self._shards,
            "extra": dict(extra or {}),
        }
        manifest = as_json(manifest)  # as it will be read
        write_json(self.folder / MANIFEST, {**manifest, "sha256": sha256_of(manifest)})
        return self.folder

    def start_over(self) -> None:
        """Forget what is there: it is made anew as a whole."""
        for name in (MANIFEST, JOURNAL):  # first what says that something is there
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.glob("shard-*"):
            path.unlink()
        self._shards = []

    def _good_shards(self) -> list[dict[str, Any]]:
        """The longest run of journalled shards that are whole and in order; later ones are written again."""
        journal = self.folder / JOURNAL
        if not journal.exists():
            return []
        good: list[dict[str, Any]] = []
        lines = journal.read_bytes().split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
                path = self.folder / row["file"]
                in_order = row["file"] == shard_name(len(good))
                if not in_order or path.stat().st_size != row["bytes"] or sha256_file(path) != row["sha256"]:
                    break
            except (ValueError, KeyError, TypeError, OSError):  # torn, or not there
                break
            good.append(row)
        if len(lines) != len(good) + 1 or lines[-1]:  # what follows must not be appended to
            write_json_lines(journal, good)
        return good


class StoreReader:
    """A complete, checked folder: `shards` holds the mapped tensors of each shard, in order."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.extra: dict[str, Any] = self.manifest["extra"]
        if verify:
            verify_shards(folder, self.manifest)
        self.shards = [open_tensors(folder / row["file"]) for row in self.manifest["shards"]]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the writer left last. StoreError where it is damaged, edited or of another form; RunFolderError: missing.

    Stores of before 0.2 carry no checksum of it.
    """
    path = folder / MANIFEST
    try:
        found = read_json(path)
        without = {key: value for key, value in found.items() if key != "sha256"}
        known = {*without} == _KEYS and found["format"] == FORMAT
        if known and ("sha256" not in found or found["sha256"] == sha256_of(without)):
            return found
    except (AttributeError, KeyError, UnicodeDecodeError):
        pass
    except RunFolderError as error:
        if not path.exists():
            raise
        raise StoreError(error.what, place=error.place, fix=_again(folder)) from None
    raise StoreError("the manifest is altered, or of another version", place=str(path), fix=_again(folder))


def find_store(root: Path, kind: str, name: str, identity: Mapping[str, Any], *, make: str) -> Path:
    """The folder with this identity, or a StoreError that says what there is instead.

    root, kind, name, identity: as given to `StoreWriter`. make: the command that writes it, for the error's fix.
    """
    folder = store_folder(root, kind, name, identity)
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)["identity"]
        if found != identity:  # somebody renamed or copied a folder over this one
            raise StoreError(
                f"the store was made with other {_differences(found, identity)}",
                place=str(folder),
                fix=f"delete it and run `{make}`",
            )
        return folder
    others: dict[Path, Mapping[str, Any]] = {}
    for path in sorted(root.glob(f"{kind}-{name}-*/{MANIFEST}")):
        with suppress(KVDistillError):  # a damaged one is not what is asked for
            others[path.parent] = read_manifest(path.parent)["identity"]
    if others:  # name the one that is nearest: arms with other options have stores of their own beside it
        nearest = min(others, key=lambda other: len(_differing(others[other], identity)))
        raise StoreError(
            f"the store that is there was made with other {_differences(others[nearest], identity)}",
            place=str(nearest),
            fix=f"run `{make}` (the old folder is not touched)",
        )
    raise StoreError(f"there is no store of {kind} for {name!r} yet", place=str(root), fix=f"run `{make}` first")


def verify_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every shard once and in order, with the manifest's size and checksum, and no others; the first wrong is named."""
    for number, row in enumerate(manifest["shards"]):
        path = folder / row["file"]
        if row["file"] != shard_name(number):
            what = f"shard stands in place {number} of the manifest: one is repeated, missing or of another store"
        elif not path.exists():
            what = "shard is missing"
        elif path.stat().st_size != row["bytes"]:
            what = f"shard is truncated or altered: {path.stat().st_size} bytes, {row['bytes']} in the manifest"
        elif sha256_file(path) != row["sha256"]:
            what = "shard is altered: its checksum differs from the manifest's"
        else:
            continue
        raise StoreError(what, place=str(path), fix=_again(folder))
    listed = {row["file"] for row in manifest["shards"]} | {MANIFEST, JOURNAL}
    for path in sorted(folder.iterdir()):
        if path.name not in listed and not path.name.startswith("."):  # locks, and what a kill left
            what = "this file is of no shard of the manifest"
            raise StoreError(what, place=str(path), fix=f"take it away, or {_again(folder)}")


def _again(folder: Path) -> str:
    return f"delete {folder} and run the stage that wrote it again"


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = _differing(found, wanted)
    return ", ".join(f"{key} ({_short(found.get(key))}, now {_short(wanted.get(key))})" for key in names) or "options"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
