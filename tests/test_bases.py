"""Recipes on a base: what is merged, what is replaced, what is each file's own; circles and missing files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_recipe import assert_one_message, invoke, no_work, run_jobs_here, tiny_tree

from kvdistill.core.arms import arm_recipe
from kvdistill.core.bases import laid_over
from kvdistill.core.config import load_recipe, recipe_hash, recipes_folder
from kvdistill.core.errors import RecipeError
from kvdistill.study.folder import difference


def written(path: Path, **tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def base_recipe(folder: Path, **changes: Any) -> Path:
    return written(folder / "base.yaml", **tiny_tree(title="the base's", run_dir=str(folder / "base-run"), **changes))


def test_a_recipe_is_laid_over_its_base_key_by_key(tmp_path):
    base = base_recipe(tmp_path)
    path = written(
        tmp_path / "some" / "where" / "upper.yaml",
        base="../../base.yaml",
        name="upper",
        student={"scratch": {"num_layers": 3}},
        seeds=[1, 2],
        loss={"kv_weight": 2.5},
    )
    below, made = load_recipe(base), load_recipe(path)
    assert made.student.scratch is not None and below.student.scratch is not None
    assert made.student.scratch.model_dump() == {**below.student.scratch.model_dump(), "num_layers": 3}
    assert (made.seeds, made.loss.kv_weight, made.data, made.arms) == ([1, 2], 2.5, below.data, below.arms)
    assert (made.name, made.title, made.run_dir) == ("upper", "", None)  # of each file its own
    assert load_recipe(path, ["student.scratch.num_layers=5"]).student.scratch.num_layers == 5  # type: ignore[union-attr]


def test_arms_are_replaced_whole_and_what_the_report_said_of_the_others_goes_with_them(tmp_path):
    base = base_recipe(
        tmp_path,
        seeds=[1, 2, 3],
        report={
            "comparisons": [["fixed", "ce"]],
            "margin": 0.07,
            "curves": {"arms": ["ce", "fixed"], "budgets": [1, 2]},
        },
    )
    path = written(tmp_path / "u.yaml", base="base.yaml", name="u", arms={"k": {"loss": {"v_weight": 0}}, "kv": {}})
    made = load_recipe(path)
    assert list(made.arms) == ["k", "kv"] and arm_recipe(made, "k").loss.v_weight == 0
    assert made.report.comparisons is None and made.report.curves is None and made.report.margin == 0.07
    keeps = load_recipe(written(tmp_path / "w.yaml", base="base.yaml", name="w"))
    assert keeps.report == load_recipe(base).report and keeps.arms == load_recipe(base).arms


def test_lists_are_the_upper_files_and_null_unsets(tmp_path):
    base_recipe(tmp_path, evaluate={"limit": 4})
    one = [{"name": "chain", "train": 9, "val": 3, "test": 5}]
    path = written(
        tmp_path / "u.yaml",
        base="base.yaml",
        name="u",
        data={"tasks": one},
        teachers=[],
        evaluate={"limit": None},
        arms={"ce": {}},
    )
    made = load_recipe(path)
    assert [task.train for task in made.data.tasks] == [9] and made.teachers == [] and made.evaluate.limit is None
    assert made.data.max_length == tiny_tree()["data"]["max_length"]


def test_a_base_may_have_a_base_and_the_uppermost_file_wins(tmp_path):
    base_recipe(tmp_path)
    written(tmp_path / "a" / "mid.yaml", base="../base.yaml", name="mid", train={"steps": 7, "batch_size": 5})
    top = written(tmp_path / "b" / "top.yaml", base="../a/mid.yaml", name="top", train={"steps": 8})
    made = load_recipe(top)
    assert (made.train.steps, made.train.batch_size, made.train.eval_examples) == (8, 5, 4)


def test_laying_over_changes_neither_file_and_is_the_upper_one_where_both_say_something():
    base = {"a": {"b": 1, "c": {"d": 2}}, "l": [1, 2], "name": "x"}
    upper = {"a": {"c": {"e": 3}}, "l": [9], "a2": None}
    assert laid_over(base, upper) == {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "l": [9], "a2": None}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "l": [1, 2], "name": "x"} and upper["a"] == {"c": {"e": 3}}


def test_the_recipe_that_comes_out_knows_nothing_of_bases(tmp_path, monkeypatch):
    base_recipe(tmp_path)
    run = tmp_path / "run"
    path = written(tmp_path / "u.yaml", base="base.yaml", name="u", run_dir=str(run), train={"steps": 3})
    printed = yaml.safe_load(invoke(monkeypatch, "recipe", path).out)
    assert "base" not in printed and printed["train"]["steps"] == 3 and printed["data"]["max_length"] == 48
    alone = written(tmp_path / "alone.yaml", **printed)
    assert recipe_hash(load_recipe(alone)) == recipe_hash(load_recipe(path))
    answer = invoke(monkeypatch, "prepare", path, work=run_jobs_here)
    assert answer.code == 0, answer
    kept = json.loads((run / "recipe.json").read_text())
    assert "base" not in kept and kept == load_recipe(path).model_dump(mode="json")


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ("bose.yaml", ["is not there", "u.yaml: base", "did you mean 'base.yaml'"]),
        ("..", ["is a folder"]),
        (["base.yaml"], ["base names the recipe"]),
        (None, ["base names the recipe"]),
        ("", ["base names the recipe"]),
        ("u.yaml", ["circle"]),
        ("round.yaml", ["circle", "round.yaml"]),
        ("list.yaml", ["a recipe is a mapping", "list.yaml"]),
        ("torn.yaml", ["not a readable recipe", "torn.yaml"]),
    ],
)
def test_a_base_that_cannot_be_is_named_before_anything_runs(tmp_path, monkeypatch, base, parts):
    base_recipe(tmp_path)
    written(tmp_path / "round.yaml", base="u.yaml", name="round")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "torn.yaml").write_text("a: [1\n")
    path = written(tmp_path / "u.yaml", base=base, name="u")
    assert_one_message(invoke(monkeypatch, "run", path, work=no_work), *parts)


def test_a_mistake_names_the_file_and_its_base(tmp_path):
    base_recipe(tmp_path)
    path = written(tmp_path / "u.yaml", base="base.yaml", name="u", train={"stesp": 3})
    with pytest.raises(RecipeError, match="steps") as caught:
        load_recipe(path)
    assert f"{path} on {tmp_path / 'base.yaml'}" in caught.value.place
    with pytest.raises(RecipeError, match="name"):
        load_recipe(written(tmp_path / "nameless.yaml", base="base.yaml"))


@pytest.mark.parametrize("name", ["demo", "few-problems", "few-problems-new", "data-efficiency", "ablations/routing"])
def test_studies_of_tiny_models_run_on_cpus_and_where_they_run_changes_no_identity(name, tmp_path):
    path = recipes_folder() / f"{name}.yaml"
    recipe, elsewhere = load_recipe(path), load_recipe(path, ["hardware.device=auto", "hardware.workers=3"])
    assert recipe.hardware.device == "cpu" and elsewhere.hardware.device == "auto"
    assert recipe_hash(recipe) == recipe_hash(elsewhere)
    assert difference(recipe.model_dump(mode="json"), elsewhere, tmp_path, planned=True) is None
