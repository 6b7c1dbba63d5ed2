"""The small search that every tuned arm gets before the study proper (`tune`): its trials, the rule, what was chosen.

A trial is an arm under other values, `ce@tune3`, trained with the tuning seeds alone and judged on validation problems.
`stages/tune.py` does it and writes `tuned.json`; here is what is asked of it without torch. All arms get as many
trials: where a key does nothing for an arm (kv_weight for one without KV), its learning rates are spaced more densely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from kvdistill.core.arms import arm_recipe
from kvdistill.core.marks import read_mark
from kvdistill.core.recipe import ArmRecipe, Recipe, TuneRecipe

FILE = "tuned.json"
RATE = "train.learning_rate"
# what may be searched, and for which arms it does anything; nothing here changes what a step costs
TUNABLE: dict[str, Callable[[ArmRecipe], bool]] = {
    RATE: lambda arm: True,
    "train.weight_decay": lambda arm: True,
    "train.min_lr_ratio": lambda arm: arm.train.schedule == "cosine",
    "train.projector_lr_scale": lambda arm: arm.needs_kv,
    "loss.kv_weight": lambda arm: arm.needs_kv,
    "loss.kv_warmup": lambda arm: arm.needs_kv or arm.learns_from_itself,
    "loss.kv_fade": lambda arm: arm.needs_kv or arm.learns_from_itself,
    "loss.logit_weight": lambda arm: arm.needs_logits,
    "loss.logit_temperature": lambda arm: arm.needs_logits,
    "latent.answer_weight": lambda arm: arm.thinks,
    "latent.self_weight": lambda arm: arm.learns_from_itself,
    "fuse.temperature": lambda arm: len(arm.teachers) > 1 and arm.fuse.fusion_strategy != "fixed",
}
SWITCHES = ("loss.kv_weight", "loss.logit_weight", "latent.self_weight")  # 0 makes another arm of it
MAX_TRIALS = 200  # of an arm
Values = dict[str, float]  # dotted key -> value


class Trial(NamedTuple):
    """An arm under these values."""

    arm: str
    values: Values
    recipe: ArmRecipe


def trial_name(arm: str, number: int) -> str:
    """Of the first trial: number 1."""
    return f"{arm}@tune{number}"


def searched(tune: TuneRecipe, arm: ArmRecipe) -> dict[str, list[float]]:
    """The keys of the grid that do something for this arm, with their values, rising."""
    grid = {f"{section}.{key}": sorted(values) for section, keys in tune.grid.items() for key, values in keys.items()}
    return {key: values for key, values in grid.items() if key in TUNABLE and TUNABLE[key](arm)}


def search(tune: TuneRecipe, arms: Mapping[str, ArmRecipe]) -> dict[str, list[Values]]:
    """Arm -> its trials, as many for each arm wherever learning rates are searched.

    Their number is the smallest that every arm can reach with a whole number of learning rates, and no arm's whole
    grid is above.
    """
    grids = {name: searched(tune, arm) for name, arm in arms.items()}
    others = {
        name: math.prod(len(values) for key, values in grid.items() if key != RATE) for name, grid in grids.items()
    }
    sizes = [math.prod(map(len, grid.values())) for grid in grids.values()]
    step = math.lcm(*others.values())
    number = step * -(-max(sizes, default=0) // step)
    found: dict[str, list[Values]] = {}
    for name, grid in grids.items():
        if RATE in grid:
            grid = {RATE: denser(grid[RATE], number // others[name]), **{k: v for k, v in grid.items() if k != RATE}}
        found[name] = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return found


def denser(values: Sequence[float], number: int) -> list[float]:
    """So many values in the same range, the given ones among them: gaps are divided evenly in ratio, each new value
    goes to the one whose parts are widest (of equal ones the lowest), to three digits. `[1, 8]` to four: 1, 2, 4, 8."""
    gaps = list(pairwise(sorted(values)))
    parts = [1] * len(gaps)
    while sum(parts) + 1 < number:
        widths = [round(math.log(high / low) / n, 3) for (low, high), n in zip(gaps, parts, strict=True)]
        parts[widths.index(max(widths))] += 1
    found = []
    for (low, high), n in zip(gaps, parts, strict=True):
        exact = [low * (high / low) ** (i / n) for i in range(1, n)]
        rounded = [float(f"{value:.3g}") for value in exact]
        is_rising = all(a < b for a, b in pairwise([low, *rounded, high]))
        found += [low, *(rounded if is_rising else exact)]
    return [*found, max(values)]


def with_values(arm: ArmRecipe, values: Mapping[str, float]) -> ArmRecipe:
    """The arm under these values. pydantic's ValidationError for one that the key cannot have."""
    changes: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        changes.setdefault(section, {})[name] = value
    made = {name: getattr(arm, name) for name in changes}
    laid = {name: type(old).model_validate({**old.model_dump(), **changes[name]}) for name, old in made.items()}
    return arm.model_copy(update=laid)


def as_trial(tune: TuneRecipe, arm: ArmRecipe, values: Mapping[str, float]) -> ArmRecipe:
    """What a trial trains: the arm under these values, measured at its end alone where nothing asks for more."""
    made = with_values(arm, values)
    points: dict[str, Any] = {} if made.train.asks_validation else {"eval_every": 0}
    if tune.examples is not None:
        points["eval_examples"] = tune.examples
    return made.model_copy(update={"train": made.train.model_copy(update=points)})


def judged_by(recipe: Recipe) -> str:
    """`accuracy` or `nll`: as `tune` says, else the primary figure."""
    assert recipe.tune is not None
    return recipe.tune.by or recipe.report.primary


def rule_of(by: str) -> str:
    """How values are chosen, in words: what `declared.json` and `tuned.json` hold."""
    first, then = ("highest accuracy", "lowest NLL") if by == "accuracy" else ("lowest NLL", "highest accuracy")
    return (
        f"of an arm's trials the one with the {first} on validation problems with the weights that are kept, mean over "
        f"the tuning seeds; of equal ones that with the {then}, then the first; one that diverges with any seed is last"
    )


def tuned_path(run: Path) -> Path:
    return run / FILE


def read_tuned(run: Path) -> dict[str, Any]:
    """What was chosen, by arm; nothing where there is no such file, or a damaged one: it is chosen anew then."""
    return (read_mark(tuned_path(run)) or {}).get("arms", {})


def tune_mistakes(
    recipe: Recipe, tune: TuneRecipe, arms: Mapping[str, ArmRecipe], nearest: Callable[[str, list[str]], str]
) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the section, as (key, what, how to mend it). arms: the recipe's, complete.

    nearest: how to mend a word that is none of these.
    """
    names = list(arms) if tune.arms == "all" else tune.arms
    unknown = [name for name in names if name not in arms]
    for name in unknown:
        yield "arms", f"an arm to be tuned is not there: {name!r}", nearest(name, list(arms))
    if both := [seed for seed in tune.seeds if seed in recipe.seeds]:
        named = f"seed{'s' if len(both) > 1 else ''} {', '.join(map(str, both))}"
        what = f"values would be chosen with {named} of the study"
        yield "seeds", what, f"give seeds that are not among {recipe.seeds}"
    if not recipe.data.has_val:
        what = "values are chosen on validation problems, and no task has any"
        yield "", what, "give at least one task a `val` count above 0 (with data.total: a second ratio above 0)"
    wrong = bool(unknown)
    for section, keys in tune.grid.items():
        for key, values in keys.items():
            where, named = f"grid.{section}.{key}", f"{section}.{key}"
            if named not in TUNABLE:
                wrong = True
                words = [one.removeprefix(f"{section}.") for one in TUNABLE if one.startswith(f"{section}.")]
                yield where, f"{named} is nothing that can be tuned", nearest(key, words)
                continue
            if len(set(values)) < max(2, len(values)):
                wrong = True
                what = (
                    "a search needs two different values at least" if len(set(values)) < 2 else "a value is given twice"
                )
                yield (
                    where,
                    f"{what}; these are {values}",
                    "give other values, or set it in the arm and leave it out here",
                )
            elif 0 in values and named in SWITCHES:
                wrong = True
                yield where, f"{named}: 0 makes another arm of it", "leave 0 out"
            elif 0 in values and named == RATE:
                wrong = True
                yield where, "a learning rate of 0 teaches nothing", "leave 0 out"
            elif not any(TUNABLE[named](arms[name]) for name in names if name in arms):
                wrong = True
                yield where, f"{named} does nothing for any arm that is tuned", "leave it out, or name other arms"
    if wrong:
        return
    tuned = {name: arms[name] for name in names}
    for name, arm in tuned.items():
        if not searched(tune, arm):
            what = f"nothing of the grid does anything for arm {name!r}, so it would get no search"
            yield "grid", what, "add train.learning_rate, or leave the arm out of tune.arms"
            return
    counts = {name: math.prod(map(len, searched(tune, arm).values())) for name, arm in tuned.items()}
    if not all(RATE in searched(tune, arm) for arm in tuned.values()) and len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        what = f"arms would get different numbers of trials: {said}"
        yield "grid", what, "add train.learning_rate, of which arms with fewer keys then get more values"
        return
    trials = search(tune, tuned)
    if max(map(len, trials.values())) > MAX_TRIALS:
        what = f"each arm would get {max(map(len, trials.values()))} trials, more than {MAX_TRIALS}"
        yield "grid", what, "give fewer values"
        return
    for name, listed in trials.items():
        for number in range(1, len(listed) + 1):
            if (trial := trial_name(name, number)) in arms:
                what = f"{trial!r} is what a trial of {name!r} is called"
                yield "arms", what, "give this arm another name"


def edges(trials: Sequence[Values], chosen: Mapping[str, float]) -> list[str]:
    """The keys of which the lowest or highest value was chosen: the best may lie beyond it."""
    found = {key: [values[key] for values in trials] for key in chosen}
    return [key for key, values in found.items() if chosen[key] in (min(values), max(values))]


def trials_of(recipe: Recipe) -> dict[str, Trial]:
    """The trials of every tuned arm, by their names; none where nothing is tuned."""
    tune = recipe.tune
    if tune is None:
        return {}
    arms = {name: arm_recipe(recipe, name) for name in recipe.arms if recipe.tuned_as(name) == name}
    return {
        trial_name(name, number): Trial(name, values, as_trial(tune, arms[name], values))
        for name, listed in search(tune, arms).items()
        for number, values in enumerate(listed, start=1)
    }
