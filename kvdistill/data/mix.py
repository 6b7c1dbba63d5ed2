"""How many problems of which task go to which split: counts as given, or a mix of `data.total` by shares.

Pure arithmetic on numbers; deterministic; knows no file. A task that cannot deliver its share gives what it has, and
the others fill up in proportion, so that the total is reached where it can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvdistill.core.errors import RecipeError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.problems import SPLITS

DEFAULT_SHARES = {"math23k": 0.2}  # one fifth of a mix is Chinese unless the recipe says otherwise
_RATIO_OF = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Available:
    """How many problems a task has for each of our splits. Splits that share a source are named in its key.

    sources: splits that are dealt from one source -> its number of problems, {("train", "val"): 7473, ("test",): 1319}.
    """

    sources: Mapping[tuple[str, ...], int]

    def most(self, ratios: Sequence[float]) -> int:
        """The most problems that can be dealt in these ratios."""
        parts = {splits: sum(ratios[_RATIO_OF[split]] for split in splits) for splits in self.sources}
        return min((int(count / parts[s] + 1e-9) for s, count in self.sources.items() if parts[s] > 0), default=0)


def share_out(asked: Mapping[str, int], available: int) -> dict[str, int]:
    """`asked` where there is enough; else `available` in the same proportions, at least one for each that asked.

    The shares add up to min(sum(asked), available), and no share is above what was asked.
    """
    total = sum(asked.values())
    if total <= available:
        return dict(asked)
    wanting = [name for name, count in asked.items() if count]
    shares = {name: available * count // total for name, count in asked.items()}
    by_rest = sorted(wanting, key=lambda name: -(available * asked[name] % total))
    for name in by_rest[: available - sum(shares.values())]:
        shares[name] += 1
    for name in wanting:
        largest = max(wanting, key=lambda other: shares[other])
        if shares[name] == 0 and shares[largest] > 1:
            shares[name], shares[largest] = 1, shares[largest] - 1
    return shares


def task_shares(tasks: Sequence[TaskRecipe]) -> dict[str, float]:
    """Task -> its part of the total, adding up to 1. Given shares are kept; the others get what is left, equally.

    Where all are given they are ratios (2, 1, 1 is a half and two quarters). RecipeError where nothing is left.
    """
    given = {task.key: task.share for task in tasks if task.share is not None}
    rest = [task.key for task in tasks if task.share is None]
    if rest and given and sum(given.values()) >= 1:
        raise RecipeError(
            f"the shares add up to {sum(given.values()):g} and leave nothing for {', '.join(rest)}",
            place="data.tasks",
            fix="lower the shares below 1 in all, or give every task one",
        )
    if len(rest) > 1 or given:
        given |= {key: DEFAULT_SHARES[key] for key in rest if key in DEFAULT_SHARES and sum(given.values()) + 0.2 < 1}
        rest = [key for key in rest if key not in given]
    left = 1 - sum(given.values())
    shares = {task.key: given.get(task.key, left / max(1, len(rest))) for task in tasks}
    total = sum(shares.values())
    if total <= 0:
        raise RecipeError("all shares are 0", place="data.tasks", fix="give at least one task a share above 0")
    return {key: share / total for key, share in shares.items()}


def mix(data: DataRecipe, available: Mapping[str, Available | None]) -> dict[str, dict[str, int]]:
    """Task -> split -> problems, for `data.total` problems in all (fewer where the tasks have no more).

    available: None for a task that can make as many as one likes.
    """
    total, shares = data.total or 0, task_shares(data.tasks)
    limits = {}
    for task in data.tasks:
        has = available[task.key]
        most = total if has is None else has.most(data.ratios)
        limits[task.key] = min(most, task.cap or most)
    numbers = fill(shares, limits, total)
    return {task.key: by_ratio(numbers[task.key], data) for task in data.tasks}


def fill(shares: Mapping[str, float], limits: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers in proportion to `shares`, none above its limit, adding up to `total` or to all limits."""
    fixed: dict[str, int] = {}
    while True:
        open_ = {name: share for name, share in shares.items() if name not in fixed and share > 0}
        left, weight = total - sum(fixed.values()), sum(open_.values())
        over = [name for name, share in open_.items() if left * share / weight > limits[name]]
        if not over:
            break
        fixed |= {name: limits[name] for name in over}
    exact = {name: left * share / weight for name, share in open_.items()}
    numbers = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: numbers[name] - exact[name])
    missing = round(sum(exact.values())) - sum(numbers.values())
    for name in [name for name in by_rest if numbers[name] < limits[name]][:missing]:
        numbers[name] += 1
    return {name: fixed.get(name, numbers.get(name, 0)) for name in shares}


def by_ratio(number: int, data: DataRecipe) -> dict[str, int]:
    """`number` problems of a task by `data.ratios`; half of train is for teachers where they study apart."""
    exact = {split: number * data.ratios[i] for split, i in _RATIO_OF.items()}
    counts = {split: int(value + 1e-9) for split, value in exact.items()}
    by_rest = sorted(counts, key=lambda split: counts[split] - exact[split])
    for split in by_rest[: number - sum(counts.values())]:
        counts[split] += 1
    teach = counts["train"] // 2 if data.disjoint_teachers else 0
    return {split: (counts | {"train": counts["train"] - teach, "teach": teach})[split] for split in SPLITS}
