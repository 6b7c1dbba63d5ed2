"""What an arm trains on beside the run's training problems (`texts`), as the student reads it.

    teachers  the `teach` problems of the tasks that scratch teachers were trained on: the teachers' data as plain text
    written   solutions that teachers wrote and that are right (`stages/write.py`)

They stand behind the training problems, and one order goes through all of them, so that an arm takes as many steps of
as many examples as any other and sees some of each in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdistill.arms.setting import Setting
from kvdistill.arms.texts import PickedRows
from kvdistill.core.errors import DataError, RunFolderError
from kvdistill.core.layout import written_folder, written_mark
from kvdistill.core.marks import read_mark
from kvdistill.data.encode import Example
from kvdistill.data.tables import ExampleRows, read_table

SOLUTIONS = "solutions.parquet"


class RowsBehind(ExampleRows):
    """Rows of two tables, one behind the other."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def row(self, number: int) -> Example:
        behind = number - len(self._first)
        return self._first[number] if behind < 0 else self._second[behind]


def studied_beside(setting: Setting, names: Sequence[str]) -> Sequence[Example]:
    """The `teach` problems of all tasks that any of these teachers studied. DataError where there is none."""
    tasks = {task for teacher in setting.recipe.teachers if teacher.name in names for task in teacher.train_on}
    rows = setting.split("teach")
    found = PickedRows(rows, [number for number, row in enumerate(rows) if row.task in tasks])
    if not found:
        raise DataError(
            f"there are no `teach` problems of {', '.join(sorted(tasks))} to read beside the training problems",
            place="data.tasks",
            fix="give these tasks a `teach` count",
        )
    return found


def written_beside(setting: Setting, names: Sequence[str], own_numbers: Sequence[int]) -> Sequence[Example]:
    """These teachers' solutions, in their order; what several wrote alike, or stands in the training problems, once.

    own_numbers: rows of the training split that the arm has. Of the others it gets no solutions either.
    """
    train = setting.split("train")
    seen = {_text(train[number]) for number in own_numbers}
    known = {train[number].doc_hash for number in own_numbers}
    others = {row.doc_hash for row in train} - known
    found: list[Example] = []
    for name in names:
        path = written_folder(setting.own_run, name) / SOLUTIONS
        for row in read_table(path, writing_facts(setting, name)["files"][SOLUTIONS]["sha256"]):
            if _text(row) not in seen and row.doc_hash not in others:
                seen.add(_text(row))
                found.append(row)
    return found


def _text(row: Example) -> tuple[str, ...]:
    return row.task, row.doc_hash, row.style, ",".join(map(str, row.input_ids))


def writing_facts(setting: Setting, name: str) -> dict[str, Any]:
    """What a teacher's mark says of what it wrote. RunFolderError where it has not."""
    folder = written_folder(setting.own_run, name)
    said = read_mark(written_mark(folder))
    if said is None:
        raise RunFolderError(
            f"teacher {name!r} has not written its solutions", place=str(folder), fix="run `kvdistill write RECIPE`"
        )
    return said
