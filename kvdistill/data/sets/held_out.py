"""What a published task holds out: the publisher's test rows, or the fixed part of a pool; and its own evaluation.

A published file without splits (a *pool*) has a test part that never changes: 30 % of its problems, chosen by their
content, near duplicates together; so whatever the seed, no model trained here has seen it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.leaks import question_hash
from kvdistill.data.leaks.near import NearIndex
from kvdistill.data.problems import Problem, write_plain
from kvdistill.data.sets.base import DataSet, Evaluation, Task
from kvdistill.data.sets.published import Loaded, Member, Published, RowDict, Split
from kvdistill.data.spool import Selection, Spool, spool_beside

HELD_OUT_SHARE = 0.3  # of a pool


@dataclass
class Dealable:
    """One task's problems as numbers in the spool. own: splits with a source of their own; rest: all others' source."""

    loaded: Loaded
    rest: array
    own: dict[str, array]
    num_repeated: int


def read_once(loaded: Loaded, spool: Spool) -> Dealable:
    """Every problem once into the spool; of a pool, its fixed test part apart from the rest."""
    num_repeated = 0

    def without_repeats(problems: Iterable[Problem]) -> array:
        nonlocal num_repeated
        seen: set[bytes] = set()
        numbers = array("Q")
        for problem in problems:
            known_by = bytes.fromhex(question_hash(problem.question))
            if known_by in seen:
                num_repeated += 1
            else:
                seen.add(known_by)
                numbers.append(spool.append(problem))
        return numbers

    rest = without_repeats(loaded.problems)
    publishers = (("val", loaded.val), ("test", loaded.test))
    own = {split: without_repeats(problems) for split, problems in publishers if problems is not None}
    if loaded.pool:
        held_out = _held_out_part(Selection(spool, rest))
        own["test"] = array("Q", (number for number in rest if number in held_out))
        rest = array("Q", (number for number in rest if number not in held_out))
    return Dealable(loaded, rest, own, num_repeated)


def _held_out_part(pool: Selection) -> set[int]:
    """The numbers of the test part: whole groups of near duplicates, each chosen by a hash of its content."""
    group = {number: number for number in pool.numbers}

    def first_of(number: int) -> int:
        while group[number] != number:
            group[number] = number = group[group[number]]
        return number

    index = NearIndex()
    known_by: dict[int, str] = {}
    for number, problem in zip(pool.numbers, pool, strict=True):
        index.add(number, problem.question)
        known_by[number] = question_hash(problem.question)
    for number, problem in zip(pool.numbers, pool, strict=True):
        for match in index.matches(problem.question):
            group[first_of(number)] = first_of(int(match.key))  # type: ignore[call-overload]
    smallest: dict[int, str] = {}
    for number, hash in known_by.items():
        first = first_of(number)
        smallest[first] = min(hash, smallest.get(first, hash))
    # min() of many hashes is small, so the group's name is hashed again before it is compared
    held_out = {first for first, name in smallest.items() if int(question_hash(name)[:8], 16) < HELD_OUT_SHARE * 2**32}
    return {number for number in pool.numbers if first_of(number) in held_out}


class HeldOut(Published):
    """The same data, of which the rows to be asked are those that no model trained here may have seen. Zero-shot."""

    def members_below(self, root: Path) -> tuple[Member, ...]:
        return () if self._missing(root) else self.members

    def rows(self, member: Member, root: Path | None, split: Split) -> list[RowDict]:
        return [{name: value for name, value in asdict(one).items() if name != "task"} for one in self.problems(root)]

    def problems(self, root: Path | None) -> list[Problem]:
        """In the publisher's order. root: folder with local copies; None: the hub."""
        spool = spool_beside(None)
        return list(Selection(spool, read_once(self._only_test(root), spool).own["test"]))

    def not_found(self, member: Member, root: Path, split: Split) -> DataError:
        error = self._missing(root)
        assert error is not None
        return error

    def _missing(self, root: Path) -> DataError | None:
        """Why there is nothing of the task below `root`. Opens files and reads no row."""
        try:
            self._only_test(root)
        except DataError as error:
            if error.place != "data.root":  # it is there, and something is wrong with it
                raise
            return error
        return None

    def _only_test(self, root: Path | None) -> Loaded:
        task = TaskRecipe(name=self.name, train=0, val=0, test=1, revision=self.revision)
        return self.load(task, DataRecipe(tasks=[task], root=None if root is None else str(root), style="direct"))


def with_own_template(
    data: Published,
    title: str,
    extract: Callable[[str], str | None],
    same: Callable[[str, str], bool],
    *,
    language: Literal["en", "zh"] = "en",
    spoils: tuple[str, ...] = (),
) -> DataSet:
    """The training task of `data`, and an evaluation of what it holds out, asked and judged as the task itself does."""
    task = Task(data.name, data.load, write_plain, extract, same, spoils=spoils)
    evaluation = Evaluation(
        title=title,
        language=language,
        data=HeldOut(**vars(data) | {"members": (Member(data.name, ""),)}),
        native="generation",
        question=lambda row: str(row["question"]),
        gold=lambda member, row: str(row["answer"]),
        extract=lambda member, completion: extract(completion),
        same=lambda member, answer, gold: same(answer, gold),
        published_gold=lambda member, row: task.write(evaluation.problem(row), "direct").completion,
        rules=task,
    )
    return DataSet(task, evaluation)
