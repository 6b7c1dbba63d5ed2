"""A family of comparisons is declared before the first student is trained, or it says so."""

from __future__ import annotations

import json

import pytest
from tiny_recipe import SEED, assert_one_message, copy_base, invoke, tiny_recipe, write_recipe

from kvdistill.core.declared import compare_declared, declare
from kvdistill.core.files import read_json

FAMILY = {"report": {"comparisons": [["fixed", "ce"]]}}


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
        ({"report": {"comparisons": [["fixed", "ce"], ["ce", "fixed"]]}}, [], [["ce", "fixed"]]),
        ({"report": {"comparisons": [["ce", "fixed"]]}}, ["left out: fixed against ce"], [["ce", "fixed"]]),
        ({"report": {**FAMILY["report"], "alpha": 0.4}}, ["alpha was 0.05, is 0.4"], [["fixed", "ce"]]),
        ({"report": {**FAMILY["report"], "margin": 0.5}}, ["margin was 0.02, is 0.5"], [["fixed", "ce"]]),
        ({"report": {**FAMILY["report"], "primary": "nll"}}, ["primary was accuracy, is nll"], [["fixed", "ce"]]),
        ({**FAMILY, "seeds": [SEED, 8]}, [f"seeds were [{SEED}], are [{SEED}, 8]"], [["fixed", "ce"]]),
    ],
)
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
    assert invoke(monkeypatch, "run", write_recipe(tmp_path, **FAMILY)).code == 0
    page = (run / "report.html").read_text()
    assert "Declared before the first student was trained" in page and "After the results" not in page
    after = {"report": {"comparisons": [["ce", "fixed"]], "alpha": 0.4}}
    answer = invoke(monkeypatch, "report", write_recipe(tmp_path, **after))
    assert answer.code == 0
    page = (run / "report.html").read_text()
    assert "Declared before" not in page and "After the results:" in page and "alpha was 0.05, is 0.4" in page
    [comparison] = read_json(run / "summary.json")["comparisons"]
    assert comparison["after_results"]
    again = invoke(monkeypatch, "run", write_recipe(tmp_path, **FAMILY))
    assert again.code == 0 and "After the results" not in (run / "report.html").read_text(), "the recipe's own page"
    assert "already finished" in str(invoke(monkeypatch, "run", write_recipe(tmp_path, **FAMILY)))
    assert invoke(monkeypatch, "report", write_recipe(tmp_path, **after)).code == 0
    assert invoke(monkeypatch, "report", write_recipe(tmp_path, report={"comparisons": []})).code == 0
    assert "left out: fixed against ce" in (run / "report.html").read_text(), "also where nothing is compared any more"
    tree = json.loads((run / "declared.json").read_text())
    (run / "declared.json").write_text(json.dumps({**tree, "alpha": 0.4}))
    assert_one_message(invoke(monkeypatch, "report", write_recipe(tmp_path, **after)), "declared.json", "altered")
