"""An arm may have a share of the training problems only; curves over shares say how many one teacher is worth."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import SEED, assert_one_message, invoke, made_ready, tiny_recipe, write_recipe

from kvdistill.arms.experiment import Experiment
from kvdistill.arms.texts import first_share
from kvdistill.core.files import read_json
from kvdistill.stages.report.factor import cost_factor

pytestmark = pytest.mark.slow

TASKS = [{"name": name, "train": 24, "val": 16, "test": 16, "teach": 32} for name in ("chain", "product")]
DATA = {"data": {"tasks": TASKS, "disjoint_teachers": True}, "align": {"calibration_examples": 20}}
HALF = [{**task, "train": 12} for task in TASKS]
ARMS = {
    "ce": {"teachers": []},
    "fixed": {},
    "mismatched": {"control": "placebo", "fuse": {"fusion_strategy": "competence"}},
}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The same arms with half of 24 problems, and in a study that has 12."""
    folder = tmp_path_factory.mktemp("shares")
    whole, half = folder / "whole", folder / "half"
    arms = {name: {**spec, "problems": 0.5} for name, spec in ARMS.items()}
    made_ready(tiny_recipe(whole, **{**DATA, "arms": arms}), whole, "evaluate")
    taught = [{"name": name, "path": str(whole / f"teachers/{name}/model")} for name in ("one", "two")]
    less = {**DATA, "data": {**DATA["data"], "tasks": HALF}, "arms": ARMS, "teachers": taught}
    made_ready(tiny_recipe(half, **less), half, "evaluate")
    return whole, half


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_with_a_share_is_the_arm_of_a_study_that_has_no_more(studies, arm):
    whole, half = (run / f"arms/{arm}/seed-{SEED}" for run in studies)
    mine, theirs = (load_file(folder / "model/model.safetensors") for folder in (whole, half))
    assert mine.keys() == theirs.keys()
    for name in mine:  # teachers read other texts beside these, padded otherwise: to rounding
        assert torch.allclose(mine[name], theirs[name], atol=0 if arm == "ce" else 1e-5), name
    ledgers = [read_json(folder / "ledger.json") for folder in (whole, half)]
    for key in ("order_fingerprint", "problems_seen", "problems_distinct", "tokens_nonpadding"):
        assert ledgers[0][key] == ledgers[1][key]
    assert ledgers[0]["flops"]["teachers"] == ledgers[1]["flops"]["teachers"], "it pays for reading what it has"
    assert ledgers[0]["flops"]["fit"] == ledgers[1]["flops"]["fit"]


def test_shares_are_nested_and_of_whole_problems(studies):
    rows = Experiment(tiny_recipe(studies[0], **DATA), studies[0]).split("train")
    third, half = (first_share(rows, share) for share in (1 / 3, 0.5))
    assert {*third} < {*half} and len(third) == 16 and len(half) == 24
    assert first_share(rows, 1e-9) == [
        next(i for i, one in enumerate(rows) if one.task == t) for t in ("chain", "product")
    ]


def test_curves_over_problems_have_a_row_for_every_share_and_say_what_they_found(tmp_path, monkeypatch):
    curves = {"arms": ["ce", "fixed"], "of": "problems", "budgets": [0.25, 1]}
    study = {**DATA, "seeds": [7, 8, 9], "arms": {"ce": {"teachers": []}, "fixed": {}}, "report": {"curves": curves}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **study, train={"steps": 6}))
    assert answer.code == 0, answer
    summary = read_json(tmp_path / "run/summary.json")["curves"]
    assert [(row["name"], row["distinct"]) for row in summary["rows"] if row["arm"] == "ce"] == [
        ("ce@p0.25", 12), ("ce", 48)
    ]  # fmt: skip
    assert [*summary["costs"]] == ["distinct"] and "problems" in summary["sentences"][0]
    page = (tmp_path / "run/report.html").read_text()
    assert "at hand" in page and "ce@p0.25" not in summary["sentences"][0]


def test_fewer_problems_is_the_factor_at_the_fewest():
    shares, better, worse = [[10.0, 40.0, 160.0]] * 3, [0.6] * 3, [[0.2, 0.4, 0.8]] * 3
    factor = cost_factor([10.0] * 3, better, shares, worse)
    assert factor.factor == pytest.approx(8.0) and factor.num_beyond == 0  # half way from 40 to 160, in logarithms


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"arms": {"ce": {"teachers": [], "problems": 1.5}}}, ["arms.ce", "problems"]),
        ({"arms": {"ce": {"teachers": [], "problems": 0}}}, ["arms.ce", "problems"]),
        ({"arms": {"kv": {"problems": 0.5, "align": {"layers": "cka"}}}}, ["arms.kv: problems", "layer_map"]),
        ({"seeds": [1, 2, 3], "report": {"curves": {"arms": ["ce", "fixed"], "of": "problems", "budgets": [1, 2]}}},
         ["shares of them"]),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused_before_anything_runs(tmp_path, monkeypatch, changes, parts):
    assert_one_message(invoke(monkeypatch, "run", write_recipe(tmp_path, **changes)), *parts)
    assert not (tmp_path / "run").exists()
