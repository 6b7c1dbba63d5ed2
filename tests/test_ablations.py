"""The ablations that come as recipes: each loads, expands, and its arms differ in what is ablated and nothing else."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_recipe import invoke

from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import load_recipe, recipes_folder
from kvdistill.core.family import BEST_SINGLE
from kvdistill.core.progress import silent
from kvdistill.stages.report.ablations import find_ablations
from kvdistill.study.rehearse import dry_run

FOLDER = recipes_folder() / "ablations"
# recipe -> (arm that the others are held against, keys of an arm that are ablated)
ARMS = {
    "routing": ("fixed", ["fuse.fusion_strategy"]),
    "layers": ("all", ["loss.distill_layers"]),
    "keys-values": ("both", ["loss.k_weight", "loss.v_weight"]),
    "truncate-soft": ("truncate", ["align.time"]),
    "compression": ("full", ["compress.kv_compression"]),
    "num-teachers": ("two", ["teachers"]),
    "family-mix": ("same-family", ["teachers"]),
    "projection": ("flat", ["align.projection", "align.init", "align.per_head"]),
    "alignment-v2": ("none", ["align.time", "align.layers"]),
}
# studies whose data differs, and the keys of a recipe that are ablated
STUDIES = {
    "style": (["style-cot", "style-direct", "style-both"], ["data.style"]),
    "chinese": (["chinese-0", "chinese-20", "chinese-50"], ["data.tasks.0.train", "data.tasks.1.train"]),
}


def leaves(tree: object, before: str = "") -> dict[str, object]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        items = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return {before: tree}
    return {k: v for key, value in items for k, v in leaves(value, f"{before}.{key}" if before else key).items()}


def unlike(one: dict, other: dict) -> set[str]:
    first, second = leaves(one), leaves(other)
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def recipe(name: str, *overrides: str):
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


def test_every_recipe_of_the_folder_is_one_of_these_and_short():
    known = {*ARMS, *(name for names, _ in STUDIES.values() for name in names)}
    files = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml")}
    assert files.keys() == known
    for name, text in files.items():
        assert "\nbase: " in text and len(text.splitlines()) <= 40, name
        assert recipe(name).name == f"ablation-{name}"


@pytest.mark.parametrize("name", ARMS)
def test_arms_differ_from_the_reference_in_what_is_ablated_and_in_nothing_else(name):
    made = recipe(name)
    reference, ablated = ARMS[name]
    trees = {arm: arm_recipe(made, arm).model_dump(mode="json") for arm in made.arms}
    for arm, tree in trees.items():
        assert unlike(tree, trees[reference]) <= {*ablated}, arm
    found = [json.dumps(tree, sort_keys=True) for tree in trees.values()]
    assert len({*found}) == len(found), "two arms are the same"
    held = {arm for pair in made.report.pairs for arm in pair} - {BEST_SINGLE}
    assert held <= trees.keys() and any(baseline == reference for _, baseline in made.report.pairs)
    assert len(made.seeds) >= 3


@pytest.mark.parametrize("name", ARMS)
def test_the_page_draws_every_ablation_of_arms(name):
    found = find_ablations(recipe(name))
    assert {key for one in found for key in one.keys} == {*ARMS[name][1]}
    assert {arm for one in found for arm in one.arms} == {*recipe(name).arms}


@pytest.mark.parametrize("kind", STUDIES)
def test_studies_whose_data_differs_differ_in_nothing_else(kind):
    names, ablated = STUDIES[kind]
    trees = [recipe(name).model_dump(mode="json") for name in names]
    for one, other in pairwise(trees):
        assert unlike(one, other) <= {*ablated, "name", "title"} and unlike(one, other) & {*ablated}
    if kind == "chinese":
        learned = [[task["train"] for task in tree["data"]["tasks"]] for tree in trees]
        assert {sum(both) for both in learned} == {1500}
        assert [chinese / 1500 for _, chinese in learned] == [0, 0.2, 0.5]


@pytest.mark.parametrize("name", [*ARMS, *(name for names, _ in STUDIES.values() for name in names)])
def test_every_ablation_can_be_expanded(tmp_path, monkeypatch, name):
    answer = invoke(monkeypatch, "recipe", FOLDER / f"{name}.yaml", f"run_dir={tmp_path / 'run'}", "--expand", "--json")
    assert answer.code == 0, answer
    found = json.loads(answer.out)["expanded"]
    made = recipe(name)
    assert found["arms"].keys() == made.every_arm.keys() and not (tmp_path / "run").exists()
    assert {arm["student_flops"] for arm in found["arms"].values()} != {None}
    for arm, shown in found["arms"].items():
        assert shown["steps"] == made.train.steps and shown["resolved"] == arm_recipe(made, arm).model_dump(mode="json")


@pytest.mark.parametrize("name", ["keys-values", "projection", "style-direct"])
def test_an_ablation_is_rehearsed_from_end_to_end(tmp_path: Path, name: str):
    made = recipe(name, f"run_dir={tmp_path / 'run'}")
    found = dry_run(made, silent)
    assert {f"evaluate {arm} {made.seeds[0]}" for arm in made.arms} <= {*found["rehearsed"]}
