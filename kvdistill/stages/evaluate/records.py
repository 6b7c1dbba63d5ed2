"""The folder of an evaluation: whose answers are in it, and the records, appended chunk by chunk.

    identity.json   the model, and per evaluation its options, versions and how far it was asked
    records.jsonl   one line a question
    results.json    scores, written from the records when everything asked for is answered

A kill leaves whole lines and perhaps a torn one, which is dropped. What was asked otherwise, or of another model, is
refused by name. Knows no question and no model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import disk_full_error, read_json, read_json_lines, write_json
from kvdistill.core.layout import folder_lock
from kvdistill.stages.evaluate.exams import AbstractExam

IDENTITY, RECORDS, RESULTS = "identity.json", "records.jsonl", "results.json"
_FORMAT = 1
Key = tuple[str, str, str, str]


class AnswerBook:
    """The records of one model in one folder. `answered`: key -> record, in the order they were written."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        self.answered: dict[Key, dict[str, Any]] = {}
        if (folder / RECORDS).exists():
            _drop_torn_end(folder / RECORDS)
            self.answered = {key_of(row): row for row in read_json_lines(folder / RECORDS)}

    @property
    def evaluations(self) -> dict[str, Any]:
        """Evaluation -> {options, limits, and of its last call: limit, members, questions, notes}."""
        return self._identity["evaluations"]

    @property
    def asked(self) -> dict[str, Any]:
        """What identifies the model."""
        return self._identity["asked"]

    def limits(self, evaluation: str) -> list[int | None]:
        """Up to where it was ever asked, rising, as far as the last call goes. None: all questions."""
        entry = self.evaluations[evaluation]
        return entry["limits"][: entry["limits"].index(entry["limit"]) + 1]

    def rows(self, evaluation: str) -> list[dict[str, Any]]:
        """The records of what its last call asked for."""
        entry = self.evaluations[evaluation]
        members, limit = {*entry["members"]}, entry["limit"]
        return [
            row
            for row in self.answered.values()
            if row["evaluation"] == evaluation and row["task"] in members and (limit is None or row["number"] < limit)
        ]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows at the end of the file, on the disk when this returns."""
        clean = [_finite(row) for row in rows]  # in memory as it will be read back
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in clean)
        try:
            with open(self.folder / RECORDS, "a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if clear := disk_full_error(error, self.folder / RECORDS):
                raise clear from error
            raise
        self.answered |= {key_of(row): row for row in clean}


def key_of(row: Mapping[str, Any]) -> Key:
    return row["evaluation"], row["task"], row["id"], row["style"]


@contextmanager
def open_book(
    folder: Path,
    asker: Mapping[str, Any],
    exams: Mapping[str, Sequence[AbstractExam]],
    options: Mapping[str, Any],
    limit: int | None,
) -> Iterator[AnswerBook]:
    """The folder's records, after checking that they answer the same questions, asked alike, of the same model.

    asker: what identifies the model. exams: evaluation -> its members. options: what else changes a prompt.
    Raises RunFolderError that names what differs, before anything is written.
    """
    check_book(folder, asker, exams, options)
    with folder_lock(folder, wait=False):
        identity = check_book(folder, asker, exams, options)
        for name, members in exams.items():
            _extend(identity["evaluations"][name], members, limit)
        if not (folder / IDENTITY).exists() or read_json(folder / IDENTITY) != identity:
            write_json(folder / IDENTITY, identity)
        yield AnswerBook(folder, identity)


def check_book(
    folder: Path, asker: Mapping[str, Any], exams: Mapping[str, Sequence[AbstractExam]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity that the folder will have. RunFolderError where it holds something else."""
    wanted = {
        name: {**options, "members": {exam.name: exam.identity() for exam in members}}
        for name, members in exams.items()
    }
    identity: dict[str, Any] = {"format": _FORMAT, "asked": _plain(asker), "evaluations": {}}
    if (folder / IDENTITY).exists():
        identity = read_json(folder / IDENTITY)
        _refuse_difference(folder, "model", identity.get("asked"), _plain(asker))
    elif folder.exists() and (not folder.is_dir() or any(entry.name != ".lock" for entry in folder.iterdir())):
        what = f"this folder holds files but no {IDENTITY}" if folder.is_dir() else "this is a file, not a folder"
        raise RunFolderError(what, place=str(folder), fix="give an empty or new folder with --out")
    for name, now in wanted.items():
        there = identity["evaluations"].setdefault(name, {"options": _plain(now), "limits": []})
        _refuse_difference(folder, name, there["options"], _plain(now))
        members = {**there["options"]["members"], **now["members"]}
        there["options"] = _plain({**now, "members": members})
    return identity


def _extend(entry: dict[str, Any], members: Sequence[AbstractExam], limit: int | None) -> None:
    limits = {*entry["limits"], limit}
    entry["limits"] = [*sorted(one for one in limits if one is not None), *([None] if None in limits else [])]
    entry["limit"] = limit
    entry["members"] = [exam.name for exam in members]
    entry["questions"] = sum(len(exam) if limit is None else min(limit, len(exam)) for exam in members)
    entry["notes"] = sorted({exam.note for exam in members if exam.note})


def _refuse_difference(folder: Path, where: str, there: Any, now: Any) -> None:
    found = _first_difference(there, now, where)
    if found:
        raise RunFolderError(
            f"this folder holds answers to something else: {found}",
            place=str(folder),
            fix="give another folder with --out, or delete this one to start over",
        )


def _first_difference(there: Any, now: Any, where: str) -> str | None:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        # a member that only one of the two has (a file more, or less, below data.root) is asked or left as it is
        keys = {*there} & {*now} if where.endswith(".members") else {*there, *now}
        for key in sorted(keys):
            if found := _first_difference(there.get(key), now.get(key), f"{where}.{key}"):
                return found
        return None
    if there == now:
        return None
    shown = [json.dumps(value, ensure_ascii=False)[:70] for value in (there, now)]
    return f"{where} ({shown[0]} there, {shown[1]} now)"


def _drop_torn_end(path: Path) -> None:
    """Cut off what follows the last line end: a kill while appending."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _finite(row: Any) -> Any:
    """NaN and infinities as null: JSON has no word for them."""
    if isinstance(row, float):
        return row if math.isfinite(row) else None
    if isinstance(row, Mapping):
        return {str(key): _finite(value) for key, value in row.items()}
    return [_finite(value) for value in row] if isinstance(row, list | tuple) else row
