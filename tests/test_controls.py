"""Controls: what an arm's teachers give, less one thing, held against slow and obvious references."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_recipe import IN_STUDENT, SEED, made_ready, tiny_recipe, tiny_tree
from torch import Tensor

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import token_counts
from kvdistill.arms.controls import (
    Moments,
    mismatched_partner,
    mismatched_predictions,
    noisy,
    permuted_places,
    predicting_places,
    random_tokens,
)
from kvdistill.arms.experiment import Experiment
from kvdistill.core.config import make_recipe
from kvdistill.core.errors import RecipeError
from kvdistill.core.kv import KV
from kvdistill.core.runtime import derive_seed
from kvdistill.models import load_model
from kvdistill.stages.train import train_student
from kvdistill.study.plan import plan

CONTROLS = ("placebo", "untrained", "shuffled", "noise")
NUMBERS = [3, 1, 7]
COMPETENCE = {"fusion_strategy": "competence", "temperature": 0.5}
MORE: dict[str, dict[str, Any]] = {
    "competence": {"fuse": COMPETENCE},
    "logit": {"loss": {"kv_weight": 0, "logit_weight": 1.0}},
    "structural": {"loss": {"kind": "structural"}},
    "r-kv": {"compress": {"kv_compression": "r-kv", "keep": 2}},
    "weighted": {"loss": {"attention_weighted": True}},
    "similarity": {"fuse": {"fusion_strategy": "similarity"}},
    "at-kv": {"fuse": {"fuse_at": "kv"}, "align": IN_STUDENT, "loss": {"logit_weight": 1}},
    "common": {"align": {"match_in": "shared"}},
    "rotated": {"align": {"keys": "rotated"}},
}
HERE = {
    **{name: changes for name, changes in MORE.items()},
    **{f"{name}-{control}": {**changes, "control": control} for name, changes in MORE.items() for control in CONTROLS},
    "plain": {},
    **{control: {"control": control} for control in CONTROLS},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls") / "run"
    made_ready(tiny_recipe(folder, arms=HERE), folder)
    return folder


IN_BOTH = {
    name: changes
    for name, changes in HERE.items()
    if name.split("-")[0] in (*CONTROLS, "logit") or name.startswith(("at-kv-", "rotated-"))
}


@pytest.fixture(scope="module")
def run_of_both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With arms that need nothing but what a teacher that runs in every step can give."""
    folder = tmp_path_factory.mktemp("both") / "run"
    made_ready(tiny_recipe(folder, arms=IN_BOTH), folder)
    return folder


def arm_of(run: Path, name: str, **changes: Any) -> Arm:
    return Experiment(tiny_recipe(run, arms=HERE, **changes), run).arm(name, SEED)


def loaded(arm: Arm, split: str = "train", numbers: list[int] = NUMBERS) -> Any:
    return arm.load(arm.batches(split), numbers)


def rows_of_tokens(x_BHSD: Tensor, b: int, places: list[int]) -> list[tuple[float, ...]]:
    return [tuple(x_BHSD[b, :, place].flatten().tolist()) for place in places]


# -- the parts ----------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 99))
def test_tokens_are_permuted_within_their_segment_and_none_stays_that_need_not(rows, seed):
    width = max(map(len, rows)) + 2
    segments_BS = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    order_BS = permuted_places(segments_BS, [seed + b for b in range(len(rows))])
    for segments, order in zip(segments_BS.tolist(), order_BS.tolist(), strict=True):
        assert sorted(order) == list(range(width))
        assert [segments[place] for place in order] == segments
        counts = Counter(segments)
        for place, code in enumerate(segments):
            assert (order[place] == place) == (code == 0 or counts[code] == 1)
    alone = permuted_places(segments_BS[-1:], [seed + len(rows) - 1])
    assert alone[0].tolist() == order_BS[-1].tolist(), "whatever stands beside it in the batch"


def test_a_prediction_goes_with_the_token_that_it_predicts():
    segments_BS = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 0]])
    order_BS = permuted_places(segments_BS, [5])
    rows = predicting_places(order_BS)[0].tolist()
    for token in range(3, 8):
        assert rows[token - 1] == order_BS[0, token] - 1
    looked_at = {rows[place] for place in range(2, 7)}
    assert looked_at == set(range(2, 7)), "all predictions of the completion, and no other"


def test_a_mismatched_text_predicts_in_order_and_from_its_beginning_again():
    mine = torch.tensor([[1, 1, 2, 2, 2, 3, 3], [1, 2, 3, 0, 0, 0, 0]])
    theirs = torch.tensor([[1, 1, 1, 2, 3, 0], [1, 1, 2, 2, 2, 3]])
    rows = mismatched_predictions(mine, theirs)
    assert rows.tolist() == [[0, 2, 3, 2, 3, 2, 0], [1, 2, 0, 0, 0, 0, 0]]


def test_moments_are_those_of_all_tokens_together():
    generator = torch.Generator().manual_seed(0)
    B, G, S, E, H, M = 2, 3, 5, 4, 6, 2
    mask_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    caches = []
    for shift in (0.0, 900.0):  # far from zero: squares must not cancel

        def side(heads: int, shift: float = shift) -> tuple[Tensor, ...]:
            return tuple(torch.randn(B, heads, S, E, generator=generator) + shift for _ in range(M))

        caches.append(KV(side(G), side(G), mask_BS, torch.zeros(B, S), "unrotated", side(H)))
    found = Moments.of(caches)
    for part, (mean, std) in {
        "keys": (found.mean_M2GE[:, 0], found.std_M2GE[:, 0]),
        "values": (found.mean_M2GE[:, 1], found.std_M2GE[:, 1]),
        "queries": (found.query_mean_MHE, found.query_std_MHE),
    }.items():
        for layer in range(M):
            rows = torch.cat([getattr(kv, part)[layer].transpose(1, 2)[mask_BS] for kv in caches]).double()
            torch.testing.assert_close(mean[layer], rows.mean(0).float())
            torch.testing.assert_close(std[layer], rows.std(0, correction=0).float())
    back = Moments.from_tensors({**found.tensors(), "aligner.k_scale": torch.ones(1)})
    assert all(torch.equal(x, y) for x, y in zip(vars(found).values(), vars(back).values(), strict=True))


def test_noise_has_these_moments_and_is_the_examples_own():
    B, G, S, E, M = 3, 2, 700, 5, 2
    generator = torch.Generator().manual_seed(0)
    moments = Moments(*(torch.rand(M, 2, G, E, generator=generator) * scale + 0.5 for scale in (30.0, 3.0)))
    mask_BS = torch.ones(B, S).bool()
    mask_BS[1, 400:] = False
    zeros = tuple(torch.zeros(B, G, S, E, dtype=torch.float64) for _ in range(M))
    kv = KV(zeros, zeros, mask_BS, torch.zeros(B, S), "unrotated", layers=(1, 4))
    made = noisy(kv, moments, [11, 12, 13])
    assert made.layers == (1, 4) and made.rope == "unrotated" and made.keys[0].dtype == torch.float64
    for layer in range(M):
        for side, tensors in enumerate((made.keys, made.values)):
            x_BSGE = tensors[layer].transpose(1, 2)
            assert not bool(x_BSGE[~mask_BS].any())
            rows = x_BSGE[mask_BS]
            error = moments.std_M2GE[layer, side] / len(rows) ** 0.5
            assert bool(((rows.mean(0) - moments.mean_M2GE[layer, side]).abs() < 5 * error).all())
            assert bool(((rows.std(0) / moments.std_M2GE[layer, side] - 1).abs() < 5 / (2 * len(rows)) ** 0.5).all())
            neighbours = torch.corrcoef(torch.stack([rows[:-1, 0, 0], rows[1:, 0, 0]]))[0, 1]
            assert abs(float(neighbours)) < 5 / len(rows) ** 0.5
    alone = noisy(replace(kv, keys=tuple(x[1:2] for x in zeros), values=tuple(x[1:2] for x in zeros),
                          mask_BT=mask_BS[1:2], positions_BT=torch.zeros(1, S)), moments, [12])  # fmt: skip
    assert torch.equal(alone.keys[1], made.keys[1][1:2]) and not torch.equal(made.keys[0][0], made.keys[0][2])
    drawn = torch.randn(
        400, M, 2, G, E, generator=torch.Generator().manual_seed(12)
    )  # what it has been since the first
    drawn = drawn * moments.std_M2GE + moments.mean_M2GE
    assert torch.equal(made.values[0][1, :, :400].transpose(0, 1), drawn[:, 0, 1].double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is one device")
def test_noise_is_drawn_where_the_moments_are_also_for_targets_that_wait_in_memory():
    moments = Moments(torch.zeros(2, 2, 3, 5), torch.ones(2, 2, 3, 5)).to("cuda")
    zeros = tuple(torch.zeros(2, 3, 70, 5) for _ in range(2))
    kv = KV(zeros, zeros, torch.ones(2, 70).bool(), torch.zeros(2, 70), "unrotated")
    waiting, running = noisy(kv, moments, [11, 12]), noisy(kv.to("cuda"), moments, [11, 12])
    assert waiting.keys[0].is_cuda and not waiting.mask_BT.is_cuda
    assert all(torch.equal(x, y) for x, y in zip(waiting.keys, running.keys, strict=True))


@pytest.mark.parametrize(("num", "size"), [(4, 4), (3, 11), (5, 90_000)])
def test_noise_in_predictions_draws_different_tokens_evenly(num, size):
    index = random_tokens(torch.zeros(7, 300, num, dtype=torch.long), size, range(7))
    assert int(index.min()) >= 0 and int(index.max()) < size
    assert all(len({*row}) == num for row in index.flatten(0, 1).tolist())
    if size == 11:
        for column in range(num):  # 2,100 draws: 191 of each, give or take 13
            counts = torch.bincount(index[..., column].flatten(), minlength=size)
            assert int(counts.min()) > 120 and int(counts.max()) < 262
    again = random_tokens(torch.zeros(1, 300, num, dtype=torch.long), size, [3])
    assert torch.equal(again[0], index[3])


# -- arms ---------------------------------------------------------------------------------------------


def test_a_placebo_has_the_targets_of_its_partner_to_the_bit(run):
    arm, plain = arm_of(run, "placebo"), arm_of(run, "plain")
    partner = mismatched_partner(len(arm.experiment.split("train")), SEED)
    batch = loaded(arm)
    for name in ("one", "two"):
        expected = plain.teachers[name].targets("train").read([partner[i] for i in NUMBERS])
        target = batch.targets[name]
        assert torch.equal(target.segments_BS, expected.segments_BS) and not batch.changes
        for mine, theirs in zip(target.kv.keys + target.kv.values, expected.kv.keys + expected.kv.values, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["shuffled", "structural-shuffled", "r-kv-shuffled", "at-kv-shuffled"])
def test_shuffled_targets_are_the_same_tokens_of_every_segment_at_other_places(run, name):
    arm, plain = arm_of(run, name), arm_of(run, name.removesuffix("-shuffled").replace("shuffled", "plain"))
    batch, right = loaded(arm), loaded(plain)
    orders = {}
    for teacher, target in batch.targets.items():
        expected = right.targets[teacher]
        segments_BS = target.segments_BS
        assert torch.equal(segments_BS, expected.segments_BS) and torch.equal(target.nll_B, expected.nll_B)
        order_BS = orders[teacher] = batch.changes[teacher].order_BS
        sides = ("keys", "values", *(["queries"] if arm.recipe.needs_queries else []))
        for b in range(len(NUMBERS)):
            for code in (1, 2, 3):
                places = (segments_BS[b] == code).nonzero().flatten().tolist()
                for side in sides:
                    for x, y in zip(getattr(target.kv, side), getattr(expected.kv, side), strict=True):
                        mine, theirs = rows_of_tokens(x, b, places), rows_of_tokens(y, b, places)
                        assert Counter(mine) == Counter(theirs)
                        if len(places) > 1 and len({*theirs}) == len(theirs):
                            assert all(a != c for a, c in zip(mine, theirs, strict=True))
            for place, source in enumerate(order_BS[b].tolist()):  # one permutation for all that is said of a token
                for side in sides:
                    for x, y in zip(getattr(target.kv, side), getattr(expected.kv, side), strict=True):
                        assert torch.equal(x[b, :, place], y[b, :, source])
                if arm.recipe.needs_scores:
                    assert torch.equal(target.scores_BSMRG[b, place], expected.scores_BSMRG[b, source])
                if arm.recipe.needs_logits and place and segments_BS[b, place] > 1:
                    for part in ("topk_index_BSK", "topk_logprob_BSK"):
                        x, y = (getattr(one, part) for one in (target, expected))
                        assert torch.equal(x[b, place - 1], y[b, source - 1])
    assert torch.equal(orders["one"], orders["two"]), "who reads the same tokens is permuted alike"
    assert batch.maps.keys() == right.maps.keys()
    if arm.recipe.compress.kv_compression == "full":
        assert all(torch.equal(batch.kv_masks[n], right.kv_masks[n]) for n in batch.kv_masks)
    else:  # the same tokens are kept, wherever they stand now
        for teacher, mask_LBT in batch.kv_masks.items():
            assert torch.equal(mask_LBT.sum(-1), right.kv_masks[teacher].sum(-1))


def test_noise_stands_for_keys_values_and_queries_with_the_moments_of_the_calibration_texts(run):
    arm, plain = arm_of(run, "structural-noise"), arm_of(run, "structural")
    batch, right = loaded(arm), loaded(plain)
    moments = Moments.from_tensors(arm.fitted("two").shards[0])
    numbers = [i for chosen in arm.calibration_numbers() for i in chosen]
    assert sorted(numbers) == list(range(len(arm.experiment.split("train"))))
    whole = plain.teachers["two"].targets("train").read(numbers).kv
    for side, tensors in enumerate((whole.keys, whole.values)):
        for layer, x in enumerate(tensors):
            rows = x.transpose(1, 2)[whole.mask_BT].double()
            torch.testing.assert_close(moments.mean_M2GE[layer, side], rows.mean(0).float(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(moments.std_M2GE[layer, side], rows.std(0, correction=0).float())
    again = loaded(arm, numbers=[7, 2])
    for name, target in batch.targets.items():
        expected = right.targets[name]
        assert torch.equal(target.nll_B, expected.nll_B) and torch.equal(target.segments_BS, expected.segments_BS)
        width = min(target.segments_BS.shape[1], again.targets[name].segments_BS.shape[1])
        for side in ("keys", "values", "queries"):
            for x, y, z in zip(
                *(getattr(one.kv, side) for one in (target, expected, again.targets[name])), strict=True
            ):
                assert x.shape == y.shape and not torch.equal(x, y)
                assert torch.equal(x[2, :, :width], z[0, :, :width]), "the same at every visit"
    assert not torch.equal(batch.targets["one"].kv.keys[0][..., :3], batch.targets["two"].kv.keys[0][..., :3])


def test_noise_in_logits_keeps_the_distributions_and_not_the_tokens(run):
    batch, right = (loaded(arm_of(run, name)) for name in ("logit-noise", "logit"))
    for name, target in batch.targets.items():
        assert torch.equal(target.topk_logprob_BSK, right.targets[name].topk_logprob_BSK)
        assert not torch.equal(target.topk_index_BSK, right.targets[name].topk_index_BSK)


def test_an_untrained_scratch_teacher_has_the_weights_that_its_training_began_with(run, monkeypatch):
    arm = arm_of(run, "untrained")
    teacher, trained = arm.teachers["one"], arm.experiment.teachers["one"]
    found = teacher.load().state_dict()
    expected = load_model(
        teacher.recipe, vocab_size=len(teacher.tokenizer), seed=derive_seed(0, "one"), place="here"
    ).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(found[key], x) for key, x in trained.load().state_dict().items())
    began: dict[str, Any] = {}

    def stop(self: Any) -> None:
        began.update(self.model.student.model.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr("kvdistill.stages.train.trainer.DistillTrainer.resume_or_start", stop)
    (run / "teachers" / "one" / "trained.json").rename(run / "teachers" / "one" / "away.json")
    try:
        with pytest.raises(KeyboardInterrupt):
            from kvdistill.stages.train import train_teacher

            train_teacher(trained)
    finally:
        (run / "teachers" / "one" / "away.json").rename(run / "teachers" / "one" / "trained.json")
    assert all(torch.equal(found[key], began[key]) for key in found)


def test_an_untrained_teacher_has_targets_of_its_own_beside_the_trained_ones(run):
    arm, plain = arm_of(run, "untrained"), arm_of(run, "plain")
    for name in ("one", "two"):
        mine, theirs = (one.teachers[name].target_identity("train") for one in (arm, plain))
        assert {key for key in mine if mine[key] != theirs[key]} == {"teacher"}
        assert arm.teachers[name].target_folder("train").name.startswith(f"targets-train-{name}~untrained-")
        assert arm.pairings[name].sources == plain.pairings[name].sources
    found = [one for one in plan(tiny_recipe(run, arms={"x": {"control": "untrained"}}), run) if one.verb == "capture"]
    assert [one.id for one in found] == ["capture:one~untrained", "capture:two~untrained"]


def test_an_untrained_pretrained_teacher_has_its_configuration_and_random_weights(tmp_path):
    folder = tmp_path / "model"
    model, tree = tiny_model("llama"), tiny_tree()
    model.save_pretrained(folder)
    from kvdistill.core.recipe import ModelRecipe

    recipe = ModelRecipe(path=str(folder), dtype="bfloat16", attention="eager")
    one, two, other = (load_model(recipe, vocab_size=1, seed=seed, place="here", untrained=True) for seed in (3, 3, 4))
    real = load_model(recipe, vocab_size=1, seed=3, place="here")
    assert tree and one.config.to_diff_dict().keys() == real.config.to_diff_dict().keys()
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    weight = "model.layers.0.self_attn.k_proj.weight"
    weights = [made.state_dict()[weight] for made in (one, other, real)]
    assert len({x.shape for x in weights}) == 1 and {x.dtype for x in weights} == {torch.bfloat16}
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.config._attn_implementation == "eager"


@pytest.mark.parametrize("control", ["untrained", "shuffled", "noise"])
def test_competence_routes_as_it_does_for_the_arm_itself(run, control):
    arm, plain = arm_of(run, f"competence-{control}"), arm_of(run, "competence")
    for split in ("train", "val"):
        batch, right = loaded(arm, split), loaded(plain, split)
        for name in ("one", "two"):
            assert torch.equal(batch.targets[name].nll_B, right.targets[name].nll_B)
    weights = [one.distiller.router_weights(loaded(one), {}) for one in (arm, plain)]
    assert torch.equal(*weights) and not torch.equal(weights[0][0], weights[0][1])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["plain", "logit", "at-kv", "rotated"])
def test_controls_are_the_same_from_the_store_and_of_teachers_that_run(run_of_both, control, name):
    name = control if name == "plain" else f"{name}-{control}"
    recipes = (tiny_recipe(run_of_both, arms=IN_BOTH, capture={"source": source}) for source in ("store", "online"))
    one, other = (loaded(Experiment(recipe, run_of_both).arm(name, SEED)) for recipe in recipes)
    assert one.targets.keys() == other.targets.keys()
    for teacher, target in one.targets.items():
        ran, real_BS = other.targets[teacher], target.segments_BS > 0
        assert torch.equal(target.segments_BS, ran.segments_BS)
        if target.kv is not None:
            for x, y in zip(target.kv.keys + target.kv.values, ran.kv.keys + ran.kv.values, strict=True):
                x, y = (part.transpose(1, 2)[real_BS].float() for part in (x, y))
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
        if target.topk_logprob_BSK is not None:
            predicts_BT = one.segments_BT[:, 1:] > 1
            logprobs = (x.topk_logprob_BSK[:, :-1][predicts_BT] for x in (target, ran))
            torch.testing.assert_close(*logprobs, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", MORE)
def test_every_control_of_every_kind_of_arm_has_a_finite_loss_with_a_gradient(run, name, control):
    arm = arm_of(run, f"{name}-{control}")
    batch = loaded(arm)
    counts = token_counts(batch, arm.recipe).float().clamp_min(1)
    out = arm.distiller(batch, counts, kv_weight=5.0)
    plain = arm_of(run, name)
    expected = plain.distiller(loaded(plain), counts, kv_weight=5.0)
    assert out.terms.keys() == expected.terms.keys() and bool(out.loss.isfinite())
    assert torch.equal(out.terms["ce"][0], expected.terms["ce"][0])
    assert not torch.equal(out.loss, expected.loss)
    out.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in arm.distiller.parameters())


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_costs_what_the_arm_costs(run, control):
    ledgers = {}
    for name in ("plain", control):
        arm = arm_of(run, name)
        train_student(arm)
        ledgers[name] = json.loads((arm.folder / "ledger.json").read_text())
    mine, theirs = ledgers[control], ledgers["plain"]
    for key in ("student_forward", "student_backward", "teachers", "aligner", "fit"):
        assert mine["flops"][key] == theirs["flops"][key], key
    for key in ("optimiser_steps", "tokens_nonpadding", "tokens_loss", "order_fingerprint", "init_fingerprint"):
        assert mine[key] == theirs[key], key
    match = json.loads((arm_of(run, control).folder / "match.json").read_text())
    assert match.keys() == {"one", "two"}


def test_a_control_is_refused_where_there_is_nothing_to_control(tmp_path):
    for arms, words in {
        "placebo": ({"fixed": {"placebo": True}}, "write control: placebo"),
        "old": ({"fixed": {"placebo": False}}, "leave it out"),
        "word": ({"fixed": {"control": "nois"}}, "control: Input should be 'placebo'"),
        "ce": ({"ce": {"teachers": [], "control": "noise"}}, "control: noise changes what teachers give"),
    }.values():
        with pytest.raises(RecipeError) as caught:
            make_recipe(tiny_tree(arms=arms))
        assert words in str(caught.value), caught.value
    arms = {"c": {"control": "untrained", "fuse": COMPETENCE}}
    with pytest.raises(RecipeError, match="twice the cost of the arm"):
        make_recipe(tiny_tree(arms=arms, capture={"source": "online"}))
    assert make_recipe(tiny_tree(arms=arms))
