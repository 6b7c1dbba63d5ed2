"""Recipes: YAML plus `key=value` overrides in, one typed, checked, hashed `Recipe` out.

Every mistake in a recipe is named at once, each with its key (and the nearest key there is), in one `RecipeError`
before anything expensive happens. Checks that need only the recipe are here; those that need models or data are in the
stages.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvdistill.core.bases import recipe_tree, unreadable
from kvdistill.core.errors import RecipeError
from kvdistill.core.family import BEST_SINGLE, MIN_SEEDS, family_mistakes
from kvdistill.core.files import sha256_of
from kvdistill.core.recipe import (
    FOLDER_NAME,
    AlignRecipe,
    ArmRecipe,
    CompressRecipe,
    DataRecipe,
    FuseRecipe,
    LossRecipe,
    ParityRecipe,
    Recipe,
    TrainRecipe,
)
from kvdistill.core.reference import sections_in
from kvdistill.core.tuning import Trial, as_trial, search, trial_name, tune_mistakes

Options = TypeVar("Options", bound=BaseModel)
ARM_SECTIONS: dict[str, type[BaseModel]] = {
    "align": AlignRecipe,
    "compress": CompressRecipe,
    "fuse": FuseRecipe,
    "loss": LossRecipe,
    "train": TrainRecipe,
}
# keys of the original software -> keys of a recipe
FORMER_KEYS = {
    "fusion_strategy": "fuse.fusion_strategy",
    "fixed_weights": "fuse.weights",
    "alignment_strategy": "align.time",
    "kv_compression": "compress.kv_compression",
    "distill_layers": "loss.distill_layers",
    "kv_weight": "loss.kv_weight",
    "router": "fuse.fusion_strategy",
    "total_steps": "train.steps",
}


def recipes_folder() -> Path:
    """The recipes that come with the package: in it when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def builtin_recipes() -> list[Path]:
    """The YAML files of `recipes/` and of the folders in it, sorted."""
    return sorted(recipes_folder().rglob("*.yaml"))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and what it builds on (`base`, see `bases.py`), lay `key=value` overrides over it, check it.

    Raises RecipeError naming file, key and fix.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if path.is_dir():
        raise RecipeError(
            "this is a folder, not a recipe",
            place=str(path),
            fix=f"give the recipe that it was made with (its copy is {path / 'recipe.json'})"
            if (path / "recipe.json").is_file()
            else "give a YAML file",
        )
    if not path.is_file():
        raise RecipeError("recipe not found", place=str(path), fix=_nearest_recipe(path))
    whole, place = recipe_tree(path)
    try:
        tree = OmegaConf.create(whole)
        mistakes = _lay_over(tree, overrides)
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise unreadable(error, place) from None
    return make_recipe(plain, place=place, also=mistakes)


def _nearest_recipe(missing: Path) -> str:
    """What to write in place of a recipe that is not there: the path of one beside it, or of one of ours."""
    beside = {path.stem: path for path in missing.parent.glob("*.yaml") if path.is_file()}
    ours = {path.stem: path for path in builtin_recipes()}
    close = difflib.get_close_matches(missing.stem, ours | beside, n=1)
    if close and close[0] in beside:
        return f"did you mean {str(beside[close[0]])!r}?"
    if close:
        came = Path(os.path.relpath(ours[close[0]])) if ours[close[0]].is_relative_to(Path.cwd()) else ours[close[0]]
        return f"did you mean {str(came)!r}, which comes with kvdistill?"
    return f"give the path of a recipe; those that come with kvdistill are in {recipes_folder()}"


def _lay_over(tree: Any, overrides: Sequence[str]) -> list[RecipeError]:
    """Lay each `key=value` over the tree; values are read as YAML, list entries go by number (`teachers.0.seed=1`).

    Returns what is wrong with those that could not be laid.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    mistakes: list[RecipeError] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            what = f"cannot read {override!r}"
            mistakes.append(RecipeError(what, place="command line", fix="write overrides as key=value"))
            continue
        try:
            OmegaConf.update(tree, key, OmegaConf.from_dotlist([f"value={value}"])["value"], merge=True, force_add=True)
        except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
            what = f"cannot set {key!r} ({str(error).strip().splitlines()[0]})"
            mistakes.append(RecipeError(what, place="command line", fix="see docs/recipe.md for keys"))
    return mistakes


def make_options(model: type[Options], overrides: Sequence[str] = (), tree: Mapping[str, Any] | None = None) -> Options:
    """A section by itself (the options of a command that takes no recipe): `key=value` laid over `tree`, checked.

    Raises RecipeError naming the key and the nearest there is.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    made = OmegaConf.create(dict(tree or {}))
    mistakes = _lay_over(made, overrides)
    try:
        return _validated(model, OmegaConf.to_container(made, resolve=True), "command line", also=mistakes)
    except OmegaConfBaseException as error:
        raise RecipeError(
            str(error).strip().splitlines()[0], place="command line", fix="write overrides as key=value"
        ) from None


def make_recipe(tree: Mapping[str, Any], place: str = "recipe", *, also: Iterable[RecipeError] = ()) -> Recipe:
    """Typed recipe from a plain mapping, with every cross-check that needs no model and no data.

    also: mistakes found before. RecipeError for all mistakes together. What depends on a section in which something is
    wrong already is not judged: most of that would be the same mistake once more.
    """
    found = list(also)
    wrong: set[str] = set()  # sections
    try:
        recipe: Recipe | None = Recipe.model_validate(tree)
    except ValidationError as error:
        found += _mistakes_of(error, Recipe, place)
        wrong = {str(one["loc"][0]) for one in error.errors(include_url=False) if one["loc"]}
        recipe = _without_wrong_keys(tree, error)
    if recipe is not None:
        found += _cross_mistakes(recipe, place, wrong)
    _refuse(found, place)
    assert recipe is not None
    return recipe


def _cross_mistakes(recipe: Recipe, place: str, wrong: Collection[str]) -> Iterator[RecipeError]:
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
                    fix=_nearest(task, tasks),
                )
    yield from _replicate_mistakes(recipe, place)
    arms = recipe.every_arm
    made: dict[str, ArmRecipe] = {}
    for arm in recipe.arms:
        one, mistakes = _read_arm(recipe, arm, place, alone=bool({"teachers", "capture", *ARM_SECTIONS} & {*wrong}))
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
                    fix=_nearest(arm, [*arms, BEST_SINGLE]),
                )
    if not unknown and len(made) == len(recipe.arms):  # else most of it would be the same mistake once more
        for what, fix in family_mistakes(recipe.report.pairs, made):
            yield RecipeError(what, place=f"{place}: report.comparisons", fix=fix)
    if "report" not in wrong:
        yield from _curve_mistakes(recipe, place)
    yield from _parity_mistakes(recipe, made, place)
    if recipe.tune is not None and len(made) == len(recipe.arms) and not {"tune", "data", "train"} & {*wrong}:
        found = [*tune_mistakes(recipe, recipe.tune, made, _nearest)]
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
            yield RecipeError(what, place=f"{where}.{key}", fix=_nearest(arm, list(recipe.arms)))
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
            yield RecipeError(what, place=where, fix=_nearest(match.arm, [one for one in named if one != arm]))
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


def arm_recipe(recipe: Recipe, arm: str, place: str = "recipe") -> ArmRecipe:
    """The complete recipe of one arm: the study's sections with the arm's own changes over them.

    Of an arm that is matched, `train.steps` are not known yet: `arms.budget` computes them. Of one that is tuned, the
    values are the recipe's: `Experiment.arm` fills in what was chosen.
    """
    if arm not in recipe.every_arm:
        raise RecipeError(f"there is no arm {arm!r}", place=f"{place}: arms", fix=_nearest(arm, list(recipe.every_arm)))
    made, mistakes = _read_arm(recipe, arm, place)
    _refuse(mistakes, place)
    assert made is not None
    return made


def _read_arm(
    recipe: Recipe, arm: str, place: str, *, alone: bool = False
) -> tuple[ArmRecipe | None, list[RecipeError]]:
    """The arm (None where its keys are wrong) and its mistakes. alone: the sections that it changes are not to be
    relied on, so only its own keys and values are judged."""
    where = f"{place}: arms.{arm}"
    changes = dict(recipe.every_arm[arm])
    mistakes: list[RecipeError] = []
    teachers = changes.pop("teachers", [teacher.name for teacher in recipe.teachers])
    tree: dict[str, Any] = {"teachers": teachers, "control": changes.pop("control", None)}
    tree |= {key: changes.pop(key) for key in ("match", "times", "problems") if key in changes}
    if "placebo" in changes:
        fix = "write control: placebo" if changes.pop("placebo") else "leave it out"
        mistakes.append(RecipeError("`placebo` is one of several controls now", place=where, fix=fix))
    for section in ARM_SECTIONS:
        over = changes.pop(section, None) or {}
        if not isinstance(over, dict):
            mistakes.append(RecipeError(f"{section} is a section", place=where, fix=f"write {section}: {{key: value}}"))
            over = {}
        tree[section] = {**getattr(recipe, section).model_dump(), **over}
    tree["texts"] = changes.pop("texts", "own")
    if (named := changes.pop("texts_from", None)) is not None or tree["texts"] != "own":
        whose = [one.name for one in recipe.teachers if tree["texts"] == "written" or one.scratch is not None]
        tree["texts_from"] = whose if named is None else named
    steps, times = tree["train"].get("steps"), tree.get("times", 1)
    if isinstance(steps, int) and isinstance(times, int | float) and 0 < times < float("inf") and times != 1:
        tree["train"]["steps"] = max(1, round(times * steps))
    words = ["teachers", "control", "texts", "texts_from", "match", "times", "problems", *ARM_SECTIONS]
    mistakes += (
        RecipeError(f"unknown key {unknown!r}", place=where, fix=_nearest(unknown, words, ArmRecipe))
        for unknown in changes
    )
    try:
        made = ArmRecipe.model_validate(tree)
    except ValidationError as error:
        return None, [*mistakes, *_mistakes_of(error, ArmRecipe, where)]
    if not alone:
        mistakes += _arm_mistakes(made, [teacher.name for teacher in recipe.teachers], where)
        mistakes += _text_mistakes(made, recipe, where)
        if made.control == "untrained" and made.needs_nll and recipe.capture.source == "online":
            mistakes.append(
                RecipeError(
                    "competence is the trained teachers', which would have to run in every step beside the untrained "
                    "ones: twice the cost of the arm",
                    place=f"{where}: control",
                    fix="set capture.source: store, or fuse.fusion_strategy: fixed for this arm",
                )
            )
        if made.problems < 1 and made.needs_kv and made.align.layers == "cka" and made.align.layer_map is None:
            what = "layers are compared on all training problems, and this arm has a share of them"
            mistakes.append(RecipeError(what, place=f"{where}: problems", fix="give align.layer_map, or other layers"))
        if made.needs_logits and recipe.capture.logits_top_k == 0:
            what = "capture.logits_top_k is 0, and this arm distils logits"
            mistakes.append(RecipeError(what, place=f"{where}: loss.logit_weight", fix="set capture.logits_top_k: 32"))
        if made.needs_scores and recipe.capture.source == "online":
            mistakes.append(
                RecipeError(
                    "r-kv and attention_weighted read what was noted when the teacher ran over the texts",
                    place=f"{where}: compress, loss",
                    fix="set capture.source: store",
                )
            )
    return made, mistakes


def _arm_mistakes(arm: ArmRecipe, teachers: list[str], where: str) -> Iterator[RecipeError]:
    for name in arm.teachers:
        if name not in teachers:
            yield RecipeError(f"unknown teacher {name!r}", place=f"{where}.teachers", fix=_nearest(name, teachers))
    if len(set(arm.teachers)) < len(arm.teachers):
        yield RecipeError(f"a teacher is named twice: {arm.teachers}", place=f"{where}.teachers", fix="name each once")
    weights = arm.fuse.weights if arm.teachers else None
    if weights is not None and arm.fuse.fusion_strategy == "fixed" and len(weights) != len(arm.teachers):
        yield RecipeError(
            f"{len(weights)} weights for {len(arm.teachers)} teachers ({', '.join(arm.teachers)})",
            place=f"{where}: fuse.weights",
            fix="give one weight per teacher of the arm, or leave weights out for equal ones",
        )
    if arm.control is not None and not (arm.needs_kv or arm.needs_logits):
        what = f"control: {arm.control} changes what teachers give, and this arm learns nothing from any"
        yield RecipeError(what, place=where, fix="give it teachers, and loss.kv_weight (or loss.logit_weight) > 0")
    if arm.loss.k_weight + arm.loss.v_weight <= 0 and arm.needs_kv:
        yield RecipeError(
            "loss.k_weight and loss.v_weight are both 0",
            place=where,
            fix="make one positive, or set loss.kv_weight: 0 for an arm without KV",
        )
    if arm.fuse.fuse_at == "kv" and arm.align.match_in == "teacher" and arm.needs_kv:
        yield RecipeError(
            "fuse.fuse_at: kv averages teachers in the student's space",
            place=f"{where}: align.match_in",
            fix="set align.match_in: student (and align.init: ridge) or shared, or fuse.fuse_at: loss",
        )
    for is_wrong, key, what, fix in _combinations(arm):
        if is_wrong and arm.needs_kv:
            yield RecipeError(what, place=f"{where}: {key}", fix=fix)
    if arm.align.layers == "explicit" and arm.align.layer_map is None:
        yield RecipeError(
            "layers: explicit needs align.layer_map",
            place=f"{where}: align.layers",
            fix="give a mapping or a JSON file",
        )


def _text_mistakes(arm: ArmRecipe, recipe: Recipe, where: str) -> Iterator[RecipeError]:
    """What cannot be of an arm that reads other texts than its own."""
    place, teachers = f"{where}.texts", {teacher.name: teacher for teacher in recipe.teachers}
    if arm.texts == "own":
        if arm.texts_from:
            yield RecipeError(
                "texts_from says whose texts are read beside its own, and texts is own",
                place=place,
                fix="set texts: teachers or texts: written, or leave texts_from out",
            )
        return
    if arm.needs_kv or arm.needs_logits:
        yield RecipeError(
            f"texts: {arm.texts} is cross-entropy on more texts, and what teachers give is captured on the training "
            "problems alone",
            place=place,
            fix="set teachers: [] for this arm (texts_from names whose texts it reads)",
        )
    known = [name for name in arm.texts_from if name in teachers]
    for name in arm.texts_from:
        if name not in teachers:
            fix = _nearest(name, list(teachers))
            yield RecipeError(f"unknown teacher {name!r}", place=f"{where}.texts_from", fix=fix)
    published = [name for name in known if teachers[name].scratch is None]
    if arm.texts == "teachers" and (published or not known):
        who = f"{', '.join(published)}, which is published" if published else "published teachers, which all are"
        yield RecipeError(
            f"texts: teachers reads what teachers were trained on, and that is not at hand of {who}",
            place=place,
            fix="name scratch teachers in texts_from, or set texts: written",
        )
        return
    if not known:
        yield RecipeError("there is no teacher to write anything", place=place, fix="name at least one teacher")
        return
    if arm.texts == "written" and recipe.write.questions == "train":
        return
    data = recipe.data
    tasks = {task for name in known for task in teachers[name].train_on or [task.key for task in data.tasks]}
    has_any = any(task.teach for task in data.tasks if task.key in tasks)
    if not (has_any if data.total is None else data.disjoint_teachers):
        fix = "give these tasks a `teach` count" if data.total is None else "set data.disjoint_teachers: true"
        yield RecipeError(
            f"there are no `teach` problems of {', '.join(sorted(tasks))}: this arm would read nothing beside its own",
            place=place,
            fix=fix + (", or write.questions: train" if arm.texts == "written" else ""),
        )


def _combinations(arm: ArmRecipe) -> list[tuple[bool, str, str, str]]:
    """What does not go together: (is so, key, what is wrong, how to mend it)."""
    align, loss, fuse = arm.align, arm.loss, arm.fuse
    joint = arm.compares_attention
    return [
        *((True, *mistake) for mistake in align.time_mistakes()),
        (
            joint and align.match_in == "shared",
            "loss.kind",
            f"{loss.kind} compares attention heads, and a shared space has none",
            "set align.match_in: teacher, or another loss.kind",
        ),
        (
            joint and fuse.fuse_at == "kv",
            "fuse.fuse_at",
            f"{loss.kind} compares the student with one teacher at a time",
            "set fuse.fuse_at: loss",
        ),
        (
            joint and align.keys == "rotated",
            "align.keys",
            f"{loss.kind} rotates keys and queries itself",
            "set align.keys: unrotated",
        ),
        (
            arm.needs_scores and fuse.fuse_at == "kv",
            "fuse.fuse_at",
            "r-kv and attention_weighted differ from layer to layer, and one fused cache has one mask",
            "set fuse.fuse_at: loss",
        ),
        (
            arm.compress.kv_compression == "r-kv" and loss.kind in ("cka", "structural", "attention_output"),
            "loss.kind",
            f"r-kv keeps other tokens in each layer, and {loss.kind} compares tokens with one another",
            "set compress.kv_compression to another mode, or loss.kind: mse",
        ),
        (
            align.rank is not None and align.projection != "flat",
            "align.rank",
            f"rank is of flat projectors, this one is {align.projection}",
            "set align.projection: flat, or leave rank out",
        ),
        (
            align.elastic_hidden is not None and align.projection != "elastic",
            "align.elastic_hidden",
            f"elastic_hidden is of elastic projectors, this one is {align.projection}",
            "set align.projection: elastic, or leave it out",
        ),
        (
            align.match_in == "shared" and align.train_projector is True,
            "align.train_projector",
            "adapters into a shared space are frozen: trained together with the student they collapse",
            "leave train_projector out",
        ),
        (
            align.match_in == "student"
            and align.projection == "elastic"
            and not align.train_projector
            and not align.residual,
            "align.projection",
            "an elastic projector has no closed form, and in the student's space projectors are frozen",
            "set align.projection: flat or structured, or align.residual: true with align.train_projector: true",
        ),
    ]


def replicate_recipe(recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe of one seed: where data or teachers vary, with its training problems and teachers. None: what all
    seeds share."""
    changes: dict[str, Any] = {}
    if seed is not None and recipe.varies_data:
        changes["data"] = recipe.data.model_copy(update={"train_seed": seed})
    if seed is not None and recipe.varies_teachers:
        changes["teachers"] = [
            teacher if teacher.scratch is None else teacher.model_copy(update={"seed": seed})
            for teacher in recipe.teachers
        ]
    return recipe.model_copy(update=changes)


def recipe_hash(recipe: Recipe) -> str:
    """Hash of everything that changes results. Where it runs and on how many workers does not."""
    tree = recipe.model_dump(mode="json")
    for key in ("run_dir", "hardware", "title"):
        tree.pop(key, None)
    return sha256_of(tree)


def asked_hash(recipe: Recipe) -> str:
    """Hash of what trained students are asked and how: whoever changes it evaluates anew."""
    evaluate = recipe.evaluate.model_dump(mode="json", exclude={"batch_size", "match_examples"})
    return sha256_of(evaluate)


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.run_dir) if recipe.run_dir else Path("runs") / recipe.name


# -- error messages ---------------------------------------------------------------------------------


def _refuse(mistakes: Iterable[RecipeError], place: str) -> None:
    """One RecipeError for all of them, where there are any; what several arms have alike is said once."""
    found: dict[tuple[str, str, str], list[RecipeError]] = {}
    for mistake in mistakes:
        key = re.sub(r"arms\.[^:]*?(?=: |\.teachers$|$)", "arms", mistake.place)
        found.setdefault((mistake.what, mistake.fix, key), []).append(mistake)
    different: list[RecipeError] = []
    for first, *others in found.values():
        if others and (more := len({other.place for other in others} - {first.place})):
            what = f"{first.what} (and in {more} more arm{'s' if more > 1 else ''})"
            first = RecipeError(what, place=first.place, fix=first.fix)
        different.append(first)
    if len(different) == 1:
        raise different[0] from None
    if different:
        lines = [f"{len(different)} mistakes"]
        for number, one in enumerate(different, start=1):
            where = one.place.removeprefix(place).lstrip(": ")
            lines.append(f"  {number}. {f'{where}: ' if where else ''}{one.what}\n     ({one.fix})")
        raise RecipeError("\n".join(lines), place=place, fix="mend them all; docs/recipe.md has every key") from None


def _validated(model: type[Options], tree: Any, place: str, *, also: Iterable[RecipeError] = ()) -> Options:
    """The section that `tree` spells; RecipeError for all that is wrong in it, and for the mistakes `also`."""
    found = list(also)
    try:
        made: Options | None = model.model_validate(tree)
    except ValidationError as error:
        made = None
        found += _mistakes_of(error, model, place)
    _refuse(found, place)
    assert made is not None
    return made


def _mistakes_of(error: ValidationError, model: type[BaseModel], place: str) -> list[RecipeError]:
    """What pydantic found, in our words. A value that fits none of several types is one mistake, not one a type."""
    mistakes: dict[tuple[Any, ...], RecipeError] = {}
    for one in error.errors(include_url=False):
        where = ".".join(str(part) for part in one["loc"])
        section: type[BaseModel] | None = model
        key: list[Any] = []  # the way to the field, without the names that pydantic gives to the types it tried
        for part in one["loc"]:
            if section is not None and not isinstance(part, int):
                field = section.model_fields.get(str(part))
                if field is None and one["type"] == "extra_forbidden":
                    break
                section = next(sections_in(field.annotation), None) if field else None
            elif section is None and not isinstance(part, int):
                break
            key.append(part)
        if one["type"] == "extra_forbidden":
            words = list(section.model_fields) if section else []
            unknown = RecipeError(
                f"unknown key {where!r}", place=place, fix=_nearest(str(one["loc"][-1]), words, model)
            )
            mistakes.setdefault(one["loc"], unknown)
            continue
        what = one["msg"].removeprefix("Value error, ")
        given = one.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
        what = f"{where}: {what}{shown}" if where else what
        mistakes.setdefault(tuple(key), RecipeError(what, place=place, fix="see docs/recipe.md for this key"))
    return list(mistakes.values())


def _without_wrong_keys(tree: Mapping[str, Any], error: ValidationError) -> Recipe | None:
    """The recipe less the keys that are wrong, so that the rest of it can be judged too; None where it is none then."""
    rest: Any = copy.deepcopy(dict(tree))
    for one in error.errors(include_url=False):
        inner, holder = rest, None  # the innermost mapping on the way, and its key
        for part in one["loc"]:
            try:
                within = inner[part]
            except (LookupError, TypeError):  # it is not there, was taken out before, or names a type that was tried
                break
            holder = (inner, part) if isinstance(inner, dict) else holder
            inner = within
        if holder is not None:
            holder[0].pop(holder[1], None)
    try:
        return Recipe.model_validate(rest)
    except ValidationError:
        return None


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _nearest(word: str, words: Sequence[str], model: type[BaseModel] | None = None) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    if word in FORMER_KEYS:
        return f"it is called {FORMER_KEYS[word]!r} here"
    if model is not None:
        keys_of = Recipe if model is ArmRecipe else model
        by_end = {key.rsplit(".", 1)[-1]: key for key in _all_keys(keys_of)}
        close = difflib.get_close_matches(word, list(by_end), n=1, cutoff=0.6)
        if close:
            return f"did you mean {by_end[close[0]]!r}?"
    return f"one of: {', '.join(words)}" if words else "see docs/recipe.md"
