"""How mistakes in a recipe are said: each with its key and the nearest key there is, all in one `RecipeError`."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvdistill.core.errors import RecipeError
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.reference import sections_in

Options = TypeVar("Options", bound=BaseModel)


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


def refuse(mistakes: Iterable[RecipeError], place: str) -> None:
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


def validated(model: type[Options], tree: Any, place: str, *, also: Iterable[RecipeError] = ()) -> Options:
    """The section that `tree` spells; RecipeError for all that is wrong in it, and for the mistakes `also`."""
    found = list(also)
    try:
        made: Options | None = model.model_validate(tree)
    except ValidationError as error:
        made = None
        found += mistakes_of(error, model, place)
    refuse(found, place)
    assert made is not None
    return made


def mistakes_of(error: ValidationError, model: type[BaseModel], place: str) -> list[RecipeError]:
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
            unknown = RecipeError(f"unknown key {where!r}", place=place, fix=nearest(str(one["loc"][-1]), words, model))
            mistakes.setdefault(one["loc"], unknown)
            continue
        what = one["msg"].removeprefix("Value error, ")
        given = one.get("input")
        shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
        what = f"{where}: {what}{shown}" if where else what
        mistakes.setdefault(tuple(key), RecipeError(what, place=place, fix="see docs/recipe.md for this key"))
    return list(mistakes.values())


def without_wrong_keys(tree: Mapping[str, Any], error: ValidationError) -> Recipe | None:
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


def nearest(word: str, words: Sequence[str], model: type[BaseModel] | None = None) -> str:
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
