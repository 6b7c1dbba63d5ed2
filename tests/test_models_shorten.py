"""Models with fewer layers, and how long a text a model can read."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_recipe import assert_one_message, invoke, no_training, write_recipe
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    BloomConfig,
    CTRLConfig,
    GPT2Config,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
    XGLMConfig,
)

from kvdistill.core.errors import ModelError
from kvdistill.core.recipe import StudentRecipe
from kvdistill.models import load_model
from kvdistill.models.positions import most_positions
from kvdistill.models.shorten import kept_layers

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_positions=21, n_embd=16, n_layer=1, n_head=2),
        OPTConfig(**{k: v for k, v in SIZES.items() if k[0] != "i"}, ffn_dim=16, max_position_embeddings=21),
        BertConfig(**SIZES, max_position_embeddings=21),
        RobertaConfig(**SIZES, max_position_embeddings=23),
        BartConfig(**BART, max_position_embeddings=21),
        CTRLConfig(vocab_size=50, n_positions=21, n_embd=16, dff=16, n_layer=1, n_head=2),
        OpenAIGPTConfig(vocab_size=50, n_positions=21, n_embd=16, n_layer=1, n_head=2),
        LlamaConfig(**SIZES, max_position_embeddings=21),
        BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2),
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
        XGLMConfig(vocab_size=50, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2, max_position_embeddings=21),
    ],
    ids=lambda config: config.model_type,
)
def test_most_positions_is_where_a_model_stops_reading(config: Any) -> None:
    model = AutoModel.from_config(config).eval()
    limit = most_positions(model)

    def reads(length: int) -> bool:
        ids = torch.full((1, length), 5)
        try:
            model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))
        except (IndexError, RuntimeError):
            return False
        return True

    assert limit == (None if config.model_type in ("llama", "bloom", "t5", "xglm") else 21)
    assert reads(limit or 40) and (limit is None or not reads(limit + 1))


def saved(folder: Any, family: str, **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("there", "keep", "chosen"), [(5, 3, [0, 2, 4]), (30, 15, None), (4, 4, [0, 1, 2, 3]), (6, 1, [0])]
)
def test_the_layers_that_stay_are_evenly_spread(there: int, keep: int, chosen: list[int] | None) -> None:
    kept = kept_layers(there, keep)
    assert chosen is None or kept == chosen
    assert len(kept) == keep and kept == sorted(set(kept)) and kept[0] == 0 and (keep == 1 or kept[-1] == there - 1)
    assert keep == 1 or max(b - a for a, b in pairwise(kept)) <= -(-(there - 1) // (keep - 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_shorter_model_runs_its_layers_and_no_others(tmp_path, family):
    sizes = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
    whole = saved(tmp_path / "whole", family, **sizes)
    recipe = StudentRecipe(path=str(tmp_path / "whole"), keep_layers=3)
    short = load_model(recipe, vocab_size=whole.config.vocab_size, seed=0, place="student")
    backbone, other = (m.model if hasattr(m, "model") else m.transformer for m in (short, whole))
    name = "h" if family == "gpt2" else "layers"
    for new, old in enumerate((0, 2, 4)):
        mine, theirs = getattr(backbone, name)[new].state_dict(), getattr(other, name)[old].state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # a copy whose other layers were taken out by hand, and the shorter model after saving
    ids = torch.randint(0, whole.config.vocab_size, (2, 9))
    with torch.no_grad():
        logits = short(ids, use_cache=False).logits
        for number in (3, 1):
            del getattr(other, name)[number]
        if getattr(whole.config, "layer_types", None):
            whole.config.layer_types = [whole.config.layer_types[i] for i in (0, 2, 4)]
        whole.config.num_hidden_layers = 3
        assert torch.equal(logits, whole(ids, use_cache=False).logits)
        short.save_pretrained(tmp_path / "short")
        again = load_model(
            StudentRecipe(path=str(tmp_path / "short")), vocab_size=whole.config.vocab_size, seed=0, place="student"
        )
        assert torch.equal(logits, again(ids, use_cache=False).logits)
        assert torch.equal(logits.argmax(-1), short(ids, use_cache=True).logits.argmax(-1))


def test_more_layers_than_there_are_cannot_be_kept(tmp_path):
    saved(tmp_path / "whole", "llama")
    with pytest.raises(ModelError, match="9 layers are to be kept, the model has"):
        load_model(StudentRecipe(path=str(tmp_path / "whole"), keep_layers=9), vocab_size=11, seed=0, place="student")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"evaluate": {"max_new_tokens": 1020}}, ["student", "longest prompt with 1020 new tokens", "1024 tokens"]),
    ],
)
def test_texts_beyond_learned_positions_are_found_before_training(tmp_path, monkeypatch, changes, parts):
    student = {"scratch": {"architecture": "gpt2", "hidden_size": 16, "num_layers": 2, "num_heads": 2}}
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, student=student, **changes), work=no_training)
    assert_one_message(answer, *parts)


def test_every_model_that_cannot_read_its_texts_is_named_at_once(tmp_path, monkeypatch):
    from test_saved_student import CE, published_llama

    from kvdistill.data.tokenizers import load_tokenizer

    folder = published_llama(tmp_path / "tokenizer")
    vocabulary = len(load_tokenizer(str(folder)))
    config = GPT2Config(vocab_size=vocabulary, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    for name in ("student", "teacher"):
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
        for file in folder.glob("tokenizer*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    changes = {
        "data": {"tokenizer": str(folder)},
        "student": {"scratch": None, "path": str(tmp_path / "student")},
        "teachers": [{"name": "one", "path": str(tmp_path / "teacher")}],
        "arms": {**CE, "kv": {}},
    }
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path, **changes), work=no_training)
    assert_one_message(answer, "student (gpt2) reads at most 12 tokens", "teachers.0 (one) (gpt2) reads at most 12")
