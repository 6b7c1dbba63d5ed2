"""Which files stand for a path of a layout: the listed one, or the same split in another form beside it.

`gsm8k/train.jsonl` is also found as `train.json`, `train.parquet`, `train.csv` or `train.tsv`, as a folder `train` that
`datasets` saved, or as the hub's parts (`train-00000-of-00002.parquet`). A `*` in a path stands for every folder (or
file) there. Reads names only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line
from kvdistill.data.sources.files import unreadable

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_NUMBERS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Found:
    """Files (or one saved folder) in the order of their rows. shown: their path below the folder, `*` for several."""

    paths: tuple[Path, ...]
    shown: str


def find(folder: Path, listed: str) -> Found | None:
    """What is there of `folder/listed`, or None. DataError where one of several parts is missing."""
    parent, _, name = listed.rpartition("/")
    try:
        if "*" not in listed:
            return _find_one(folder, parent, name)
        every = sorted(filter(Path.is_dir, folder.glob(parent)), key=_natural) if "*" in parent else [folder / parent]
        if "*" in name:
            paths = tuple(path for one in every for path in sorted(one.glob(name), key=_natural))
        else:
            each = [_find_one(folder, one.relative_to(folder).as_posix(), name) for one in every]
            paths = tuple(path for found in each if found for path in found.paths)
    except OSError as error:  # a folder that may not be searched
        raise unreadable(Path(error.filename or folder), error, "data.root") from error
    return Found(paths, listed) if paths else None


def _find_one(folder: Path, parent: str, name: str) -> Found | None:
    suffix = Path(name).suffix
    stem, others = (name.removesuffix(suffix), SUFFIXES) if suffix in SUFFIXES else (name, ())
    for one in (name, *(stem + other for other in others)):
        path = folder / parent / one
        if path.exists() or path.is_symlink():  # a link to nothing is named when it is opened
            return Found((path,), f"{parent}/{one}")
    if not others:
        return None
    if (folder / parent / stem / "state.json").is_file():
        return Found((folder / parent / stem,), f"{parent}/{stem}")
    return _find_parts(folder / parent, parent, stem)


def _find_parts(folder: Path, parent: str, stem: str) -> Found | None:
    """`stem-00000-of-00002.parquet`, …: all of them, in order; the hub sometimes puts a hash behind the numbers."""
    endings = "|".join(map(re.escape, SUFFIXES))
    pattern = re.compile(rf"{re.escape(stem)}-([0-9]+)-of-([0-9]+)(?:-[0-9a-f]+)?({endings})")
    if not folder.is_dir():
        return None
    matches = [match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    matches.sort(key=lambda match: (int(match[1]), match[0]))
    if not matches:
        return None
    number = int(matches[0][2])
    if [int(match[1]) for match in matches] != list(range(number)):
        raise DataError(
            f"{stem} should be {number} files ({matches[0][0]}, …), and {len(matches)} are there",
            place=at_line(folder),
            fix="copy the missing ones there, or take away those that do not belong together",
        )
    shown = matches[0][0] if number == 1 else f"{stem}-*{matches[0][3]}"
    return Found(tuple(folder / match[0] for match in matches), f"{parent}/{shown}")


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts `10.json` after `9.json`: every second piece is a number."""
    pieces = _NUMBERS.split(path.as_posix())
    return [(int(piece), "") if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]
