"""`loss.logit_match` in a study: a teacher with its own tokenizer gives its logits, stored or online, and it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_alignment_arms import byte_level_tokenizer
from tiny_recipe import SEED, assert_one_message, invoke, made_ready, no_training, rows_of, tiny_recipe, write_recipe

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import token_counts
from kvdistill.arms.experiment import Experiment
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.core.segments import ANSWER
from kvdistill.losses import prediction_mask

quiet_libraries()
set_threads(1)
KD = {"kv_weight": 0, "logit_weight": 2.0}
FORMS = ("auto", "spans", "sorted", "hybrid")


def changes(folder: Path) -> dict[str, Any]:
    def teacher(name: str, steps: int, **more: Any) -> dict[str, Any]:
        scratch = {"architecture": "llama", "hidden_size": 48, "num_layers": 2, "num_heads": 4, "init_std": 0.1}
        optimiser = {"steps": steps, "batch_size": 32, "learning_rate": 4e-3, "lr_warmup_steps": 10}
        return {"name": name, "train_on": ["chain"], "scratch": scratch, "optimiser": optimiser, **more}

    of_other = {form: {"teachers": ["other"], "loss": {**KD, "logit_match": form}} for form in FORMS}
    return {
        "data": {"tasks": [{"name": "chain", "train": 48, "val": 48, "test": 4, "teach": 6000}]},
        "teachers": [teacher("other", 300, tokenizer=str(folder / "bytes")), teacher("mine", 20)],
        "student": {"scratch": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "init_std": 0.1}},
        "train": {"steps": 100, "batch_size": 16, "learning_rate": 4e-3, "lr_warmup_steps": 5, "eval_examples": 48},
        "arms": {"ce": {"teachers": []}, **of_other, "mine": {"teachers": ["mine"], "loss": KD},
                 "mine-spans": {"teachers": ["mine"], "loss": {**KD, "logit_match": "spans"}},
                 "both": {"loss": {**KD, "logit_match": "sorted"}}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("across")
    byte_level_tokenizer(folder / "bytes")
    made = changes(folder)
    recipe = tiny_recipe(folder / "run", **made)
    made_ready(recipe, folder / "run")
    return folder, made


def arm_of(study: tuple[Path, dict[str, Any]], name: str, **more: Any) -> Arm:
    folder, made = study
    return Experiment(tiny_recipe(folder / "run", **{**made, **more}), folder / "run").arm(name, SEED)


def test_chunks_are_of_learned_tokens_and_write_the_same_text_on_both_sides(study: Any) -> None:
    arm = arm_of(study, "spans")
    teacher, student = arm.teachers["other"].tokenizer, arm.experiment.tokenizer
    batch = arm.load(arm.batches("train"), [0, 3, 5])
    chunks = batch.chunks["other"]
    seen = set()
    for row, (i0, i1), (j0, j1) in zip(
        chunks.row_C.tolist(), chunks.theirs_C2.tolist(), chunks.mine_C2.tolist(), strict=True
    ):
        theirs, mine = chunks.ids_BS[row, i0 : i1 + 1], batch.input_ids_BT[row, j0 : j1 + 1]
        same = teacher.decode(theirs) == student.decode(mine)
        assert same or (theirs[-1] == teacher.eos_token_id and mine[-1] == student.eos_token_id)
        seen |= {(row, j) for j in range(j0, j1 + 1)}
    learned = prediction_mask(arm.distiller._supervised(batch)).nonzero() + torch.tensor([0, 1])
    assert seen == {(int(b), int(t)) for b, t in learned}, "no learned token is left out"
    assert any(i0 == i1 and j0 < j1 for (i0, i1), (j0, j1) in zip(chunks.theirs_C2, chunks.mine_C2, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_stored_and_online_targets_give_the_same_loss_however_a_batch_is_split(study: Any, form: str) -> None:
    def loss(arm: Arm, numbers: list[int], counts: Any = None) -> tuple[float, Any]:
        batch = arm.load(arm.batches("train"), numbers)
        counts = token_counts(batch, arm.recipe).float() if counts is None else counts
        return float(arm.distiller(batch, counts).terms["logit/other"][0]), counts

    stored, online = arm_of(study, form), arm_of(study, form, capture={"source": "online"})
    whole, counts = loss(stored, [4, 1, 7, 2])
    assert whole > 0 and loss(online, [4, 1, 7, 2])[0] == pytest.approx(whole, rel=2e-5)
    parts = [loss(stored, part, counts)[0] for part in ([4], [1, 7], [2])]
    assert sum(parts) == pytest.approx(whole, rel=2e-5), "padding and splitting change nothing"
    assert whole == pytest.approx(loss(arm_of(study, "spans"), [4, 1, 7, 2])[0]) or form in ("sorted", "hybrid")


def test_with_the_students_tokenizer_it_is_plain_distillation_to_the_bit(study: Any) -> None:
    found = []
    for name in ("mine", "mine-spans"):
        arm = arm_of(study, name)
        batch = arm.load(arm.batches("train"), [4, 1, 7])
        found.append(arm.distiller(batch, token_counts(batch, arm.recipe).float()).loss)
    assert torch.equal(*found)
    both = arm_of(study, "both")
    batch = both.load(both.batches("train"), [4, 1, 7])
    out = both.distiller(batch, token_counts(batch, both.recipe).float())
    assert {"logit/mine", "logit/other"} <= set(out.terms) and bool(out.loss.isfinite())
    assert (batch.segments_BT == ANSWER).any()


def test_a_teacher_of_another_tokenizer_brings_held_out_nll_down(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 problems, which cross-entropy alone learns by heart; the teacher saw 6,000 in tokens of its own."""
    folder, made = study
    nll = {}
    for arm in ("ce", "spans"):
        path = write_recipe(folder, **made)
        assert invoke(monkeypatch, "train", path, "--arm", arm, "--seed", SEED).code == 0
        log = rows_of(folder / f"run/arms/{arm}/seed-{SEED}/log.jsonl")
        nll[arm] = [row["val"]["nll"] for row in log if "val" in row][-1]
    assert nll["spans"] < 0.93 * nll["ce"], nll


@pytest.mark.parametrize(
    ("arm", "parts"),
    [
        ({"loss": {**KD, "logit_match": "same"}}, ["arms.bad with teacher 'other'", "logit_match: same", "auto"]),
        ({"loss": {**KD, "kv_weight": 1.0}, "control": "placebo"}, ["control: placebo", "logit_weight: 0"]),
    ],
)
def test_what_has_no_common_positions_is_refused(tmp_path: Path, monkeypatch: Any, arm: Any, parts: list[str]) -> None:
    byte_level_tokenizer(tmp_path / "bytes")
    path = write_recipe(tmp_path, **{**changes(tmp_path), "arms": {"bad": {"teachers": ["other"], **arm}}})
    assert_one_message(invoke(monkeypatch, "run", path, work=no_training), *parts)
