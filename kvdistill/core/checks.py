"""What does not go together in a recipe whose keys and values are right by themselves. Needs only the recipe: what
needs models or data is in the stages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from pydantic import ValidationError

from kvdistill.core.arms import ARM_SECTIONS, arm_recipe, read_arm
from kvdistill.core.errors import RecipeError
from kvdistill.core.family import BEST_SINGLE, MIN_SEEDS, family_mistakes
from kvdistill.core.mistakes import nearest
from kvdistill.core.recipe import FOLDER_NAME, ArmRecipe, DataRecipe, ParityRecipe, Recipe
from kvdistill.core.tuning import trials_of, tune_mistakes


def cross_mistakes(recipe: Recipe, place: str, wrong: Collection[str]) -> Iterator[RecipeError]:
    """What does not go together in a recipe whose keys and values are right by themselves, but for the sections
    `wrong`."""
    names = [teacher.name for teacher in recipe.teachers]
    if len(set(names)) < len(names):
        yield RecipeError("two teachers share a name", place=f"{place}: teachers", fix="give each teacher its own name")
    for arm in recipe.arms:
        if not re.fullmatch(FOLDER_NAME, arm):
            yield RecipeError(
                f"{arm!r} cannot be an arm's name: its folder is called so",
                place=f"{place}: arms",
                fix="use letters, digits and . _ + @ -, beginning with a letter or digit",
            )
    if len(set(recipe.seeds)) < len(recipe.seeds):
        yield RecipeError(f"a seed is given twice: {recipe.seeds}", place=f"{place}: seeds", fix="give each once")
    if "data" not in wrong:
        yield from _data_mistakes(recipe.data, place)
    tasks = [task.key for task in recipe.data.tasks]
    for number, teacher in enumerate(recipe.teachers):
        for task in teacher.train_on if "data" not in wrong else ():
            if task not in tasks:
                yield RecipeError(
                    f"teacher {teacher.name!r} is to be trained on {task!r}, which is not among the tasks",
                    place=f"{place}: teachers.{number}.train_on",
                    fix=nearest(task, tasks),
                )
    yield from _replicate_mistakes(recipe, place)
    arms = recipe.every_arm
    made: dict[str, ArmRecipe] = {}
    for arm in recipe.arms:
        one, mistakes = read_arm(recipe, arm, place, alone=bool({"teachers", "capture", *ARM_SECTIONS} & {*wrong}))
        made |= {arm: one} if one is not None else {}
        yield from mistakes
    asks = "train" not in wrong and any(one.train.asks_validation for one in made.values())
    if asks and "data" not in wrong and not recipe.data.has_val:
        yield RecipeError(
            "train.select and train.patience look at validation problems, and no task has any",
            place=f"{place}: data.tasks",
            fix="give at least one task a `val` count above 0 (with data.total: a second ratio above 0)",
        )
    unknown = False
    for pair in recipe.report.pairs:
        for arm in pair:
            if arm not in arms and arm != BEST_SINGLE:
                unknown = True
                yield RecipeError(
                    f"comparison names an arm that is not there: {arm!r}",
                    place=f"{place}: report.comparisons",
                    fix=nearest(arm, [*arms, BEST_SINGLE]),
                )
    if not unknown and len(made) == len(recipe.arms):  # else most of it would be the same mistake once more
        for what, fix in family_mistakes(recipe.report.pairs, made):
            yield RecipeError(what, place=f"{place}: report.comparisons", fix=fix)
    if "report" not in wrong:
        yield from _curve_mistakes(recipe, place)
    yield from _parity_mistakes(recipe, made, place)
    if recipe.tune is not None and len(made) == len(recipe.arms) and not {"tune", "data", "train"} & {*wrong}:
        found = [*tune_mistakes(recipe, recipe.tune, made, nearest)]
        yield from (RecipeError(what, place=f"{place}: tune.{key}".rstrip("."), fix=fix) for key, what, fix in found)
        if not found:
            yield from _trial_mistakes(recipe, place)


def _curve_mistakes(recipe: Recipe, place: str) -> Iterator[RecipeError]:
    curves, where = recipe.report.curves, f"{place}: report.curves"
    if curves is None:
        return
    for arm in (*curves.arms, *curves.points):
        if arm not in recipe.arms:
            what = f"a curve of an arm that is not there: {arm!r}"
            key = "arms" if arm in curves.arms else "points"
            yield RecipeError(what, place=f"{where}.{key}", fix=nearest(arm, list(recipe.arms)))
            continue
        for budget, name in curves.names(arm).items():
            if name != arm and name in recipe.arms:
                what = f"{name!r} is what {arm!r} at {budget:g} times its budget is called"
                yield RecipeError(what, place=f"{place}: arms.{name}", fix="give this arm another name")
            elif name != arm:  # its steps may be none, or too many; what else is wrong is said of the arm itself
                try:
                    arm_recipe(recipe, name, place)
                except RecipeError as error:
                    if "steps" in error.what:
                        yield error
    if len(recipe.seeds) < MIN_SEEDS:
        what = f"a curve has an interval over seeds, and {len(recipe.seeds)} is too few for one"
        yield RecipeError(what, place=where, fix=f"give at least {MIN_SEEDS} seeds (5 are better), or leave curves out")


def _parity_mistakes(recipe: Recipe, arms: Mapping[str, ArmRecipe], place: str) -> Iterator[RecipeError]:
    """Budgets that cannot be made equal. arms: as written, those whose own keys and values are right."""
    named, curves = recipe.every_arm, recipe.report.curves
    written = {name: arm for arm in (curves.arms if curves else ()) if curves for name in curves.names(arm).values()}
    published = {teacher.name for teacher in recipe.teachers if teacher.scratch is None}

    def unknown_cost(parity: ParityRecipe, *both: str) -> str | None:
        """A teacher of these arms of which nobody knows here what its training cost, where that is asked for."""
        asked = parity.parity == "total_flops" and not parity.amortised
        taught = [arms[one] for one in both if one in arms and (arms[one].needs_kv or arms[one].needs_logits)]
        return next((name for arm in taught for name in arm.teachers if asked and name in published), None)

    unpriced = "the training of teacher {!r}, which comes from elsewhere, has a cost that nobody knows here"
    mend = "set amortised: true (its forward passes are counted then, its training is not), or another parity"
    for arm, baseline in recipe.report.pairs:
        if teacher := unknown_cost(recipe.report.parity(arm, baseline), *(written.get(x, x) for x in (arm, baseline))):
            where = f"{place}: report.comparisons: {arm} against {baseline}"
            yield RecipeError(unpriced.format(teacher), place=where, fix=mend)
    for arm, made in arms.items():
        if (match := made.match) is None:
            continue
        where = f"{place}: arms.{arm}.match"
        if match.arm not in named:
            what = f"matched to an arm that is not there: {match.arm!r}"
            yield RecipeError(what, place=where, fix=nearest(match.arm, [one for one in named if one != arm]))
            continue
        if "steps" in (dict(recipe.arms[arm]).get("train") or {}):
            what = "match computes the steps, and train.steps gives them"
            yield RecipeError(what, place=where, fix="leave one of the two out")
        way = [arm]
        while len(set(way)) == len(way) and way[-1] in arms and (onwards := arms[way[-1]].match) is not None:
            way.append(written.get(onwards.arm, onwards.arm))
        if way[-1] == arm and arm == next(one for one in arms if one in way):  # a circle is said once
            what = f"no steps can be computed: {' is matched to '.join(way)}"
            yield RecipeError(what, place=where, fix="match to an arm whose steps are given")
        elif teacher := unknown_cost(match, arm, written.get(match.arm, match.arm)):
            yield RecipeError(unpriced.format(teacher), place=where, fix=mend)


def _trial_mistakes(recipe: Recipe, place: str) -> Iterator[RecipeError]:
    """Values of the grid that an arm cannot have."""
    try:
        trials_of(recipe)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            key = ".".join(map(str, one["loc"])) or "train"
            what = f"{key}: {one['msg'].removeprefix('Value error, ')} (given: {one.get('input')!r})"
            yield RecipeError(what, place=f"{place}: tune.grid", fix="see docs/recipe.md for this key")


def _replicate_mistakes(recipe: Recipe, place: str) -> Iterator[RecipeError]:
    """What cannot vary with the seed as the recipe asks."""
    if recipe.varies_teachers and not any(teacher.scratch is not None for teacher in recipe.teachers):
        fixed = ", ".join(teacher.name for teacher in recipe.teachers)
        what = f"published teachers ({fixed}) are the same for every seed" if fixed else "there is no teacher"
        instead = "data" if recipe.replicate == "all" else "student or data"
        yield RecipeError(
            f"replicate: {recipe.replicate} trains teachers for every seed, and {what}",
            place=f"{place}: replicate",
            fix=f"set replicate: {instead}, or give a teacher with `scratch`",
        )
    if recipe.varies_data and recipe.data.train_seed is not None:
        yield RecipeError(
            f"replicate: {recipe.replicate} draws the training problems of every seed by that seed",
            place=f"{place}: data.train_seed",
            fix="leave data.train_seed out, or set replicate: student or teacher",
        )
    if recipe.varies_teachers:
        for section, align in [("align", recipe.align.model_dump())] + [
            (f"arms.{name}.align", arm["align"])
            for name, arm in recipe.arms.items()
            if isinstance(arm, dict) and isinstance(arm.get("align"), dict)
        ]:
            layers = align.get("layers", recipe.align.layers)
            if layers == "cka" and isinstance(align.get("layer_map"), str):
                yield RecipeError(
                    "a file of layer similarities is of one teacher's weights, and every seed trains teachers of its "
                    "own",
                    place=f"{place}: {section}.layer_map",
                    fix="leave it out: layers are then compared for every seed",
                )


def _data_mistakes(data: DataRecipe, place: str) -> Iterator[RecipeError]:
    """Keys of the data section that say nothing without another one: whoever writes them expects something of them."""
    mixed = [task.key for task in data.tasks if task.share is not None or task.cap is not None]
    if mixed and data.total is None:
        yield RecipeError(
            f"`share` and `cap` of {', '.join(mixed)} divide data.total, which is not set",
            place=f"{place}: data.tasks",
            fix="set data.total, or give train, val and test counts instead",
        )
    if data.system_prompt is not None and data.template != "chat":
        yield RecipeError(
            "a system prompt goes with the chat template only", place=f"{place}: data", fix="set data.template=chat"
        )
    if data.disjoint_teachers and data.total is None and not any(task.teach for task in data.tasks):
        yield RecipeError(
            "disjoint_teachers: no task has problems for teachers only",
            place=f"{place}: data.tasks",
            fix="give tasks a `teach` count, or set data.total (half of train then goes to the teachers)",
        )
