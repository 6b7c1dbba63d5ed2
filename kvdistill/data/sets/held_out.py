"""Training tasks as evaluations, by our own templates: their publishers' test rows, or the held-out part of a pool.

Zero-shot, in the style that the caller names; which problems those are is `splits.load_held_out`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.sets.base import AbstractRows, DataSet, Evaluation, Member, RowDict, Split, Task


@dataclass(frozen=True)
class HeldOutRows(AbstractRows):
    """The problems of a training task that no model trained here may have seen."""

    task: Task
    hub: str
    members: tuple[Member, ...]
    revision: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)

    def members_below(self, root: Path) -> tuple[Member, ...]:
        return () if self._missing(root) else self.members

    def rows(self, evaluation: str, member: Member, root: Path | None, split: Split) -> list[RowDict]:
        from kvdistill.data.splits import load_held_out

        problems = load_held_out(self.task.name, root, self.revision)
        return [{name: value for name, value in asdict(problem).items() if name != "task"} for problem in problems]

    def pinned(self, revision: str | None) -> HeldOutRows:
        return replace(self, revision=revision)

    def not_found(self, evaluation: str, member: Member, root: Path, split: Split) -> DataError:
        error = self._missing(root)
        assert error is not None
        return error

    def _missing(self, root: Path) -> DataError | None:
        """Why there is nothing of the task below `root`. Opens files and reads no row."""
        task = TaskRecipe(name=self.task.name, train=0, val=0, test=1)
        try:
            self.task.load(task, DataRecipe(tasks=[task], root=str(root), style="direct"))
        except DataError as error:
            if error.place != "data.root":  # it is there, and something is wrong with it
                raise
            return error
        return None


def with_own_template(task: Task, title: str, hub: str, language: Literal["en", "zh"] = "en") -> DataSet:
    """The task, and an evaluation of what it holds out, asked and judged as the task itself does."""

    def published_gold(member: Member, row: RowDict) -> str:
        return task.write(evaluation.problem(row), "direct").completion

    evaluation = Evaluation(
        name=task.name,
        title=title,
        language=language,
        data=HeldOutRows(task, hub, (Member(task.name, ""),)),
        native="generation",
        question=lambda row: str(row["question"]),
        gold=lambda member, row: str(row["answer"]),
        extract=lambda member, completion: task.extract(completion),
        same=lambda member, answer, gold: task.same(answer, gold),
        published_gold=published_gold,
        rules=task,
    )
    return DataSet(task, evaluation)
