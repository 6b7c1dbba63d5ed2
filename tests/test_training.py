"""Training: the loss does not depend on how a batch is split or where targets come from; every arm trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import (
    ARMS,
    IN_STUDENT,
    SEED,
    assert_one_message,
    base_run,
    copy_base,
    environment,
    invoke,
    rows_of,
    tiny_recipe,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from kvdistill.arms.controls import mismatched_partner
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.order import data_order
from kvdistill.arms.student import CausalStudent
from kvdistill.core.errors import TrainingStopped
from kvdistill.core.files import read_json_lines, sha256_file
from kvdistill.core.recipe import OptimiserRecipe
from kvdistill.core.runtime import Stopwatch, quiet_libraries
from kvdistill.stages.fit import fit
from kvdistill.stages.train import train_student
from kvdistill.stages.train.checkpoint import Generators
from kvdistill.stages.train.ledger import training_ledger
from kvdistill.stages.train.trainer import training_arguments

quiet_libraries()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One run folder that all arms of this file are trained in."""
    return copy_base(tmp_path_factory.mktemp("training"))


def trained(run: Path, arm: str, seed: int = SEED, **changes: Any) -> Path:
    """Train `arm` in `run` (unless it is there) and return its folder."""
    changes = {"arms": ARMS, **changes}
    train_student(Experiment(tiny_recipe(run, **changes), run).arm(arm, seed))
    return run / "arms" / arm / f"seed-{seed}"


def in_copy(folder: Path, arm: str, **changes: Any) -> Path:
    """Train `arm` in a fresh copy of the base run, with changes to the recipe."""
    return trained(copy_base(folder), arm, **changes)


def losses_of(folder: Path) -> list[dict[str, float]]:
    return [
        {"loss": row["loss"], **{name: term["raw"] for name, term in row["terms"].items()}}
        for row in rows_of(folder / "log.jsonl")
        if "loss" in row
    ]


def assert_same_training(one: Path, two: Path, *, loss: float, weights: float) -> None:
    """Same logged losses (relative) and weights (absolute) within the tolerances."""
    logs = losses_of(one), losses_of(two)
    assert len(logs[0]) == len(logs[1]) > 0
    for mine, theirs in zip(*logs, strict=True):
        assert mine == pytest.approx(theirs, rel=loss)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst <= weights, worst


# -- every kind of arm ------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_arm_trains(run, arm):
    folder = trained(run, arm)
    log = losses_of(folder)
    assert [row["step"] for row in rows_of(folder / "log.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in log)
    named = {name.split("/")[0] for name in log[0]} - {"loss", "ce"}
    made = ARMS[arm].get("loss", {})
    wanted = set() if arm == "ce" else ({"kv"} if made.get("kv_weight", 1) else set())
    wanted |= {"logit"} if made.get("logit_weight") else set()
    assert named == wanted
    before = Experiment(tiny_recipe(run, arms=ARMS), run).initial_model(SEED).state_dict()
    after = load_file(folder / "model" / "model.safetensors")
    assert sum(not torch.equal(before[name], after[name]) for name in after) > len(after) / 2
    assert (folder / "adapters.safetensors").exists() == ("kv" in wanted)


def test_the_kv_term_moves_what_it_should(run):
    """Arms that differ only in the KV term part; the placebo's text differs, its cost does not."""
    weights = {arm: sha256_file(trained(run, arm) / "model" / "model.safetensors") for arm in ARMS}
    assert weights.pop("terminal") == weights["fixed"]  # three layers to two, from the top: the same rows as ratio
    assert weights.pop("index") == weights["placebo"]  # `pad`, the default, is the same arithmetic
    assert len(set(weights.values())) == len(weights), "two kinds of arm trained the same student"
    real, placebo = (json.loads((trained(run, arm) / "ledger.json").read_text()) for arm in ("fixed", "placebo"))
    assert real["flops"] == placebo["flops"] and real["tokens_nonpadding"] == placebo["tokens_nonpadding"]


def test_all_arms_of_a_seed_see_the_same_data_in_the_same_order_from_the_same_weights(run):
    prints = ("data_fingerprint", "init_fingerprint", "order_fingerprint")
    ledgers = [json.loads((trained(run, arm) / "ledger.json").read_text()) for arm in ARMS]
    assert len({tuple(ledger[name] for name in prints) for ledger in ledgers}) == 1
    assert len({(ledger["tokens_nonpadding"], ledger["optimiser_steps"]) for ledger in ledgers}) == 1


def test_the_placebos_partner_is_never_the_example_itself():
    for count in (2, 3, 48, 97):
        for seed in range(20):
            partner = mismatched_partner(count, seed)
            assert sorted(partner) == list(range(count))  # each is used once: the same texts, mismatched
            assert all(partner[i] != i for i in range(count))


def test_the_order_is_seeded_permutations_and_a_prefix_of_longer_ones():
    order = data_order(10, 35, 3)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert data_order(10, 12, 3) == order[:12] and data_order(10, 35, 4) != order
    assert order[:10] != order[10:20]


# -- the same numbers -------------------------------------------------------------------------------


def test_the_same_recipe_twice_is_the_same_bits_and_another_seed_is_not(run, tmp_path):
    files = ("model/model.safetensors", "adapters.safetensors", "match.json")
    first, again = trained(run, "competence"), in_copy(tmp_path, "competence")
    assert [sha256_file(first / name) for name in files] == [sha256_file(again / name) for name in files]
    assert losses_of(first) == losses_of(again)
    fit(Experiment(tiny_recipe(run, arms=ARMS), run).arm("competence", SEED + 1))
    other = trained(run, "competence", SEED + 1)
    assert sha256_file(first / files[0]) != sha256_file(other / files[0])
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (first, other)]
    assert ledgers[0]["order_fingerprint"] != ledgers[1]["order_fingerprint"]
    assert ledgers[0]["init_fingerprint"] != ledgers[1]["init_fingerprint"]


@pytest.mark.parametrize("arm", ["ce", "fixed", "competence", "kv-and-logit", "fixed-at-kv"])
def test_the_loss_does_not_depend_on_gradient_accumulation(run, tmp_path, arm):
    """8×1 = 4×2 = 2×4 (relative 1e-5; weights 1e-5): lengths differ, so means of micro-batch means would not be."""
    whole = trained(run, arm)
    for batch_size, accumulation in ((4, 2), (2, 4)) if arm in ("ce", "fixed") else ((2, 4),):
        folder = tmp_path / f"{batch_size}"
        folder.mkdir()
        split = in_copy(folder, arm, train={"batch_size": batch_size, "accumulation": accumulation})
        assert_same_training(whole, split, loss=1e-5, weights=1e-5)


@pytest.mark.parametrize("arm", ["fixed", "competence", "kv-and-logit", "placebo", "rotated", "crop", "similarity"])
def test_stored_and_online_targets_are_the_same_numbers(run, tmp_path, arm):
    """Relative 1e-5: the same teacher, but batched with other neighbours, so sums are taken in another order."""
    stored = trained(run, arm)
    online = copy_base(tmp_path)
    recipe = tiny_recipe(online, arms=ARMS, capture={"source": "online"})
    train_student(Experiment(recipe, online).arm(arm, SEED))
    assert_same_training(stored, online / "arms" / arm / f"seed-{SEED}", loss=1e-5, weights=2e-5)


def test_two_processes_are_one_with_the_double_batch(run, tmp_path):
    """torchrun, two ranks of batch 4 over gloo, against one process of batch 8 (relative 1e-5; weights 1e-5)."""
    copied = copy_base(tmp_path)
    shutil.rmtree(copied / "arms", ignore_errors=True)
    path = write_recipe(tmp_path, arms=ARMS, train={"batch_size": 4}, hardware={"device": "cpu"})
    recipe = copied / "recipe.json"
    tree = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**tree, "train": {**tree["train"], "batch_size": 4}}))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kvdistill"]
    words += ["train", str(path), "--arm", "kv-and-logit", "--seed", str(SEED)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = copied / "arms" / "kv-and-logit" / f"seed-{SEED}"
    assert_same_training(trained(run, "kv-and-logit"), both, loss=1e-5, weights=1e-5)
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (trained(run, "kv-and-logit"), both)]
    for name in ("tokens_nonpadding", "tokens_loss", "order_fingerprint"):
        assert ledgers[0][name] == ledgers[1][name]


# -- what is saved ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 3, "alpha": 6}])
def test_the_saved_student_is_the_trained_one_and_loads_with_plain_transformers(tmp_path, monkeypatch, lora):
    """With adapters: under gradient checkpointing, merged on saving (1e-5)."""
    ids = torch.arange(3, 15)[None]
    kept: dict[str, Any] = {}
    save = CausalStudent.save

    def keep_logits(student: CausalStudent, folder: Path, tokenizer: Any) -> None:
        student.eval()
        with torch.no_grad():
            kept["logits"] = student.model(input_ids=ids, use_cache=False).logits
        save(student, folder, tokenizer)

    monkeypatch.setattr(CausalStudent, "save", keep_logits)
    changes: dict[str, Any] = {"student": {"lora": lora, "gradient_checkpointing": True}} if lora else {}
    run = copy_base(tmp_path)
    fit(Experiment(tiny_recipe(run, arms=ARMS, **changes), run).arm("competence", SEED))
    folder = trained(run, "competence", **changes)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, kept["logits"], rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())
    assert model.generation_config.eos_token_id == model.config.eos_token_id is not None
    before = Experiment(tiny_recipe(run, arms=ARMS, **changes), run).initial_model(SEED).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_gradient_checkpointing_changes_nothing_but_memory(run, tmp_path):
    changes = {"student": {"gradient_checkpointing": True}}
    copied = copy_base(tmp_path)
    fit(Experiment(tiny_recipe(copied, arms=ARMS, **changes), copied).arm("fixed", SEED))
    assert_same_training(trained(run, "fixed"), trained(copied, "fixed", **changes), loss=1e-6, weights=1e-6)


def test_bf16_autocast_and_gpt2_students_train(tmp_path):
    """GPT-2 has no rotary positions and no grouped heads; its teachers do."""
    gpt2 = {"scratch": {"architecture": "gpt2", "hidden_size": 16, "num_layers": 2, "num_heads": 2}}
    run = copy_base(tmp_path)
    changes: dict[str, Any] = {"student": gpt2, "train": {"bf16": True}}
    fit(Experiment(tiny_recipe(run, arms=ARMS, **changes), run).arm("fixed", SEED))
    log = losses_of(trained(run, "fixed", **changes))
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in log)


def test_learning_curves_and_match_figures_see_every_task(tmp_path):
    """Validation stands in task order: the first few examples would be all of one task."""
    run = copy_base(tmp_path)
    folder = trained(run, "single", train={"eval_every": 3})
    points = [row for row in rows_of(folder / "log.jsonl") if "val" in row]
    assert [row["step"] for row in points] == [3, 6]
    assert all(set(row["val"]["accuracy_by_task"]) == {"chain", "product"} for row in points)
    assert all(row["val"]["kv_loss"] > 0 and row["train"]["ce"] > 0 for row in points)


# -- stopping cleanly -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "where", "says"),
    [
        ("fixed", "values", "loss term 'kv/one/v' became nan at step 5"),
        ("competence", "nll", "fuse.fusion_strategy: competence: no teacher has a finite NLL"),
    ],
)
def test_a_nan_in_a_teachers_target_stops_and_names_the_term(tmp_path, monkeypatch, arm, where, says):
    from kvdistill.store.packed import TargetReader

    run, path = copy_base(tmp_path), write_recipe(tmp_path, arms=ARMS, train={"save_every": 2})
    tree = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**tree, "train": {**tree["train"], "save_every": 2}}))
    calls = [0]
    read = TargetReader.read

    def poisoned(self: Any, examples: Any, **options: Any) -> Any:
        out = read(self, examples, **options)
        calls[0] += 1
        if calls[0] > 8:  # two teachers a step: from step 5 on
            (out.kv.values[-1][0, 0, 0] if where == "values" else out.nll_B)[0] = float("nan")
        return out

    monkeypatch.setattr(TargetReader, "read", poisoned)
    answer = invoke(monkeypatch, "train", path, "--arm", arm, "--seed", SEED)
    assert_one_message(answer, says)
    monkeypatch.setattr(TargetReader, "read", read)
    folder = run / "arms" / arm / f"seed-{SEED}"
    assert not (folder / "trained.json").exists()
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert [row["step"] for row in rows_of(folder / "log.jsonl")] == [1, 2, 3, 4]
    assert invoke(monkeypatch, "train", path, "--arm", arm, "--seed", SEED).code == 0  # goes on from step 4
    (tmp_path / "whole").mkdir()
    whole = in_copy(tmp_path / "whole", arm)
    assert sha256_file(folder / "model/model.safetensors") == sha256_file(whole / "model/model.safetensors")


def test_a_learning_rate_that_explodes_stops_and_leaves_no_student(tmp_path):
    run = copy_base(tmp_path)
    with pytest.raises(TrainingStopped, match=r"loss term '.*' became (nan|inf)|no longer finite") as caught:
        trained(run, "ce", train={"learning_rate": 1e30})
    assert caught.value.fix and not (run / "arms" / "ce" / f"seed-{SEED}" / "model").exists()


def test_gradients_that_are_no_numbers_do_not_reach_a_checkpoint(tmp_path, monkeypatch):
    """The loss may be finite where its gradient is not: then weights break one step before the loss shows it."""
    from kvdistill.stages.train.trainer import DistillTrainer

    step = DistillTrainer.training_step

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        if self.state.global_step == 5:  # the last step: no loss comes after it
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return out

    monkeypatch.setattr(DistillTrainer, "training_step", broken)
    run = copy_base(tmp_path)
    with pytest.raises(TrainingStopped, match="no longer finite after step 6"):
        trained(run, "ce")
    assert not (run / "arms" / "ce" / f"seed-{SEED}" / "model").exists()


def test_the_base_run_is_untouched():
    assert not (base_run() / "arms").exists() and IN_STUDENT["init"] == "ridge"


def test_tensorboard_gets_every_term_and_stays_in_the_run_folder(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run = copy_base(tmp_path)
    folder = trained(run, "fixed", train={"report_to": ["tensorboard"]})
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    assert {"loss", "ce/raw", "kv/one/k/raw", "kv/two/v/weighted"} <= scalars
    logged = [row["terms"]["ce"]["raw"] for row in read_json_lines(folder / "log.jsonl") if "terms" in row]
    shown = [event.value for event in events.Scalars("train/ce/raw")]
    assert shown == pytest.approx(logged, rel=1e-6) and len(shown) == 6
    assert [entry.name for entry in tmp_path.iterdir()] == [run.name]


def test_one_process_on_a_machine_of_several_gpus_trains_on_the_first(tmp_path, monkeypatch):
    """Trainer would wrap the model in DataParallel, which splits batches that are one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)  # all that transformers asks for where it counts
    made = training_arguments(OptimiserRecipe(batch_size=5), tmp_path, seed=1, cpu=False)
    assert made.n_gpu == 1 and made.train_batch_size == 5
    assert made.parallel_mode.value == "not_parallel"
    assert training_arguments(OptimiserRecipe(batch_size=5), tmp_path, seed=1, cpu=True).n_gpu == 0


def test_a_gpu_that_is_there_and_not_used_is_left_alone(monkeypatch):
    """`hardware.device: cpu` on a machine with one: memory is the process's, and no checkpoint asks the GPU."""
    recipe = tiny_recipe(base_run(), arms=ARMS, hardware={"device": "cpu"})
    arm = Experiment(recipe, base_run()).arm("fixed", SEED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ledger = training_ledger(arm, arm.training_order(), recipe.train.steps, torch.tensor([7.0, 5.0]), Stopwatch())
    assert ledger["peak_memory_bytes"] > 1 << 20
    assert Generators.now().cuda is None and not torch.cuda.is_initialized()
