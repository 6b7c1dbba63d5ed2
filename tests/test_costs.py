"""Costs by closed form against torch's own counter, and what is shared divided by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import counted_flops
from tiny_recipe import SEED, made_ready, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode

from kvdistill.arms.batches import token_counts
from kvdistill.arms.costs import (
    aligner_flops,
    all_sharers,
    fit_flops,
    pass_flops,
    run_flops,
    shared_keys,
    teacher_flops,
)
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.teacher_pass import run_teacher
from kvdistill.core.costs import SHARED, apart, count_sharers, student_flops, total_flops
from kvdistill.core.files import read_json
from kvdistill.core.recipe import LoraRecipe
from kvdistill.models import batch_geometry, forward_flops
from kvdistill.store.shards import StoreReader

EAGER = {"attention": "eager"}  # the CPU's fused attention is not in the counter's list
KINDS = {
    "ce": {"teachers": []},
    "fixed": {},
    "single": {"teachers": ["one"]},
    "v-only": {"loss": {"k_weight": 0}},
    "in-student": {"align": {"match_in": "student", "init": "ridge"}},
    "low-rank": {"align": {"rank": 3}},
    "elastic": {"align": {"projection": "elastic", "elastic_hidden": 10}},
    "residual": {"align": {"projection": "elastic", "elastic_hidden": 10, "residual": True}},
    "frozen": {"align": {"init": "ridge", "train_projector": False}},
    "one-projector": {"align": {"share_layers": True}},
    "space": {"align": {"match_in": "shared"}},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    run = tmp_path_factory.mktemp("costs") / "run"
    scratch = {"scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2}, **EAGER}
    recipe = tiny_recipe(run, arms=KINDS, student=scratch)
    made_ready(recipe, run)
    return Experiment(recipe, run)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_costs_what_the_counter_counts(experiment, name):
    arm = experiment.arm(name, SEED)
    batches = arm.batches("train")
    longest = sorted(range(len(batches.examples)), key=lambda i: len(batches.examples[i].input_ids))[-5:]
    batch = arm.load(batches, longest)
    tokens, squares = batch_geometry([batch.mask_BT.shape[1]] * len(longest))  # padded, as it is run
    counts = token_counts(batch, arm.recipe if arm.uses_teachers else None).float().clamp_min(1)
    distiller = arm.distiller.train()
    with FlopCounterMode(display=False) as counter:
        distiller(batch, counts, kv_weight=1.0).loss.backward()
    student = sum(distiller.student.flops(tokens, squares))
    aligners = sum(aligner_flops(arm, teacher, tokens, squares) for teacher in arm.teachers)
    assert (name == "ce") == (aligners == 0)
    # a weight that is itself a product is made once a step, whatever the tokens
    assert counted_flops(counter) == pytest.approx(student + aligners, rel=2e-3)
    if name in ("ce", "fixed", "space", "low-rank", "elastic"):
        assert counted_flops(counter) == student + aligners


@pytest.mark.parametrize("kind", ["structural", "attention_output"])
@pytest.mark.parametrize("space", ["teacher", "student"])
def test_comparing_attention_costs_about_what_the_counter_counts(experiment, kind, space):
    align = {"match_in": space, **({"init": "ridge"} if space == "student" else {})}
    arms = {"attention": {"teachers": ["two"], "loss": {"kind": kind}, "align": align}}
    recipe = tiny_recipe(experiment.run, arms={**KINDS, **arms}, student=experiment.recipe.student.model_dump())
    made_ready(recipe, experiment.run)
    arm = Experiment(recipe, experiment.run).arm("attention", SEED)
    batch = arm.load(arm.batches("train"), [0, 1, 2])
    tokens, squares = batch_geometry([batch.mask_BT.shape[1]] * 3)
    counts = token_counts(batch, arm.recipe).float().clamp_min(1)
    with FlopCounterMode(display=False) as counter:
        arm.distiller.train()(batch, counts, kv_weight=1.0).loss.backward()
    student = sum(arm.distiller.student.flops(tokens, squares))
    compared = counted_flops(counter) - student
    assert compared == pytest.approx(aligner_flops(arm, "two", tokens, squares), rel=0.1)


def test_adapters_cost_what_the_counter_counts(experiment):
    lora = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    student = experiment.recipe.student.model_copy(update={"lora": LoraRecipe(**lora)})
    other = Experiment(experiment.recipe.model_copy(update={"student": student}), experiment.run)
    arm = other.arm("ce", SEED)
    batch = arm.batches("train")([0, 1, 2])
    tokens, squares = batch_geometry([batch.mask_BT.shape[1]] * 3)
    counts = token_counts(batch, None).float().clamp_min(1)
    with FlopCounterMode(display=False) as counter:
        arm.distiller.train()(batch, counts).loss.backward()
    assert other.student_outline.flops(tokens, squares) == arm.distiller.student.flops(tokens, squares)
    # nothing passes below the first adapter, which we count as if it did: two layers here, so a good part
    forward = forward_flops(other.student_shape, tokens, squares)
    assert counted_flops(counter) < sum(other.student_outline.flops(tokens, squares)) < 1.25 * counted_flops(counter)
    assert sum(other.student_outline.flops(tokens, squares)) < 3 * forward


def test_capturing_and_fitting_note_what_they_cost(experiment):
    arm, teacher = experiment.arm("fixed", SEED), experiment.teachers["one"]
    examples = teacher.examples("train")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = teacher.load()
        model.set_attn_implementation("eager")
        for example in examples[:7]:
            ids, segments = (torch.tensor([x]) for x in (example.input_ids, example.segments))
            run_teacher(model, ids, segments, layers=teacher.layers, dtype="float32")
    assert counted_flops(counter) == pass_flops(teacher, teacher.train_sizes[:7], stops=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for example in examples[:7]:
            ids, segments = (torch.tensor([x]) for x in (example.input_ids, example.segments))
            run_teacher(model, ids, segments, layers=teacher.layers, dtype="float32", want_nll=False)
    assert counted_flops(counter) == pass_flops(teacher, teacher.train_sizes[:7], stops=True)
    noted = StoreReader(teacher.target_folder("train")).extra["flops"]
    assert noted == pass_flops(teacher, teacher.train_sizes, stops=False) == teacher_flops(arm, teacher, [])
    assert arm.fitted("one").extra["flops"] == fit_flops(arm, "one") == 0  # means and deviations: no products
    ridge = experiment.arm("in-student", SEED)
    assert ridge.fitted("one").extra["flops"] == fit_flops(ridge, "one") > 0


def test_training_a_teacher_costs_its_own_texts_in_its_own_order(experiment):
    teacher = experiment.teachers["one"]
    lengths = [len(example.input_ids) for example in teacher.studied()]
    order = teacher.training_order(len(lengths))
    assert len(order) == 6 * 8 and {example.task for example in teacher.studied()} == {"chain"}
    report = read_json(experiment.run / "teachers/one/report.json")
    assert report["tokens"] == sum(lengths[i] for i in order)
    one = forward_flops(teacher.shape, *batch_geometry(lengths[i] for i in order))
    assert report["flops"] == {"forward": one, "backward": 2 * one}


def test_a_run_pays_for_all_it_needs_and_shares_what_others_read(experiment):
    runs = {name: experiment.arm(name, SEED) for name in KINDS}
    costs = {name: run_flops(arm, arm.training_order()) for name, arm in runs.items()}
    sharers = all_sharers(experiment)
    taught = len(KINDS) - 1
    assert sharers["teachers", "one"] == sharers["teacher_training", "one"] == taught
    assert sharers["teachers", "two"] == taught - 1, "`single` has teacher one only"
    keys = {name: shared_keys(arm.recipe, SEED, experiment.recipe) for name, arm in runs.items()}
    assert keys["ce"] == {"teacher_training": {}, "generation": {}, "teachers": {}} and keys["fixed"] == {
        **keys["v-only"],
        "fit": keys["fixed"]["fit"],
    }
    assert keys["fixed"]["fit"]["one"] == keys["single"]["fit"]["one"] != keys["low-rank"]["fit"]["one"]
    assert total_flops(costs["ce"]) == student_flops(costs["ce"]) == student_flops(costs["fixed"])
    whole = total_flops(costs["fixed"])
    by_hand = student_flops(costs["fixed"]) + costs["fixed"]["aligner"]
    for teacher in ("one", "two"):
        by_hand += costs["fixed"]["teachers"][teacher] + costs["fixed"]["teacher_training"][teacher]
    assert whole == by_hand
    shared = total_flops(costs["fixed"], keys["fixed"], sharers)
    assert student_flops(costs["fixed"]) < shared < whole


PARTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 10**15), max_size=3)
FLOPS = st.fixed_dictionaries({
    "student_forward": st.integers(0, 10**15), "student_backward": st.integers(0, 10**15),
    "measuring": st.integers(0, 10**15), "teachers": PARTS, "teacher_training": PARTS, "fit": PARTS,
})  # fmt: skip


@given(st.lists(FLOPS, min_size=1, max_size=6))
def test_what_is_shared_is_paid_for_once_by_all_together(runs):
    """Runs whose shared parts cost the same: all shares together are the whole, once."""
    first = runs[0]
    runs = [{**run, **{part: first.get(part, {}) for part in SHARED}} for run in runs]
    keys = {part: {name: name for name in first.get(part, {})} for part in SHARED}
    sharers = count_sharers([keys] * len(runs))
    together = sum(total_flops(run, keys, sharers) for run in runs)
    once = sum(amount for part in SHARED for amount in first.get(part, {}).values())
    assert together == pytest.approx(sum(map(student_flops, runs)) + once)
    assert total_flops(first) == pytest.approx(student_flops(first) + once)


@given(st.floats(0, 1e30), st.floats(0, 1e30))
def test_how_far_budgets_are_apart_does_not_depend_on_whose_is_asked_first(x, y):
    assert apart(x, y) == apart(y, x) and 0 <= apart(x, y) <= 1
    assert apart(x, x) == 0
