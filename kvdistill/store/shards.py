"""Folders of safetensors shards, named by what they were made from, and refused when that is not what is asked for.

A folder is `KIND-NAME-<hash of its identity>`. The identity is a plain dict of everything its content depends
on (model weights, tokenizer, texts, options). Shards are written one by one, each noted with its checksum in
`shards.jsonl`, so that a killed writer goes on where it stopped; `manifest.json` comes last and makes the
folder complete. A reader refuses a folder whose identity, sizes or checksums differ, and names the shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kvdistill.core.errors import StoreError
from kvdistill.core.files import (
    append_json_line,
    open_tensors,
    read_json,
    read_json_lines,
    sha256_file,
    sha256_of,
    write_json,
    write_json_lines,
    write_tensors,
)

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "shards.jsonl"


def store_folder(root: Path, kind: str, name: str, identity: Mapping[str, Any]) -> Path:
    return root / f"{kind}-{name}-{sha256_of({**identity, 'format': FORMAT})[:16]}"


class StoreWriter:
    """Writes the shards of one folder; picks up after a kill. `finish` makes it complete.

    root: the folder of all stores. kind: what is in it (`targets-train`, a fit, …). name: whose it is, a teacher's
    mostly. identity: everything its content depends on, as JSON-able values; the folder's name ends in its hash.
    """

    def __init__(self, root: Path, kind: str, name: str, identity: Mapping[str, Any]) -> None:
        self.folder = store_folder(root, kind, name, identity)
        self.kind, self.name, self.identity = kind, name, dict(identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards = self._good_shards()

    @property
    def num_shards(self) -> int:
        """Shards that are already there and sound: the next one to write has this number."""
        return len(self._shards)

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard, and note it in the journal once it is whole."""
        file = f"shard-{len(self._shards):05d}.safetensors"
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
        write_json(self.folder / MANIFEST, manifest)
        return self.folder

    def _good_shards(self) -> list[dict[str, Any]]:
        """The longest run of journalled shards that are whole; later ones are written again."""
        journal = self.folder / JOURNAL
        if not journal.exists():
            return []
        good: list[dict[str, Any]] = []
        rows = read_json_lines(journal)
        for row in rows:
            path = self.folder / row["file"]
            if not path.exists() or path.stat().st_size != row["bytes"] or sha256_file(path) != row["sha256"]:
                break
            good.append(row)
        if len(good) < len(rows) or not journal.read_bytes().endswith(b"\n"):  # a torn line must not be appended to
            write_json_lines(journal, good)
        return good


class StoreReader:
    """A complete, checked folder: `shards` holds the mapped tensors of each shard, in order."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = read_json(folder / MANIFEST)
        self.extra: dict[str, Any] = self.manifest["extra"]
        if verify:
            verify_shards(folder, self.manifest)
        self.shards = [open_tensors(folder / row["file"]) for row in self.manifest["shards"]]


def find_store(root: Path, kind: str, name: str, identity: Mapping[str, Any], *, make: str) -> Path:
    """The folder with this identity, or a StoreError that says what there is instead.

    root, kind, name, identity: as given to `StoreWriter`. make: the command that writes it, for the error's fix.
    """
    folder = store_folder(root, kind, name, identity)
    if (folder / MANIFEST).exists():
        found = read_json(folder / MANIFEST)["identity"]
        if found != identity:  # somebody renamed or copied a folder over this one
            raise StoreError(
                f"the store was made with other {_differences(found, identity)}",
                place=str(folder),
                fix=f"delete it and run `{make}`",
            )
        return folder
    others = {path.parent: read_json(path)["identity"] for path in sorted(root.glob(f"{kind}-{name}-*/{MANIFEST}"))}
    if others:  # name the one that is nearest: arms with other options have stores of their own beside it
        nearest = min(others, key=lambda other: len(_differing(others[other], identity)))
        raise StoreError(
            f"the store that is there was made with other {_differences(others[nearest], identity)}",
            place=str(nearest),
            fix=f"run `{make}` (the old folder is not touched)",
        )
    raise StoreError(f"there is no store of {kind} for {name!r} yet", place=str(root), fix=f"run `{make}` first")


def verify_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every shard's size and checksum with the manifest; the first that differs is named."""
    for row in manifest["shards"]:
        path = folder / row["file"]
        if not path.exists():
            what = "shard is missing"
        elif path.stat().st_size != row["bytes"]:
            what = f"shard is truncated or altered: {path.stat().st_size} bytes, {row['bytes']} in the manifest"
        elif sha256_file(path) != row["sha256"]:
            what = "shard is altered: its checksum differs from the manifest's"
        else:
            continue
        raise StoreError(what, place=str(path), fix=f"delete {folder} and run the stage that wrote it again")


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = _differing(found, wanted)
    return ", ".join(f"{key} ({_short(found.get(key))}, now {_short(wanted.get(key))})" for key in names) or "options"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
