"""What share of the gradient each term has: against separate backward passes; in the log; what weight is proposed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import ARMS, SEED, base_run, copy_base, rows_of, tiny_recipe

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import token_counts
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.shares import WANTED, gradient_shares, proposed_weight
from kvdistill.cli.profiles import profile_lines
from kvdistill.stages.train import train_student
from kvdistill.study.profile import profile_alignment
from kvdistill.study.profile.matching import FIT_TEXTS, HELD_OUT_TEXTS, num_texts
from kvdistill.study.profile.timing import PATIENCE_S, num_timed

NUMBERS = [3, 1, 7, 4, 6]


def arm_of(name: str, run: Path | None = None, **changes: Any) -> Arm:
    run = run or base_run()
    return Experiment(tiny_recipe(run, arms=ARMS, **changes), run).arm(name, SEED)


def output_of(arm: Arm, kv_weight: float) -> Any:
    batch = arm.load(arm.batches("train"), NUMBERS)
    counts = token_counts(batch, arm.recipe).float()
    return arm.distiller.train()(batch, counts, kv_weight=kv_weight)


def test_shares_are_those_of_one_backward_pass_a_term() -> None:
    arm = arm_of("fixed")
    parameters = list(arm.distiller.student.parameters())
    out = output_of(arm, 5.0)
    found = gradient_shares(out.parts, parameters)
    assert all(p.grad is None for p in parameters), "nothing is added to a gradient"

    def slow(*wanted: str) -> torch.Tensor:
        arm.distiller.zero_grad(set_to_none=True)
        again = output_of(arm, 5.0)
        sum(part for name, part in again.parts.items() if name.startswith(wanted)).backward()
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]).double()

    ce, kv, one = slow("ce"), slow("kv/"), slow("kv/one/")
    assert found.keys() == {"ce", "kv", "kv/one", "kv/two"}
    for name, gradient in (("ce", ce), ("kv", kv), ("kv/one", one)):
        assert found[name]["norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert found[name]["share"] == pytest.approx(float(gradient.norm() / (ce.norm() + kv.norm())), rel=1e-5)
        assert found[name]["cosine"] == pytest.approx(
            float(gradient @ ce / gradient.norm() / ce.norm()), rel=1e-4, abs=1e-6
        )


def test_with_the_proposed_weight_keys_and_values_have_the_wanted_part_of_the_gradient() -> None:
    arm = arm_of("fixed")
    parameters = list(arm.distiller.student.parameters())
    shares = gradient_shares(output_of(arm, 0.001).parts, parameters)
    proposed = proposed_weight(0.001, shares)
    assert proposed is not None and proposed > 0.001
    again = gradient_shares(output_of(arm, proposed).parts, parameters)
    assert again["kv"]["norm"] / again["ce"]["norm"] == pytest.approx(WANTED, rel=0.06)  # two digits of a weight
    assert proposed_weight(5.0, {"ce": {"norm": 1.0}, "kv": {"norm": 0.0}}) is None


def test_what_logs_depend_on_are_the_tensors_that_attention_takes() -> None:
    """The values of the highest layers, caught where the projection gives them."""
    arm = arm_of("fixed")
    caught: list[torch.Tensor] = []
    layers = arm.distiller.student.model.model.layers
    hooks = [one.self_attn.v_proj.register_forward_hook(lambda _, __, out: caught.append(out)) for one in layers]
    out = output_of(arm, 5.0)
    for hook in hooks:
        hook.remove()
    values = out.seen[len(out.seen) // 2 :]
    assert len(values) == len(layers)
    for name in ("ce", "kv/one/v"):
        direct = torch.autograd.grad(out.parts[name], values, retain_graph=True)
        slow = torch.autograd.grad(out.parts[name], caught, retain_graph=True)
        for mine, theirs in zip(direct, slow, strict=True):
            assert torch.allclose(mine.transpose(1, 2).flatten(2), theirs, atol=1e-7) and float(theirs.abs().max()) > 0


@pytest.mark.parametrize("name", ["fixed", "logit", "ce"])
def test_training_logs_the_shares_and_learns_the_same(name: str, tmp_path: Path) -> None:
    weights, logs = [], []
    for every in (1, 100):
        run = copy_base(tmp_path / str(every))
        arm = arm_of(name, run, train={"log_every": every, "accumulation": 2})
        train_student(arm)
        weights.append(load_file(arm.folder / "model" / "model.safetensors"))
        logs.append([row for row in rows_of(arm.folder / "log.jsonl") if "terms" in row])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert len(logs[0]) == 6
    for row in logs[0]:
        if name != "fixed":  # no keys and values are captured
            assert "gradient" not in row
            continue
        shares = row["gradient"]
        assert shares["ce"]["share"] + shares["kv"]["share"] == pytest.approx(1)
        assert shares["kv"]["norm"] > 0 and -1 <= shares["kv/two"]["cosine"] <= 1


def test_a_profile_says_the_shares_and_proposes_a_weight_with_one_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_base(tmp_path)
    experiment = Experiment(tiny_recipe(run, arms=ARMS), run)
    made: list[torch.optim.AdamW] = []

    class Counted(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Counted)
    monkeypatch.setattr("kvdistill.study.profile.STEPS", 3)
    seen: list[float] = []
    found = profile_alignment(experiment, ["fixed"], lambda what, done, total: seen.append(done / total))
    assert len(made) == 1
    assert len(made[0].state) == sum(p.requires_grad for p in experiment.arm("fixed", SEED).distiller.parameters())
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) > 12, "progress within every long part"
    shares = found["fixed"]["numbers"]["shares"]
    assert shares["kv_weight"] == 5.0 and shares["proposed"] > 0
    text = "\n".join(profile_lines(found))
    assert "gradient on the student, before clipping" in text and f"with {shares['proposed']:g} the gradient" in text


def test_a_slow_student_is_profiled_with_fewer_steps_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [num_timed(seconds, 7) for seconds in (1e-3, PATIENCE_S / 8, PATIENCE_S / 6, PATIENCE_S)] == [7, 3, 3, 1]
    arm = arm_of("fixed")
    assert num_texts(arm) == (FIT_TEXTS, HELD_OUT_TEXTS)
    heads = {"num_heads": 9, "num_kv_heads": 3, "head_size": 64}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 3000, **heads}
    sizes = replace(arm.experiment.student_shape, **sizes)
    monkeypatch.setattr("kvdistill.arms.setting.Setting.student_shape", sizes)
    fit_texts, held_out = num_texts(arm_of("fixed"))
    tokens = sum(len(e.input_ids) for e in arm.experiment.examples("train")) / len(arm.experiment.examples("train"))
    assert fit_texts < FIT_TEXTS and fit_texts * tokens >= 15 * 3 * 64
    assert held_out == 16
