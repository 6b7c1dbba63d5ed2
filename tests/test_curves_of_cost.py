"""Arms at several budgets in one study: trained apart, or each going on where the shorter one ended."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import invoke, tiny_recipe, write_recipe

from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import continued
from kvdistill.core.files import read_json
from kvdistill.study.plan import plan

pytestmark = pytest.mark.slow

CURVES = {"arms": ["fixed", "ce"], "budgets": [1, 2, 3]}
STUDY = {
    "seeds": [7, 8, 9],
    "train": {"steps": 5, "schedule": "constant", "lr_warmup_steps": 2, "log_every": 2},
    "loss": {"kv_warmup": 3},
    "report": {"curves": CURVES},
}


def arms_of(recipe):
    return {name: arm_recipe(recipe, name) for name in recipe.every_arm}


def test_a_longer_training_waits_for_the_shorter_one_only_where_it_can_go_on_from_it(tmp_path):
    recipe = tiny_recipe(tmp_path, **STUDY)
    assert continued(recipe, arms_of(recipe)) == {
        "fixed@x2": "fixed", "fixed@x3": "fixed@x2", "ce@x2": "ce", "ce@x3": "ce@x2"
    }  # fmt: skip
    jobs = {job.id: job for job in plan(recipe, tmp_path)}
    assert "train:ce:7" in jobs["train:ce@x2:7"].after and "train:ce:8" not in jobs["train:ce@x2:7"].after
    assert [jobs[f"train:ce{x}:7"].cost for x in ("", "@x2", "@x3")] == [5, 5, 5], "five steps each"
    assert {f"evaluate:ce@x3:{seed}" for seed in (7, 8, 9)} <= jobs.keys()
    # a warm-up that is a share of the steps is another one in a longer training: fixed is trained apart, ce has none
    shares = tiny_recipe(tmp_path, **{**STUDY, "loss": {"kv_warmup": 0.2}})
    assert continued(shares, arms_of(shares)) == {"ce@x2": "ce", "ce@x3": "ce@x2"}
    cosine = tiny_recipe(tmp_path, **{**STUDY, "train": {**STUDY["train"], "schedule": "cosine"}})
    assert continued(cosine, arms_of(cosine)) == {}
    assert {job.id: job for job in plan(cosine, tmp_path)}["train:ce@x3:7"].cost == 15.0


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    with pytest.MonkeyPatch.context() as patch:
        answer = invoke(patch, "run", write_recipe(folder, **STUDY))
    assert answer.code == 0, answer
    return folder / "run", answer


def test_a_training_that_went_on_ends_in_the_bits_of_one_that_began_anew(studied, tmp_path, monkeypatch):
    run, _ = studied
    alone = {"fixed": {"train": {"steps": 15}}, "ce": {"teachers": [], "train": {"steps": 15}}}
    apart = {**STUDY, "arms": alone, "report": {}, "seeds": [7]}
    assert invoke(monkeypatch, "run", write_recipe(tmp_path, **apart)).code == 0
    for arm in alone:
        here, there = run / f"arms/{arm}@x3/seed-7", tmp_path / f"run/arms/{arm}/seed-7"
        for file in ("model/model.safetensors", *(["adapters.safetensors"] if arm == "fixed" else [])):
            mine, theirs = load_file(here / file), load_file(there / file)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), file
        ledgers = [read_json(folder / "ledger.json") for folder in (here, there)]
        for key in ("optimiser_steps", "problems_seen", "tokens_nonpadding", "order_fingerprint", "init_fingerprint"):
            assert ledgers[0][key] == ledgers[1][key]
        assert ledgers[0]["flops"]["student_forward"] == ledgers[1]["flops"]["student_forward"]
        rows = [
            [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (here, there)
        ]
        steps = [[{k: v for k, v in row.items() if k != "seconds"} for row in each if "loss" in row] for each in rows]
        assert steps[0] == steps[1], "each step once, with the same terms"
        assert not (here / "checkpoints").exists()
        assert ledgers[0]["went_on_from"]["arm"] == f"{arm}@x2" and "went_on_from" not in ledgers[1]
        assert ledgers[0]["seconds"] > ledgers[0]["went_on_from"]["seconds"] > 0
        assert [row["step"] for row in rows[0] if "val" in row] == [5, 10, 15]


def test_the_study_has_a_row_for_every_budget_and_says_what_it_found(studied):
    run, answer = studied
    summary = read_json(run / "summary.json")
    assert [row["steps"] for row in summary["curves"]["rows"] if row["arm"] == "ce"] == [5, 10, 15]
    assert list(summary["arms"]) == ["ce", "fixed"], "budgets are no arms of their own on the page"
    [sentence] = summary["curves"]["sentences"]
    assert " ".join(sentence.split()[:3]) in " ".join(answer.out.split())
    assert "What it takes" in (run / "report.html").read_text()
