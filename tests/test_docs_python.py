"""The Python in README.md, README.zh-CN.md and docs/python.md runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvdistill.core.config import recipes_folder
from kvdistill.core.kv import KV
from kvdistill.data.tokenizers import as_read, character_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def run_blocks(page: str) -> dict[str, Any]:
    """All Python of a page in one namespace, as in a notebook; what is left in it."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture
def beside_a_demo(tmp_path, monkeypatch):
    """A working folder as in a checkout after `make demo`, with a student of the demo's sizes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(recipes_folder())
    tokenizer = as_read(character_tokenizer(), template="plain")
    torch.manual_seed(0)
    folder = "runs/demo/arms/competence/seed-42/model"
    sizes = {**SIZES, "num_key_value_heads": 4, "vocab_size": len(tokenizer)}
    Qwen2ForCausalLM(Qwen2Config(**sizes, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readmes_snippets_run_as_they_stand(beside_a_demo, capsys, page):
    kv = run_blocks(page)["kv"]
    assert isinstance(kv, KV) and kv.keys[0].requires_grad
    printed = capsys.readouterr().out
    assert repr(kv) in printed and repr(kv) in (ROOT / page).read_text(encoding="utf-8"), "the page shows what comes"


def test_the_notebook_page_runs_from_top_to_bottom(beside_a_demo, capsys):
    names = run_blocks("docs/python.md")
    printed = capsys.readouterr().out
    assert repr(names["kv"]) in printed and repr(names["kv"]) in (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert "did you mean 'steps'?" in printed
    assert len(names["records"]) == 40 and Path(names["page"]["page"]).is_file()


def test_the_verbs_do_nothing_twice_and_keep_quiet_when_asked(beside_a_demo, capsys):
    from kvdistill import load_recipe, prepare
    from kvdistill.core.progress import silent

    words = ["run_dir=runs/quiet", *(f"data.tasks.{i}.{split}=8" for i in (0, 1) for split in ("train", "val", "test"))]
    recipe = load_recipe("recipes/demo.yaml", [*words, "data.tasks.0.teach=8", "data.tasks.1.teach=8"])
    first = prepare(recipe, progress=silent)
    stamp = Path("runs/quiet/data/train.parquet").stat().st_mtime_ns
    assert prepare(recipe, progress=silent) == first
    assert Path("runs/quiet/data/train.parquet").stat().st_mtime_ns == stamp
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_keys_and_values_show_their_shapes_in_one_line():
    keys, values = torch.zeros(3, 2, 7, 5), torch.zeros(3, 2, 7, 4)
    mask = torch.ones(3, 7, dtype=torch.bool)
    kv = KV((keys, keys), (values, values), mask, torch.zeros(3, 7, dtype=torch.long), "none")
    assert repr(kv) == (
        "KV(2 layers: [3 texts, 2 heads, 7 tokens, size 5 (values 4)], keys without rotation, float32 on cpu)"
    )
