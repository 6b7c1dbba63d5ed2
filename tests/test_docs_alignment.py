"""docs/alignment.md: its figures can be drawn, its keys exist, and no mode is left out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
from pydantic import BaseModel

from kvdistill.core.recipe import AlignRecipe, CompressRecipe, LossRecipe, Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"!\[[^\]]+\]\(images/(alignment-[a-z-]+\.svg)\)", PAGE)
MODES = [
    (section, key)
    for section, keys in (
        (AlignRecipe, ("match_in", "time", "layers", "projection", "init", "keys", "shared_fit")),
        (CompressRecipe, ("kv_compression",)),
        (LossRecipe, ("kind",)),
    )
    for key in keys
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_alignment", ROOT / "docs" / "draw_alignment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_draws_every_figure_of_the_page_and_no_other(script: ModuleType, tmp_path: Path) -> None:
    script.main([str(tmp_path / "made")])
    made = {file.name: file for file in (tmp_path / "made").iterdir()}
    assert sorted(made) == sorted(SHOWN) == sorted(set(SHOWN))
    for file in made.values():
        root = ElementTree.parse(file).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 100, f"{file.name} is all but empty"


def test_figures_beside_the_page_are_those_it_shows() -> None:
    there = sorted(file.name for file in (ROOT / "docs" / "images").glob("alignment-*"))
    assert there == sorted(SHOWN), "run: .venv/bin/python docs/draw_alignment.py"


def sections(page: str) -> dict[str, str]:
    """Text under each heading of the first or second rank below the page's own."""
    parts = re.split(r"^##+ (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def key_exists(words: list[str], models: list[type[BaseModel]]) -> bool:
    fields = [model.model_fields[words[0]] for model in models if words[0] in model.model_fields]
    if len(words) == 1 or not fields:
        return bool(fields)
    return key_exists(words[1:], [inner for field in fields for inner in models_in(field.annotation)])


def test_recipe_keys_of_the_page_exist() -> None:
    dotted = "|".join(name for name, field in Recipe.model_fields.items() if models_in(field.annotation))
    named = set(re.findall(rf"`((?:{dotted})\.[a-z_0-9.]+)", PAGE))
    assert len(named) > 30
    assert not [key for key in sorted(named) if not key_exists(key.split("."), [Recipe])]


def test_a_wrong_key_would_be_found() -> None:
    assert key_exists(["teachers", "tokenizer"], [Recipe])
    assert not key_exists(["align", "tmie"], [Recipe])
    assert not key_exists(["seeds", "first"], [Recipe])


@pytest.mark.parametrize("section, key", MODES, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_every_mode_has_a_row(section: type[BaseModel], key: str) -> None:
    place = {AlignRecipe: "align", CompressRecipe: "compress", LossRecipe: "loss"}[section]
    modes = get_args(section.model_fields[key].annotation)
    assert len(modes) > 1
    tables = [
        re.findall(r"^\| `([a-z0-9_-]+)`[^|]*\|", text, flags=re.MULTILINE)
        for text in sections(PAGE).values()
        if f"`{place}.{key}" in text
    ]
    described = max(tables, key=lambda rows: len(set(modes) & set(rows)))
    assert not set(modes) - set(described), f"{place}.{key}: a mode without a row in its table"


def test_page_has_no_raw_html() -> None:
    prose = re.sub(r"`[^`]*`", "", PAGE)
    assert not re.search(r"<[a-zA-Z/!]", prose)
