"""The LM head runs where its logits are looked at, and batches of measurements are as large as there is room for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_recipe import ARMS, SEED, base_run, copy_base, rows_of, tiny_recipe

from kvdistill.arms import student as student_module
from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import token_counts
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.student import CausalStudent
from kvdistill.core.files import read_json
from kvdistill.models.generate import segment_nll
from kvdistill.stages.evaluate import evaluate
from kvdistill.stages.train import match_on_held_out, train_student
from kvdistill.stages.train.curves import LearningCurve

NUMBERS = [3, 1, 7, 4, 6]


def arm_of(name: str, run: Path | None = None, **changes: Any) -> Arm:
    run = run or base_run()
    return Experiment(tiny_recipe(run, arms=ARMS, **changes), run).arm(name, SEED)


@contextmanager
def rows_at_the_head(model: Any) -> Iterator[list[int]]:
    """How many positions the LM head was given, call by call."""
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, args, out: seen.append(args[0].numel() // args[0].shape[-1])
    )
    try:
        yield seen
    finally:
        hook.remove()


def test_the_head_scores_counted_tokens_alone_and_each_part_by_itself() -> None:
    model = tiny_model("gemma2", attention="eager").eval()  # soft caps its logits
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 37, (length,), generator=generator).tolist() for length in (9, 5, 12, 7)]
    counted = [[0] * 4 + [1, 1, 2, 0, 2], [0] * 5, [2] * 12, [0, 0, 0, 0, 1, 1, 0]]
    with rows_at_the_head(model) as seen:
        found = segment_nll(model, rows, counted, pad_id=0, batch_size=3, num_parts=2)
    assert sum(seen) == 4 + 0 + 11 + 2, "the first token of a row is predicted by nothing"
    for row, parts, [first, second] in zip(rows, counted, found, strict=True):
        logprob = model(torch.tensor([row])).logits[0].detach().float().log_softmax(-1)
        for part, mean in ((1, first), (2, second)):
            nll = [-float(logprob[t - 1, row[t]]) for t in range(1, len(row)) if parts[t] == part]
            assert math.isnan(mean) if not nll else mean == pytest.approx(sum(nll) / len(nll), abs=1e-6)


def test_no_measurement_runs_the_head_on_a_prompt_and_none_runs_it_for_keys_and_values_alone() -> None:
    arm = arm_of("fixed")
    model, batches = arm.distiller.student.model, arm.batches("val")
    batch = arm.load(batches, NUMBERS)
    counts = token_counts(batch, arm.recipe).float()
    with torch.no_grad(), rows_at_the_head(model) as seen:
        arm.distiller(batch, counts, kv_weight=1.0)
        arm.distiller.cross_entropy_only(batch, counts)
    assert seen == [int(counts[0])] * 2 and seen[0] < batch.input_ids_BT.numel()
    with rows_at_the_head(model) as seen:
        arm.student_kv(arm.distiller.student, batch)
        match_on_held_out(arm, arm.distiller)
    assert seen == []


def test_layers_above_the_highest_that_is_looked_at_do_not_run_either() -> None:
    student = CausalStudent(tiny_model("gemma2", attention="eager"))
    ran: list[int] = []
    hook = student.model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    ids = torch.arange(3, 18).view(3, 5)
    whole = student(ids, torch.ones_like(ids), layers=[1], head=False)
    assert ran == [1] and whole.logits is None and whole.kv is not None, "with a graph all of it runs"
    with torch.no_grad():
        part = student(ids, torch.ones_like(ids), layers=[1], head=False)
    hook.remove()
    assert ran == [1] and part.kv is not None and torch.equal(part.kv.keys[0], whole.kv.keys[0])


@pytest.mark.parametrize("name", ["fixed", "logit", "ce"])
def test_a_large_head_trains_on_predicting_positions_to_the_same_loss_and_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for limit in (1 << 25, 0):
        monkeypatch.setattr(student_module, "WHOLE_HEAD_LOGITS", limit)
        arm = arm_of(name)
        batch = arm.load(arm.batches("train"), NUMBERS)
        counts = token_counts(batch, arm.recipe).float()
        with rows_at_the_head(arm.distiller.student.model) as seen:
            out = arm.distiller.train()(batch, counts, kv_weight=5.0)
        assert seen == [batch.input_ids_BT.numel() if limit else int(counts[0])]
        out.loss.backward()
        grads = {n: p.grad for n, p in arm.distiller.named_parameters() if p.grad is not None}
        found[limit] = out.loss.detach(), grads
    (loss, grads), (few_loss, few_grads) = found.values()
    assert torch.allclose(loss, few_loss, rtol=1e-6, atol=0)
    assert grads.keys() == few_grads.keys()
    for key, grad in grads.items():
        assert torch.allclose(grad, few_grads[key], rtol=1e-5, atol=1e-7), key


def test_measurements_in_little_room_are_the_same_figures_in_more_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {}
    for room in (1 << 28, 40_000):
        monkeypatch.setattr("kvdistill.arms.arm.elements_at_once", lambda _, room=room: room)
        arm = arm_of("fixed")
        chosen = list(range(len(arm.batches("val").examples)))
        sizes = [len(one) for one in arm.measured_in(arm.batches("val").examples, chosen, head=True, kv=True)]
        assert sum(sizes) == len(chosen) > 4 and (len(sizes) == 1 if room == 1 << 28 else max(sizes) < 5)
        log = tmp_path / f"{room}.jsonl"
        LearningCurve(arm, log).point(arm.experiment.recipe.train.steps, arm.distiller)
        figures[room] = rows_of(log)[0]["val"], match_on_held_out(arm, arm.distiller)
    (val, match), (small_val, small_match) = figures.values()
    assert val["ce"] == pytest.approx(small_val["ce"], rel=1e-6)
    assert val["kv_loss"] == pytest.approx(small_val["kv_loss"], rel=1e-6)
    assert match["one"]["k"]["r2"] == pytest.approx(small_match["one"]["k"]["r2"], rel=1e-6)


def test_records_hold_the_nll_of_the_answer_and_of_the_reasoning_apart(tmp_path: Path) -> None:
    run = copy_base(tmp_path)
    arm = arm_of("ce", run, train={"steps": 2})
    train_student(arm)
    evaluate(arm)
    rows = rows_of(arm.folder / "records.jsonl")
    assert all(0 < row["nll"] < 10 and 0 < row["nll_reasoning"] < 10 for row in rows)
    examples = {(e.task, e.id, e.style): e for e in arm.experiment.split("test")}
    model = arm.distiller.student.model.eval()
    for row in rows[:3]:
        example = examples[row["task"], row["id"], row["style"]]
        ids = torch.tensor([list(example.input_ids)])
        logprob = model(ids).logits[0].float().log_softmax(-1)
        for code, key in ((2, "nll_reasoning"), (3, "nll")):
            places = [t for t, segment in enumerate(example.segments) if segment == code]
            nll = [-float(logprob[t - 1, ids[0, t]].detach()) for t in places]
            assert row[key] == pytest.approx(sum(nll) / len(nll), abs=1e-5)
    assert read_json(arm.folder / "evaluated.json")
