"""Experiment, arm, batch and student: whatever the stages ask of an arm, asked of it directly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from tiny_recipe import ARMS, SEED, base_run, copy_base, rows_of, tiny_recipe
from torch import Tensor, nn

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import Batch, token_counts
from kvdistill.arms.controls import Change, Moments
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.questions import Questions
from kvdistill.arms.student import CausalStudent, Student, load_saved
from kvdistill.core.files import read_json
from kvdistill.core.targets import TeacherTargets
from kvdistill.losses import TextChunks
from kvdistill.stages.train import train_student

NUMBERS = [3, 1, 7]


def arm_of(name: str, run: Path | None = None, **changes: Any) -> Arm:
    run = run or base_run()
    return Experiment(tiny_recipe(run, arms=ARMS, **changes), run).arm(name, SEED)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in it, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for one in fields(value):
            yield from tensors_in(getattr(value, one.name))


# -- targets from the store, and of teachers that run --------------------------------------------------


@pytest.mark.parametrize("name", ["fixed", "competence", "placebo", "logit", "crop"])
def test_targets_are_the_same_from_the_store_and_of_teachers_that_run(name: str) -> None:
    stored, online = arm_of(name), arm_of(name, capture={"source": "online"})
    read, to_run = stored.batches("train")(NUMBERS), online.batches("train")(NUMBERS)
    assert read.targets.keys() == to_run.teacher_inputs.keys() == {"one", "two"}
    assert not read.teacher_inputs and not to_run.targets
    assert stored.run_teachers(read) is read, "there is nothing left to run"
    one, other = stored.load(stored.batches("train"), NUMBERS), online.load(online.batches("train"), NUMBERS)
    assert one.targets.keys() == other.targets.keys() and not other.teacher_inputs
    for teacher, target in one.targets.items():
        ran = other.targets[teacher]
        assert torch.equal(target.segments_BS, ran.segments_BS)
        assert (target.kv is None) == (ran.kv is None) == (not stored.recipe.needs_kv)
        real_BS = target.segments_BS > 0
        if target.kv is not None and ran.kv is not None:
            assert target.kv.layers == ran.kv.layers
            for side in ("keys", "values"):
                for x, y in zip(getattr(target.kv, side), getattr(ran.kv, side), strict=True):
                    x, y = (part.transpose(1, 2)[real_BS].float() for part in (x, y))
                    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
        if stored.recipe.needs_nll:
            torch.testing.assert_close(target.nll_B, ran.nll_B, atol=1e-5, rtol=1e-4)
        if stored.recipe.needs_logits:
            logprobs = (x.topk_logprob_BSK[real_BS].float() for x in (target, ran))
            torch.testing.assert_close(*logprobs, atol=1e-3, rtol=1e-2)
    for part in ("input_ids_BT", "segments_BT", "tasks", "maps", "kv_masks"):
        sides = [list(tensors_in(getattr(batch, part))) for batch in (one, other)]
        assert all(torch.equal(x, y) for x, y in zip(*sides, strict=True)), part


def test_held_out_targets_are_stored_even_where_teachers_run_and_one_may_ask_for_none() -> None:
    arm = arm_of("fixed", capture={"source": "online"})
    held_out = arm.batches("val")(NUMBERS)
    assert held_out.targets.keys() == {"one", "two"} and not held_out.teacher_inputs
    asked = arm_of("fixed").batches("train", stored=False)(NUMBERS)
    assert asked.teacher_inputs.keys() == {"one", "two"} and not asked.targets
    plain = arm_of("ce")
    batch = plain.load(plain.batches("train"), NUMBERS)
    assert not (batch.targets or batch.teacher_inputs or batch.kv_masks)


def test_an_arm_alone_has_one_teacher_and_its_own_texts() -> None:
    arm = arm_of("placebo")
    alone = arm.alone("two")
    assert list(alone.teachers) == alone.recipe.teachers == list(alone.pairings) == ["two"]
    assert arm.recipe.control == "placebo" and alone.recipe.control is None
    assert arm.recipe.teachers == ["one", "two"], "the arm itself is as it was"
    assert alone.experiment is arm.experiment and alone.seed == arm.seed
    own, mismatched = (one.batches("train")(NUMBERS).targets["two"] for one in (alone, arm))
    matched = arm.batches("train", mismatched=False)(NUMBERS).targets["two"]
    assert torch.equal(own.segments_BS, matched.segments_BS) and own.kv is not None and matched.kv is not None
    assert torch.equal(own.kv.keys[0], matched.kv.keys[0])
    assert mismatched.kv is not None and not torch.equal(own.kv.keys[0], mismatched.kv.keys[0])


# -- a batch ------------------------------------------------------------------------------------------


def test_all_parts_of_a_batch_move() -> None:
    stored, asked = arm_of("crop").batches("train"), arm_of("crop").batches("train", stored=False)
    batch = replace(
        stored(NUMBERS),
        teacher_inputs=asked(NUMBERS).teacher_inputs,
        nll_scale={"one": torch.ones(3)},
        token_weights={"two": torch.ones(2, *stored(NUMBERS).segments_BT.shape)},
        changes={"one": Change(torch.zeros(3, 2).long(), moments=Moments(torch.zeros(1), torch.ones(1)))},
        chunks={
            "two": TextChunks(*(torch.ones(shape).long() for shape in ((5,), (5, 2), (5, 2), (3, 7), (4, 2), (6,))))
        },
        questions=Questions.of_ids([[3, 4], [5], [6, 7, 8]], [[1], [2, 1], [1]], 0),
    )
    for part in fields(Batch):
        value = getattr(batch, part.name)
        assert len(value) > 0 if hasattr(value, "__len__") else value is not None, (
            f"the test says nothing about {part.name}"
        )
    moved = batch.to("meta")
    before, after = list(tensors_in(batch)), list(tensors_in(moved))
    assert len(after) == len(before) > 30 and {x.device.type for x in before} == {"cpu"}
    assert {x.device.type for x in after} == {"meta"}
    assert [x.shape for x in after] == [x.shape for x in before] and moved.tasks == batch.tasks


def test_nll_is_scaled_once() -> None:
    ids_BT = torch.ones(2, 3, dtype=torch.long)
    batch = Batch(
        ids_BT,
        ids_BT,
        ["chain", "chain"],
        teacher_inputs={name: (ids_BT, ids_BT) for name in ("one", "two", "encoder")},
        nll_scale={"one": torch.tensor([2.0, 0.5]), "encoder": torch.ones(2)},
    )
    given = {name: TeacherTargets(ids_BT, nll_B=torch.tensor([1.0, 3.0])) for name in ("one", "two")}
    found = batch.with_targets(given | {"encoder": TeacherTargets(ids_BT)})
    assert found.targets["one"].nll_B is not None and found.targets["one"].nll_B.tolist() == [2.0, 1.5]
    assert found.targets["two"].nll_B is not None and found.targets["two"].nll_B.tolist() == [1.0, 3.0], "no scale"
    assert found.targets["encoder"].nll_B is None
    assert given["one"].nll_B is not None and given["one"].nll_B.tolist() == [1.0, 3.0], "theirs is as it was"
    assert not found.teacher_inputs and batch.teacher_inputs
    again = arm_of("competence").run_teachers(found)
    assert again is found, "what has its targets is not scaled a second time"


def test_ids_and_segments_of_different_shapes_are_refused() -> None:
    ids_BT = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeCheckError, match="segments_BT"):
        Batch(ids_BT, torch.ones(2, 4, dtype=torch.long), ["chain", "chain"])
    with pytest.raises(TypeCheckError, match="kv_masks"):
        Batch(ids_BT, ids_BT, ["chain", "chain"], kv_masks={"one": torch.ones(5, 3, dtype=torch.bool)})
    with pytest.raises(AssertionError, match="kv_masks"):
        Batch(ids_BT, ids_BT, ["chain", "chain"], kv_masks={"one": torch.ones(2, 4, dtype=torch.bool)})


# -- another kind of student --------------------------------------------------------------------------


class Counting(nn.Module):
    """Another kind of student: no CausalStudent, though it asks one. It counts what is asked of it."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inside = CausalStudent(model, **options)
        self.asked: dict[str, int] = {}

    @property
    def model(self) -> nn.Module:
        return self.inside.model

    def _ask(self, what: str, *args: Any, **options: Any) -> Any:
        self.asked[what] = self.asked.get(what, 0) + 1
        return getattr(self.inside, what)(*args, **options)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self._ask("forward", *args, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        return self._ask("generate", *args, **options)

    def score(self, *args: Any, **options: Any) -> Any:
        return self._ask("score", *args, **options)

    def save(self, *args: Any) -> None:
        self._ask("save", *args)

    def flops(self, *args: Any) -> Any:
        return self._ask("flops", *args)


def test_another_kind_of_student_learns_generates_and_scores() -> None:
    arm, plain = arm_of("fixed"), arm_of("fixed").distiller
    student = Counting(arm.initial_model)
    assert isinstance(student, Student) and not isinstance(student, CausalStudent)
    aligners = {name: plain.aligner(name) for name in plain.teachers}
    distiller = Distiller(student, arm.recipe, aligners, plain.fusion, plain.student_layers, arm.frames)
    batch = arm.load(arm.batches("train"), NUMBERS)
    counts = token_counts(batch, arm.recipe).float()
    out, expected = distiller(batch, counts, kv_weight=5.0), plain(batch, counts, kv_weight=5.0)
    assert out.terms.keys() == {"ce", "kv/one/k", "kv/one/v", "kv/two/k", "kv/two/v"}
    assert torch.equal(out.loss, expected.loss)
    before = [p.detach().clone() for p in student.parameters()]
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    out.loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in student.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))
    assert distiller(batch, counts, kv_weight=5.0).loss < out.loss
    assert arm.student_kv(student, batch).layers == tuple(plain.student_layers)

    rows = arm.experiment.split("test")[:4]
    tokenizer = arm.experiment.tokenizer
    prompts = [[t for t, code in zip(e.input_ids, e.segments, strict=True) if code == 1] for e in rows]
    answers = student.generate(prompts, tokenizer, max_new_tokens=3, batch_size=2)
    assert len(answers) == 4
    counted = [[code > 1 for code in e.segments] for e in rows]
    ids = [list(e.input_ids) for e in rows]
    scores = student.score(ids, counted, pad_id=tokenizer.pad_token_id, batch_size=2)
    assert len(scores) == 4 and all(0 < nll < 10 for [nll] in scores)


def test_training_takes_another_kind_of_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"train": {"steps": 1}}
    run, plain_run = copy_base(tmp_path / "another"), copy_base(tmp_path / "plain")
    plain = arm_of("fixed", plain_run, **changes)
    train_student(plain)
    monkeypatch.setattr("kvdistill.arms.arm.CausalStudent", Counting)
    arm = arm_of("fixed", run, **changes)
    train_student(arm)
    student = arm.distiller.student
    assert isinstance(student, Counting)
    assert {"forward", "generate", "save", "flops"} <= student.asked.keys()
    terms = [[row["terms"] for row in rows_of(one.folder / "log.jsonl") if "terms" in row] for one in (plain, arm)]
    assert terms[0] == terms[1] and "kv/two/v" in terms[0][0]
    assert read_json(arm.folder / "match.json") == read_json(plain.folder / "match.json")
    saved, _ = load_saved(arm.folder / "model", torch.float32)
    of_plain, _ = load_saved(plain.folder / "model", torch.float32)
    pairs = zip(saved.parameters(), of_plain.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
