"""Where the recipes that come with the package lie: in the package when installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def recipes_folder() -> Path:
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def builtin_recipes() -> list[Path]:
    """The YAML files of `recipes/`, sorted."""
    return sorted(recipes_folder().glob("*.yaml"))
