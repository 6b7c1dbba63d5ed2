"""A data set with a publisher: the hub, and the ways in which copies of it lie below `data.root`.

Serves both: problems to learn from (`load`) and the rows of an evaluation (`rows`), which have the columns that
lm-eval's definition of it expects (those of the hub), in the publisher's order. Every row is checked when it is read.
Knows no answer rules. A listed file is also found in other forms (`sources.find`: `test.jsonl` as `test.parquet`, …).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import at_line
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.problems import Problem
from kvdistill.data.sources import Found, RawRow, Source, find, found_source, read_found, read_hub

RowDict = dict[str, Any]
Split = Literal["test", "fewshot"]


@dataclass
class Noticed:
    """What a user should know of rows that were read: nothing is wrong with them, but perhaps they are meant otherwise.

    unused: columns; `used` are those that problems were made of. numbers_with_words: answers that are a number for a
    reader and a text for the rule that reads them, and one_of_them.
    """

    unused: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    numbers_with_words: int = 0
    one_of_them: str = ""

    def as_dict(self) -> dict[str, Any]:
        words = {"numbers_with_words": self.numbers_with_words, "one_of_them": self.one_of_them}
        return {"unused_columns": sorted(self.unused - self.used), **(words if self.numbers_with_words else {})}


@dataclass(frozen=True)
class Loaded:
    """A task's problems before they are split. Each of the three may be gone through once: rows are read as one goes.

    problems: train is taken from these, and val and test too unless `val` and `test` hold the publisher's own.
    in_order: the order is already random (generated), so no shuffle.
    pool: `problems` are a published file without splits, of which a fixed part is test.
    noticed: filled while a user's own rows are gone through.
    """

    problems: Iterable[Problem]
    sources: Sequence[Source]
    test: Iterable[Problem] | None = None
    in_order: bool = False
    val: Iterable[Problem] | None = None
    pool: bool = False
    noticed: Noticed = field(default_factory=Noticed)


@dataclass(frozen=True)
class Member:
    """One lm-eval task of an evaluation: a BBH task, a subject; most evaluations have one.

    name: what records carry. definition: a YAML file below lm_eval/tasks; empty for our own templates.
    local: its name in file names.
    """

    name: str
    definition: str
    hub_config: str | None = None
    local: str = ""


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies below `data.root`: paths of files (or what stands for them, see `find`).

    train, test, val: the publisher's splits; an evaluation takes the examples of its prompts from `train` and scores
    `test`, and `{}` in its paths is the member's `local`. pool: the one file of a data set without splits. reasoning:
    whether its rows carry any; a layout without serves style `direct` only. serves: who looks there.
    """

    train: str | None = None
    test: str | None = None
    val: str | None = None
    pool: str | None = None
    reasoning: bool = True
    serves: Literal["both", "training", "evaluation"] = "both"

    @property
    def paths(self) -> dict[str, str]:
        """Split -> path, of the splits that this layout has; a pool's only split is `all`."""
        every = {"train": self.train, "val": self.val, "test": self.test, "all": self.pool}
        return {split: path for split, path in every.items() if path is not None}


@dataclass(frozen=True)
class Published:
    """A data set with a publisher: its hub name, how copies of it lie below `data.root`, and what a row says.

    hub_splits: our `train`, `test` and perhaps `val` -> the publisher's split. layouts: for training the first that
    is there completely is read, else a pool, else the first that has the splits asked for; behind the listed ones come
    the ways in which a download from the hub lies. For an evaluation the first that has the split is read.

    problem: row, id -> what training learns from. columns: member, row -> the columns of lm-eval's definition; both
    raise DataError at the row. unpack: a row of a local file -> the rows it holds. revision: of an evaluation, the
    hub's commit, tag or branch; None: the newest.
    """

    name: str
    hub: str
    layouts: tuple[Layout, ...]
    hub_splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    hub_config: str | None = None
    problem: Callable[[RawRow, str], Problem] | None = None
    members: tuple[Member, ...] = ()
    columns: Callable[[Member, RawRow], RowDict] | None = None
    unpack: Callable[[RawRow], Iterable[RawRow]] = lambda row: (row,)
    revision: str | None = None

    # ---- for training

    def load(self, task: TaskRecipe, data: DataRecipe) -> Loaded:
        """Publisher's train file for train (and val, where there is no file for that), publisher's test for test.

        Files are opened at once, and rows read when they are asked for.
        """
        place = f"data.tasks ({self.name})"
        refuse_keys_of_own_files(task)
        problems: dict[str, Iterable[Problem]] = {}
        sources: list[Source] = []
        folder = None if data.root is None else Path(data.root).expanduser()
        if folder is not None and not folder.is_dir():
            raise DataError(f"no such folder: {data.root}", place="data.root", fix="give the folder with the data")
        paths = self.hub_splits if folder is None else self._find_layout(folder, task, data.style).paths
        for split, count in _wanted(task, paths).items():
            rows: Iterable[RawRow] = ()
            if count and folder is None:
                rows = read_hub(
                    self.hub,
                    self.hub_config,
                    paths[split],
                    local_layout=self._describe_layouts(),
                    revision=task.revision,
                    place=place,
                )
                shown_as = f"{self.hub}:{self.hub_config}:{paths[split]}"
                sources.append(Source(self.name, "hub", shown_as, revision=rows.commit))
            elif count and folder is not None:
                found = find(folder, paths[split])
                assert found is not None  # `_find_layout` has just looked
                rows = read_found(found, place="data.root")
                sources.append(found_source(self.name, found))
            problems[split] = self._problems(rows, split, data.style)
        if "all" in problems:
            return Loaded(problems["all"], sources, pool=True)
        return Loaded(problems["train"], sources, test=problems["test"], val=problems.get("val"))

    def _problems(self, rows: Iterable[RawRow], split: str, style: str) -> Iterator[Problem]:
        assert self.problem is not None, f"{self.name} is no training task"
        for row in rows:
            problem = self.problem(row, f"{split}-{row.number}")
            if style != "direct" and not problem.reasoning:
                with_it = self._describe_layouts(reasoning=True)
                raise row.error(
                    f"the row has no reasoning, and style {style} needs it",
                    fix=f"set data.style=direct, or use a copy with reasoning: {with_it}",
                )
            yield problem

    def _find_layout(self, folder: Path, task: TaskRecipe, style: str) -> Layout:
        def there(layout: Layout, *, completely: bool) -> bool:
            wanted = _wanted(task, layout.paths)
            needed = [split for split in wanted if completely or wanted[split]]
            return all(split in layout.paths and find(folder, layout.paths[split]) is not None for split in needed)

        # A download of the hub's repository: parts or files named by split, beside each other or in a folder.
        folders = [self.name, f"{self.name}/data", *([f"{self.name}/{self.hub_config}"] if self.hub_config else [])]
        listed = [layout for layout in self.layouts if layout.serves != "evaluation"]
        downloads = [
            Layout(**{split: f"{one}/{name}.parquet" for split, name in self.hub_splits.items()})  # type: ignore[arg-type]
            for one in folders
        ]
        layouts = [*listed, *downloads]
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
        first = listed[0].paths
        wanted = _wanted(task, first)
        missing = [path for split, path in first.items() if wanted[split] and find(folder, path) is None]
        raise DataError(
            f"file not found: {', '.join(at_line(folder / path) for path in missing)}",
            place="data.root",
            fix=f"{self.name} needs {self._describe_layouts()}; or ask for none of the splits that are not there "
            f"(train: 0, val: 0, …); or unset data.root to load {self.hub} from the hub",
        )

    def _describe_layouts(self, *, reasoning: bool = False) -> str:
        layouts = [one for one in self.layouts if one.serves != "evaluation" and (one.reasoning or not reasoning)]
        listed = "; or ".join(", ".join(f"DIR/{path}" for path in layout.paths.values()) for layout in layouts)
        return f"{listed} (or .json, .parquet, .csv of the same names; or the hub's files in DIR/{self.name}/)"

    # ---- for evaluation

    def members_below(self, root: Path) -> tuple[Member, ...]:
        """The members with rows to score below `root`."""
        return tuple(member for member in self.members if self._find(member, root, "test") is not None)

    def rows(self, member: Member, root: Path | None, split: Split) -> list[RowDict]:
        """All rows of a split, checked; DataError where there are none."""
        assert self.columns is not None, f"{self.name} is no evaluation"
        rows: Iterable[RawRow]
        if root is None:
            rows = read_hub(
                self.hub,
                member.hub_config,
                self.hub_splits["train" if split == "fewshot" else split],
                local_layout=self._looked_for(member, split),
                revision=self.revision,
                place=f"data.root ({self.name})",
            )
        elif (found := self._find(member, root, split)) is not None:
            rows = (inner for row in read_found(found, place="data.root") for inner in self.unpack(row))
        else:
            raise self.not_found(member, root, split)
        return [self.columns(member, row) for row in rows]

    def not_found(self, member: Member, root: Path, split: Split) -> DataError:
        """The error for rows that are not below `root`."""
        if not root.is_dir():
            return DataError(f"no such folder: {at_line(root)}", place="data.root", fix="give the folder with the data")
        wanted = f"{member.name}: " if member.name != self.name else ""
        what = "rows to score" if split == "test" else "examples for the prompt"
        no_examples = "ask for none (num_fewshot: 0), or " if split == "fewshot" else ""
        return DataError(
            f"{self.name}: {wanted}no {what} below {at_line(root)}; looked for {self._looked_for(member, split)}",
            place="data.root",
            fix=f"put one of them there, or {no_examples}unset data.root to load {self.hub} from the hub",
        )

    def _paths(self, member: Member, split: Split) -> list[str]:
        """Where the split may lie, in the order of the layouts, each place once."""
        layouts = [layout for layout in self.layouts if layout.serves != "training"]
        paths = [layout.test if split == "test" else layout.train for layout in layouts]
        return list(dict.fromkeys(path.format(member.local) for path in paths if path is not None))

    def _find(self, member: Member, root: Path, split: Split) -> Found | None:
        return next((found for path in self._paths(member, split) if (found := find(root, path))), None)

    def _looked_for(self, member: Member, split: Split) -> str:
        listed = " or ".join(f"DIR/{path}" for path in self._paths(member, split))
        return f"{listed} (or .json, .parquet, .csv of the same names)"


def refuse_keys_of_own_files(task: TaskRecipe) -> None:
    """DataError for a built-in task with a key that says how a user's own file is read."""
    for key in ("file", "fields", "language", "answer"):
        if getattr(task, key):
            raise DataError(
                f"`{key}` does not go with {task.name}",
                place=f"data.tasks ({task.name})",
                fix="use name: jsonl, csv or parquet for a file of your own, or data.root for a copy of the "
                "published files",
            )


def _wanted(task: TaskRecipe, has: Mapping[str, str]) -> dict[str, int]:
    """Publisher's split -> how many problems are to come from it."""
    train = task.train + task.teach
    if "all" in has:
        return {"all": train + task.val + task.test}
    if "val" in has:
        return {"train": train, "val": task.val, "test": task.test}
    return {"train": train + task.val, "test": task.test}
