"""Loading and building models: sizes, seeds, errors that name the recipe key, LoRA, fingerprints."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, inputs, padded_batch, tiny_model

from kvdistill.core.errors import ModelError
from kvdistill.core.recipe import LoraRecipe, ModelRecipe, ScratchRecipe
from kvdistill.models import (
    add_lora,
    check_model_exists,
    describe_model,
    fingerprint_model,
    load_model,
    merge_lora,
    model_config,
)

SIZES = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "intermediate_size": 28}


def scratch(architecture="qwen2", attention="sdpa", dtype="float32", **changes):
    sizes = ScratchRecipe(**{"architecture": architecture, **SIZES, **changes})
    return ModelRecipe(scratch=sizes, attention=attention, dtype=dtype)


def load(recipe, seed=5, vocab_size=37, place="student"):
    return load_model(recipe, vocab_size=vocab_size, seed=seed, place=place)


@pytest.mark.parametrize("family", FAMILIES)
def test_scratch_models_have_the_sizes_asked_for(family):
    own = {} if family == "gpt2" else {"num_kv_heads": 2, "head_size": 10}
    model = load(scratch(family, attention="eager", **own))
    shape = describe_model(model)
    assert (shape.family, shape.num_layers, shape.num_heads, shape.hidden_size) == (family, 3, 6, 48)
    assert (shape.num_kv_heads, shape.head_size) == ((6, 8) if family == "gpt2" else (2, 10))
    assert (shape.intermediate_size, shape.vocab_size, shape.tied) == (28, 37, True)
    assert not model.training and model.config._attn_implementation == "eager"
    ids, mask = padded_batch()
    assert model(**inputs(ids, mask)).logits.shape == (3, 9, 37)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bits_and_the_global_stream_is_left_alone(family):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one = load(scratch(family))
    assert torch.rand(3).equal(expected)
    torch.manual_seed(77)
    two, other = load(scratch(family)), load(scratch(family), seed=6)
    assert all(a.equal(b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert fingerprint_model(one) == fingerprint_model(two) != fingerprint_model(other)


def test_half_precision_scratch_keeps_rotary_frequencies():
    full, half = load(scratch("qwen2")), load(scratch("qwen2", dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.equal(full.model.rotary_emb.inv_freq)
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert half.lm_head.weight.equal(full.lm_head.weight.bfloat16())


def test_a_saved_model_comes_back(tmp_path):
    model = load(scratch("qwen3"))
    model.save_pretrained(tmp_path)
    recipe = ModelRecipe(path=str(tmp_path), attention="eager")
    assert check_model_exists(recipe, "student").model_type == "qwen3"
    back = load(recipe)
    assert fingerprint_model(back) == fingerprint_model(model) and not back.training
    assert back.config._attn_implementation == "eager"
    assert {p.dtype for p in load(ModelRecipe(path=str(tmp_path), dtype="bfloat16")).parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match=r"student: the model has 37 token embeddings, the tokenizer has 38"):
        load(recipe, vocab_size=38)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"teachers\[1\]\.path: there is no folder .*/nothing\n  fix: give a folder"):
        check_model_exists(ModelRecipe(path=str(tmp_path / "nothing")), "teachers[1]")
    with pytest.raises(ModelError, match=r"student\.path: .* has no config\.json"):
        check_model_exists(ModelRecipe(path=str(tmp_path)), "student")
    model = load(scratch("llama"))
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no safetensors weights\n"):
        load(ModelRecipe(path=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"only pickled ones, which are never loaded"):
        load(ModelRecipe(path=str(tmp_path)))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks one\.safetensors"):
        load(ModelRecipe(path=str(tmp_path)))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a weight index"):
        load(ModelRecipe(path=str(tmp_path)))


def test_torn_and_incomplete_weights_are_refused(tmp_path):
    load(scratch("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"student\.path: .* lacks 1 weights, first model\.layers\.1\.mlp\.up_proj"):
        load(ModelRecipe(path=str(tmp_path)))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"student\.path: cannot load"):
        load(ModelRecipe(path=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_by_file_and_tensor_when_a_model_is_loaded(tmp_path, dtype, value):
    tiny_model("llama").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(file)
    assert load(ModelRecipe(path=str(tmp_path), dtype=dtype), vocab_size=3).dtype == getattr(torch, dtype)
    tensors[name][1, 2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{file}: tensor {name} holds 1 values of") as raised:
        load(ModelRecipe(path=str(tmp_path), dtype=dtype), vocab_size=3)
    assert raised.value.place == "student.path" and "damaged" in raised.value.fix


def test_weights_that_a_dtype_cannot_hold_are_told_from_damaged_ones(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(ModelRecipe(path=str(tmp_path), dtype="bfloat16"), vocab_size=3)
    with pytest.raises(ModelError, match=r"model.norm.weight has values that float16 cannot hold"):
        load(ModelRecipe(path=str(tmp_path), dtype="float16"), vocab_size=3)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    load(scratch("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.MyModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"(?s)student\.path: cannot load .*fix: use a model transformers knows"):
        load(ModelRecipe(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, r"student\.scratch\.num_kv_heads: 6 heads cannot share 4"),
        ({"hidden_size": 50}, r"student\.scratch\.hidden_size: hidden_size 50 is no multiple of num_heads 6"),
        ({"head_size": 7}, r"student\.scratch\.head_size: head size 7 is odd"),
        ({"architecture": "gpt2", "num_kv_heads": 2}, r"student\.scratch: GPT-2 has as many key/value heads"),
        ({"architecture": "gpt2", "head_size": 4}, r"student\.scratch: GPT-2 has as many key/value heads"),
        ({"architecture": "llama", "hidden_size": 50, "head_size": 8}, r"student\.scratch: llama does not take"),
        ({"vocab_size": 36}, r"student: the model has 36 token embeddings, the tokenizer has 37"),
    ],
)
def test_sizes_that_do_not_go_together(changes, message):
    with pytest.raises(ModelError, match=message):
        model_config(scratch(**changes), 37, "student")


def test_scratch_defaults():
    config = model_config(ModelRecipe(scratch=ScratchRecipe(vocab_size=99, rope_theta=777.0)), 12)
    assert (config.vocab_size, config.intermediate_size, config.num_key_value_heads) == (99, 176, 4)
    assert config.rope_parameters["rope_theta"] == 777.0 and config.tie_word_embeddings
    assert config.pad_token_id is None and config.eos_token_id is None
    mistral = model_config(scratch("mistral"), 12)
    assert mistral.sliding_window is None
    assert check_model_exists(scratch(), "student").model_type == "qwen2"


def test_flash_attention_without_a_gpu_is_an_error_with_its_key():
    if torch.cuda.is_available():
        return
    with pytest.raises(ModelError, match=r"student\.attention: cannot run attention flash_attention_2"):
        load(scratch(attention="flash_attention_2"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_trains_only_adapters_and_merges_exactly(family):
    plain = tiny_model(family)
    ids, mask = padded_batch()
    before = plain(**inputs(ids, mask)).logits
    lora = LoraRecipe(r=3, alpha=6, target_modules="all-linear")
    one, two = (add_lora(copy.deepcopy(plain), lora, seed=4) for _ in range(2))
    assert fingerprint_model(one) == fingerprint_model(two)
    assert one(**inputs(ids, mask)).logits.equal(before)
    trained = [n for n, p in one.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained) and not any("lm_head" in n for n in trained)
    for n, p in one.named_parameters():
        if "lora_B" in n:
            p.data.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    adapted = one(**inputs(ids, mask)).logits
    merged = merge_lora(one)
    assert type(merged) is type(plain) and merge_lora(merged) is merged
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(merged(**inputs(ids, mask)).logits, adapted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"student\.lora\.target_modules: no adapter fits"):
        add_lora(copy.deepcopy(plain), LoraRecipe(target_modules=["nowhere"]), seed=4)


def test_fingerprint_sees_names_shapes_types_and_every_byte():
    model = tiny_model()
    base = fingerprint_model(model)
    assert len(base) == 64 and fingerprint_model(copy.deepcopy(model)) == base
    changed = copy.deepcopy(model)
    changed.model.layers[2].mlp.up_proj.weight.data[-1, -1] += 1e-6
    assert fingerprint_model(changed) != base
    assert fingerprint_model(copy.deepcopy(model).to(torch.bfloat16)) != base
    square = torch.nn.Linear(4, 4)
    reshaped = copy.deepcopy(square)
    reshaped.weight.data = reshaped.weight.data.view(2, 8)
    assert fingerprint_model(reshaped) != fingerprint_model(square)
