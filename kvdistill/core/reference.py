"""The reference of all recipe keys, made from the types themselves, so that it cannot fall behind them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from kvdistill.core.recipe import ArmRecipe, Recipe


def recipe_reference() -> str:
    """Markdown: one table per section, in the order of the recipe."""
    parts = [
        "# Recipe keys",
        "",
        "Made by `kvdistill recipe`. Any key can be set on the command line: `train.steps=200`, `seeds=[1,2,3]`,",
        "`teachers.0.optimiser.steps=100`. Unknown keys are errors that name the nearest one.",
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
            default = "required"
        elif isinstance(value, BaseModel):
            default = "its own defaults"
        else:
            default = "unset" if value is None else f"`{value}`"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} |")
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


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(_type(one) for one in inner)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return getattr(annotation, "__name__", str(annotation)).replace("Any", "anything")
