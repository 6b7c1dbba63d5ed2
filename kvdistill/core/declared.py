"""What was declared before the first student was trained: the family of comparisons, its rules and the seeds.

`declared.json` in the run folder, written once with its time and hash. A report holds against it what it is asked to
show, and says what was chosen after the results. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import not_comparable, planned_parities, read_budgets
from kvdistill.core.errors import RunFolderError
from kvdistill.core.family import BEST_SINGLE, Family, Pair, best_single_rule, make_family, single_arms
from kvdistill.core.files import as_json, read_json, sha256_of, write_json
from kvdistill.core.layout import file_lock, locks_folder
from kvdistill.core.recipe import Parity, ParityRecipe, Recipe, TrainRecipe
from kvdistill.core.tuning import judged_by, rule_of, trials_of

_RULES = ("primary", "alpha", "margin")


def declare(recipe: Recipe, run: Path) -> None:
    """Freeze the recipe's family and seeds, unless that is done or a student was trained before there was a choice."""
    with file_lock(locks_folder(run) / "declare", wait=True):
        if not _path(run).exists() and not [*run.glob("arms/*/seed-*/trained.json")]:
            content = {**_family(recipe, run), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            write_json(_path(run), {**content, "sha256": sha256_of(content)})


def compare_declared(recipe: Recipe, run: Path) -> dict[str, Any]:
    """What a report says of it: `time` and `sha256` (None: nothing was frozen here), `changed`: in words what differs,
    `late`: [arm, baseline] pairs that were chosen after the results. Raises RunFolderError for an altered file."""
    now, then = _family(recipe, run), _frozen(run)
    if then is None:
        return {"time": None, "sha256": None, "changed": [], "late": []}
    digest = sha256_of(then)
    changed = [f"{rule} was {then[rule]}, is {now[rule]}" for rule in _RULES if then[rule] != now[rule]]
    late = [pair for pair in now["comparisons"] if changed or pair not in then["comparisons"]]
    for pair in then["comparisons"]:
        was, is_now = (_compared_at(said, pair) for said in (then, now))
        if pair in now["comparisons"] and was != is_now:
            changed.append(f"{_named(pair)} was {was}, is {is_now}")
            late = [*late, *([] if pair in late else [pair])]
    left_out = [pair for pair in then["comparisons"] if pair not in now["comparisons"]]
    if left_out:  # Holm over fewer comparisons than were declared
        changed.append(f"left out: {', '.join(' against '.join(pair) for pair in left_out)}")
        late = now["comparisons"]
    if then.get("best_single") not in (None, best_single_rule(then["primary"])):
        changed.append("best-single is chosen by another rule")
        late = [pair for pair in now["comparisons"] if pair in late or BEST_SINGLE in pair]
    if _searched_otherwise(then.get("tuning"), now.get("tuning")):
        changed.append("how arms are tuned differs")
        late = now["comparisons"]
    if then["seeds"] != now["seeds"]:
        changed.append(f"seeds were {then['seeds']}, are {now['seeds']}")
        late = now["comparisons"]
    return {"time": then["time"], "sha256": digest, "changed": changed, "late": late}


def _compared_at(said: Mapping[str, Any], pair: Sequence[str]) -> str:
    """`at equal steps`, `not comparable`: how a declaration has a pair."""
    if _named(pair) in said.get("not_comparable", {}):
        return "not comparable"
    return f"at equal {said.get('parities', {}).get(_named(pair), str(ParityRecipe()))}"


def family_of(recipe: Recipe) -> Family:
    """The family of a recipe's comparisons: what it lists, and what is there by rule."""
    return make_family(recipe, {name: arm_recipe(recipe, name) for name in recipe.arms})


def parities_of(recipe: Recipe, run: Path) -> dict[Pair, ParityRecipe | str]:
    """At what each comparison of the family is made, in the family's order; in words why one cannot be.

    A listed one: as the recipe says. One that is there by rule: steps where both arms take as many, else the first
    parity that holds by the plan (`core/budgets.py`). That is decided before any result and frozen in `declared.json`.
    """
    family, then = family_of(recipe), _frozen(run)
    frozen = [tuple(pair) for pair in (then or {}).get("by_rule", [])]
    found: dict[Pair, ParityRecipe | str] = {}
    for pair in family.pairs:
        if pair not in family.by_rule:
            found[pair] = recipe.report.parity(*pair)
        elif then is not None and pair in frozen:
            name = _named(pair)
            reason: str | None = then.get("not_comparable", {}).get(name)
            found[pair] = reason or _parity_called(then.get("parities", {}).get(name))
        else:
            found[pair] = _planned(recipe, run, pair)
    return found


def _planned(recipe: Recipe, run: Path, pair: Pair) -> ParityRecipe | str:
    """The first parity that holds for a pair by the plan: for `best-single` with whichever arm will be chosen."""
    arms, planned = {name: arm_recipe(recipe, name) for name in recipe.arms}, read_budgets(run)
    arm, baseline = pair
    others = single_arms(arms) if baseline == BEST_SINGLE else [baseline]
    same_rules = [other for other in others if _ends_alike(arms[arm].train, arms[other].train)]
    held = [planned_parities(arm, other, arms, planned) if other in same_rules else [] for other in others]
    common = [parity for parity in held[0] if all(parity in one for one in held)]
    if common:
        return common[0]
    if all(held):
        each = ", ".join(f"{other} at equal {one[0]}" for other, one in zip(others, held, strict=True))
        return f"not comparable: no parity holds for {arm} with all that best-single is chosen among ({each})"
    return not_comparable(arm, [other for other, one in zip(others, held, strict=True) if not one], arms, planned)


def _ends_alike(one: TrainRecipe, other: TrainRecipe) -> bool:
    return (one.select, one.patience) == (other.select, other.patience)


def _parity_called(words: str | None) -> ParityRecipe:
    """What was written as `total FLOPs, amortised`; steps are not written."""
    every = [ParityRecipe(parity=name, amortised=shared) for name in get_args(Parity) for shared in (True, False)]
    return next((one for one in every if str(one) == words), ParityRecipe())


def _frozen(run: Path) -> dict[str, Any] | None:
    """What `declared.json` holds but for its hash; None where nothing was frozen. RunFolderError for an altered one."""
    if not _path(run).exists():
        return None
    then = read_json(_path(run))
    digest = then.pop("sha256", None) if isinstance(then, dict) else None
    if digest is None or digest != sha256_of(then) or not {*_RULES, "comparisons", "seeds", "time"} <= then.keys():
        raise RunFolderError(
            "what was declared before training was altered",
            place=str(_path(run)),
            fix="put the file back as it was, or delete it: the page then says that nothing is known to be declared",
        )
    return dict(then)


def _family(recipe: Recipe, run: Path) -> dict[str, Any]:
    rules, family = recipe.report, family_of(recipe)
    pairs, by_rule = ([list(pair) for pair in listed] for listed in (family.pairs, family.by_rule))
    found: dict[str, Any] = {"comparisons": pairs, "by_rule": by_rule, "seeds": list(recipe.seeds)}
    parities = {_named(pair): one for pair, one in parities_of(recipe, run).items()}
    held = {name: one for name, one in parities.items() if isinstance(one, ParityRecipe)}
    found["parities"] = {name: str(one) for name, one in held.items() if one.parity != "steps"}
    if len(held) < len(parities):
        found["not_comparable"] = {name: one for name, one in parities.items() if name not in held}
    if any(BEST_SINGLE in pair for pair in family.pairs):
        found["best_single"] = best_single_rule(rules.primary)
    if recipe.tune is not None:
        trials: dict[str, list[Any]] = {}
        for trial in trials_of(recipe).values():
            trials.setdefault(trial.arm, []).append(trial.values)
        said = {"rule": rule_of(judged_by(recipe)), "seeds": recipe.tune.seeds, "examples": recipe.tune.examples}
        found["tuning"] = {**said, "trials": trials}
    return as_json(found | {rule: getattr(rules, rule) for rule in _RULES})


def _searched_otherwise(then: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether arms are tuned in another way; arms that are tuned in the same one may have come."""
    if then is None or now is None:
        return then is not now
    trials = [{arm: one["trials"][arm] for arm in then["trials"] if arm in one["trials"]} for one in (then, now)]
    return {**then, "trials": trials[0]} != {**now, "trials": trials[1]}


def _named(pair: Sequence[str]) -> str:
    return " against ".join(pair)


def _path(run: Path) -> Path:
    return run / "declared.json"
