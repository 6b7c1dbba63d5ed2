"""`kvdistill compare RECIPE...`: finished studies side by side.

Arms of one study share their data, their student and their questions, and only they are compared with p-values. What an
ablation of data asks (styles, the share of a language) is told by several studies, which this shows beside each other,
with the keys in which their recipes differ and whether they were asked the same problems. Reads what reports left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdistill.core.config import load_recipe, run_folder
from kvdistill.core.errors import RecipeError, RunFolderError
from kvdistill.core.files import read_json
from kvdistill.core.layout import arm_folder
from kvdistill.core.records import read_records

_UNLIKE = ("name", "title", "run_dir", "hardware")  # differ, and tell nothing


def compare_studies(recipes: Sequence[str]) -> dict[str, Any]:
    """{"studies": {name: {run, differs, arms: {arm: {mean, std, nll}}}}, "same_problems", "note"}.

    Raises RecipeError or RunFolderError for fewer than two studies, two of one name, and one that is not finished.
    """
    made = {path: load_recipe(path) for path in recipes}
    if len(made) < 2:
        fix = "name the recipes of two finished studies or more"
        raise RecipeError("one study alone is compared with nothing", place="command line", fix=fix)
    names = [recipe.name for recipe in made.values()]
    if len({*names}) < len(names):
        what = f"two recipes have one name: {', '.join(names)}"
        raise RecipeError(what, place="command line", fix="give each recipe a name of its own")
    studies: dict[str, Any] = {}
    trees: dict[str, dict[str, Any]] = {}
    asked: list[frozenset[tuple[str, str]]] = []
    for path, recipe in made.items():
        run = run_folder(recipe)
        if not (run / "summary.json").is_file():
            raise RunFolderError("this study has no report yet", place=str(run), fix=f"kvdistill run {path}")
        arms = read_json(run / "summary.json")["arms"]
        trees[recipe.name] = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _UNLIKE}
        figures = {name: {"mean": arm.get("mean"), "std": arm.get("std")} for name, arm in arms.items()}
        for name, arm in arms.items():
            figures[name]["nll"] = {key: (arm.get("nll") or {}).get(key) for key in ("mean", "std")}
        studies[recipe.name] = {"run": str(run), "arms": figures}
        asked.append(_problems(run, recipe.seeds, list(arms)))
    flat = {name: dict(_leaves(tree)) for name, tree in trees.items()}
    keys = dict.fromkeys(key for leaves in flat.values() for key in leaves)
    unlike = [key for key in keys if len({repr(leaves.get(key)) for leaves in flat.values()}) > 1]
    for name, leaves in flat.items():
        studies[name]["differs"] = {key: leaves.get(key) for key in unlike}
    same = len({*asked}) == 1 and bool(asked[0])
    note = "other studies, other runs: the figures stand beside each other, and nothing here is a test"
    return {
        "studies": studies,
        "same_problems": same,
        "note": note if same else f"{note}; they were not asked the same problems, so that figures differ by these too",
    }


def _problems(run: Path, seeds: Sequence[int], arms: Sequence[str]) -> frozenset[tuple[str, str]]:
    """(task, problem) of what the first run answered, in whatever style."""
    for arm in arms:
        for seed in seeds:
            path = arm_folder(run, arm, seed) / "records.jsonl"
            if path.is_file():
                return frozenset((record.task, str(record.doc_hash)) for record in read_records(path))
    return frozenset()


def _leaves(tree: Any, before: str = "") -> list[tuple[str, Any]]:
    """(key, value) of all that is no section: `data.tasks.0.train`, 1500."""
    if isinstance(tree, Mapping):
        return [
            leaf for key, value in tree.items() for leaf in _leaves(value, f"{before}.{key}" if before else str(key))
        ]
    if isinstance(tree, list) and any(isinstance(one, Mapping) for one in tree):
        return [leaf for number, one in enumerate(tree) for leaf in _leaves(one, f"{before}.{number}")]
    return [(before, tree)]
