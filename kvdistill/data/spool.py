"""Problems on disk while they are being dealt and checked: memory stays flat however many there are.

`Spool` appends problems to a file without a name (it is gone when the process ends, however it ends) and reads any of
them back by number; `Selection` is a list of such numbers that looks like a list of problems. Knows no split, no task.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import overload

from kvdistill.data.problems import Problem

_FIELDS = ("task", "id", "question", "reasoning", "answer", "language", "rule")
_FLUSH_BYTES = 1 << 20
_BATCH = 1000  # problems read at once


class Spool:
    """Problems by number, in the order they were appended. folder: an existing folder on the disk to use."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the problems are used)
        self._starts = array("Q", [0])
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def append(self, problem: Problem) -> int:
        """Keep a problem; its number."""
        line = json.dumps([getattr(problem, name) for name in _FIELDS], ensure_ascii=False).encode()
        self._pending.append(line)
        self._pending_bytes += len(line)
        self._starts.append(self._starts[-1] + len(line))
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()
        return len(self._starts) - 2

    def read(self, numbers: Iterable[int]) -> list[Problem]:
        """The problems of these numbers, in this order."""
        self._flush()
        file, starts = self._file.fileno(), self._starts
        return [Problem(*json.loads(os.pread(file, starts[n + 1] - starts[n], starts[n]))) for n in numbers]

    def _flush(self) -> None:
        if self._pending:
            os.pwrite(self._file.fileno(), b"".join(self._pending), self._starts[-1] - self._pending_bytes)
            self._pending, self._pending_bytes = [], 0


class Selection(Sequence[Problem]):
    """Some problems of a spool, in an order of their own."""

    def __init__(self, spool: Spool, numbers: Iterable[int] = ()) -> None:
        self.spool = spool
        self.numbers = array("Q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Problem | Selection:
        if isinstance(index, slice):
            return Selection(self.spool, self.numbers[index])
        return self.spool.read([self.numbers[index]])[0]

    def __iter__(self) -> Iterator[Problem]:
        return chain.from_iterable(self.batches(_BATCH))

    def batches(self, size: int) -> Iterator[list[Problem]]:
        """All of them, so many at a time."""
        for start in range(0, len(self.numbers), size):
            yield self.spool.read(self.numbers[start : start + size])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

    def without(self, numbers: set[int]) -> Selection:
        """The selection less some of its problems, named by their numbers in the spool."""
        return Selection(self.spool, (number for number in self.numbers if number not in numbers))


def spool_beside(folder: Path | None) -> Spool:
    """A spool on the disk of `folder`, which need not exist yet; None: on the disk of temporary files."""
    if folder is None:
        return Spool(Path(tempfile.gettempdir()))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return Spool(existing)
