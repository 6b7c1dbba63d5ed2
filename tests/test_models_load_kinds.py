"""Loading encoders, encoder-decoders and the partial rotary families: from sizes, from folders, and as what."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models_encoders import needs_t5
from test_models_load import load, scratch
from tiny_models import inputs, padded_batch, tiny_encoder
from transformers import BertModel, T5EncoderModel

from kvdistill.core.errors import ModelError
from kvdistill.core.recipe import ModelRecipe, ScratchRecipe, StudentRecipe, TeacherRecipe
from kvdistill.models import (
    auto_class,
    check_model_exists,
    describe_model,
    fingerprint_model,
    model_config,
    model_kind,
    require_causal,
    teacher_forward,
)

KINDS = {"gpt_neox": "decoder", "phi": "decoder", "bert": "encoder", "t5": "encoder-decoder"}
CLASSES = {"gpt_neox": "GPTNeoXForCausalLM", "phi": "PhiForCausalLM", "bert": "BertForMaskedLM"} | {
    "t5": "T5ForConditionalGeneration"
}


@pytest.mark.parametrize("family", KINDS)
def test_scratch_models_have_the_sizes_asked_for(family):
    own = {"head_size": 10} if family == "t5" else {}
    model = load(scratch(family, attention="eager", **own))
    shape = describe_model(model)
    assert type(model).__name__ == CLASSES[family] and shape.kind == KINDS[family] == model_kind(model.config)
    assert (shape.family, shape.num_layers, shape.num_heads, shape.hidden_size) == (family, 3, 6, 48)
    assert (shape.num_kv_heads, shape.head_size) == (6, 10 if family == "t5" else 8)
    assert (shape.intermediate_size, shape.vocab_size, shape.tied) == (28, 37, True)
    assert not model.training and model.config._attn_implementation == "eager"
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    assert fingerprint_model(model) == fingerprint_model(load(scratch(family, attention="eager", **own)))
    if KINDS[family] == "decoder":
        ids, mask = padded_batch()
        assert model(**inputs(ids, mask)).logits.shape == (3, 9, 37)
        rotary = model.get_decoder().rotary_emb
        assert len(rotary.inv_freq) == {"gpt_neox": 1, "phi": 2}[family]  # a quarter, or half, of 8 channels, in pairs


@pytest.mark.parametrize("family", ["gpt_neox", "phi", "bert", pytest.param("t5", marks=needs_t5)])
def test_a_saved_model_comes_back_and_gives_the_same_keys(family, tmp_path):
    model = load(scratch(family))
    model.save_pretrained(tmp_path)
    recipe = TeacherRecipe(name="one", path=str(tmp_path), attention="eager")
    assert model_kind(check_model_exists(recipe, "teachers[0]")) == KINDS[family]
    back = load(recipe, place="teachers[0]")
    assert type(back) is type(model) and fingerprint_model(back) == fingerprint_model(model)
    ids, mask = padded_batch()
    one, two = (teacher_forward(m, ids, mask, mask.long(), layers=[2]).kv for m in (model, back))
    for a, b in zip((*one.keys, *one.values), (*two.keys, *two.values), strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[mask], b.transpose(1, 2)[mask], rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=r"teachers\[0\]: the model has 37 token embeddings, the tokenizer has 38"):
        model_config(recipe, 38, "teachers[0]")


@needs_t5
def test_the_encoder_of_t5_alone(tmp_path):
    whole = tiny_encoder("t5")
    ids, mask = padded_batch()
    expected = teacher_forward(whole, ids, mask, mask.long()).kv
    alone = T5EncoderModel(whole.encoder.config).eval()
    alone.encoder.load_state_dict(whole.encoder.state_dict())
    alone.save_pretrained(tmp_path)
    back = load(ModelRecipe(path=str(tmp_path)), place="teachers[0]")
    assert type(back) is T5EncoderModel and model_kind(back.config) == "encoder"
    kv = teacher_forward(back, ids, mask, mask.long()).kv
    assert all(a.equal(b) for a, b in zip(kv.keys, expected.keys, strict=True))
    shape = describe_model(back)
    assert (shape.kind, shape.num_layers, shape.head_size) == ("encoder", 3, 7)


def test_a_bert_without_a_pooler_is_whole_and_one_without_a_layer_is_not(tmp_path):
    masked = tiny_encoder("bert")
    BertModel(masked.config, add_pooling_layer=False).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    recipe = ModelRecipe(path=str(tmp_path))
    model = load(recipe, place="teachers[0]")
    assert type(model) is BertModel and describe_model(model).num_layers == 3
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.attention.self.key.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, first encoder\.layer\.1(?s:.*)the whole BertModel"):
        load(recipe, place="teachers[0]")


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_student_must_be_causal(family, tmp_path):
    sizes = ScratchRecipe(architecture=family, hidden_size=48, num_layers=3, num_heads=6)
    what = f"{family} is an {KINDS[family]}: it does not continue a text from left to right"
    with pytest.raises(ModelError, match=rf"student\.scratch\.architecture: {what}\n.*can be teachers"):
        model_config(StudentRecipe(scratch=sizes), 37, "student")
    with pytest.raises(ModelError, match=what):
        check_model_exists(StudentRecipe(scratch=sizes), "student")
    load(scratch(family, attention="eager")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"student\.path: {what}"):
        load(StudentRecipe(path=str(tmp_path)))
    with pytest.raises(ModelError, match=rf"model: {what}"):
        require_causal(model_config(scratch(family), 37), "model")
    require_causal(model_config(scratch("phi"), 37), "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt_neox", "num_kv_heads": 2}, r"student\.scratch: GPT-NeoX has as many key/value heads"),
        ({"architecture": "bert", "head_size": 4}, r"student\.scratch: BERT has as many(?s:.*)unset for bert"),
        ({"architecture": "t5", "num_kv_heads": 2}, r"student\.scratch: T5 has as many key/value heads as heads"),
        ({"architecture": "gpt_neox", "num_heads": 4}, r"head_size: 3 channels of a head are turned: .*in pairs"),
        ({"architecture": "phi", "head_size": 6}, r"head_size: 3 channels of a head are turned(?s:.*)multiple of 8"),
    ],
)
def test_sizes_that_do_not_go_together(changes, message):
    with pytest.raises(ModelError, match=message):
        model_config(scratch(**changes), 37, "student")


def test_what_a_config_is_built_as():
    bert, t5 = model_config(scratch("bert"), 37), model_config(scratch("t5"), 37)
    names = []
    for config, saved_as in (
        (bert, None),
        (bert, "BertForMaskedLM"),
        (bert, "BertForSequenceClassification"),
        (bert, "BertLMHeadModel"),
        (t5, None),
        (t5, "T5ForConditionalGeneration"),
        (t5, "T5Model"),
        (t5, "T5EncoderModel"),
        (model_config(scratch("gpt_neox"), 37), None),
    ):
        config.architectures = saved_as and [saved_as]
        names.append(auto_class(config).__name__.removeprefix("AutoModel"))
    assert names[:4] == ["ForMaskedLM", "ForMaskedLM", "", "ForCausalLM"]
    assert names[4:] == ["ForSeq2SeqLM", "ForSeq2SeqLM", "", "ForTextEncoding", "ForCausalLM"]
