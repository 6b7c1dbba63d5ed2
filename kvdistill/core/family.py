"""The family of comparisons: which arm is held against which, and what the word `best-single` stands for.

Pure functions of the recipe's arms, so that a mistake is named when a recipe is read, and what holds for every study
is written once: where several teachers are studied, the family has each such arm against the best arm with one teacher
(chosen on validation problems) and against plain fine-tuning, whether the recipe lists these or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvdistill.core.recipe import ArmRecipe, Recipe

BEST_SINGLE = "best-single"
MIN_SEEDS = 3  # two find an effect of 11.5 of its standard deviations (power .8), three one of 3.3, five one of 1.7
Pair = tuple[str, str]  # arm, baseline
Arms = Mapping[str, ArmRecipe]


@dataclass(frozen=True)
class Family:
    """pairs: as the recipe lists them, then those that are there by rule (`by_rule`); a side may be `best-single`.
    notes: in words, what the rule asks for and the recipe's arms cannot give."""

    pairs: list[Pair]
    by_rule: list[Pair]
    notes: list[str]


def _is_control(arm: ArmRecipe) -> bool:
    return arm.control is not None


def _is_taught(arm: ArmRecipe) -> bool:
    """Something of a teacher reaches it, and is meant to help. Its own written reasoning is no teacher."""
    return (arm.needs_kv or arm.needs_logits) and not _is_control(arm)


def single_arms(arms: Arms) -> list[str]:
    """The arms that `best-single` is chosen among: taught by one teacher, by KV or logits, and no control.

    An arm whose steps are matched to another's is one at another budget: listed by its name, it is compared as well.
    """
    single = [name for name, arm in arms.items() if _is_taught(arm) and len(arm.teachers) == 1]
    return [name for name in single if arms[name].match is None] or single


def several_arms(arms: Arms) -> list[str]:
    """The arms that stand for several teachers: two or more of them, by KV (logits: a reference), and no control."""
    return [name for name, arm in arms.items() if _is_taught(arm) and arm.needs_kv and len(arm.teachers) > 1]


def plain_arm(arms: Arms) -> str | None:
    """The arm that stands for plain fine-tuning: `ce` if it is one, else the first without a teacher's signal, which
    reads its own texts and writes its reasoning."""
    plain = [
        name
        for name, arm in arms.items()
        if not (arm.needs_kv or arm.needs_logits) and arm.texts == "own" and arm.reasoning == "written"
    ]
    return "ce" if "ce" in plain else next(iter(sorted(plain, key=lambda name: bool(arms[name].teachers))), None)


def best_single_rule(primary: str) -> str:
    """How `best-single` is chosen, in words: what `declared.json` freezes and the page shows."""
    first, then = "highest accuracy", "lowest NLL"
    if primary == "nll":
        first, then = then, first
    return (
        "of the arms with one teacher (controls left out) the one with the " + first + " on validation problems at the "
        f"end of training, mean over seeds; of equal ones that with the {then}, then the first in the recipe"
    )


def make_family(recipe: Recipe, arms: Arms) -> Family:
    """The family of a study. arms: the recipe's, complete.

    `report.comparisons: []` declares that nothing is compared. Unset: each arm with several teachers against the best
    single one and against plain fine-tuning; without such arms each taught arm against plain fine-tuning; with fewer
    than three seeds nothing. A list: what it says; for each arm with several teachers that it names first (or as
    baseline, or at all, where it names none so) these two are added where they are missing.
    """
    listed, several, plain = recipe.report.pairs, several_arms(arms), plain_arm(arms)
    if recipe.report.comparisons is None:
        if len(recipe.seeds) < MIN_SEEDS:
            return Family([], [], [f"fewer than {MIN_SEEDS} seeds: nothing is compared"])
        if not several:
            taught = [name for name, arm in arms.items() if arm.needs_kv or arm.needs_logits or arm.learns_from_itself]
            pairs = [(name, plain) for name in taught if plain is not None]
            return Family(pairs, pairs, [])
    elif not listed:
        return Family([], [], [])
    baselines = ([BEST_SINGLE] if single_arms(arms) else []) + ([plain] if plain is not None else [])
    named = [name for name in several if any(name == arm for arm, _ in listed)]
    named = named or [name for name in several if any(name in pair for pair in listed)] or several
    asked = [(name, baseline) for name in named for baseline in baselines]
    by_rule = [(arm, baseline) for arm, baseline in asked if not {(arm, baseline), (baseline, arm)} & {*listed}]
    notes = []
    if several and BEST_SINGLE not in baselines:
        notes.append("no arm has one teacher, so nothing here says whether several teachers beat the best one of them")
    if several and plain is None:
        notes.append("no arm is plain fine-tuning, so nothing here says whether teachers help at all")
    return Family(listed + by_rule, by_rule, notes)


def family_mistakes(pairs: Sequence[Pair], arms: Arms) -> Iterator[tuple[str, str]]:
    """What is wrong with listed comparisons beside names that are not there, as (what, how to mend it).

    arms: those whose own keys and values are right.
    """
    singles = single_arms(arms)
    if BEST_SINGLE in arms:
        yield f"{BEST_SINGLE!r} is a word of report.comparisons and cannot be an arm's name", "call the arm otherwise"
    for number, (arm, baseline) in enumerate(pairs):
        if arm == baseline:
            yield f"{arm!r} is compared with itself", f"write another baseline, e.g. [{arm}, {plain_arm(arms) or 'ce'}]"
        elif {(arm, baseline), (baseline, arm)} & {*pairs[:number]}:
            yield f"{arm} and {baseline} are compared twice, and Holm would count both", "list the pair once"
        elif BEST_SINGLE in (arm, baseline):
            other = baseline if arm == BEST_SINGLE else arm
            if not singles:
                what = f"[{arm}, {baseline}]: no arm is taught by exactly one teacher, so there is no best one"
                yield what, "add one, e.g. arms.NAME: {teachers: [TEACHER]}, or compare with another arm"
            elif other in singles:
                what = f"[{arm}, {baseline}]: {other!r} has one teacher itself, and may be the best of those"
                yield what, "name the arm that you mean in place of best-single"
