"""A recipe's file, and the one it builds on: `base: ../demo.yaml`, laid under it.

    mappings          are merged key by key, however deep; the upper file wins
    lists, values     are the upper file's (null too), whole
    arms              whole: a recipe that lists arms has these and no others. What the base's `report` says of its own
                      arms (`comparisons`, `curves`) is left behind with them
    name, title, run_dir   are of each file its own, so that no study lands in another one's folder

A base may have a base. What comes out is an ordinary recipe: a run folder's `recipe.json` and `kvdistill recipe RECIPE`
hold it resolved, and nothing after this knows of bases.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvdistill.core.errors import RecipeError
from kvdistill.core.quoting import shown

MAX_RECIPE_BYTES, MAX_RECIPE_VALUES = 4 << 20, 100_000
OWN_KEYS = ("name", "title", "run_dir")
REPORT_OF_ARMS = ("comparisons", "curves")


def recipe_tree(path: Path) -> tuple[dict[str, Any], str]:
    """The keys of a recipe with those of its bases under them (interpolations as written), and where they come from in
    words: `kv.yaml on ../demo.yaml`.

    Raises RecipeError for a file that is no recipe, a base that is not there, and bases that go round in a circle.
    """
    trees: list[dict[str, Any]] = []
    chain: list[Path] = []
    at: Path | None = path
    while at is not None:
        if any(at.samefile(other) for other in chain):
            what = f"the bases go round in a circle: {' on '.join(map(str, [*chain, at]))}"
            raise RecipeError(what, place=f"{chain[-1]}: base", fix="let one of these files stand without a base")
        tree = _tree_of(at)
        chain.append(at)
        at = _base_file(tree.pop("base"), at) if "base" in tree else None
        trees.append(tree)
    whole = trees.pop()
    for tree in reversed(trees):
        whole = laid_over(whole, tree)
    return whole, " on ".join(map(str, chain))


def laid_over(base: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys over its base's, by the rules above."""
    under = {key: value for key, value in base.items() if key not in OWN_KEYS}
    if "arms" in upper:
        under.pop("arms", None)
        if isinstance(report := under.get("report"), Mapping):
            under["report"] = {key: value for key, value in report.items() if key not in REPORT_OF_ARMS}
    return _merged(under, upper)


def _merged(under: Mapping[Any, Any], upper: Mapping[Any, Any]) -> dict[Any, Any]:
    out = dict(under)
    for key, value in upper.items():
        deeper = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if deeper else value
    return out


def _base_file(base: object, of: Path) -> Path:
    """The file that `base` names, beside the recipe that names it."""
    place = f"{of}: base"
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        what = f"base names the recipe that this one builds on, and this is {shown(base, 60)}"
        raise RecipeError(what, place=place, fix="write the path of one YAML file, from this file's folder")
    path = Path(os.path.normpath(of.parent / Path(base).expanduser()))
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*.yaml")], n=1)
        fix = f"did you mean {os.path.join(os.path.dirname(base), near[0])!r}?" if near else "paths begin at its folder"
        what = "is a folder" if path.is_dir() else "is not there"
        raise RecipeError(f"the base {str(path)!r} {what}", place=place, fix=fix)
    return path


def _tree_of(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. RecipeError naming the file for one that cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(_read_yaml(path)), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise unreadable(error, str(path)) from None
    return tree


def unreadable(error: Exception, place: str) -> RecipeError:
    """What YAML or OmegaConf could not read, in one line."""
    first = "nested too deep" if isinstance(error, RecursionError) else shown(" ".join(str(error).split()), 300)
    return RecipeError(f"not a readable recipe: {first}", place=place, fix="mend the YAML (or the override)")


def _read_yaml(path: Path) -> str:
    """The text of a YAML file that holds a mapping. RecipeError for something else, and for what would fill memory."""
    import yaml

    place = str(path)
    if path.stat().st_size > MAX_RECIPE_BYTES:
        what = f"this file has {path.stat().st_size:,} bytes, which no recipe needs"
        raise RecipeError(what, place=place, fix="give the path of a recipe; data goes into files of its own")
    text = path.read_text(encoding="utf-8-sig")
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """Values in a node; one that is named again (`*name`) counts every time, as it will be copied."""
        if id(node) not in sizes:
            sizes[id(node)] = MAX_RECIPE_VALUES  # while it is counted: a node inside of itself has no end
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            sizes[id(node)] = 1 + sum(size(x) for part in parts for x in (part if isinstance(part, tuple) else (part,)))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "empty" if root is None else shown(text, 40)
        what = f"a recipe is a mapping of sections, and this is {kind}"
        raise RecipeError(what, place=place, fix="start from recipes/demo.yaml; `kvdistill recipe` explains every key")
    if size(root) > MAX_RECIPE_VALUES:
        what = "it holds more values than a recipe can have, or names itself (`*name`)"
        raise RecipeError(
            what, place=place, fix="write the recipe out without aliases; data goes into files of its own"
        )
    return text
