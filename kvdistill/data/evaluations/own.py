"""Training tasks as evaluations, by our own templates: their publishers' test rows, or the held-out part of a pool.

Zero-shot, in the style that the caller names; which problems those are is `splits.load_held_out`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.evaluations.base import Evaluation
from kvdistill.data.evaluations.rows import AbstractRows, Member, Split
from kvdistill.data.problems import Problem
from kvdistill.data.tasks import TASKS


@dataclass(frozen=True)
class HeldOutRows(AbstractRows):
    """The problems of a training task that no model trained here may have seen."""

    task: str
    hub: str
    members: tuple[Member, ...]
    revision: str | None = None

    def members_below(self, root: Path) -> tuple[Member, ...]:
        return () if self._missing(root) else self.members

    def load(self, evaluation: str, member: Member, root: Path | None, split: Split) -> list[dict[str, Any]]:
        return [
            {"id": p.id, "question": p.question, "reasoning": p.reasoning, "answer": p.answer, "language": p.language}
            for p in self._problems(root)
        ]

    def pinned(self, revision: str | None) -> HeldOutRows:
        return replace(self, revision=revision)

    def not_found(self, evaluation: str, member: Member, root: Path, split: Split) -> DataError:
        error = self._missing(root)
        assert error is not None
        return error

    def _missing(self, root: Path) -> DataError | None:
        """Why there is nothing of the task below `root`. Opens files and reads no row."""
        task = TaskRecipe(name=self.task, train=0, val=0, test=1)
        try:
            TASKS[self.task].load(task, DataRecipe(tasks=[task], root=str(root), style="direct"))
        except DataError as error:
            if error.place != "data.root":  # it is there, and something is wrong with it
                raise
            return error
        return None

    def _problems(self, root: Path | None) -> list[Problem]:
        from kvdistill.data.splits import load_held_out

        return load_held_out(self.task, root, self.revision)


def _own(name: str, title: str, hub: str, language: Literal["en", "zh"] = "en") -> Evaluation:
    rules = TASKS[name]

    def published_gold(member: Member, row: dict[str, Any]) -> str:
        return rules.write(evaluation.problem(row), "direct").completion

    evaluation = Evaluation(
        name=name,
        title=title,
        language=language,
        rows=HeldOutRows(name, hub, (Member(name, ""),)),
        num_fewshot=0,
        native="generation",
        fewshot_from="none",
        splits={},
        question=lambda row: str(row["question"]),
        gold=lambda member, row: str(row["answer"]),
        extract=lambda member, completion: rules.extract(completion),
        same=lambda member, answer, gold: rules.same(answer, gold),
        published_gold=published_gold,
        rules=rules,
    )
    return evaluation


SVAMP = _own("svamp", "SVAMP", "ChilleD/SVAMP")
STRATEGYQA = _own("strategyqa", "StrategyQA", "ChilleD/StrategyQA")
MATH23K = _own("math23k", "Math23K", "Gxg/Math23K", "zh")
MATH = _own("math", "MATH", "DigitalLearningGmbH/MATH-lighteval")
HOTPOTQA = _own("hotpotqa", "HotpotQA (closed book)", "hotpotqa/hotpot_qa")
