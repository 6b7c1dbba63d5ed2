"""What a data set is to the rest of the software: a training task, an evaluation, or both.

A task gives problems to learn from and says how they are written, and how answers are read and compared. An evaluation
gives rows to be asked. Knows nothing of lm-eval but the names of its definitions.

The order in which choices are shown depends on the content of the question alone (`fixed_order`): not on the position
in the file, a limit, other tasks, or any random state. lm-eval's own definition of GPQA shuffles with Python's global
`random`; its rows here carry the shuffled choices already, and `replaced` names the key that would shuffle again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.answers.numbers import text_after
from kvdistill.data.problems import ANSWER_MARK, Problem, Row, Style
from kvdistill.data.sets.letters import Lettered
from kvdistill.data.sets.published import Loaded, Member, Published, RowDict, Split


@dataclass(frozen=True)
class Task:
    """One training task. All functions are pure but `load`.

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
class Evaluation:
    """One evaluation. All functions are pure but `members`, `load` and `is_there`.

    data: where its rows come from. gold: the answer as records show it; a letter where there is a lettered form.
    extract: the answer of a generated text by the evaluation's own mark, never "the last number".
    published_gold: a whole right completion. native: the output type of the definition. num_fewshot: as usual in the
    field. fewshot_from: whether the examples of a prompt are rows (`load(…, "fewshot")`), stand in the definition, or
    there are none. replaced: keys of the definition whose work `load` has done.

    question: the question with its choices, by which a row is known. stem: without its choices, where it has any.
    lettered: the question with lettered choices; None where it has no such form.
    repeated: members with the same questions as another one. rules: of an own template, the training task.
    """

    title: str
    data: Published
    question: Callable[[RowDict], str]
    gold: Callable[[Member, RowDict], str]
    extract: Callable[[Member, str], str | None]
    published_gold: Callable[[Member, RowDict], str]
    native: Literal["likelihood", "generation"]
    same: Callable[[Member, str, str], bool] = lambda member, answer, gold: answer == gold
    language: Literal["en", "zh"] = "en"
    num_fewshot: int = 0
    fewshot_from: Literal["rows", "definition", "none"] = "none"
    lettered: Callable[[Member, RowDict], Lettered | None] = lambda member, row: None
    stem: Callable[[RowDict], str] | None = None
    replaced: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    rules: Task | None = None

    @property
    def name(self) -> str:
        return self.data.name

    def pinned(self, revision: str | None) -> Evaluation:
        """The same with the hub's data set at a commit, tag or branch."""
        return replace(self, data=replace(self.data, revision=revision))

    @property
    def splits(self) -> dict[str, Split]:
        """The split names of lm-eval's definition, which are the hub's -> ours."""
        ours: dict[str, Split] = {"test": "test"}
        if self.fewshot_from == "rows":
            ours = {"train": "fewshot", **ours}
        return {self.data.hub_splits[name]: split for name, split in ours.items()}

    def is_there(self, root: Path) -> bool:
        """Whether rows to score are below `root`."""
        return bool(self.data.members_below(root))

    def members(self, root: Path | None) -> tuple[Member, ...]:
        """Those with rows to score below `root`, in the definition's order; all for the hub (None).

        DataError where there is none, naming what was looked for.
        """
        if root is None:
            return self.data.members
        found = self.data.members_below(root)
        if not found:
            raise self.data.not_found(self.data.members[0], root, "test")
        return found

    def load(self, member: Member, root: Path | None, split: Split) -> list[RowDict]:
        """The checked rows of a member, from below `root` or (None) from the hub.

        DataError for a file or data set that is not there, at the row for anything wrong with it, and for rows
        without gold answers.
        """
        if split == "fewshot" and self.fewshot_from != "rows":
            raise DataError(
                f"{self.name} has no examples of its own for the prompt",
                place="evaluate.num_fewshot",
                fix="leave it out",
            )
        return self.data.rows(member, root, split)

    def problem(self, row: RowDict) -> Problem:
        """The row of an evaluation with own templates as a problem of its training task."""
        assert self.rules is not None, f"{self.name} has no template of its own"
        return Problem(self.rules.name, row["id"], row["question"], row["reasoning"], row["answer"], row["language"])

    def prompt(self, row: RowDict, style: Style) -> str:
        """The prompt that the training task writes for it."""
        assert self.rules is not None, f"{self.name} has no template of its own"
        return self.rules.write(self.problem(row), style).prompt


@dataclass(frozen=True)
class DataSet:
    """What one data set is here: a task to learn, an evaluation to be asked, or both."""

    task: Task | None = None
    evaluation: Evaluation | None = None


def extract_marked(completion: str) -> str | None:
    """The rest of the line after the first `####`."""
    return text_after(ANSWER_MARK, completion)


def fixed_order(question: str, choices: Sequence[str]) -> list[int]:
    """Indices of the choices in the order to show them: by a hash of the question and the choice.

    Depends on nothing else. `choices` must differ, or be told apart by the caller.
    """

    def key(i: int) -> str:
        return hashlib.sha256(f"{question}\x1f{choices[i]}".encode()).hexdigest()

    return sorted(range(len(choices)), key=key)
