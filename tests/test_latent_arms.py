"""Arms whose student thinks in latents: their loss against loops, training, saving, answering, costs, mistakes."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_alignment_arms import byte_level_tokenizer, study_changes, write_traces
from test_resume import Stopped, assert_same_end, stop_at
from tiny_recipe import (
    SEED,
    TREE,
    assert_one_message,
    environment,
    invoke,
    made_ready,
    no_training,
    no_work,
    rows_of,
    tiny_recipe,
    write_recipe,
)
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import BatchMaker, token_counts
from kvdistill.arms.costs import run_flops
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.latent_student import LatentStudent, student_of, thinking_cost
from kvdistill.arms.questions import Questions
from kvdistill.arms.shares import gradient_shares
from kvdistill.arms.student import load_saved
from kvdistill.compress import kept_by_layer, rkv_layer_scores
from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import continued
from kvdistill.core.errors import ModelError
from kvdistill.core.kv import KV
from kvdistill.core.recipe import ModelRecipe
from kvdistill.core.records import read_records
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.core.targets import IMPORTANCE, REDUNDANCY
from kvdistill.data.encode import Example
from kvdistill.data.tokenizers import character_tokenizer
from kvdistill.models.latent import LatentForCausalLM
from kvdistill.models.load import model_config
from kvdistill.stages.evaluate import evaluate
from kvdistill.stages.evaluate.lm import MeteredLM
from kvdistill.stages.train import train_student
from kvdistill.store.packed import TargetReader

M, T = 4, 2
MARK = ","
LATENT: dict[str, Any] = {"teachers": [], "reasoning": "latent"}
ITSELF: dict[str, Any] = {**LATENT, "latent": {"self_weight": 1.5}}
ARMS: dict[str, dict[str, Any]] = {
    "direct": {"teachers": [], "reasoning": "none"},
    "twin": LATENT,
    "own": ITSELF,
    "own-values-only": {**ITSELF, "loss": {"k_weight": 0.0, "v_weight": 0.7, "distill_layers": "1"}},
    "own-rkv": {**ITSELF, "compress": {"kv_compression": "r-kv", "keep": 3}},
    "both": {"reasoning": "latent", "fuse": {"weights": [0.7, 0.3]}},
    "rkv": {"reasoning": "latent", "compress": {"kv_compression": "r-kv", "keep": 2}},
    "competence": {"reasoning": "latent", "fuse": {"fusion_strategy": "competence"}, "latent": {"self_weight": 0.5}},
    "similarity": {"reasoning": "latent", "fuse": {"fusion_strategy": "similarity"}},
}
STUDY: dict[str, Any] = {
    "arms": ARMS,
    "data": {
        "max_length": 60,
        "tasks": [
            {"name": "affine", "train": 24, "val": 8, "test": 8},
            {"name": "product", "train": 24, "val": 8, "test": 8},
        ],
    },
    "teachers": [{**TREE["teachers"][0], "train_on": ["affine"]}, TREE["teachers"][1]],
    "student": {"attention": "eager"},  # the CPU's fused attention is not in the FLOP counter's list
    "compress": {"kv_compression": "steps", "step_mark": MARK},
    "latent": {"tokens": M, "passes": T, "start_after": 2, "projection_size": 11},
    "train": {"learning_rate": 0.01},
}
NUMBERS = [1, 30, 3, 41, 17]  # affine and product: four steps, and two
NEAR: dict[str, float] = {"atol": 1e-6, "rtol": 1e-4}


def study(run: Path, **changes: Any) -> Experiment:
    return Experiment(tiny_recipe(run, **{**STUDY, **changes}), run)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, teachers, targets and fits of all arms."""
    run = tmp_path_factory.mktemp("latent") / "run"
    made_ready(tiny_recipe(run, **STUDY), run)
    return run


def copied(base: Path, folder: Path, **changes: Any) -> Experiment:
    shutil.copytree(base, folder / "run")
    (folder / "run/recipe.json").unlink(missing_ok=True)
    return study(folder / "run", **changes)


def counts_of(arm: Arm, batch: Any) -> Tensor:
    return token_counts(batch, arm.recipe).float().clamp_min(1)


# -- the loss, by loops ---------------------------------------------------------------------------------------


def places(row: Example, code: int) -> list[int]:
    return [place for place, of in enumerate(row.segments) if of == code]


def ends_of_steps(row: Example, comma: int) -> list[int]:
    reasoning = places(row, REASONING)
    return [p for p in reasoning if p == reasoning[-1] or row.input_ids[p + 1] == comma]


def answers_nll(arm: Arm, rows: list[Example]) -> float:
    """Of all tokens of the answers behind latents, each row alone."""
    total, count = 0.0, 0
    for row in rows:
        answer = [row.input_ids[p] for p in places(row, ANSWER)]
        thinking = arm.distiller.student.think(Questions.of_ids([row.prompt_ids], [answer], 0))
        for logits, token in zip(thinking.logits_NV, answer, strict=True):
            total, count = total - float(logits.log_softmax(-1)[token]), count + 1
    return total / count


def written_nll(arm: Arm, rows: list[Example]) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = arm.distiller.student(ids, torch.ones_like(ids, dtype=torch.bool)).logits[0].log_softmax(-1)
        for place in places(row, REASONING) + places(row, ANSWER):
            total, count = total - float(logits[place - 1, row.input_ids[place]]), count + 1
    return total / count


def own_text(arm: Arm, row: Example, layers: list[int], keys: Any = "unrotated") -> KV:
    ids = torch.tensor([row.input_ids])
    return arm.distiller.student(ids, torch.ones_like(ids, dtype=torch.bool), layers=layers, queries=True, keys=keys).kv


def vectors(kv: KV, side: str, layer: int) -> Tensor:
    """Of one row, one layer: [T, C]."""
    [one] = getattr(kv, {"k": "keys", "v": "values"}[side])[layer]
    return torch.cat([*one], dim=-1)


@torch.no_grad()
def own_distance(arm: Arm, rows: list[Example], side: str, chosen: Callable[[Example, int], list[int]]) -> float:
    """Mean over layers of: squared difference of latent and the token it stands for, in units of the tokens' standard
    deviation, mean over channels, summed over filled slots and divided by their number over all rows (r-kv: a row's
    tokens or those kept, whichever are fewer)."""
    layers, found = arm.own_layers, []
    for number in range(len(layers)):
        latents, tokens = [], []
        for row in rows:
            kept = chosen(row, number)
            thinking = arm.distiller.student.think(Questions.of_ids([row.prompt_ids], [[1]], 0), layers)
            latents += [*vectors(thinking.kv, side, number)[: len(kept)]]
            tokens += [*vectors(own_text(arm, row, layers), side, number)[kept]]
        values = [float(x) for token in tokens for x in token]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
        parts = [float(((a - b) / deviation).square().mean()) for a, b in zip(latents, tokens, strict=True)]
        found.append(sum(parts) / len(parts))
    return sum(found) / len(found)


@pytest.mark.parametrize("name", ["twin", "own", "own-values-only", "own-rkv"])
def test_the_loss_of_latents_without_teachers_is_the_loop(base, name):
    arm = study(base).arm(name, SEED)
    batches = arm.batches("train")
    rows, comma = [batches.examples[i] for i in NUMBERS], arm.experiment.tokenizer.convert_tokens_to_ids(MARK)
    batch = arm.load(batches, NUMBERS)
    out = arm.distiller(batch, counts_of(arm, batch), kv_weight=0.0, self_weight=0.6)
    sides = {"k": 1.0, "v": 1.0} if name != "own-values-only" else {"v": 0.7}
    assert set(out.terms) == {"ce", "answer", *(f"kv/itself/{side}" for side in sides if name != "twin")}
    with torch.no_grad():
        assert float(out.terms["ce"][0]) == pytest.approx(written_nll(arm, rows), rel=1e-4)
        assert float(out.terms["answer"][0]) == pytest.approx(answers_nll(arm, rows), rel=1e-4)
    total = float(out.terms["ce"][0] + out.terms["answer"][0])

    def chosen(row: Example, layer: int) -> list[int]:
        if name != "own-rkv":
            return ends_of_steps(row, comma)[-M:]
        kv, segments = own_text(arm, row, arm.own_layers, "rotated"), torch.tensor([row.segments])
        scores = rkv_layer_scores(kv.queries, kv.keys, segments)
        return kept_by_layer(scores, 3, arm.recipe.compress.importance_share)[layer, 0].nonzero()[:, 0].tolist()

    for side, weight in sides.items() if name != "twin" else ():
        raw, entered, routed = out.terms[f"kv/itself/{side}"]
        assert float(raw) == pytest.approx(own_distance(arm, rows, side, chosen), rel=1e-4)
        assert entered == pytest.approx(0.6 * weight) and float(routed) == pytest.approx(entered * float(raw))
        total += float(routed)
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-5)
    out.loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in arm.distiller.student.thinker.projection.parameters())


def test_its_own_written_reasoning_is_a_target_and_not_pulled_towards_the_latents(base):
    """The gradient of the KV term reaches the backbone through the latents alone."""
    arm = study(base).arm("own", SEED)
    batch = arm.load(arm.batches("train"), NUMBERS)
    student = arm.distiller.student
    for p in student.parameters():
        p.requires_grad_(False)
    student.thinker.special.requires_grad_(True)
    out = arm.distiller(batch, counts_of(arm, batch), self_weight=1.0)
    out.parts["kv/itself/k"].backward()
    by_hand = student.thinker.special.grad.clone()
    student.thinker.special.grad = None
    thinking = student.think(batch.questions, arm.own_layers)
    with torch.no_grad():
        own = student(batch.input_ids_BT, batch.mask_BT, layers=arm.own_layers).kv
    total, index, live = 0.0, batch.maps["itself"].index[..., 0], batch.kv_masks["itself"]
    for mine, theirs in zip(thinking.kv.keys, own.keys, strict=True):
        pairs = [
            (mine[b, :, m].flatten(), theirs[b, :, int(index[b, m])].flatten())
            for b in range(len(NUMBERS))
            for m in range(M)
            if live[b, m]
        ]
        deviation = torch.stack([target for _, target in pairs]).std(correction=0)
        total = total + sum(((a - b) / deviation).square().mean() for a, b in pairs) / len(pairs) / len(own.keys)
    total.backward()
    torch.testing.assert_close(student.thinker.special.grad, by_hand, **NEAR)


@pytest.mark.parametrize("name", ["both", "competence", "similarity", "rkv"])
def test_the_loss_of_latents_to_teachers_is_the_loop(base, name):
    """Slot by slot: the token that it stands for, out of the teacher's stored text."""
    arm = study(base).arm(name, SEED)
    batches = arm.batches("train")
    comma = arm.experiment.tokenizer.convert_tokens_to_ids(MARK)
    rows, batch = [batches.examples[i] for i in NUMBERS], arm.load(batches, NUMBERS)
    out = arm.distiller(batch, counts_of(arm, batch), kv_weight=0.8)
    with torch.no_grad():
        thinking = arm.distiller.student.think(batch.questions, arm.distiller.student_layers)
    assert out.weights is not None
    for number, teacher in enumerate(arm.teachers):
        aligner, reader = arm.distiller.aligner(teacher), batches.readers[teacher]
        assert isinstance(reader, TargetReader)
        with torch.no_grad():
            sources = aligner.sources(thinking.kv)
        stored = reader.read(NUMBERS, kv=True, scores=name == "rkv")
        whole = aligner.targets(stored.kv)[0]
        for place, side in enumerate("kv"):
            raw, routed, count = [], [], []
            for layer, sources_BMC in enumerate(sources[place]):
                for b, row in enumerate(rows):
                    if name == "rkv":  # two of every reasoning, in each teacher layer others
                        [(read, share)] = batches.layers[teacher][layer]
                        scores = stored.scores_BSMRG[b, :, stored.kv.layers.index(read)].double().mean(-1)
                        both = 0.1 * scores[:, IMPORTANCE] + 0.9 * scores[:, REDUNDANCY]
                        kept = sorted(places(row, REASONING), key=lambda p: -float(both[p]))[:2]
                        assert share == 1 and sorted(kept) == batch.maps[teacher].index[layer, b, :2, 0].tolist()
                        kept = sorted(kept)
                    else:
                        kept = ends_of_steps(row, comma)[-M:]
                    weights = out.weights[number].expand(len(sources[place]), -1, -1)[layer, b]
                    for m, token in enumerate(kept):
                        mine = float((sources_BMC[b, m] - whole[place][layer, b, token]).square().mean())
                        raw.append(mine)
                        routed.append(mine * float(weights[0]))
                        count.append(1)
            found, weight, entered = out.terms[f"kv/{teacher}/{side}"]
            assert weight == pytest.approx(0.8)
            assert float(found) == pytest.approx(sum(raw) / len(count), rel=1e-4)
            assert float(entered) == pytest.approx(0.8 * sum(routed) / len(count), rel=1e-4)
    assert torch.allclose(out.weights.sum(0), torch.ones_like(out.weights[0]))


SELECTORS: dict[str, Callable[[list[int], int], list[int]]] = {
    "right": lambda tokens, keep: tokens[-keep:],
    "crop": lambda tokens, keep: tokens[:keep],
    "uniform": lambda tokens, keep: [tokens[round(i * (len(tokens) - 1) / max(1, keep - 1))] for i in range(keep)],
    "random": lambda tokens, keep: tokens,
}


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("selector", SELECTORS)
def test_slots_stand_for_the_tokens_that_the_selector_says_in_their_order(base, selector, keep):
    compress = {"kv_compression": selector, "keep": keep, "step_mark": None}
    arm = study(base, arms={"own": ITSELF}, compress=compress).arm("own", SEED)
    batches, num = arm.batches("train"), keep or M
    one, other = batches(NUMBERS), batches(NUMBERS[::-1])
    for b, number in enumerate(NUMBERS):
        filled = one.kv_masks["itself"][b].tolist()
        tokens = places(batches.examples[number], REASONING)
        assert filled == [True] * num + [False] * (M - num) and len(tokens) > M
        found = one.maps["itself"].index[b, :num, 0].tolist()
        wanted = SELECTORS[selector](tokens, num)
        assert found == wanted if selector != "random" else set(found) <= set(wanted) and found == sorted({*found})
        assert found == other.maps["itself"].index[-1 - b, :num, 0].tolist(), "whatever else is in the batch"
    assert float(token_counts(one, arm.recipe)[-1]) == num * len(NUMBERS)


def without_reasoning(row: Example) -> Example:
    kept = [place for place, code in enumerate(row.segments) if code != REASONING]
    ids, segments = ([values[p] for p in kept] for values in (row.input_ids, row.segments))
    return replace(row, input_ids=ids, segments=segments, reasoning="")


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("selector", ["right", "r-kv", "steps"])
def test_how_many_examples_lose_a_token_to_the_selector_is_counted(base, tokens, selector):
    experiment = study(base)
    recipe = arm_recipe(experiment.recipe, "own-rkv")
    compress = recipe.compress.model_copy(update={"kv_compression": selector, "keep": None})
    latent = recipe.latent.model_copy(update={"tokens": tokens})
    recipe = recipe.model_copy(update={"compress": compress, "latent": latent})
    batches = Arm(experiment, {}, recipe, SEED).batches("train")
    lengths = [len(places(experiment.split("train")[n], REASONING)) for n in NUMBERS]
    expected = 1.0 if selector == "steps" else sum(length > tokens for length in lengths) / len(lengths)
    assert batches.shares_that_drop(NUMBERS) == {"itself": expected}


@pytest.mark.parametrize("name", ["own", "own-rkv", "both", "competence", "similarity"])
def test_short_reasoning_leaves_slots_masked_and_empty_reasoning_all_of_them(base, name):
    """Teachers run then and there: what stands in the store is of other texts."""
    arm = study(base).arm(name, SEED)
    batches = arm.batches("train", stored=False)
    plain = [batches.examples[i] for i in NUMBERS]
    some: BatchMaker = replace(batches, examples=[plain[0], without_reasoning(plain[1]), plain[3]])
    none: BatchMaker = replace(batches, examples=[without_reasoning(row) for row in plain])
    out = {}
    for what, made, numbers in (("some", some, [0, 1, 2]), ("none", none, [0, 1, 2, 3, 4])):
        batch = arm.load(made, numbers)
        for which, mask in batch.kv_masks.items():
            filled = mask.sum(-1).tolist()
            assert filled == ([3, 0, 2] if what == "some" else [0] * 5), which
        out[what] = arm.distiller(batch, counts_of(arm, batch), kv_weight=1.0, self_weight=1.0)
        out[what].loss.backward()
        assert math.isfinite(float(out[what].loss.detach())) and all(
            bool(p.grad.isfinite().all()) for p in arm.distiller.parameters() if p.grad is not None
        )
    terms = [term for term in out["none"].terms if term.startswith("kv/")]
    assert terms and all(float(out["none"].terms[term][0]) == 0 for term in terms)
    assert all(float(out["some"].terms[term][0]) > 0 for term in terms)


# -- training -------------------------------------------------------------------------------------------------


@functools.cache
def trained(base: Path, name: str) -> Path:
    """The folder of one arm, trained and evaluated in a copy of the base."""
    arm = copied(base, base.parent / f"trained-{name}").arm(name, SEED)
    train_student(arm)
    evaluate(arm)
    return arm.folder


def test_before_latents_start_only_written_words_are_learned_and_weights_rise_from_there(tmp_path, base):
    changes = {"train": {"steps": 9, "learning_rate": 0.01}, "loss": {"kv_weight": 5.0, "kv_warmup": 4, "kv_fade": 2}}
    experiment = copied(base, tmp_path, **changes)
    arm = experiment.arm("competence", SEED)
    train_student(arm)
    rows = [row for row in rows_of(arm.folder / "log.jsonl") if "loss" in row]
    kv = {f"kv/{name}/{side}" for name in ("one", "two", "itself") for side in "kv"}
    assert [row["step"] for row in rows] == [*range(1, 10)]
    for row in rows:
        step, terms = row["step"] - 1 - 2, row["terms"]  # steps of latents that were done before
        if step < 0:
            assert set(terms) == {"ce"}
            continue
        assert set(terms) == {"ce", "answer", *kv} and terms["answer"]["weight"] == 1.0
        share = min(1.0, (step + 1) / 4, (7 - step) / 2)
        for name, weight in (("one", 5.0), ("two", 5.0), ("itself", 0.5)):
            for side in "kv":
                assert terms[f"kv/{name}/{side}"]["weight"] == pytest.approx(share * weight), (row["step"], name)


def test_the_row_in_which_latents_start_has_each_term_over_the_steps_that_have_it(tmp_path, base):
    logs = []
    for every in (1, 5):
        train = {"steps": 5, "learning_rate": 0.01, "log_every": every}
        arm = copied(base, tmp_path / str(every), train=train).arm("own", SEED)
        train_student(arm)
        logs.append([row for row in rows_of(arm.folder / "log.jsonl") if "loss" in row])
    (_, *steps), (_, window) = logs  # the first step is logged by itself
    assert [set(row["terms"]) == {"ce"} for row in steps] == [True, False, False, False]
    for name, term in window["terms"].items():
        own = [row["terms"][name] for row in steps if name in row["terms"]]
        for figure in ("raw", "weighted"):
            assert term[figure] == pytest.approx(sum(one[figure] for one in own) / len(own)), (name, figure)
    assert window["loss"] == pytest.approx(sum(row["loss"] for row in steps) / 4)


def test_all_arms_that_think_start_from_the_same_weights(base):
    """An arm and its twin without keys and values are pairs, seed by seed."""
    experiment = study(base)
    starts = [experiment.arm(name, SEED).distiller.student.state_dict() for name in ("twin", "own", "both")]
    for other in starts[1:]:
        assert starts[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in starts[0].items())


@pytest.mark.parametrize("name", ["direct", "twin"])
def test_before_they_start_latents_change_nothing_that_is_learned(tmp_path, base, name):
    """Until they start a student that thinks is one of plain fine-tuning, to the bit."""
    arms = {"ce": {"teachers": []}, "twin": {**LATENT, "latent": {"start_after": 2}}, "direct": ARMS["direct"]}
    experiment = copied(base, tmp_path, arms=arms, train={"steps": 3})
    logs = {}
    for one in ("ce", name):
        train_student(experiment.arm(one, SEED))
        logs[one] = [row["terms"] for row in rows_of(experiment.arm(one, SEED).folder / "log.jsonl") if "terms" in row]
    assert (logs["ce"][:2] == logs[name][:2]) == (name == "twin") and logs["ce"] != logs[name]
    texts = [experiment.arm(one, SEED).lessons for one in ("ce", "direct")]
    for whole, short in zip(*texts, strict=True):
        assert short.input_ids == without_reasoning(whole).input_ids and REASONING not in short.segments


SHORT: dict[str, Any] = {
    **STUDY,
    "arms": {"own": ITSELF},
    "student": {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}},
    "latent": {**STUDY["latent"], "start_after": 7},
    "train": {"steps": 16, "accumulation": 2, "batch_size": 4, "log_every": 2, "save_every": 3, "eval_every": 10},
}
FINAL = ("model/model.safetensors", "model/latent.py", "log.jsonl")


def test_stopped_before_and_after_latents_start_it_ends_in_the_same_bits(tmp_path, base, monkeypatch):
    monkeypatch.setattr("test_resume.FINAL", ("model/model.safetensors", "model/latent.py"))
    ends = []
    for name, stops in (("whole", []), ("stopped", [5, 8, 11, 14])):
        experiment = copied(
            base, tmp_path / name, **{k: v for k, v in SHORT.items() if k != "arms"}, arms=SHORT["arms"]
        )
        for step in stops:
            with pytest.raises(Stopped):
                train_student(experiment.arm("own", SEED), progress=stop_at(step))
            experiment = study(experiment.run, **SHORT)
        train_student(experiment.arm("own", SEED))
        ends.append(experiment.arm("own", SEED).folder)
    assert_same_end(ends[1], ends[0])
    assert {"answer", "kv/itself/k"} <= rows_of(ends[0] / "log.jsonl")[-1]["terms"].keys()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_bits(tmp_path, base, monkeypatch):
    monkeypatch.setattr("test_resume.FINAL", ("model/model.safetensors",))
    long = {**SHORT, "train": {**SHORT["train"], "steps": 28}}
    whole = copied(base, tmp_path / "whole", **long)
    train_student(whole.arm("own", SEED))
    killed, changes = copied(base, tmp_path / "killed", **long), tmp_path / "changes.json"
    changes.write_text(json.dumps(long))
    driver = Path(__file__).with_name("killed_training.py")
    words = [sys.executable, str(driver), str(killed.run), "own", str(SEED), "2", str(changes)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_end(killed.arm("own", SEED).folder, whole.arm("own", SEED).folder)


def test_a_longer_training_goes_on_from_a_shorter_one_only_where_latents_start_at_the_same_step(tmp_path):
    tree = {**STUDY, "arms": {"twin": LATENT, "own": ITSELF}, "seeds": [7, 8, 9], "train": {"schedule": "constant"}}
    curves = {"curves": {"arms": ["twin", "own"], "budgets": [1, 3]}}
    for start, warmup, go_on in ((2, 3, ["twin", "own"]), (2, 0.2, ["twin"]), (0, 0.2, ["twin"]), (0.25, 3, [])):
        changes = {"report": curves, "latent": {"start_after": start}, "loss": {"kv_warmup": warmup}}
        recipe = tiny_recipe(tmp_path, **{**tree, **changes})
        arms = {name: arm_recipe(recipe, name) for name in recipe.every_arm}
        assert continued(recipe, arms) == {f"{name}@x3": name for name in go_on}, (start, warmup)


# -- teachers of other families -------------------------------------------------------------------------------


def test_teachers_with_other_tokenizers_and_chains_of_their_own_fill_slots_from_their_own_tokens(tmp_path):
    """Four families: one cuts numbers of two digits, one has longer chains than the student reads."""
    byte_level_tokenizer(tmp_path / "bytes")
    write_traces(tmp_path)
    arms = {"steps": {"reasoning": "latent"}, "r-kv": {**ARMS["rkv"], "align": {"keys": "rotated"}}}
    changes = study_changes(tmp_path) | {"arms": arms, "latent": {"tokens": M, "passes": T, "start_after": 0}}
    recipe = tiny_recipe(tmp_path / "run", **changes, compress=STUDY["compress"])
    made_ready(recipe, tmp_path / "run")
    experiment = Experiment(recipe, tmp_path / "run")
    arm, numbers = experiment.arm("steps", SEED), [5, 0, 61, 33, 79]
    batch, lengths = arm.load(arm.batches("train"), numbers), set()
    for name, teacher in arm.teachers.items():
        index, live = batch.maps[name].index[..., 0], batch.kv_masks[name]
        for b, number in enumerate(numbers):
            row = teacher.examples("train")[number]
            start, steps = row.segments.index(REASONING), row.reasoning.split(MARK)
            lengths.add(len(steps))
            ends = [int(i) for i, lives in zip(index[b], live[b], strict=True) if lives]
            read = [teacher.tokenizer.decode(row.input_ids[start : end + 1]) for end in ends]
            whole = [MARK.join(steps[: n + 1]) for n in range(len(steps))][-M:]
            assert read == whole, (name, row.reasoning)
    assert lengths == {2, 4}, "with two steps of its own in front, and without"
    for name in arms:
        arm = experiment.arm(name, SEED)
        train_student(arm)
        last = rows_of(arm.folder / "log.jsonl")[-1]["terms"]
        assert {f"kv/{one}/{side}" for one in arm.teachers for side in "kv"} <= last.keys()


# -- saving and answering -------------------------------------------------------------------------------------

ALONE = """
import json, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kvdistill":
            raise ModuleNotFoundError("kvdistill is not here")

sys.meta_path.insert(0, NotHere())
folder, wanted, most = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    AutoModelForCausalLM.from_pretrained(folder)
    refused = False
except Exception as error:
    refused = str(error)
sys.path.insert(0, folder)
from latent import LatentForCausalLM
model, tokenizer = LatentForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
answers = []
for prompt in wanted:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    [ids] = model.generate(**inputs, max_new_tokens=most)
    answers.append(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
by_code = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
same = all(bool((a == b).all()) for a, b in zip(model.parameters(), by_code.parameters(), strict=True))
try:
    import kvdistill
    alone = False
except ModuleNotFoundError:
    alone = True
print()
print(json.dumps({"refused": refused, "answers": answers, "alone": alone, "same": same}))
"""


def test_a_saved_student_needs_its_folder_alone_and_gives_the_recorded_answers(tmp_path, base):
    folder = trained(base, "competence")
    records = read_records(folder / "records.jsonl")
    experiment = study(folder.parents[2])
    prompts = {(e.task, e.id): e.prompt for e in experiment.split("test")}
    asked = [prompts[record.task, record.id] for record in records]
    most = experiment.recipe.evaluate.max_new_tokens
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    here = {k: v for k, v in environment().items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hub")}
    words = [sys.executable, str(script), str(folder / "model"), json.dumps(asked), str(most)]
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL}
    done = subprocess.run(words, env=here, cwd=tmp_path, check=False, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["alone"] and "execute" in said["refused"], (
        "no folder of ours is opened without the class that knows its tensors"
    )
    assert said["same"] and said["answers"] == [record.completion for record in records]
    eos = AutoTokenizer.from_pretrained(folder / "model").eos_token_id
    assert eos is not None
    for record in records:
        ended = record.tokens_out < most
        assert record.forward_passes == T + 1 + record.tokens_out + ended
        assert record.nll is not None and math.isfinite(record.nll)


def test_answers_are_recorded_with_their_loss_behind_latents(base):
    folder = trained(base, "competence")
    experiment = study(folder.parents[2])
    model, _ = load_saved(folder / "model", torch.float32)
    student = student_of(model.eval())
    assert isinstance(student, LatentStudent)
    rows = {(e.task, e.id): e for e in experiment.split("test")}
    for record in read_records(folder / "records.jsonl")[::3]:
        row = rows[record.task, record.id]
        answer = [row.input_ids[p] for p in places(row, ANSWER)]
        with torch.no_grad():
            thinking = student.think(Questions.of_ids([row.prompt_ids], [answer], 0))
            values = functional.cross_entropy(thinking.logits_NV, thinking.labels_N, reduction="none")
        assert record.nll == pytest.approx(float(values.mean()), rel=1e-4)


def test_saving_a_student_that_thinks_is_tried_before_training(tmp_path, monkeypatch):
    def lost(self: LatentStudent, folder: Path, tokenizer: Any) -> None:
        raise ModelError("the saved student is another one", place=str(folder), fix="take another family")

    monkeypatch.setattr(LatentStudent, "save", lost)
    tree = {**STUDY, "arms": {"twin": LATENT, "ce": {"teachers": []}}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **tree), work=no_training)
    assert_one_message(answer, "student: the saved student is another one", "take another family")
    with pytest.raises(AssertionError, match="began before the mistake was found"):  # of others nothing is tried
        written = write_recipe(tmp_path, **{**tree, "arms": {"ce": {"teachers": []}}})
        shutil.rmtree(tmp_path / "run")
        invoke(monkeypatch, "run", written, work=no_training)


def test_each_shape_of_latents_is_tried_once(tmp_path, monkeypatch):
    tried: list[tuple[int, int]] = []

    def noted(self: LatentStudent, folder: Path, tokenizer: Any) -> None:
        tried.append((self.thinker.config.num_latents, self.thinker.config.num_passes))
        self.writer.save(folder, tokenizer)

    monkeypatch.setattr(LatentStudent, "save", noted)
    arms = {f"t{T}-{w:g}": {**LATENT, "latent": {"passes": T, "self_weight": w}} for T in (0, 2) for w in (0.0, 1.0)}
    arms["slots"] = {**LATENT, "latent": {"tokens": 3}}
    with pytest.raises(AssertionError, match="began before the mistake was found"):
        invoke(monkeypatch, "run", write_recipe(tmp_path, **{**STUDY, "arms": arms}), work=no_training)
    assert tried == [(M, 0), (M, 2), (3, T)]


# -- costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["twin", "own", "both", "own-values-only"])
def test_a_step_of_latents_costs_what_the_counter_counts(tmp_path, base, name):
    """A whole ledger: one step, of questions of one size, so that nothing is padded."""
    one_step = {"train": {"steps": 1, "batch_size": 5}, "latent": {**STUDY["latent"], "start_after": 0}}
    arm = study(base, **one_step).arm(name, SEED)
    batches = arm.batches("train")
    sizes = [tuple(row.segments.count(code) for code in (PROMPT, REASONING, ANSWER)) for row in batches.examples]
    numbers = [i for i, size in enumerate(sizes) if size == sizes[0]][:5]
    assert len(numbers) == 5
    batch = arm.load(batches, numbers)
    distiller, counts = arm.distiller.train(), counts_of(arm, batch)
    with FlopCounterMode(display=False) as counter:
        out = distiller(batch, counts, kv_weight=1.0, self_weight=1.0)
    ledger = run_flops(arm, numbers)
    aligners = [x for x in distiller.aligners.values()]
    projected = sum(2 * p.num_in * p.num_out * p.num_layers * M * 5 for x in aligners for p in (x.proj_k, x.proj_v))
    assert counter.get_total_flops() == ledger["student_forward"] + projected
    assert (ledger["aligner"] == 0) == (name != "both")
    with FlopCounterMode(display=False) as counter:
        out.loss.backward()
    # nobody asks for what pause tokens and the last pass end in, nor for gradients of the first layer's input
    assert 0.9 * ledger["student_backward"] < counter.get_total_flops() - (ledger["aligner"] - projected)
    assert counter.get_total_flops() - (ledger["aligner"] - projected) <= ledger["student_backward"]


@pytest.mark.parametrize(("start", "steps", "first"), [(2, 6, 2), (0.25, 6, 2), (0.25, 16, 4)])
def test_latents_cost_from_the_step_on_in_which_they_start(base, start, steps, first):
    """Also of a training that ended early, and of a plan of more steps than the recipe's."""
    train = {"train": {"accumulation": 2, "batch_size": 3, "steps": 6}}
    latent = {**STUDY["latent"], "start_after": start}
    arm, plain = (
        study(base, arms={"x": one}, latent=latent, **train).arm("x", SEED) for one in (LATENT, {"teachers": []})
    )
    order, rows = arm.training_order(arm.num_batches(steps)), arm.lessons
    for trained in (steps, steps - 1, first + 1):
        read = order[: trained * 2 * 3]
        sizes = [(places(rows[i], PROMPT), places(rows[i], ANSWER)) for i in read[first * 2 * 3 :]]
        more = thinking_cost(
            arm.experiment.student_outline, arm.recipe.latent, [(len(prompt), len(answer)) for prompt, answer in sizes]
        )
        written, both = run_flops(plain, read, None, steps), run_flops(arm, read, None, steps)
        for side, thinking in zip(("student_forward", "student_backward"), more, strict=True):
            assert both[side] == written[side] + thinking
        assert run_flops(arm, read, arm.experiment.train_lengths, steps)["student_forward"] == both["student_forward"]


def test_validation_may_choose_the_weights_of_latents_and_its_points_are_paid_for(tmp_path, base):
    """By the likelihood of the answer behind them; what a point costs is counted by what was run."""
    train = {"steps": 6, "eval_every": 3, "eval_examples": 4, "select": "best", "learning_rate": 0.01}
    arm = copied(base, tmp_path, arms={"own": ITSELF}, train=train).arm("own", SEED)
    asked: list[tuple[int, int]] = []
    think = LatentForCausalLM.think

    def counted(self: LatentForCausalLM, input_ids: Tensor, mask: Tensor, **options: Any) -> Any:
        asked.extend([(int(row.sum()), int(torch.is_grad_enabled())) for row in mask])
        return think(self, input_ids, mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentForCausalLM, "think", counted)
        train_student(arm)
    points = [row for row in rows_of(arm.folder / "log.jsonl") if "val" in row]
    assert len(points) >= 2 and all(math.isfinite(row["val"]["completion_nll"]) for row in points)
    by_hand = [row["val"]["nll"] for row in points]
    assert [row["val"]["completion_nll"] for row in points] == pytest.approx(by_hand, rel=1e-4)
    measured = [size for size, learns in asked if not learns]
    assert len(measured) >= len(points) * 3 * 4, "its losses, the choice and the answers"
    most = arm.experiment.recipe.evaluate.max_new_tokens
    writer, rows = arm.experiment.student_outline, [*arm.experiment.split("val"), *arm.lessons]
    text, prompt = max(len(r.input_ids) for r in rows), max(len(r.prompt_ids) for r in rows)
    for row in points:
        most_of_it = writer.flops(8 * text, 8 * text**2)[0]
        most_of_it += thinking_cost(writer, arm.recipe.latent, [(prompt, most)] * 12)[0]
        assert 0.5 * most_of_it < row["flops"] <= most_of_it


def test_the_gradient_of_the_answer_is_weighed_against_that_of_keys_and_values(base):
    """Both reach what the answer reads of the prompt and the slots; the written text does not."""
    arm = study(base).arm("own", SEED)
    batch = arm.batches("train")(NUMBERS)
    out = arm.distiller(batch, counts_of(arm, batch), self_weight=1.5)
    shares = gradient_shares(out.parts, out.seen)
    assert 0 < shares["ce"]["share"] < 1 and 0 < shares["kv"]["share"] < 1 and -1 <= shares["kv"]["cosine"] <= 1
    alone = torch.autograd.grad(out.parts["answer"], out.seen, retain_graph=True, allow_unused=True)
    squares = sum(float(g.square().sum()) for g in alone if g is not None)
    assert shares["ce"]["norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_validation_chooses_among_points_at_which_latents_were_trained(tmp_path, base):
    """A point before them is measured and decides nothing, nor does it use up patience."""
    train = {"steps": 6, "eval_every": 1, "eval_examples": 4, "select": "best", "patience": 2, "learning_rate": 0.01}
    latent = {**STUDY["latent"], "start_after": 4}
    arm = copied(base, tmp_path, arms={"own": ITSELF}, train=train, latent=latent).arm("own", SEED)
    train_student(arm)
    assert len([row for row in rows_of(arm.folder / "log.jsonl") if "val" in row]) == 6
    assert json.loads((arm.folder / "ledger.json").read_text())["selection"]["chosen_step"] >= 5


def test_public_evaluations_read_continuations_and_answers_behind_latents(base, tmp_path):
    """As lm-eval asks: the likelihood of a continuation is that of `Student.score`, and rows run side by side."""
    arm = copied(base, tmp_path, arms={"own": ITSELF}).arm("own", SEED)
    train_student(arm)
    model, tokenizer = load_saved(arm.folder / "model", torch.float32)
    assert model_config(ModelRecipe(path=str(arm.folder / "model")), len(tokenizer)).vocab_size == len(tokenizer)
    lm, student = MeteredLM(model, tokenizer, batch_size=3), student_of(model)
    rows = [arm.lessons[i] for i in NUMBERS]
    pairs = [(list(row.prompt_ids), [row.input_ids[p] for p in places(row, ANSWER)]) for row in rows]
    found = lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])
    parts = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs]
    wanted = student.score([[*a, *b] for a, b in pairs], parts, pad_id=tokenizer.pad_token_id, batch_size=2)
    for (log_prob, _), [nll], (_, answer) in zip(found, wanted, pairs, strict=True):
        assert log_prob == pytest.approx(-nll * len(answer), rel=1e-4)
    assert [one.forward_passes for one in lm.usage] == [T + 2] * len(rows) and lm._rows.most == 3
    texts = [tokenizer.decode(prompt) for prompt, _ in pairs]
    asked = [SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 5}), task_name="x", doc_id=0) for text in texts]
    alone = student.generate([lm.tok_encode(text) for text in texts], tokenizer, max_new_tokens=5, batch_size=1)
    assert lm.generate_until(asked) == [one.text for one in alone]


# -- mistakes -------------------------------------------------------------------------------------------------

LOGITS = {"loss": {"logit_weight": 0.5}}
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no slots": ({"latent": {"tokens": 0}}, ["latent.tokens", "0"]),
    "fewer passes than none": ({"latent": {"passes": -1}}, ["latent.passes", "-1"]),
    "a teacher's logits": ({"arms": {"x": {"reasoning": "latent", **LOGITS}}}, ["arms.x", "logit_weight"]),
    "texts without reasoning": ({"data": {"style": "direct"}, "arms": {"own": ITSELF}}, ["style direct", "cot"]),
    "all tokens": ({"compress": {"kv_compression": "full", "step_mark": None}}, ["4 latent slots", "all tokens"]),
    "no token": ({"compress": {"kv_compression": "none", "step_mark": None}}, ["4 latent slots", "no tokens"]),
    "more tokens than slots": ({"compress": {"keep": 5}}, ["5 tokens are kept for 4 latent slots", "keep: 4"]),
    "a closed form": ({"align": {"init": "ridge"}}, ["align.init", "are those of latent slots"]),
    "the student's space": ({"align": {"match_in": "student"}}, ["align.match_in", "are those of latent slots"]),
    "losses of attention": ({"loss": {"kind": "structural"}}, ["loss.kind", "are those of latent slots"]),
    "direct answers and teachers": ({"arms": {"x": {"reasoning": "none"}}}, ["arms.x.reasoning", "teachers: []"]),
    "an unknown word": ({"arms": {"x": {**LATENT, "reasoning": "latents"}}}, ["arms.x: reasoning", "latents"]),
    "a projector that does not learn": ({"align": {"train_projector": False}}, ["align.train_projector"]),
    "tokens of the text": ({"loss": {"kv_on": "answer"}}, ["loss.kv_on", "set loss.kv_on: all"]),
    "latents that never start": ({"latent": {"start_after": 6}}, ["latents would be trained from step 6 on"]),
    "latents of one who writes": (
        {"arms": {"x": {"latent": {"self_weight": 1}}}},
        ["arms.x.latent", "reasoning: latent"],
    ),
    "nothing to learn": ({"arms": {"x": {**LATENT, "latent": {"answer_weight": 0}}}}, ["answer_weight is 0"]),
    "no keys and no values": (
        {"arms": {"x": {**ITSELF, "loss": {"k_weight": 0, "v_weight": 0}}}},
        ["loss.k_weight and loss.v_weight are both 0"],
    ),
    "no mark": ({"compress": {"step_mark": None}}, ["step_mark"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_thought_is_one_message_before_any_work(tmp_path, monkeypatch, what):
    changes, parts = WRONG[what]
    tree = {**STUDY, "arms": {"both": ARMS["both"]}}
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if key not in ("arms",) else value
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **tree), work=no_work)
    assert_one_message(answer, *parts)


def test_an_encoder_does_not_think_in_latents(tmp_path, monkeypatch):
    encoder = {"student": {"scratch": {"architecture": "bert", "hidden_size": 16, "num_layers": 2, "num_heads": 2}}}
    tree = {**STUDY, **encoder, "arms": {"own": ITSELF}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **tree), work=no_training)
    assert_one_message(answer, "encoder", "student")


def test_slots_beyond_the_positions_that_a_model_has_learned_are_said_before_training(tmp_path, monkeypatch):
    """The longest written text fits (39 tokens), and prompt, <bot>, slots, <eot> and answer do not."""
    folder, tokenizer = tmp_path / "gpt2", character_tokenizer(">")
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=44, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tree = {"arms": {"twin": LATENT}, "student": {"scratch": None, "path": str(folder)}}
    tree = {**STUDY, **tree, "data": {**STUDY["data"], "tokenizer": str(folder)}}
    monkeypatch.chdir(tmp_path)
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **{**tree, "latent": {"tokens": 29}}), work=no_training)
    said = "student (gpt2) reads at most 44 tokens: the longest question of arms.twin with its 29 latent slots"
    assert_one_message(answer, said, "latent.tokens) has 48")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(AssertionError, match="began before the mistake was found"):  # there is none
        invoke(monkeypatch, "run", write_recipe(tmp_path, **{**tree, "latent": {"tokens": 23}}), work=no_training)


@pytest.mark.parametrize("name", ["both", "own"])
def test_a_mark_that_no_reasoning_holds_is_said_before_training(tmp_path, monkeypatch, name):
    tree = {**STUDY, "compress": {"kv_compression": "steps", "step_mark": ";"}, "arms": {name: ARMS[name]}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **tree), work=no_training)
    assert_one_message(answer, "holds the mark ';'", "compress.step_mark")
