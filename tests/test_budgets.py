"""Budgets of arms: predicted before anything is trained, matched, held against ledgers, refused where they differ."""

from __future__ import annotations

import json

import pytest
from tiny_recipe import (
    assert_one_message,
    invoke,
    made_ready,
    no_training,
    no_work,
    tiny_recipe,
    tiny_tree,
    write_recipe,
)

from kvdistill.arms.budget import TrainingBudgetController
from kvdistill.arms.experiment import Experiment
from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import FILE, differences, figure_of, read_budgets
from kvdistill.core.config import make_recipe
from kvdistill.core.costs import apart
from kvdistill.core.declared import compare_declared, declare, parities_of
from kvdistill.core.errors import KVDistillError, RecipeError
from kvdistill.core.files import read_json
from kvdistill.core.layout import trained_mark
from kvdistill.core.marks import read_mark, write_mark
from kvdistill.core.recipe import ParityRecipe
from kvdistill.stages.report.compare import find_refusals
from kvdistill.stages.train import MADE
from kvdistill.study.verbs import train

pytestmark = pytest.mark.slow

SEEDS = [7, 8, 9]
STEPS = 60  # whole steps come within 1 %
TOTAL = {"arm": "fixed", "parity": "total_flops"}
ARMS = {
    "ce": {"teachers": []},
    "fixed": {},
    "ce-total": {"teachers": [], "match": TOTAL},
    "ce-student": {"teachers": [], "train": {"batch_size": 6}, "match": {"arm": "fixed", "parity": "student_flops"}},
    "ce-data": {"teachers": [], "train": {"batch_size": 6}, "match": {"arm": "fixed", "parity": "data"}},
    "ce-chained": {"teachers": [], "match": {"arm": "ce-data", "parity": "student_flops"}},
}
STUDY = {"arms": ARMS, "seeds": SEEDS, "train": {"steps": STEPS}}


def study(run, **changes):
    return tiny_recipe(run, **{**STUDY, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run = tmp_path_factory.mktemp("budgets") / "run"
    recipe = study(run)
    made_ready(recipe, run, "teach")
    return run


def test_an_arm_trains_as_its_own_train_section_says(tmp_path, monkeypatch):
    arms = {"ce": {"teachers": []}, "longer": {"teachers": [], "train": {"steps": 9, "batch_size": 5, "log_every": 3}}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, arms=arms))
    assert answer.code == 0, answer
    ledgers = {name: read_json(tmp_path / f"run/arms/{name}/seed-7/ledger.json") for name in arms}
    assert [ledgers[name]["optimiser_steps"] for name in arms] == [6, 9]
    assert [ledgers[name]["problems_seen"] for name in arms] == [48, 45]
    rows = [json.loads(line) for line in (tmp_path / "run/arms/longer/seed-7/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 6, 9]
    assert read_json(tmp_path / "run/arms/longer/seed-7/trained.json")["steps"] == 9
    shorter = min(ledgers["ce"]["order_prefixes"], key=int)
    assert ledgers["ce"]["order_prefixes"][shorter] == ledgers["longer"]["order_prefixes"][shorter]
    assert ledgers["ce"]["order_prefixes"]["32"] == ledgers["longer"]["order_prefixes"]["32"]
    for name, ledger in ledgers.items():
        planned = read_budgets(tmp_path / "run")[name]
        assert planned["tokens"] == ledger["tokens_nonpadding"] and planned["steps"] == ledger["optimiser_steps"]
        assert ledger["flops"]["measuring"] > 0


def test_matched_arms_spend_what_the_other_spends(prepared):
    controller = TrainingBudgetController(Experiment(study(prepared), prepared))
    assert controller.get_unified_training_steps() == STEPS
    assert controller.steps_for_tokens(1e9, 32, 512, num_gpus=8) == 7629
    written = controller.write()
    arms = written["arms"]
    assert arms == read_budgets(prepared) and list(arms) == list(ARMS) and written["seeds"] == SEEDS
    assert apart(arms["ce-total"]["amortised_flops"], arms["fixed"]["amortised_flops"]) < 0.01
    assert arms["ce-total"]["steps"] > STEPS and arms["ce-total"]["match"]["amortised"] is True
    assert apart(arms["ce-student"]["student_flops"], arms["fixed"]["student_flops"]) < 0.01
    assert arms["ce-data"]["data"] == arms["fixed"]["data"] == 8 * STEPS and arms["ce-data"]["steps"] == 80
    assert apart(arms["ce-chained"]["student_flops"], arms["ce-data"]["student_flops"]) < 0.01
    fixed = arms["fixed"]
    parts = fixed["parts"]
    assert fixed["total_flops"] > fixed["amortised_flops"] > fixed["student_flops"]
    assert {"teachers", "teacher_training", "aligner"} <= parts.keys() and not fixed["not_counted"]
    nearest = min(range(1, 400), key=lambda n: abs(mean_cost(controller, n) - fixed["amortised_flops"]))
    assert nearest == arms["ce-total"]["steps"], "a slow search finds the same steps"


def test_what_is_compared_by_rule_is_so_at_the_parity_that_the_plan_holds(prepared):
    arms = {"ce": {"teachers": [], "match": TOTAL}, "fixed": {}, "single": {"teachers": ["one"]}}
    arms |= {"brief": {"teachers": ["two"], "train": {"steps": STEPS // 2}}}
    recipe = study(prepared, arms=arms)
    TrainingBudgetController(Experiment(recipe, prepared)).write()
    found = parities_of(recipe, prepared)
    assert str(found["fixed", "ce"]) == "total FLOPs, amortised"
    assert str(found["fixed", "best-single"]).startswith("not comparable: fixed and brief are trained with unlike")


def mean_cost(controller, steps):
    return sum(controller._cost("ce-total", seed, steps)["amortised_flops"] for seed in SEEDS) / len(SEEDS)


def test_all_that_an_arm_pays_is_matched_where_nothing_is_divided(prepared):
    whole = {**ARMS, "ce-total": {"teachers": [], "match": {**TOTAL, "amortised": False}}}
    arms = TrainingBudgetController(Experiment(study(prepared, arms=whole), prepared)).write()["arms"]
    assert apart(arms["ce-total"]["total_flops"], arms["fixed"]["total_flops"]) < 0.01
    divided = TrainingBudgetController(Experiment(study(prepared), prepared)).write()["arms"]
    assert arms["ce-total"]["steps"] > divided["ce-total"]["steps"]


def test_steps_that_a_student_was_trained_with_stay(prepared, monkeypatch):
    experiment = Experiment(study(prepared), prepared)
    steps = TrainingBudgetController(experiment).write()["arms"]["ce-total"]["steps"]
    more = {**ARMS, "single": {"teachers": ["one"]}, "another": {"teachers": ["two"]}}  # more to share with
    fewer = TrainingBudgetController(Experiment(study(prepared, arms=more), prepared)).steps("ce-total")
    assert fewer < steps
    (prepared / "arms/ce-total/seed-7").mkdir(parents=True)
    try:
        controller = TrainingBudgetController(Experiment(study(prepared, arms=more), prepared))
        assert controller.steps("ce-total") == steps
        with pytest.raises(RecipeError, match=r"arms\.ce-total\.match: .* will be .* apart in total FLOPs, amortised"):
            controller.write()
    finally:
        (prepared / "arms/ce-total/seed-7").rmdir()


def test_what_is_spent_is_what_was_planned_and_a_page_compares_at_the_declared_parity(tmp_path, monkeypatch):
    compared = [["fixed", "ce"], {"arm": "fixed", "baseline": "ce-total", "parity": "total_flops"}]
    arms = {name: ARMS[name] for name in ("ce", "fixed", "ce-total")}
    recipe = write_recipe(tmp_path, **{**STUDY, "arms": arms}, report={"comparisons": compared})
    answer = invoke(monkeypatch, "run", recipe)
    assert answer.code == 0, answer
    run = tmp_path / "run"
    summary, planned = read_json(run / "summary.json"), read_budgets(run)
    for one, at_equal in zip(summary["comparisons"], ("steps", "total FLOPs, amortised"), strict=True):
        assert not [why for why in one["refused"] if "budget" in why or "order" in why] and one["at_equal"] == at_equal
    for name in arms:
        for seed in SEEDS:
            ledger = read_json(run / f"arms/{name}/seed-{seed}/ledger.json")
            assert ledger["optimiser_steps"] == planned[name]["steps"]
            assert ledger["flops"]["student_forward"] > 0
    assert not [note for note in summary["notes"] if "planned" in note]
    assert read_json(run / "declared.json")["parities"] == {"fixed against ce-total": "total FLOPs, amortised"}
    assert read_json(run / FILE)["comparisons"][1]["apart"] < 0.01
    assert "already finished" in str(invoke(monkeypatch, "run", recipe))
    path = run / "arms/ce-total/seed-8/ledger.json"
    ledger = json.loads(path.read_text())
    ledger["flops"]["student_backward"] *= 1.1
    path.write_text(json.dumps(ledger))
    mark = trained_mark(path.parent)
    facts = read_mark(mark) or {}
    write_mark(mark, {key: value for key, value in facts.items() if key != "files"}, MADE)
    assert invoke(monkeypatch, "report", recipe).code == 0
    summary = read_json(run / "summary.json")
    assert not any("budget" in why for why in summary["comparisons"][0]["refused"])
    assert "seed 8: budgets apart by" in summary["comparisons"][1]["refused"][0]
    assert any("ce-total" in note and "planned" in note for note in summary["notes"])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"arms": {**ARMS, "a": {"match": {"arm": "b"}}, "b": {"match": {"arm": "a"}}}},
            ["a is matched to b is matched"],
        ),
        ({"arms": {**ARMS, "a": {"match": {"arm": "a"}}}}, ["arms.a.match", "a is matched to a"]),
        ({"arms": {**ARMS, "a": {"match": {"arm": "fixd"}}}}, ["arms.a.match", "'fixd'", "did you mean 'fixed'"]),
        ({"arms": {**ARMS, "a": {"match": {"arm": "ce", "parity": "flops"}}}}, ["arms.a", "match.parity"]),
        ({"arms": {**ARMS, "a": {"match": {"arm": "ce"}, "train": {"steps": 5}}}}, ["arms.a.match", "train.steps"]),
        ({"arms": {**ARMS, "a": {"train": {"stepz": 5}}}}, ["arms.a", "'train.stepz'", "did you mean 'steps'"]),
        ({"report": {"comparisons": [["fixed", "fixed"]]}}, ["compared with itself", "report.comparisons"]),
        ({"report": {"comparisons": [{"arm": "fixed", "baseline": "cee"}]}}, ["'cee'", "did you mean 'ce'"]),
        ({"report": {"comparisons": [{"arm": "fixed", "baseline": "ce", "parity": "time"}]}}, ["report.comparisons"]),
        ({"report": {"curves": {"arms": ["ce", "fixed"], "budgets": [1]}}}, ["report.curves.budgets", "at least 2"]),
        ({"report": {"curves": {"arms": ["ce", "fixed"], "budgets": [2, 4]}}}, ["report.curves.budgets", "1"]),
        ({"report": {"curves": {"arms": ["ce", "fixed"], "budgets": [1, 4, 2]}}}, ["budgets rise"]),
        ({"report": {"curves": {"arms": ["ce", "fixd"], "budgets": [1, 2]}}}, ["'fixd'", "did you mean 'fixed'"]),
        ({"report": {"curves": {"arms": ["ce", "ce"], "budgets": [1, 2]}}}, ["named twice"]),
        ({"report": {"curves": {"arms": ["ce"], "points": ["ce"], "budgets": [1, 2]}}}, ["named twice"]),
        ({"report": {"curves": {"arms": ["ce"], "budgets": [1, 2]}}}, ["name one more in arms, or in points"]),
        (
            {"report": {"curves": {"arms": ["ce"], "points": ["fixed"], "of": "problems", "budgets": [0.5, 1]}}},
            ["points are arms at their own steps"],
        ),
        ({"report": {"curves": {"arms": ["ce"], "points": ["fixd"], "budgets": [1]}}}, ["budgets"]),
        ({"report": {"curves": {"arms": ["ce"], "points": ["fixd"], "budgets": [1, 2]}}}, ["'fixd'", "points"]),
        ({"seeds": [1, 2], "report": {"curves": {"arms": ["ce", "fixed"], "budgets": [1, 2]}}}, ["at least 3"]),
        (
            {"arms": {**ARMS, "ce@x2": {}}, "report": {"curves": {"arms": ["ce", "fixed"], "budgets": [1, 2]}}},
            ["arms.ce@x2", "another name"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_budgets_that_make_no_sense_are_named_before_anything_runs(tmp_path, monkeypatch, changes, parts):
    recipe = write_recipe(tmp_path, **{**STUDY, **changes})
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_work), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": {"steps": 6}}, ["arms.ce-total.match", "apart in total FLOPs", "whole numbers"]),
        ({"report": {"comparisons": [["fixed", "ce-total"]]}}, ["fixed against ce-total", "apart in steps"]),
        (
            {
                "arms": {
                    **ARMS,
                    "brief": {"teachers": [], "train": {"steps": 1}},
                    "poor": {"match": {"arm": "brief", "parity": "total_flops", "amortised": False}},
                }
            },
            ["arms.poor.match", "one step already takes", "before training"],
        ),
        (
            {
                "capture": {"source": "online"},
                "arms": {**ARMS, "fixed": {"align": {"layers": "cka"}}},
            },
            ["arms.ce-total.match", "layers: cka", "capture.source: store"],
        ),
    ],
)
def test_budgets_that_cannot_be_reached_are_named_before_anything_is_trained(tmp_path, monkeypatch, changes, parts):
    recipe = write_recipe(tmp_path, **{**STUDY, **changes})
    assert_one_message(invoke(monkeypatch, "run", recipe, work=no_training), *parts)


def test_budgets_of_arms_whose_layers_are_compared_later_are_planned_before_any_teacher_is_trained(tmp_path):
    recipe = study(tmp_path / "run", arms={"fixed": {}, "cka": {"align": {"layers": "cka", "cka_texts": 11}}})
    made_ready(recipe, tmp_path / "run", "prepare")
    found = TrainingBudgetController(Experiment(recipe, tmp_path / "run")).write()["arms"]
    assert found["cka"]["parts"]["layer_maps"] and found["cka"]["student_flops"] == found["fixed"]["student_flops"]


def test_what_a_published_teacher_cost_is_not_known_and_is_said(tmp_path):
    published = {"name": "elsewhere", "path": "org/model"}
    tree = tiny_tree(**STUDY)
    tree["teachers"] = [published]
    whole = {**TOTAL, "amortised": False}
    for changes, place in (
        ({"arms": {"ce": {"teachers": [], "match": whole}, "fixed": {}}}, "arms.ce.match"),
        ({"report": {"comparisons": [{**whole, "baseline": "ce"}]}}, "report.comparisons: fixed against ce"),
    ):
        with pytest.raises(RecipeError, match=r"training of teacher 'elsewhere'.*nobody knows") as raised:
            make_recipe({**tree, "arms": {"ce": {"teachers": []}, "fixed": {}}, **changes})
        assert place in raised.value.place and "amortised: true" in raised.value.fix
    make_recipe({**tree, "arms": {"ce": {"teachers": [], "match": TOTAL}, "fixed": {}}})


def test_a_parity_that_was_changed_after_it_was_declared_is_named(tmp_path):
    def at(**parity):
        return study(tmp_path, report={"comparisons": [{"arm": "fixed", "baseline": "ce", **parity}]})

    declare(at(), tmp_path)
    assert compare_declared(at(parity="steps"), tmp_path)["changed"] == []
    found = compare_declared(at(parity="total_flops"), tmp_path)
    assert found["changed"] == ["fixed against ce was at equal steps, is at equal total FLOPs, amortised"]
    assert found["late"] == [["fixed", "ce"]]


def test_curves_make_arms_that_are_planned_like_any_other(tmp_path):
    recipe = study(tmp_path, report={"curves": {"arms": ["ce", "fixed"], "budgets": [0.5, 1, 4]}})
    assert list(recipe.every_arm)[len(ARMS) :] == ["ce@x0.5", "ce@x4", "fixed@x0.5", "fixed@x4"]
    assert [arm_recipe(recipe, f"ce{x}").train.steps for x in ("@x0.5", "", "@x4")] == [30, 60, 240]
    assert arm_recipe(recipe, "fixed@x4").loss == arm_recipe(recipe, "fixed").loss
    assert list(recipe.arms) == list(ARMS), "as they are written"


def test_differences_from_the_plan_are_said_in_words():
    planned = {"steps": 100, "total_flops": 1e9}
    assert differences(planned, {"steps": 101, "total_flops": 1e9, "data": 5}) == []
    [said] = differences(planned, {"steps": 102, "total_flops": 1e9})
    assert said == "steps: 102 spent, 100 planned (2.0% apart)"
    assert figure_of(ParityRecipe(parity="total_flops")) == "amortised_flops"
    assert figure_of(ParityRecipe(parity="total_flops", amortised=False)) == "total_flops"
    assert issubclass(RecipeError, KVDistillError) and find_refusals({}, {}, [1])


def test_one_run_of_a_study_whose_seeds_have_their_own_data_is_planned_by_itself(tmp_path, monkeypatch):
    changes = {"arms": {"ce": {"teachers": []}}, "seeds": SEEDS, "replicate": "data", "report": {"comparisons": []}}
    recipe = tiny_recipe(tmp_path / "run", **changes)

    train(recipe, arm="ce", seed=8, progress=lambda *_: None)
    assert read_json(tmp_path / "run" / FILE)["seeds"] == [8]
    ledger = read_json(tmp_path / "run/arms/ce/seed-8/ledger.json")
    assert read_budgets(tmp_path / "run")["ce"]["tokens"] == ledger["tokens_nonpadding"]
