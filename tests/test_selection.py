"""Which weights a training keeps and when it ends: by validation alone, to the same bits however it is interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_report import ARM as RUNS
from test_report import BASE as BASELINE
from test_report import SEEDS, with_ledger
from test_resume import ARM, CHANGES, Stopped, arm_folder, assert_same_end, prepared, stop_at
from tiny_recipe import (
    ARMS,
    SEED,
    assert_one_message,
    copy_base,
    environment,
    invoke,
    no_work,
    rows_of,
    tiny_recipe,
    write_recipe,
)

import kvdistill.core.stopping as stopping
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.student import CausalStudent
from kvdistill.core.errors import TrainingStopped
from kvdistill.core.marks import check_marked, read_mark
from kvdistill.core.recipe import TrainRecipe
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.core.segments import PROMPT
from kvdistill.models import batch_geometry
from kvdistill.stages.report.compare import find_refusals
from kvdistill.stages.train import train_student
from kvdistill.stages.train.checkpoint import newest_checkpoint
from kvdistill.stages.train.curves import LearningCurve
from kvdistill.stages.train.selection import Selection, selection_rule

quiet_libraries()
set_threads(1)

# adapters with dropout, projectors, competence and logits; points, checkpoints and rows of the log do not coincide
BEST: dict[str, Any] = {
    **CHANGES,
    "train": {**CHANGES["train"], "steps": 24, "save_every": 5, "eval_every": 3, "select": "best", "patience": 3},
}
NLLS = {3: 3.0, 6: 2.5, 9: 2.0, 12: 2.0, 15: 2.25, 18: 2.125, 21: 1.0, 24: 0.5}  # best at 9, over at 18


def train(run: Path, recipe: Any, **options: Any) -> None:
    with stopping.listening():
        train_student(Experiment(recipe, run).arm(ARM, SEED), **options)


@pytest.fixture
def scripted(monkeypatch) -> dict[int, dict[str, torch.Tensor]]:
    """Validation NLLs by script, and what learned as it was at each point."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    point = LearningCurve.point

    def noted(self: LearningCurve, step: int, distiller: Any) -> float | None:
        if step in NLLS:
            seen[step] = {n: p.detach().clone() for n, p in distiller.named_parameters() if p.requires_grad}
        monkeypatch.setattr(LearningCurve, "_completion_nll", lambda self, distiller: NLLS.get(step, math.nan))
        return point(self, step, distiller)

    monkeypatch.setattr(LearningCurve, "point", noted)
    return seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The training of `BEST`, never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run, recipe = prepared(folder, BEST)
    with pytest.MonkeyPatch.context() as patch:
        step_of: list[int] = []
        point = LearningCurve.point

        def noted(self: LearningCurve, step: int, distiller: Any) -> float | None:
            step_of.append(step)
            return point(self, step, distiller)

        patch.setattr(LearningCurve, "point", noted)
        patch.setattr(LearningCurve, "_completion_nll", lambda *given: NLLS[step_of[-1]])
        train(run, recipe)
    return arm_folder(run)


# -- the rule -----------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, math.nan, math.inf]), min_size=1, max_size=12),
    st.sampled_from([None, 1, 2, 3]),
    st.integers(0, 12),
)
def test_the_lowest_counts_and_the_earlier_of_equal_ones_also_after_a_resume(nlls, patience, resumed_after):
    recipe = TrainRecipe(steps=len(nlls) + 1, eval_every=1, select="best", patience=patience)
    model, selection = torch.nn.Linear(1, 1, bias=False), Selection(recipe)
    reached = 0
    for step, nll in enumerate(nlls, start=1):
        torch.nn.init.constant_(model.weight, step)
        selection.add(step, nll, model)
        if step == resumed_after:
            state, weights = json.loads(json.dumps(selection.state())), selection.weights
            selection = Selection(recipe)
            selection.restore(state, Path("nothing"))
            selection.weights = weights
        reached = step
        if selection.is_over:
            break
    # the slow, obvious way
    finite = [nll if math.isfinite(nll) else math.inf for nll in nlls]
    over = [
        at
        for at in range(1, len(nlls) + 1)
        if patience is not None
        and (best := min(finite[:at])) is not None
        and at - (1 + finite[:at].index(best) if best < math.inf else 0) >= patience
    ]
    assert reached == (over[0] if over else len(nlls))
    best = min(finite[:reached])
    if best == math.inf:
        with pytest.raises(TrainingStopped, match="finite NLL"):
            selection.put_back(model)
    else:
        selection.put_back(model)
        facts = selection.facts()
        assert model.weight.item() == facts["chosen_step"] == facts["best_step"] == 1 + finite[:reached].index(best)
        assert facts["best_nll"] == best


def test_without_select_the_last_weights_are_kept_and_patience_still_ends():
    model = torch.nn.Linear(1, 1, bias=False)
    selection = Selection(TrainRecipe(steps=50, eval_every=10, patience=2))
    for step, nll in ((10, 1.0), (20, 1.5), (30, 1.25)):
        torch.nn.init.constant_(model.weight, step)
        selection.add(step, nll, model)
    selection.put_back(model)
    assert selection.is_over and model.weight.item() == 30 and selection.weights == {}
    facts = selection.facts()
    assert facts["chosen_step"] == 30 and facts["best_step"] == 10 and facts["ended_early"]


def test_the_rule_in_words_says_what_is_kept_and_when_it_ends():
    both = selection_rule(TrainRecipe(steps=900, eval_every=50, eval_examples=32, select="best", patience=4))
    for words in (
        "lowest validation NLL",
        "ties: the earlier",
        "4 points",
        "at the latest after 900 steps",
        "every 50",
    ):
        assert words in both
    assert "of the last step" in selection_rule(TrainRecipe(patience=2)) and "points without" not in selection_rule(
        TrainRecipe(select="best")
    )


# -- a training ---------------------------------------------------------------------------------------


def test_the_weights_of_the_best_point_are_saved_and_the_steps_after_it_are_paid_for(tmp_path, scripted, monkeypatch):
    saved: dict[str, torch.Tensor] = {}
    save = CausalStudent.save
    monkeypatch.setattr(
        CausalStudent,
        "save",
        lambda self, *to: (saved.update({n: p.clone() for n, p in self.named_parameters()}), save(self, *to))[1],
    )
    run, recipe = prepared(tmp_path, BEST)
    train(run, recipe)
    folder = arm_folder(run)
    best = {n.removeprefix("student."): p for n, p in scripted[9].items() if n.startswith("student.")}
    assert best and all(torch.equal(saved[name], tensor) for name, tensor in best.items())
    assert any(not torch.equal(scripted[18][name], tensor) for name, tensor in scripted[9].items())
    adapters = load_file(folder / "adapters.safetensors")
    learned = {n: p for n, p in scripted[9].items() if n.startswith("aligners.")}
    assert learned
    for name, tensor in learned.items():
        _, number, part = name.split(".", 2)
        assert torch.equal(adapters[f"{('one', 'two')[int(number)]}/{part}"], tensor)

    ledger, mark = json.loads((folder / "ledger.json").read_text()), read_mark(folder / "trained.json")
    assert ledger["optimiser_steps"] == mark["steps"] == 18
    assert ledger["selection"] == mark["selection"]
    assert ledger["selection"]["chosen_step"] == 9 and ledger["selection"]["best_nll"] == 2.0
    assert ledger["selection"]["ended_early"] and ledger["selection"]["rule"] == selection_rule(recipe.train)
    assert ledger["checkpoint_chosen_on"] == "validation"
    arm = Experiment(recipe, run).arm(ARM, SEED)
    examples = arm.experiment.split("train")
    seen = [len(examples[i].input_ids) for i in arm.training_order()[: 18 * 2 * 4]]
    assert ledger["tokens_nonpadding"] == sum(seen)
    assert [ledger["flops"]["student_forward"], ledger["flops"]["student_backward"]] == list(
        arm.distiller.student.flops(*batch_geometry(seen))
    )
    rows = rows_of(folder / "log.jsonl")
    assert [(row["step"], row["val"]["completion_nll"]) for row in rows if "val" in row] == list(NLLS.items())[:6]
    assert max(row["step"] for row in rows) == 18
    check_marked(folder / "trained.json", fix="")
    assert not (folder / "checkpoints").exists() and not list(folder.rglob("best*"))


@pytest.mark.usefixtures("scripted")
def test_the_match_is_measured_with_the_weights_that_are_kept(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(Selection, "put_back", lambda self, model: None)
    run, recipe = prepared(tmp_path, BEST)
    train(run, recipe)
    assert (arm_folder(run) / "match.json").read_text() != (undisturbed / "match.json").read_text()


@pytest.mark.parametrize("arm", ["ce", "reasoning"])  # the latter's cross-entropy is of answers only
def test_the_validation_nll_is_the_mean_over_all_completion_tokens(tmp_path, arm):
    run = copy_base(tmp_path)
    changes = {"steps": 4, "eval_every": 2, "eval_examples": 8, "select": "best"}
    recipe = tiny_recipe(run, arms=ARMS, train=changes)
    one = Experiment(recipe, run).arm(arm, SEED)
    distiller = one.distiller.eval()
    curve = LearningCurve(one, run / "log.jsonl")
    examples = [one.experiment.examples("val")[i] for i in curve._chosen]
    assert len(examples) == 8 and len({len(e.input_ids) for e in examples}) > 1
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logprobs = distiller.student.model(ids).logits.double().log_softmax(-1)
        for at in range(1, len(example.input_ids)):
            if example.segments[at] != PROMPT:
                total -= logprobs[0, at - 1, example.input_ids[at]].item()
                count += 1
    assert curve.point(2, distiller) == pytest.approx(total / count, rel=1e-6)
    row = rows_of(run / "log.jsonl")[-1]["val"]
    assert (row["completion_nll"] == pytest.approx(row["nll"], rel=1e-6)) is (arm == "ce")


def test_a_recipe_that_asks_for_neither_leaves_what_it_left_before(tmp_path):
    run = copy_base(tmp_path)
    recipe = tiny_recipe(run, arms=ARMS, train={"eval_every": 2})
    train_student(Experiment(recipe, run).arm("fixed", SEED))
    folder = run / "arms" / "fixed" / f"seed-{SEED}"
    assert "selection" not in read_mark(folder / "trained.json")
    assert not {"selection", "checkpoint_chosen_on"} & json.loads((folder / "ledger.json").read_text()).keys()
    assert all("completion_nll" not in row.get("val", {}) for row in rows_of(folder / "log.jsonl"))


# -- interrupted --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("steps", [(7,), (11, 13), (16,), (18,), (3, 10, 17)], ids=str)
def test_killed_anywhere_it_ends_in_the_same_bits(tmp_path, undisturbed, steps):
    """Before, at and after the best point, and in the step that was the last."""
    run, recipe = prepared(tmp_path, BEST)
    for step in steps:
        with pytest.raises(Stopped):
            train(run, recipe, progress=stop_at(step))
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)
    assert json.loads((arm_folder(run) / "ledger.json").read_text())["selection"]["chosen_step"] == 9


@pytest.mark.usefixtures("scripted")
def test_killed_between_the_end_and_the_mark_it_trains_no_further(tmp_path, undisturbed, monkeypatch):
    run, recipe = prepared(tmp_path, BEST)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CausalStudent, "save", lambda *a: (_ for _ in ()).throw(Stopped()))
        train(run, recipe)
    assert newest_checkpoint(arm_folder(run) / "checkpoints").name == "checkpoint-18"
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("step", [9, 12, 18])
def test_asked_to_end_while_a_point_is_measured_it_judges_that_point_later(tmp_path, undisturbed, monkeypatch, step):
    """At the best point, at its equal, and at the one that ends the training; cut again when it is made up for."""
    run, recipe = prepared(tmp_path, BEST)
    losses, asked = LearningCurve._losses, list[int]()
    point = LearningCurve.point

    def interrupted(self: Any, *given: Any, **options: Any) -> Any:
        if len(asked) < 2:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *given, **options)

    def chosen(self: Any, now: int, distiller: Any) -> float | None:
        monkeypatch.setattr(LearningCurve, "_losses", interrupted if now == step else losses)
        return point(self, now, distiller)

    monkeypatch.setattr(LearningCurve, "point", chosen)
    for _ in range(2):
        with pytest.raises(stopping.Stopped):
            train(run, recipe)
        assert newest_checkpoint(arm_folder(run) / "checkpoints").name == f"checkpoint-{step}"
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)


@pytest.mark.usefixtures("scripted")
def test_a_point_that_was_logged_and_then_cut_stands_in_the_log_once(tmp_path, undisturbed, monkeypatch):
    import kvdistill.stages.train.curves as curves

    append, asked = curves.append_json_line, list[int]()

    def cut_after(path: Path, row: dict[str, Any]) -> None:
        append(path, row)
        if row["step"] == 12 and not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(curves, "append_json_line", cut_after)
    run, recipe = prepared(tmp_path, BEST)
    with pytest.raises(stopping.Stopped):
        train(run, recipe)
    train(run, recipe)
    assert asked and not (arm_folder(run) / "checkpoints").exists()
    assert_same_end(arm_folder(run), undisturbed)


@pytest.mark.usefixtures("scripted")
def test_a_torn_best_snapshot_spoils_its_checkpoint_only(tmp_path, undisturbed):
    run, recipe = prepared(tmp_path, BEST)
    with pytest.raises(Stopped):
        train(run, recipe, progress=stop_at(16))
    torn = arm_folder(run) / "checkpoints" / "checkpoint-15" / "best.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    assert newest_checkpoint(torn.parent.parent).name == "checkpoint-10"
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)


def test_two_ranks_agree_on_the_end_and_on_the_best(tmp_path):
    """torchrun, two ranks of batch 4, against one process of batch 8, at a rate at which validation gets worse."""
    train_section = {
        "steps": 40, "eval_every": 2, "eval_examples": 8, "learning_rate": 0.05, "schedule": "constant",
        "select": "best", "patience": 2,
    }  # fmt: skip
    folders = []
    for ranks, batch in ((1, 8), (2, 4)):
        run = copy_base(tmp_path / str(ranks))
        changes = {"arms": ARMS, "train": {**train_section, "batch_size": batch}, "hardware": {"device": "cpu"}}
        recipe, path = tiny_recipe(run, **changes), write_recipe(run.parent, **changes)
        if ranks == 1:
            train_student(Experiment(recipe, run).arm("fixed", SEED))
        else:
            (run / "recipe.json").write_text(recipe.model_dump_json())
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            words += ["-m", "kvdistill", "train", str(path), "--arm", "fixed", "--seed", str(SEED)]
            done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        folders.append(run / "arms" / "fixed" / f"seed-{SEED}")
    one, two = (json.loads((folder / "ledger.json").read_text()) for folder in folders)
    assert one["optimiser_steps"] == two["optimiser_steps"] < 40 and one["selection"]["ended_early"]
    assert one["selection"]["chosen_step"] == two["selection"]["chosen_step"] < one["optimiser_steps"]
    assert one["tokens_nonpadding"] == two["tokens_nonpadding"]
    a, b = (load_file(folder / "model/model.safetensors") for folder in folders)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-4)


# -- recipes and comparisons --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.select=best", "train.eval_every=0"], "select: best looks at validation points"),
        (["train.select=best", "train.eval_every=6"], "give an eval_every between 1 and 5"),
        (["train.patience=2", "train.eval_every=9"], "patience: 2 looks at validation points"),
        (["train.patience=0", "train.eval_every=2"], "train.patience"),
        (["train.select=first"], "train.select"),
    ],
)
def test_what_validation_cannot_choose_from_is_named_before_anything_runs(tmp_path, monkeypatch, changes, words):
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path), *changes, work=no_work)
    assert_one_message(answer, words)
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_chooses_too_also_where_only_one_arm_does(tmp_path, monkeypatch):
    arms = {"ce": {"teachers": []}, "chosen": {"train": {"select": "best", "patience": 1, "eval_every": 3}}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, arms=arms), "--dry-run")
    assert answer.code == 0 and "train chosen 7" in answer.out, answer


def test_arms_that_stopped_by_the_same_rule_are_compared_at_equal_data():
    rule = {"select": "best", "patience": 3}
    early = with_ledger(RUNS, optimiser_steps=60, tokens_nonpadding=600.0, selection=rule)
    assert find_refusals(early, with_ledger(BASELINE, selection=rule), SEEDS) == []
    other = find_refusals(early, with_ledger(BASELINE, selection={**rule, "patience": 4}), SEEDS)
    assert len(other) == 1 and other[0].startswith(f"seed {', '.join(map(str, SEEDS))}: differing rules")
    assert any("differing rules" in reason for reason in find_refusals(early, BASELINE, SEEDS))
    whole = {"select": "best", "patience": None}  # who trains all steps is held to them
    unequal = with_ledger(RUNS, optimiser_steps=60, selection=whole)
    assert any(
        "steps: 60 against 100" in r for r in find_refusals(unequal, with_ledger(BASELINE, selection=whole), SEEDS)
    )
