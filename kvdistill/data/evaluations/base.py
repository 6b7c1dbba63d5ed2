"""What an evaluation is: where its rows come from, what its gold answers are, how an answer is read and compared.

Rows have the columns that lm-eval's definition of the evaluation expects (those of the hub), in the publisher's order,
and every row is checked when it is read. Knows nothing of lm-eval but the names of its definitions.

The order in which choices are shown depends on the content of the question alone (`fixed_order`): not on the position
in the file, a limit, other tasks, or any random state. lm-eval's own definition of GPQA shuffles with Python's global
`random`; its rows here carry the shuffled choices already, and `replaced` names the key that would shuffle again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.errors import DataError
from kvdistill.data.evaluations.letters import Lettered
from kvdistill.data.evaluations.rows import AbstractRows, Split
from kvdistill.data.evaluations.rows import Member as Member
from kvdistill.data.problems import Problem, Style
from kvdistill.data.tasks import Task

RowDict = dict[str, Any]


def _no_letters(member: Member, row: RowDict) -> Lettered | None:
    return None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. All functions are pure but `members`, `load` and `is_there`.

    num_fewshot: as usual in the field. native: the output type of the definition. fewshot_from: whether the examples of
    a prompt are rows (`load(…, "fewshot")`), stand in the definition, or there are none. splits: the definition's split
    names -> ours. replaced: keys of the definition whose work `load` has done.

    question: the question with its choices, by which a row is known. stem: without its choices, where it has any.
    gold: the answer as records show it; a letter where there is a lettered form. extract: the answer of a generated
    text by the evaluation's own mark, never "the last number". published_gold: a whole right completion.
    lettered: the question with lettered choices; None where it has no such form.
    repeated: members with the same questions as another one. rules: of an own template, the training task.
    """

    name: str
    title: str
    language: Literal["en", "zh"]
    rows: AbstractRows
    num_fewshot: int
    native: Literal["likelihood", "generation"]
    fewshot_from: Literal["rows", "definition", "none"]
    splits: Mapping[str, Split]
    question: Callable[[RowDict], str]
    gold: Callable[[Member, RowDict], str]
    extract: Callable[[Member, str], str | None]
    same: Callable[[Member, str, str], bool]
    published_gold: Callable[[Member, RowDict], str]
    lettered: Callable[[Member, RowDict], Lettered | None] = _no_letters
    stem: Callable[[RowDict], str] | None = None
    replaced: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    rules: Task | None = None

    def pinned(self, revision: str | None) -> Evaluation:
        """The same with the hub's data set at a commit, tag or branch."""
        return replace(self, rows=self.rows.pinned(revision))

    @property
    def hub(self) -> str:
        """The data set's name on the Hugging Face hub; empty for the own templates."""
        return self.rows.hub

    @property
    def hub_revision(self) -> str | None:
        return self.rows.revision

    @property
    def all_members(self) -> tuple[Member, ...]:
        return self.rows.members

    def is_there(self, root: Path) -> bool:
        """Whether rows to score are below `root`."""
        return bool(self.rows.members_below(root))

    def members(self, root: Path | None) -> tuple[Member, ...]:
        """Those with rows to score below `root`, in the definition's order; all for the hub (None).

        DataError where there is none, naming what was looked for.
        """
        if root is None:
            return self.all_members
        found = self.rows.members_below(root)
        if not found:
            raise self.rows.not_found(self.name, self.all_members[0], root, "test")
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
        return self.rows.load(self.name, member, root, split)

    def problem(self, row: RowDict) -> Problem:
        """The row of an evaluation with own templates as a problem of its training task."""
        assert self.rules is not None, f"{self.name} has no template of its own"
        return Problem(self.rules.name, row["id"], row["question"], row["reasoning"], row["answer"], row["language"])

    def prompt(self, row: RowDict, style: Style) -> str:
        """The prompt that the training task writes for it."""
        assert self.rules is not None, f"{self.name} has no template of its own"
        return self.rules.write(self.problem(row), style).prompt


def fixed_order(question: str, choices: Sequence[str]) -> list[int]:
    """Indices of the choices in the order to show them: by a hash of the question and the choice.

    Depends on nothing else. `choices` must differ, or be told apart by the caller.
    """

    def key(i: int) -> str:
        return hashlib.sha256(f"{question}\x1f{choices[i]}".encode()).hexdigest()

    return sorted(range(len(choices)), key=key)
