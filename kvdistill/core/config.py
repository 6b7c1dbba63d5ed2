"""Recipes: YAML plus `key=value` overrides in, one typed, checked, hashed `Recipe` out.

Every mistake in a recipe is named at once, each with its key (and the nearest key there is), in one `RecipeError`
before anything expensive happens. What does not go together is in `checks.py` and, of one arm, in `arms.py`; how
mistakes are said in `mistakes.py`. Checks that need models or data are in the stages.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvdistill.core.bases import recipe_tree, unreadable
from kvdistill.core.checks import cross_mistakes
from kvdistill.core.errors import RecipeError
from kvdistill.core.files import sha256_of
from kvdistill.core.mistakes import Options, mistakes_of, refuse, validated, without_wrong_keys
from kvdistill.core.recipe import Recipe


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
        return validated(model, OmegaConf.to_container(made, resolve=True), "command line", also=mistakes)
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
        found += mistakes_of(error, Recipe, place)
        wrong = {str(one["loc"][0]) for one in error.errors(include_url=False) if one["loc"]}
        recipe = without_wrong_keys(tree, error)
    if recipe is not None:
        found += cross_mistakes(recipe, place, wrong)
    refuse(found, place)
    assert recipe is not None
    return recipe


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
