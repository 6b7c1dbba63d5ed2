"""A family of comparisons is declared before the first student is trained, or it says so."""

from __future__ import annotations

import json

import pytest
from tiny_recipe import SEED, assert_one_message, copy_base, invoke, tiny_recipe, write_recipe

from kvdistill.core.declared import compare_declared, declare
from kvdistill.core.files import read_json, sha256_of

pytestmark = pytest.mark.slow

FAMILY = {"report": {"comparisons": [["fixed", "ce"]]}}
SEEDS = {"seeds": [SEED, 8, 9]}
ARMS = {"ce": {"teachers": []}, "fixed": {}, "single": {"teachers": ["one"]}}


@pytest.fixture
def declared(tmp_path):
    recipe = tiny_recipe(tmp_path, **FAMILY)
    declare(recipe, tmp_path)
    return recipe


def test_what_was_declared_is_shown_as_that(declared, tmp_path):
    found = compare_declared(declared, tmp_path)
    assert found["changed"] == [] and found["late"] == [] and found["time"].endswith("Z") and len(found["sha256"]) == 64
    before = (tmp_path / "declared.json").read_bytes()
    declare(tiny_recipe(tmp_path, report={"comparisons": [["ce", "fixed"]]}), tmp_path)
    assert (tmp_path / "declared.json").read_bytes() == before, "frozen once"


@pytest.mark.parametrize(
    ("changes", "changed", "late"),
    [
        ({"report": {"comparisons": [["fixed", "ce"], ["ce", "best-single"]]}, "arms": ARMS}, [],
         [["ce", "best-single"], ["fixed", "best-single"]]),
        ({"report": {"comparisons": [["ce", "fixed"]]}}, ["left out: fixed against ce"], [["ce", "fixed"]]),
        ({"report": {**FAMILY["report"], "alpha": 0.4}}, ["alpha was 0.05, is 0.4"], [["fixed", "ce"]]),
        ({"report": {**FAMILY["report"], "margin": 0.5}}, ["margin was 0.02, is 0.5"], [["fixed", "ce"]]),
        ({"report": {**FAMILY["report"], "primary": "nll"}}, ["primary was accuracy, is nll"], [["fixed", "ce"]]),
        ({**FAMILY, "seeds": [SEED, 8]}, [f"seeds were [{SEED}], are [{SEED}, 8]"], [["fixed", "ce"]]),
    ],
)  # fmt: skip
def test_what_was_chosen_later_is_named(declared, tmp_path, changes, changed, late):
    found = compare_declared(tiny_recipe(tmp_path, **changes), tmp_path)
    assert found["changed"] == changed and found["late"] == late


def test_nothing_is_declared_once_a_student_is_trained(tmp_path):
    (tmp_path / "arms/ce/seed-7").mkdir(parents=True)
    (tmp_path / "arms/ce/seed-7/trained.json").touch()
    declare(tiny_recipe(tmp_path), tmp_path)
    assert compare_declared(tiny_recipe(tmp_path), tmp_path)["time"] is None


def test_a_page_says_what_was_declared_and_what_came_after_the_results(tmp_path, monkeypatch):
    run = copy_base(tmp_path)
    assert invoke(monkeypatch, "run", write_recipe(tmp_path, **FAMILY, **SEEDS)).code == 0
    page = (run / "report.html").read_text()
    assert "Declared before the first student was trained" in page and "After the results" not in page
    after = {"report": {"comparisons": [["ce", "fixed"]], "alpha": 0.4}, **SEEDS}
    answer = invoke(monkeypatch, "report", write_recipe(tmp_path, **after))
    assert answer.code == 0
    page = (run / "report.html").read_text()
    assert "Declared before" not in page and "After the results:" in page and "alpha was 0.05, is 0.4" in page
    [comparison] = read_json(run / "summary.json")["comparisons"]
    assert comparison["after_results"]
    again = invoke(monkeypatch, "run", write_recipe(tmp_path, **FAMILY, **SEEDS))
    assert again.code == 0 and "After the results" not in (run / "report.html").read_text(), "the recipe's own page"
    assert "already finished" in str(invoke(monkeypatch, "run", write_recipe(tmp_path, **FAMILY, **SEEDS)))
    assert invoke(monkeypatch, "report", write_recipe(tmp_path, **after)).code == 0
    assert invoke(monkeypatch, "report", write_recipe(tmp_path, report={"comparisons": []}, **SEEDS)).code == 0
    assert "left out: fixed against ce" in (run / "report.html").read_text(), "also where nothing is compared any more"
    tree = json.loads((run / "declared.json").read_text())
    (run / "declared.json").write_text(json.dumps({**tree, "alpha": 0.4}))
    assert_one_message(invoke(monkeypatch, "report", write_recipe(tmp_path, **after)), "declared.json", "altered")


def test_the_rule_that_chooses_the_best_single_arm_is_frozen_with_the_family(tmp_path):
    recipe = tiny_recipe(tmp_path, arms=ARMS, **FAMILY)
    declare(recipe, tmp_path)
    frozen = json.loads((tmp_path / "declared.json").read_text())
    assert frozen["comparisons"] == [["fixed", "ce"], ["fixed", "best-single"]]
    assert frozen["by_rule"] == [["fixed", "best-single"]] and "highest accuracy on validation" in frozen["best_single"]
    frozen["best_single"] = "the one that we like"
    write_frozen(tmp_path, frozen)
    found = compare_declared(recipe, tmp_path)
    assert found["changed"] == ["best-single is chosen by another rule"] and found["late"] == [["fixed", "best-single"]]


def test_a_run_that_declared_less_says_so_of_what_the_rule_adds(tmp_path):
    """A folder of before: what is in the family by rule now was not declared then."""
    declare(tiny_recipe(tmp_path, **FAMILY), tmp_path)
    frozen = json.loads((tmp_path / "declared.json").read_text())
    del frozen["by_rule"]
    write_frozen(tmp_path, frozen)
    found = compare_declared(tiny_recipe(tmp_path, arms=ARMS, **FAMILY), tmp_path)
    assert found["changed"] == [] and found["late"] == [["fixed", "best-single"]]


def write_frozen(run, content):
    content = {key: value for key, value in content.items() if key != "sha256"}
    (run / "declared.json").write_text(json.dumps({**content, "sha256": sha256_of(content)}))
