"""What the evaluate stage measures of students that think in latents: causal checks, read-out, what an answer takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_recipe import SEED, made_ready, tiny_recipe
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from kvdistill.arms.experiment import Experiment
from kvdistill.arms.latent_student import LatentStudent
from kvdistill.arms.student import CausalStudent
from kvdistill.core.errors import ModelError
from kvdistill.core.layout import LATENTS, evaluated_mark
from kvdistill.core.marks import read_mark
from kvdistill.core.recipe import LatentRecipe
from kvdistill.core.records import read_records
from kvdistill.models.structure import auto_class
from kvdistill.stages.evaluate.latents import CHANGES, answer_alone, changes_of, even, seconds_alone
from kvdistill.stages.evaluate.stage import evaluate

SIZES = {"vocab_size": 23, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=20, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=20, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=23, n_embd=24, n_head=4, n_layer=3),
}
PROMPTS = [[5, 3, 8], [4, 9, 11, 2, 7], [6, 12, 3, 3, 3, 19, 1], [17, 2, 15, 14]]
M, T = 5, 2


class Tokens:
    """Words are numbers; nothing ends an answer."""

    eos_token_id, pad_token_id = 22, 0

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def make_student(family: str = "llama") -> LatentStudent:
    torch.manual_seed(3)
    backbone = auto_class(CONFIGS[family]).from_config(CONFIGS[family])
    for parameter in backbone.parameters():  # far enough from zero that latents matter to the answer
        parameter.data.mul_(4.0)
    return LatentStudent.around(backbone, LatentRecipe(tokens=M, passes=T), seed=4).eval()


def answers(student: LatentStudent, prompts: Sequence[Sequence[int]], change: Any = None) -> list[list[int]]:
    found = student.generate(prompts, Tokens(), max_new_tokens=6, batch_size=len(prompts), change=change)
    return [one.ids for one in found]


# -- changing latents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_latents_that_are_changed_to_themselves_give_the_same_answer(family: str) -> None:
    student = make_student(family)
    assert answers(student, PROMPTS, lambda x: x) == answers(student, PROMPTS)


@pytest.mark.parametrize("family", CONFIGS)
def test_another_questions_latents_are_the_other_ones_at_this_ones_places(family: str) -> None:
    """Reference: the slots of the other question, which has another length, taken from a run of it alone."""
    student = make_student(family)
    one, other = PROMPTS[0], PROMPTS[2]
    kept: list[list[Tensor]] = []
    for prompt in (one, other):
        seen: list[Tensor] = []
        answers(student, [prompt], lambda x, seen=seen: seen.append(x) or x)
        kept.append(seen)
    exchanged = answers(student, [one, other], lambda x: x.flip(0))
    alone = []
    for prompt, taken in ((one, kept[1]), (other, kept[0])):
        values = iter(taken)
        alone += answers(student, [prompt], lambda x, values=values: next(values))
    assert exchanged == alone
    assert exchanged != answers(student, [one, other])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_keys_are_changed_without_the_rotation_of_their_places(family: str) -> None:
    """Pause tokens enter the first layer alike, so its keys are the same in every slot after every question."""
    student = make_student(family)
    student.thinker.config.num_passes = 0
    seen: list[Tensor] = []
    answers(student, PROMPTS, lambda x: seen.append(x) or x)
    first_BHMD = seen[0]
    torch.testing.assert_close(first_BHMD, first_BHMD[:1, :, :1].expand_as(first_BHMD), rtol=1e-4, atol=1e-5)


def test_zeroed_latents_leave_prompt_and_marks_as_they_are() -> None:
    student, ids = make_student(), torch.tensor([PROMPTS[1]])
    thoughts = student.thinker.think(ids, torch.ones_like(ids))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in thoughts.cache.layers]  # type: ignore[union-attr]
    touched: list[Any] = []
    generate = type(student.thinker).generate

    def spy(self: Any, *args: Any, change: Any, **options: Any) -> Tensor:
        def noted(thoughts: Any) -> Any:
            changed = change(thoughts)
            touched.append([(layer.keys, layer.values) for layer in changed.cache.layers])
            return changed

        return generate(self, *args, change=noted, **options)

    student.thinker.generate = spy.__get__(student.thinker)  # type: ignore[method-assign]
    student.generate([PROMPTS[1]], Tokens(), max_new_tokens=2, batch_size=1, change=torch.zeros_like)
    [layers] = touched
    for (keys, values), (old_keys, old_values) in zip(layers, before, strict=True):
        for new, old in ((keys, old_keys), (values, old_values)):
            assert new.shape == old.shape and not new[:, :, -M:].any() and old[:, :, -M:].any()
            torch.testing.assert_close(new[:, :, :-M], old[:, :, :-M])


@given(size=st.integers(2, 40), seed=st.integers(0, 2**31 - 1))
def test_nobody_keeps_their_own_latents_and_everybody_gives_them_once(size: int, seed: int) -> None:
    rows = torch.arange(size)
    shuffled = changes_of(seed)["shuffle"](rows)
    assert sorted(shuffled.tolist()) == rows.tolist() and not (shuffled == rows).any()
    assert torch.equal(shuffled, changes_of(seed)["shuffle"](rows))  # keys and values of all layers go together


def test_the_mean_is_over_the_batch_slot_by_slot() -> None:
    x_BHMD = torch.randn(3, 2, 5, 4)
    mean = changes_of(0)["mean"](x_BHMD)
    torch.testing.assert_close(mean, torch.stack([sum(x_BHMD) / 3] * 3))  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["mean", "shuffle"])
def test_one_question_alone_cannot_be_mixed(kind: str) -> None:
    with pytest.raises(ModelError, match="two questions at once"):
        changes_of(0)[kind](torch.zeros(1, 2))


@given(count=st.integers(2, 60), batch_size=st.integers(1, 20))
def test_batches_hold_two_questions_at_least_and_all_of_them_once(count: int, batch_size: int) -> None:
    class Row:
        def __init__(self, number: int) -> None:
            self.number, self.num_prompt_tokens = number, number * 7 % 5

    batches = even([Row(n) for n in range(count)], batch_size)  # type: ignore[arg-type]
    assert min(map(len, batches)) >= 2 and max(map(len, batches)) <= max(3, batch_size)
    assert sorted(row.number for batch in batches for row in batch) == list(range(count))  # type: ignore[attr-defined]


# -- by the clock ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_the_loop_that_is_timed_gives_the_answers_that_are_recorded(family: str) -> None:
    latent = make_student(family)
    for student, before in ((latent, T + 1), (latent.writer, 0)):
        written = student.generate(PROMPTS, Tokens(), max_new_tokens=6, batch_size=1)
        for prompt, answer in zip(PROMPTS, written, strict=True):
            alone = answer_alone(student, prompt, Tokens.eos_token_id, 6)
            assert [token for token in alone if token != Tokens.eos_token_id] == answer.ids
            assert before + len(alone) == answer.forward_passes


def test_no_arm_is_timed_through_another_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student()
    asked: Any = [SimpleNamespace(prompt_ids=prompt) for prompt in PROMPTS]
    for kind in (LatentStudent, CausalStudent):
        monkeypatch.setattr(kind, "generate", None)
    for one in (student, student.writer):
        assert (seconds_alone(one, Tokens(), asked, 4) or 0) > 0


# -- reading latents ------------------------------------------------------------------------------------


def test_what_is_read_out_is_what_the_head_says_of_each_slot_after_each_pass() -> None:
    student, thinker = make_student(), make_student().thinker
    found = student.read_out(PROMPTS[1], [0, 2], 3)
    ids = torch.tensor([PROMPTS[1]])
    for number, slots in zip((0, 2), found, strict=True):
        hidden = thinker.think(ids, torch.ones_like(ids), num_passes=number).hidden_BMH
        shares_MV = thinker.get_output_embeddings()(hidden)[0].softmax(-1).detach()
        assert len(slots) == M
        for slot, shares_V in zip(slots, shares_MV, strict=True):
            assert len(slot) == 3 and [share for _, share in slot] == sorted((s for _, s in slot), reverse=True)
            assert slot[0][0] == int(shares_V.argmax()) and slot[0][1] == pytest.approx(float(shares_V.max()))
    assert found[0] != found[1]


# -- in a study -----------------------------------------------------------------------------------------

ARMS: dict[str, Any] = {"ce": {"teachers": []}, "twin": {"teachers": [], "reasoning": "latent"}}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """Both arms saved as they begin: what they answer is of no matter here."""
    run = tmp_path_factory.mktemp("study") / "run"
    recipe = tiny_recipe(run, arms=ARMS, teachers=[], loss={"kv_weight": 0}, latent={"tokens": M, "passes": T})
    made_ready(recipe, run, "train")
    experiment = Experiment(recipe, run)
    for name in ARMS:
        evaluate(experiment.arm(name, SEED))
    return experiment, run


def measured(experiment: Experiment, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((experiment.arm(arm, SEED).folder / LATENTS).read_text())
    return found


def test_every_student_says_what_an_answer_takes_and_the_mark_vouches_for_it(study: Any) -> None:
    experiment, _ = study
    for name in ARMS:
        arm, found = experiment.arm(name, SEED), measured(experiment, name)
        mark = read_mark(evaluated_mark(arm.folder))
        assert mark is not None and LATENTS in mark["files"]
        own, cost = read_records(arm.folder / "records.jsonl"), found["cost"]
        beside = 2 + M - (T + 1) if name == "twin" else 0
        places = [one.tokens_in + beside + one.forward_passes - 1 for one in own]
        assert cost["cache_places"] == pytest.approx(sum(places) / len(own)) and cost["questions"] == len(own) == 32
        assert cost["cache_bytes"] == pytest.approx(cost["cache_places"] * 2 * 2 * 16 * 4)  # 2 layers, 16 channels
        assert cost["forward_passes"] == sum(one.forward_passes for one in own) / len(own)
        assert cost["seconds_alone"] > 0 and cost["seconds"] > 0 and cost["timed"] == 5
    assert set(measured(experiment, "ce")) == {"schema", "cost"}


def test_the_cache_of_an_answer_is_as_long_as_the_closed_form_says() -> None:
    thinker = make_student().thinker
    ids = torch.tensor([PROMPTS[1]])
    kept: list[Any] = []
    thinker.generate(ids, max_new_tokens=6, change=lambda thoughts: kept.append(thoughts) or thoughts)
    passes = thinker.num_passes_before_answer + 6
    assert kept[0].cache.get_seq_length() == len(PROMPTS[1]) + 2 + M + (passes - T - 1) - 1


def test_causal_checks_are_paired_by_question_and_change_no_record(study: Any) -> None:
    experiment, _ = study
    arm, found = experiment.arm("twin", SEED), measured(experiment, "twin")
    questions, correct = found["causal"]["questions"], found["causal"]["correct"]
    assert [*correct] == ["none", *CHANGES] and {len(rows) for rows in correct.values()} == {8} == {len(questions)}
    records = {one.question: one for one in read_records(arm.folder / "records.jsonl")}
    assert {*map(tuple, questions)} <= {*records}
    assert correct["none"] == [records[tuple(one)].correct for one in questions]
    assert found["latents"] == M and found["passes"] == T


def test_the_first_question_of_each_task_is_read_out(study: Any) -> None:
    experiment, _ = study
    found, records = (
        measured(experiment, "twin")["readout"],
        read_records(experiment.arm("twin", SEED).folder / "records.jsonl"),
    )
    first = {one.task: one for one in sorted(records, key=lambda one: one.question, reverse=True)}
    assert {one["question"][0]: tuple(one["question"]) for one in found} == {t: r.question for t, r in first.items()}
    for one in found:
        assert one["passes"] == [0, 1, 2] and one["completion"] == first[one["question"][0]].completion
        assert [len(slots) for slots in one["tokens"]] == [M] * 3
        assert all(
            isinstance(text, str) and 0 < share < 1 for slots in one["tokens"] for s in slots for text, share in s
        )


def test_a_study_without_latent_arms_measures_none_of_this(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tiny_recipe(run, arms={"ce": {"teachers": []}}, teachers=[], loss={"kv_weight": 0})
    made_ready(recipe, run, "train")
    arm = Experiment(recipe, run).arm("ce", SEED)
    evaluate(arm)
    assert not (arm.folder / LATENTS).exists()
    mark = read_mark(evaluated_mark(arm.folder))
    assert mark is not None and [*mark["files"]] == ["records.jsonl"]
