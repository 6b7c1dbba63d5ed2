"""What a task is: where its problems come from, how they are written, how answers are read and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.problems import Problem, Row, Style
from kvdistill.data.sources import RawRow, Source, file_source, read_hub, read_jsonl


@dataclass(frozen=True)
class Loaded:
    """A task's problems before they are split.

    problems: train and val are taken from these, and test too unless `test` holds the publisher's own.
    in_order: the order is already random (generated), so no shuffle.
    """

    problems: Sequence[Problem]
    sources: Sequence[Source]
    test: Sequence[Problem] | None = None
    in_order: bool = False


@dataclass(frozen=True)
class Task:
    """One task. All functions are pure but `load`."""

    name: str
    load: Callable[[TaskRecipe, DataRecipe], Loaded]
    write: Callable[[Problem, Style], Row]
    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool]


@dataclass(frozen=True)
class Published:
    """A data set with a publisher: its hub name, its files under `data.root`, and what a row says.

    hub_splits, files: our `train` and `test` -> the publisher's split, the path below data.root.
    read: row, id -> Problem.
    """

    name: str
    hub: str
    hub_config: str | None
    hub_splits: Mapping[str, str]
    files: Mapping[str, str]
    read: Callable[[RawRow, str], Problem]

    def load(self, task: TaskRecipe, data: DataRecipe) -> Loaded:
        """Publisher's train file for train and val, publisher's test file for test."""
        if task.file is not None:
            raise DataError(
                f"`file` does not go with {self.name}",
                place=f"data.tasks ({self.name})",
                fix="use name: jsonl for a file of your own, or data.root for a copy of the published files",
            )
        wanted = {"train": task.train + task.val + task.teach, "test": task.test}
        problems: dict[str, list[Problem]] = {"train": [], "test": []}
        sources: list[Source] = []
        for split in (split for split, count in wanted.items() if count):
            rows, source = self._rows(split, data.root)
            problems[split] = [self.read(row, f"{split}-{row.number}") for row in rows]
            sources.append(source)
        return Loaded(problems["train"], sources, test=problems["test"])

    def _rows(self, split: str, root: str | None) -> tuple[list[RawRow], Source]:
        if root is None:
            layout = ", ".join(f"DIR/{path}" for path in self.files.values())
            rows = read_hub(self.hub, self.hub_config, self.hub_splits[split], local_layout=layout)
            return rows, Source(self.name, "hub", f"{self.hub}:{self.hub_config}:{self.hub_splits[split]}")
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise DataError(f"no such folder: {root}", place="data.root", fix="give the folder with the data sets")
        path = folder / self.files[split]
        return read_jsonl(path, place="data.root"), file_source(self.name, path, self.files[split])
