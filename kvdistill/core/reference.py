"""The reference of all recipe keys, made from the types themselves, so that it cannot fall behind them."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel

from kvdistill.core.recipe import ArmRecipe, Recipe


def recipe_reference() -> str:
    """Markdown: one table per section, in the order of the recipe."""
    parts = [
        "# Recipe keys",
        "",
        "Made by `kvdistill recipe`; `kvdistill recipe RECIPE` prints a recipe with all keys as YAML. Any key can be",
        "set on the command line: `train.steps=200`, `seeds=[1,2,3]`, `teachers.0.optimiser.steps=100`.",
        "Unknown keys are errors that name the nearest one.",
        "",
        "`base: ../demo.yaml` builds a recipe on another one, found from its own folder, which may have a base too.",
        "Mappings are merged key by key, lists and values replaced (`null` unsets). A recipe that has `arms` has these",
        "alone, and leaves `report.comparisons` and `report.curves` of its base behind; `name`, `title` and `run_dir`",
        "are never its base's. What `kvdistill recipe RECIPE` prints, and a run folder's `recipe.json`, is the recipe",
        "resolved.",
        "",
    ]
    for title, section in _sections(Recipe, "", set()):
        parts += _table(title, section)
    parts += _table("one entry of `arms` (a section of it holds only what differs from the study's)", ArmRecipe)
    return "\n".join(parts)


def _table(title: str, section: type[BaseModel]) -> list[str]:
    doc = (section.__doc__ or "").strip().splitlines()[0]
    rows = [f"## {title}", "", doc, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        value: Any = field.get_default(call_default_factory=True)
        if field.is_required():
            default = "the recipe's" if section is ArmRecipe else "required"
        elif isinstance(value, BaseModel):
            default = "its own defaults"
        else:
            default = "unset" if value is None else f"`{json.dumps(value)}`"
        meaning = (field.description or "").replace("|", "\\|")
        kind = _type(field.annotation, field.metadata)
        rows.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return [*rows, ""]


def _sections(model: type[BaseModel], prefix: str, seen: set[type]) -> Iterator[tuple[str, type[BaseModel]]]:
    if prefix == "":
        yield "the recipe", model
    for name, field in model.model_fields.items():
        for inner in sections_in(field.annotation):
            if inner in seen:
                continue
            seen.add(inner)
            many = get_origin(field.annotation) in (list, dict)
            path = f"{prefix}{name}{'.N' if many else ''}"
            yield f"`{path}`", inner
            yield from _sections(inner, f"{path}.", seen)


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a key's type speaks of: of `list[TaskRecipe] | None`, TaskRecipe."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


_FAR = 10**8  # a bound that is there for our own sake tells a reader nothing
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: `whole number, 1 to 1024`, `list of text`, `section`. metadata: what bounds it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], inner[1:])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one, metadata) for one in inner if one is not type(None))
    if origin is tuple:
        return f"list of {len(inner)}: each {_type(inner[0])}"
    if origin in (list, dict):
        return ("list of " if origin is list else "mapping of ") + " to ".join(map(_type, inner))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if annotation is str and any(isinstance(one, AfterValidator) for one in metadata):
        return "path or name"
    return _WORDS[annotation] + (_bounds(metadata, annotation is int) if annotation in (int, float) else "")


def _bounds(metadata: Sequence[Any], whole: bool) -> str:
    """`, 1 to 1,024`, `, above 0, at most 1`; nothing where there are none. whole: of whole numbers."""
    bounds: dict[str, Any] = {}
    for one in metadata:
        for constraint in getattr(one, "metadata", [one]):  # of a `Field(…)` inside of Annotated
            bounds |= {
                sign: getattr(constraint, sign) for sign in ("gt", "ge", "lt", "le") if hasattr(constraint, sign)
            }
    if whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if whole and "lt" in bounds:
        bounds["le"] = bounds.pop("lt") - 1
    bounds = {sign: value for sign, value in bounds.items() if value < _FAR}
    shown = {sign: f"{value:,}" if whole else f"{value:g}" for sign, value in bounds.items()}
    if "ge" in shown and "le" in shown:
        return f", {shown['ge']} to {shown['le']}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return "".join(f", {word} {shown[sign]}" for sign, word in words.items() if sign in shown)
