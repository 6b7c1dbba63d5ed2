"""What a task is: where its problems come from, how they are written, how answers are read and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.problems import Problem, Row, Style
from kvdistill.data.sources import RawRow, Source, file_source, read_hub, read_rows


@dataclass(frozen=True)
class Loaded:
    """A task's problems before they are split.

    problems: train is taken from these, and val and test too unless `val` and `test` hold the publisher's own.
    in_order: the order is already random (generated), so no shuffle.
    """

    problems: Sequence[Problem]
    sources: Sequence[Source]
    test: Sequence[Problem] | None = None
    in_order: bool = False
    val: Sequence[Problem] | None = None


@dataclass(frozen=True)
class Task:
    """One task. All functions are pure but `load`."""

    name: str
    load: Callable[[TaskRecipe, DataRecipe], Loaded]
    write: Callable[[Problem, Style], Row]
    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool]


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies below `data.root`; paths of files, or of folders saved by `datasets`.

    pool: the one file of a data set without splits (ours are dealt by the seed). reasoning: whether its rows carry
    any; a layout without serves style `direct` only.
    """

    train: str | None = None
    test: str | None = None
    val: str | None = None
    pool: str | None = None
    reasoning: bool = True

    @property
    def paths(self) -> dict[str, str]:
        """Split -> path, of the splits that this layout has; a pool's only split is `all`."""
        every = {"train": self.train, "val": self.val, "test": self.test, "all": self.pool}
        return {split: path for split, path in every.items() if path is not None}


@dataclass(frozen=True)
class Published:
    """A data set with a publisher: its hub name, how copies of it lie below `data.root`, and what a row says.

    hub_splits: our `train`, `test` and perhaps `val` -> the publisher's split. layouts: the first that is there
    completely is read, else the first that has the splits asked for, else a pool. read: row, id -> Problem.
    """

    name: str
    hub: str
    hub_config: str | None
    hub_splits: Mapping[str, str]
    layouts: tuple[Layout, ...]
    read: Callable[[RawRow, str], Problem]

    def load(self, task: TaskRecipe, data: DataRecipe) -> Loaded:
        """Publisher's train file for train (and val, where there is no file for that), publisher's test for test."""
        if task.file is not None:
            raise DataError(
                f"`file` does not go with {self.name}",
                place=f"data.tasks ({self.name})",
                fix="use name: jsonl for a file of your own, or data.root for a copy of the published files",
            )
        if data.root is None:
            wanted, read = _wanted(task, self.hub_splits), self._read_hub
        else:
            folder = Path(data.root).expanduser()
            if not folder.is_dir():
                raise DataError(f"no such folder: {data.root}", place="data.root", fix="give the folder with the data")
            layout = self._find_layout(folder, task, data.style)
            wanted = _wanted(task, layout.paths)

            def read(split: str) -> tuple[list[RawRow], Source]:
                shown = layout.paths[split]
                rows = read_rows(folder / shown, place="data.root")
                return rows, file_source(self.name, folder / shown, shown)

        problems: dict[str, list[Problem]] = {split: [] for split in wanted}
        sources: list[Source] = []
        for split in (split for split, count in wanted.items() if count):
            rows, source = read(split)
            problems[split] = [self._read_row(row, split, data.style) for row in rows]
            sources.append(source)
        if "all" in problems:
            return Loaded(problems["all"], sources)
        return Loaded(problems["train"], sources, test=problems["test"], val=problems.get("val"))

    def _read_row(self, row: RawRow, split: str, style: str) -> Problem:
        problem = self.read(row, f"{split}-{row.number}")
        if style != "direct" and not problem.reasoning:
            raise DataError(
                f"the row has no reasoning, and style {style} needs it",
                place=row.place,
                fix=f"set data.style=direct, or use a copy with reasoning: {self._describe_layouts(reasoning=True)}",
            )
        return problem

    def _read_hub(self, split: str) -> tuple[list[RawRow], Source]:
        publishers = self.hub_splits[split]
        rows = read_hub(self.hub, self.hub_config, publishers, local_layout=self._describe_layouts())
        return rows, Source(self.name, "hub", f"{self.hub}:{self.hub_config}:{publishers}")

    def _find_layout(self, folder: Path, task: TaskRecipe, style: str) -> Layout:
        def there(layout: Layout, *, completely: bool) -> bool:
            wanted = _wanted(task, layout.paths)
            needed = [split for split in wanted if completely or wanted[split]]
            return all(split in layout.paths and (folder / layout.paths[split]).exists() for split in needed)

        usable = [layout for layout in self.layouts if layout.reasoning or style == "direct"]
        for layouts in (usable, self.layouts):
            # a pool comes last: where the publisher's own split is there, it is kept
            split = [layout for layout in layouts if layout.pool is None]
            pools = [layout for layout in layouts if layout.pool is not None]
            for group, completely in ((split, True), (split, False), (pools, True)):
                for layout in group:
                    if there(layout, completely=completely):
                        return layout
        first = self.layouts[0].paths
        wanted = _wanted(task, first)
        missing = [path for split, path in first.items() if wanted[split] and not (folder / path).exists()]
        raise DataError(
            f"file not found: {', '.join(str(folder / path) for path in missing)}",
            place="data.root",
            fix=f"{self.name} needs {self._describe_layouts()}; or ask for none of the splits that are not there "
            f"(train: 0, val: 0, …); or unset data.root to load {self.hub} from the hub",
        )

    def _describe_layouts(self, *, reasoning: bool = False) -> str:
        layouts = [layout for layout in self.layouts if layout.reasoning or not reasoning]
        return "; or ".join(", ".join(f"DIR/{path}" for path in layout.paths.values()) for layout in layouts)


def _wanted(task: TaskRecipe, has: Mapping[str, str]) -> dict[str, int]:
    """Publisher's split -> how many problems are to come from it."""
    train = task.train + task.teach
    if "all" in has:
        return {"all": train + task.val + task.test}
    if "val" in has:
        return {"train": train, "val": task.val, "test": task.test}
    return {"train": train + task.val, "test": task.test}
