"""What a task is: where its problems come from, how they are written, how answers are read and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.problems import Problem, Row, Style
from kvdistill.data.sources import RawRow, Source, find, found_source, read_found, read_hub


@dataclass(frozen=True)
class Loaded:
    """A task's problems before they are split. Each of the three may be gone through once: rows are read as one goes.

    problems: train is taken from these, and val and test too unless `val` and `test` hold the publisher's own.
    in_order: the order is already random (generated), so no shuffle.
    pool: `problems` are a published file without splits, of which a fixed part is test.
    """

    problems: Iterable[Problem]
    sources: Sequence[Source]
    test: Iterable[Problem] | None = None
    in_order: bool = False
    val: Iterable[Problem] | None = None
    pool: bool = False


@dataclass(frozen=True)
class Task:
    """One task. All functions are pure but `load`.

    published: its rows have a publisher (`Published.load`). generated: its problems are made, as many as one asks for.
    spoils: evaluations taken from the same rows; whoever learns from a pool of them must have them checked for leaks.
    """

    name: str
    load: Callable[[TaskRecipe, DataRecipe], Loaded]
    write: Callable[[Problem, Style], Row]
    extract: Callable[[str], str | None]
    same: Callable[[str, str], bool]
    published: bool = True
    generated: bool = False
    spoils: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies below `data.root`: paths of files (or what stands for them, see `find`).

    pool: the one file of a data set without splits. reasoning: whether its rows carry any; a layout without serves
    style `direct` only.
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
    completely is read, else a pool, else the first that has the splits asked for; behind the listed ones come the
    ways in which a download from the hub lies. read: row, id -> Problem.
    """

    name: str
    hub: str
    hub_config: str | None
    hub_splits: Mapping[str, str]
    layouts: tuple[Layout, ...]
    read: Callable[[RawRow, str], Problem]

    def load(self, task: TaskRecipe, data: DataRecipe) -> Loaded:
        """Publisher's train file for train (and val, where there is no file for that), publisher's test for test.

        Files are opened at once, and rows read when they are asked for.
        """
        place = f"data.tasks ({self.name})"
        for key, given in (("file", task.file is not None), ("fields", bool(task.fields))):
            if given:
                raise DataError(
                    f"`{key}` does not go with {self.name}",
                    place=place,
                    fix="use name: jsonl, csv or parquet for a file of your own, or data.root for a copy of the "
                    "published files",
                )
        if data.root is None:
            wanted = _wanted(task, self.hub_splits)
            opened = {split: self._open_hub(split, task, place) for split, count in wanted.items() if count}
        else:
            folder = Path(data.root).expanduser()
            if not folder.is_dir():
                raise DataError(f"no such folder: {data.root}", place="data.root", fix="give the folder with the data")
            layout = self._find_layout(folder, task, data.style)
            wanted = _wanted(task, layout.paths)
            opened = {split: self._open(folder, layout.paths[split]) for split, count in wanted.items() if count}
        sources = [source for _, source in opened.values()]
        problems: dict[str, Iterable[Problem]] = {split: () for split in wanted}
        problems |= {split: self._problems(rows, split, data.style) for split, (rows, _) in opened.items()}
        if "all" in problems:
            return Loaded(problems["all"], sources, pool=True)
        return Loaded(problems["train"], sources, test=problems["test"], val=problems.get("val"))

    def _problems(self, rows: Iterable[RawRow], split: str, style: str) -> Iterator[Problem]:
        for row in rows:
            problem = self.read(row, f"{split}-{row.number}")
            if style != "direct" and not problem.reasoning:
                with_it = self._describe_layouts(reasoning=True)
                raise DataError(
                    f"the row has no reasoning, and style {style} needs it",
                    place=row.place,
                    fix=f"set data.style=direct, or use a copy with reasoning: {with_it}",
                )
            yield problem

    def _open(self, folder: Path, listed: str) -> tuple[Iterable[RawRow], Source]:
        found = find(folder, listed)
        assert found is not None  # `_find_layout` has just looked
        return read_found(found, place="data.root"), found_source(self.name, found)

    def _open_hub(self, split: str, task: TaskRecipe, place: str) -> tuple[Iterable[RawRow], Source]:
        publishers = self.hub_splits[split]
        rows = read_hub(
            self.hub,
            self.hub_config,
            publishers,
            local_layout=self._describe_layouts(),
            revision=task.revision,
            place=place,
        )
        return rows, Source(self.name, "hub", f"{self.hub}:{self.hub_config}:{publishers}", revision=rows.commit)

    def _find_layout(self, folder: Path, task: TaskRecipe, style: str) -> Layout:
        def there(layout: Layout, *, completely: bool) -> bool:
            wanted = _wanted(task, layout.paths)
            needed = [split for split in wanted if completely or wanted[split]]
            return all(split in layout.paths and find(folder, layout.paths[split]) is not None for split in needed)

        layouts = (*self.layouts, *self._hub_layouts())
        usable = [layout for layout in layouts if layout.reasoning or style == "direct"]
        for candidates in (usable, layouts):
            # A pool comes before a layout that lacks a file, whatever splits are asked for: which problems are test
            # must not depend on whether one also trains. Where the publisher's own split is whole, it is kept.
            split = [layout for layout in candidates if layout.pool is None]
            pools = [layout for layout in candidates if layout.pool is not None]
            for group, completely in ((split, True), (pools, True), (split, False)):
                for layout in group:
                    if there(layout, completely=completely):
                        return layout
        first = self.layouts[0].paths
        wanted = _wanted(task, first)
        missing = [path for split, path in first.items() if wanted[split] and find(folder, path) is None]
        raise DataError(
            f"file not found: {', '.join(at_line(folder / path) for path in missing)}",
            place="data.root",
            fix=f"{self.name} needs {self._describe_layouts()}; or ask for none of the splits that are not there "
            f"(train: 0, val: 0, …); or unset data.root to load {self.hub} from the hub",
        )

    def _hub_layouts(self) -> list[Layout]:
        """A download of the hub's repository: parts or files named by split, beside each other or in a folder."""
        folders = [self.name, f"{self.name}/data", *([f"{self.name}/{self.hub_config}"] if self.hub_config else [])]
        names = self.hub_splits
        paths = [{split: f"{folder}/{names[split]}.parquet" for split in names} for folder in folders]
        return [Layout(train=one["train"], test=one["test"], val=one.get("val")) for one in paths]

    def _describe_layouts(self, *, reasoning: bool = False) -> str:
        layouts = [layout for layout in self.layouts if layout.reasoning or not reasoning]
        listed = "; or ".join(", ".join(f"DIR/{path}" for path in layout.paths.values()) for layout in layouts)
        return f"{listed} (or .json, .parquet, .csv of the same names; or the hub's files in DIR/{self.name}/)"


def _wanted(task: TaskRecipe, has: Mapping[str, str]) -> dict[str, int]:
    """Publisher's split -> how many problems are to come from it."""
    train = task.train + task.teach
    if "all" in has:
        return {"all": train + task.val + task.test}
    if "val" in has:
        return {"train": train, "val": task.val, "test": task.test}
    return {"train": train + task.val, "test": task.test}
