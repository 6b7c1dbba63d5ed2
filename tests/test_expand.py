"""`recipe --expand`: arms resolved, and their cost by plan, by prepared texts, or by texts of an assumed length; and
`compare`: finished studies side by side."""

from __future__ import annotations

import json

import pytest
from tiny_recipe import assert_one_message, invoke, made_ready, run_jobs_here, tiny_recipe, write_recipe

from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import read_budgets
from kvdistill.core.files import read_json
from kvdistill.study.expand import COSTS, expand

SEEDS = [7, 8, 9]
ARMS = {
    "ce": {"teachers": []},
    "fixed": {},
    "wide": {"teachers": [], "train": {"batch_size": 6}, "match": {"arm": "fixed", "parity": "data"}},
    "total": {"teachers": [], "match": {"arm": "fixed", "parity": "total_flops"}},
}
CURVES = {"comparisons": [], "curves": {"arms": ["ce", "fixed"], "budgets": [1, 2]}}
STUDY = {"arms": ARMS, "seeds": SEEDS, "report": CURVES, "train": {"steps": 60}}


def test_arms_are_resolved_also_those_of_curves_and_those_that_are_matched(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", **STUDY)
    found = expand(recipe)["expanded"]
    arms = found["arms"]
    assert [*arms] == ["ce", "fixed", "wide", "total", "ce@x2", "fixed@x2"]
    assert [name for name in arms if arms[name]["derived"]] == ["ce@x2", "fixed@x2"]
    assert [arms[name]["steps"] for name in arms] == [60, 60, 80, None, 120, 120]  # 60 x 8 problems, six at once
    assert arms["wide"]["match"] == "fixed, problems seen" and arms["fixed"]["data"] == 480 == arms["wide"]["data"]
    assert arms["wide"]["changes"]["train.batch_size"] == 6 and arms["fixed"]["changes"] == {}
    for name, arm in arms.items():
        expected = arm_recipe(recipe, name).model_dump(mode="json")
        expected["train"]["steps"] = arm["steps"]
        assert arm["resolved"] == expected
    assert any("matched by total FLOPs" in note for note in found["notes"]) and "nothing is prepared" in found["basis"]
    assert not (tmp_path / "run").exists()


def test_assumed_costs_are_the_closed_form_for_the_length_that_is_given(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", arms={"ce": {"teachers": []}})
    found = expand(recipe, text_length=11)["expanded"]
    hidden, heads, layers, vocabulary, texts, length = 16, 2, 2, 24, 6 * 8, 11
    inner = 48  # 8/3 of the width, rounded up to 8
    per_token = layers * 2 * (4 * hidden * hidden + 3 * hidden * inner) + 2 * hidden * vocabulary
    attention = layers * 4 * length * length * heads * (hidden // heads)
    forward = texts * (length * per_token + attention)
    assert found["arms"]["ce"]["student_flops"] == 3 * forward and found["arms"]["ce"]["tokens"] == texts * length
    assert found["student"]["parameters"] == found["student"]["trained"] > 0
    half = expand(tiny_recipe(tmp_path / "run", data={"template": "chat", "max_length": 40}))["expanded"]
    assert half["arms"]["ce"]["tokens"] == texts * 20 and "half of data.max_length" in half["basis"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run = tmp_path_factory.mktemp("expand") / "run"
    made_ready(tiny_recipe(run, **STUDY), run, "prepare")
    return run


def test_what_is_assumed_comes_near_what_is_known_when_data_is_prepared(prepared, tmp_path):
    known = expand(tiny_recipe(prepared, **STUDY))["expanded"]
    assumed = expand(tiny_recipe(tmp_path / "elsewhere", **STUDY))["expanded"]
    assert "texts prepared in" in known["basis"] and known["student"] == assumed["student"]
    for name, arm in known["arms"].items():
        assert all(arm[key] is not None for key in COSTS)
        if name != "total":
            assert [arm[k] for k in ("steps", "data")] == [assumed["arms"][name][k] for k in ("steps", "data")]
            for key in ("tokens", "student_flops"):
                assert assumed["arms"][name][key] == pytest.approx(arm[key], rel=0.05)
    assert known["arms"]["total"]["steps"] > known["arms"]["fixed"]["steps"]
    assert not (prepared / "training_budget_config.json").exists()  # nothing is written


def test_the_plan_of_a_run_folder_is_shown_where_it_is_of_this_recipe(prepared):
    recipe = tiny_recipe(prepared, **STUDY)
    computed = expand(recipe)["expanded"]["arms"]
    made_ready(recipe, prepared, "teach")
    found = expand(recipe)["expanded"]
    assert found["basis"].startswith("as planned")
    planned = read_budgets(prepared)
    for name, arm in found["arms"].items():
        assert [arm[key] for key in COSTS] == [planned[name][key] for key in COSTS]
        assert [arm[key] for key in COSTS] == [computed[name][key] for key in COSTS]
    other = expand(tiny_recipe(prepared, **{**STUDY, "arms": {**ARMS, "more": {"loss": {"kv_weight": 2}}}}))
    assert "texts prepared in" in other["expanded"]["basis"] and "more" in other["expanded"]["arms"]
    changed = expand(tiny_recipe(prepared, **{**STUDY, "data": {"max_length": 47}}))
    assert "nothing is prepared" in changed["expanded"]["basis"]


def test_the_table_says_what_differs_what_it_costs_and_how_that_is_known(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, **STUDY)
    shown = invoke(monkeypatch, "recipe", path, "--expand").out
    assert "tiny: 6 arms, 3 seeds" in shown and "ce@x2: teachers: []" in shown and "(by report.curves)" in shown
    assert "steps matched to fixed, total FLOPs, amortised" in shown and "cost: nothing is prepared" in shown
    assert max(map(len, shown.splitlines())) <= 100
    asked = json.loads(invoke(monkeypatch, "recipe", path, "--expand", "--text-length", "9", "--json").out)
    assert asked["expanded"]["arms"]["ce"]["tokens"] == 480 * 9 and "as given" in asked["expanded"]["basis"]
    whole = json.loads(invoke(monkeypatch, "recipe", path, "--json").out)
    assert whole["train"]["steps"] == 60 and whole["name"] == "tiny"
    assert_one_message(invoke(monkeypatch, "recipe", "--expand"), "--expand is about a recipe")


def test_studies_with_other_data_stand_side_by_side(tmp_path, monkeypatch):
    paths = []
    for style in ("cot", "direct"):
        (tmp_path / style).mkdir()
        paths.append(
            write_recipe(
                tmp_path / style,
                name=f"in-{style}",
                data={"style": style},
                arms={"ce": {"teachers": []}},
                evaluate={"limit": 3},
            )
        )
    assert_one_message(invoke(monkeypatch, "compare", *paths), "no report yet", "kvdistill run")
    assert_one_message(invoke(monkeypatch, "compare", paths[0]), "one study alone")
    for path in paths:
        assert invoke(monkeypatch, "run", path, work=run_jobs_here).code == 0
    found = json.loads(invoke(monkeypatch, "compare", *paths, "--json").out)
    for style, path in zip(("cot", "direct"), paths, strict=True):
        study = found["studies"][f"in-{style}"]
        assert study["differs"] == {"data.style": style}
        summary = read_json(path.parent / "run" / "summary.json")["arms"]["ce"]
        assert study["arms"]["ce"] == {
            "mean": summary["mean"],
            "std": summary["std"],
            "nll": {k: summary["nll"][k] for k in ("mean", "std")},
        }
    assert found["same_problems"] is True and "nothing here is a test" in found["note"]
    shown = invoke(monkeypatch, "compare", *paths).out
    assert "in-direct: data.style: direct" in shown and max(map(len, shown.splitlines())) <= 100
    assert_one_message(invoke(monkeypatch, "compare", paths[0], write_recipe(tmp_path, name="in-cot")), "one name")
