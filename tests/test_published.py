"""Real pretrained weights: captured as plain hooks see them, saved, evaluated, distilled within a family and across.

Needs SmolLM2-135M (`published_models.py`, KVDISTILL_MODELS) and, for texts, the real data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import is_required, skip_or_fail
from published_models import MODELS, NotThere, published_model
from tiny_recipe import invoke, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdistill.arms.student import CausalStudent
from kvdistill.models import capture_kv, positions_from_mask, unrotate_keys

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def folder() -> Path:
    if not (MODELS / NAME / "config.json").is_file() and not is_required("published"):
        skip_or_fail("published", f"{NAME} is not made (python tests/published_models.py)")
    try:
        return published_model(NAME)
    except NotThere as error:
        skip_or_fail("published", str(error))
        raise


def test_capture_gives_what_plain_hooks_see(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["2 + 3 makes 5.", "Tom has seven apples and eats two of them."], return_tensors="pt", padding=True
    )
    mask, seen = batch["attention_mask"].bool(), {}
    layers = (0, 13, 29)
    for layer in layers:
        attention = model.model.layers[layer].self_attn
        for name in ("k_proj", "v_proj"):
            getattr(attention, name).register_forward_hook(
                lambda _module, _inputs, output, key=(layer, name): seen.__setitem__(key, output)
            )
    positions = positions_from_mask(mask)
    with torch.no_grad(), capture_kv(model, layers=layers) as captured:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions)
    kv = unrotate_keys(captured.kv(mask, positions), model)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    for number, layer in enumerate(layers):
        for found, name in ((kv.keys[number], "k_proj"), (kv.values[number], "v_proj")):
            plain = seen[layer, name].view(*mask.shape, heads, size).transpose(1, 2)
            away = (found - plain)[mask[:, None, :, None].expand_as(found)].abs().max() / plain.abs().max()
            assert away < (1e-5 if name == "k_proj" else 1e-9), (layer, name, away)


def test_saved_and_loaded_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    CausalStudent(model).save(tmp_path / "model", AutoTokenizer.from_pretrained(folder))
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_twenty_questions(folder: Path, gsm8k_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evaluate", folder, "--tasks", "gsm8k", "--limit", 20, "--out", tmp_path / "out", "--json"]
    words += [f"data.root={gsm8k_root}", "evaluate.max_new_tokens=12", "evaluate.num_fewshot=0"]
    answer = invoke(monkeypatch, *words)
    assert answer.code == 0, answer
    rows = rows_of(tmp_path / "out/records.jsonl")
    assert len(rows) == 20 and sum(bool(row["completion"]) for row in rows) > 10
    assert all(row["tokens_in"] > 20 and row["forward_passes"] >= 1 for row in rows)


def study(folder: Path, gsm8k_root: Path, run: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "name": "published",
        "run_dir": str(run),
        "seeds": [42],
        "data": {
            "tokenizer": str(folder),
            "root": str(gsm8k_root),
            "max_length": 120,
            "tasks": [{"name": "gsm8k", "train": 12, "val": 4, "test": 4}],
        },
        "teachers": [{"name": "whole", "path": str(folder), "keep_layers": 6}],
        "student": {"path": str(folder), "keep_layers": 3},
        "train": {"steps": 3, "batch_size": 3, "learning_rate": 1e-4, "log_every": 1, "eval_every": 0}
        | {"eval_examples": 2, "save_every": 100},
        "loss": {"kv_weight": 1.0, "kv_warmup": 0},
        "align": {"calibration_examples": 6, "init": "ridge"},
        "evaluate": {"max_new_tokens": 2, "batch_size": 4, "match_examples": 2},
        "hardware": {"device": "cpu", "workers": 1},
        "arms": {"kv": {}},
        "report": {"comparisons": []},
    }
    return tree | changes


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bfloat16", "float16", "other family and tokenizer"])  # the last in float32
def test_a_few_steps_of_distillation(
    folder: Path, gsm8k_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    run = tmp_path / "run"
    tree = study(folder, gsm8k_root, run)
    if case.startswith("other"):
        tree["student"] = {"scratch": {"architecture": "gpt2", "hidden_size": 32, "num_layers": 2, "num_heads": 2}}
        tree["data"] |= {"tokenizer": str(gsm8k_root / "tokenizers/gpt2"), "trim_vocabulary": True}
    else:  # half precision for the teacher and the store; a student is trained in float32 or bfloat16
        tree["teachers"][0]["dtype"] = case
        tree["capture"] = {"dtype": case}
        tree["student"]["dtype"] = "bfloat16" if case == "bfloat16" else "float32"
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(tree))
    answer = invoke(monkeypatch, "run", path)
    assert answer.code == 0, answer
    log = [row for row in rows_of(run / "arms/kv/seed-42/log.jsonl") if "loss" in row]
    assert len(log) == 3 and all(0 < row["terms"][f"kv/whole/{kind}"]["raw"] < 10 for row in log for kind in "kv"), log
    match = json.loads((run / "arms/kv/seed-42/match.json").read_text())
    assert match["whole"]["k"]["r2"] is not None
