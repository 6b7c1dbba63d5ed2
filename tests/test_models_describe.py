"""Sizes and FLOPs of every family against torch's flop counter and against counting parameters."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    FAMILIES,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    VOCAB,
    counted_flops,
    inputs,
    padded_batch,
    tiny_model,
)
from torch.utils.flop_counter import FlopCounterMode

from kvdistill.core.errors import ModelError
from kvdistill.models import (
    batch_geometry,
    capture_flops,
    capture_kv,
    describe_config,
    describe_model,
    forward_flops,
)
from kvdistill.models.forward import teacher_forward

B, T = 3, 11


def count(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counted_flops(counter)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shape_from_model_and_config(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    shape = describe_model(model)
    assert shape == describe_config(model.config)
    gpt2 = family == "gpt2"
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (LAYERS, HIDDEN, VOCAB)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size) == ((4, 4, 12) if gpt2 else (HEADS, KV_HEADS, 10))
    assert (shape.intermediate_size, shape.has_rope, shape.tied) == (INNER, not gpt2, tied)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_the_counters(family):
    model = tiny_model(family, attention="eager")  # the CPU's fused attention is not in the counter's list
    shape = describe_model(model)
    ids = torch.ones(B, T, dtype=torch.long)
    geometry = batch_geometry([T] * B)
    assert geometry == (B * T, B * T * T)
    batch = inputs(ids, torch.ones(B, T, dtype=torch.bool))
    assert count(lambda: model(**batch)) == forward_flops(shape, *geometry)
    assert count(lambda: model.get_decoder()(**batch)) == forward_flops(shape, *geometry, with_lm_head=False)
    kept = count(lambda: model(**batch, logits_to_keep=2))
    assert kept == forward_flops(shape, *geometry, num_head_tokens=B * 2)


@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_early_stop_runs_the_flops_it_says(family, top):
    model = tiny_model(family, attention="eager")
    ids, mask = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)

    def run():
        with capture_kv(model, layers=[top], stop_early=True):
            model(**inputs(ids, mask))

    assert count(run) == capture_flops(describe_model(model), B * T, B * T * T, top)


def test_the_head_runs_on_completion_tokens_only():
    model = tiny_model("llama", attention="eager")
    ids, mask = padded_batch((9, 5, 7))
    segments = mask.long()
    segments[:, -3:] = 3
    flops = count(lambda: teacher_forward(model, ids, mask, segments, want_nll=True))
    assert flops == forward_flops(describe_model(model), 27, 3 * 81, num_head_tokens=9)


def test_a_teacher_asked_for_kv_stops_early():
    model = tiny_model("mistral", attention="eager")
    ids, mask = padded_batch((9, 5, 7))
    flops = count(lambda: teacher_forward(model, ids, mask, mask.long(), layers=[0, 1]))
    assert flops == capture_flops(describe_model(model), 27, 3 * 81, top_layer=1)


def test_flops_of_parts_add_up():
    shape = describe_model(tiny_model("qwen2"))
    tokens, squares = batch_geometry([5, 2, 8])
    assert (tokens, squares) == (15, 93)
    whole = forward_flops(shape, tokens, squares)
    layer = forward_flops(shape, tokens, squares, num_layers=1, with_lm_head=False)
    assert whole - LAYERS * layer == 2 * tokens * HIDDEN * VOCAB
    assert forward_flops(shape, tokens, squares, num_layers=0, with_lm_head=False) == 0


def test_mixed_head_sizes_and_mixtures_of_experts_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.head_dim = 16
    with pytest.raises(ModelError, match="LlamaForCausalLM: layer 1 has head size 16, the config says 10"):
        describe_model(model)
    model = tiny_model("llama")
    model.config.num_experts = 4
    with pytest.raises(ModelError, match="mixture of experts"):
        describe_model(model)
