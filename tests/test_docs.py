"""The docs say what the code does: generated pages are fresh, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from kvdistill.cli.app import app
from kvdistill.core.config import builtin_recipes, load_recipe
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.reference import recipe_reference, sections_in

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def test_recipe_reference_is_fresh() -> None:
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").strip()
    assert written == recipe_reference().strip(), "run: .venv/bin/kvdistill recipe > docs/recipe.md"


def test_every_recipe_key_has_a_type_and_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", recipe_reference(), flags=re.MULTILINE)
    assert len(rows) > 150
    for name, kind, default, meaning in rows:
        assert kind and default and len(meaning) > 8, name
        assert not re.search(r"Annotated|Literal|Optional|Any\b|\bint\b|\bstr\b|[<\[]", kind), (name, kind)

    def num_keys(section: type[BaseModel], seen: set[type]) -> int:
        inner = {one for field in section.model_fields.values() for one in sections_in(field.annotation)} - seen
        seen |= inner
        return len(section.model_fields) + sum(num_keys(one, seen) for one in inner)

    assert len(rows) == num_keys(Recipe, set()) + len(ArmRecipe.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for verb in re.findall(r"(?:`|^|\.venv/bin/|-m )kvdistill ([a-z-]+)", text, flags=re.MULTILINE):
        assert verb in VERBS, f"{page.name}: kvdistill {verb}"


@pytest.mark.parametrize("path", builtin_recipes(), ids=lambda path: path.name)
def test_recipes_that_come_with_it_are_valid(path: Path) -> None:
    assert load_recipe(path).arms


def test_help_lists_the_verbs_in_the_order_of_the_data() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    order = ["demo", "run", "prepare", "teach", "capture", "fit", "train", "evaluate", "report", "doctor"]
    places = [re.search(rf"^  {verb} ", shown, flags=re.MULTILINE) for verb in order]
    assert all(places), shown
    starts = [place.start() for place in places if place]
    assert starts == sorted(starts)
