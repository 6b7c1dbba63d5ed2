"""Encoders and encoder-decoders: keys, values, queries and hidden states against projections made by hand; sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_models_capture import assert_gradients_close, gradients, weighted_sum
from test_models_describe import count
from tiny_models import (
    BERT_HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    T5_DECODER_LAYERS,
    T5_HEAD,
    T5_HEADS,
    VOCAB,
    padded_batch,
    slow_encoder_projections,
    slow_rotation,
    tiny_encoder,
    tiny_model,
)
from torch import nn
from transformers.models.t5 import modeling_t5

from kvdistill.core.errors import ModelError
from kvdistill.core.segments import PROMPT
from kvdistill.models import (
    capture_flops,
    capture_kv,
    describe_config,
    describe_model,
    find_backbone,
    forward_flops,
    model_kind,
    rotate_keys,
    teacher_forward,
    unrotate_keys,
)
from kvdistill.models.capture import _BORROWED, _LISTENERS
from kvdistill.models.structure import layer_modules, numbered_attention, text_config

HAS_T5 = hasattr(modeling_t5, "ALL_ATTENTION_FUNCTIONS")  # transformers 5.13's T5 goes around the interface
needs_t5 = pytest.mark.skipif(not HAS_T5, reason="this transformers' T5 bypasses the attention interface")
STACKS = ["bert", pytest.param("t5", marks=needs_t5)]


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert not _BORROWED and not _LISTENERS


def run(model, ids, mask, stack="encoder", **more):
    """The whole forward of the encoder, or of an encoder-decoder with the same text on both sides."""
    given = {"input_ids": ids, "attention_mask": mask.long(), **more}
    if model_kind(model.config) == "encoder":
        given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    if stack == "decoder":
        return model(**given, decoder_input_ids=ids, decoder_attention_mask=mask.long(), use_cache=False)
    return find_backbone(model)(**given)


def captured(model, ids, mask, stack="encoder", **options):
    with capture_kv(model, stack=stack, **options) as capture:
        run(model, ids, mask, stack)
    return capture.kv(mask)


CASES = [("bert", "encoder"), *(pytest.param("t5", s, marks=needs_t5) for s in ("encoder", "decoder"))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "stack"), CASES)
def test_recorded_tensors_are_the_projections(family, stack, attention):
    model = tiny_encoder(family, attention=attention)
    ids, mask = padded_batch()
    states = run(model, ids, mask, stack, output_hidden_states=True)
    hidden = states.decoder_hidden_states if stack == "decoder" else states.hidden_states
    kv = captured(model, ids, mask, stack, queries=True)
    layers = T5_DECODER_LAYERS if stack == "decoder" else LAYERS
    assert kv.rope == "none" and kv.layers == tuple(range(layers))
    assert kv.scaling == ((1.0,) * layers if family == "t5" else (pytest.approx(12**-0.5),) * layers)
    for layer, (q, k, v) in enumerate(slow_encoder_projections(model, hidden, stack)):
        assert k.shape[1::2] == ((T5_HEADS, T5_HEAD) if family == "t5" else (BERT_HEADS, 12))
        assert_close(kv.queries[layer], q)
        assert_close(kv.keys[layer], k)
        assert_close(kv.values[layer], v)
    assert unrotate_keys(kv, model) is kv and rotate_keys(kv, model) is kv


@pytest.mark.parametrize(("family", "stack"), CASES)
def test_capture_changes_no_output_and_restores(family, stack):
    model = tiny_encoder(family)
    ids, mask = padded_batch(side="right")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = run(model, ids, mask, stack)[0]
    with capture_kv(model, layers=[1], stack=stack, hidden=True) as capture:
        assert find_backbone(model, stack).config._attn_implementation == "kvdistill_sdpa"
        inside = run(model, ids, mask, stack)[0]
    assert inside.equal(before) and all(c._attn_implementation == "sdpa" for c in configs)
    assert capture.kv(mask).layers == (1,) and len(capture.hidden()) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", STACKS)
def test_an_encoder_sees_what_comes_after_and_a_decoder_does_not(family):
    model = tiny_encoder(family)
    ids, mask = padded_batch((9, 9, 9))
    other = ids.clone()
    other[:, -1] = other[:, -1] % (VOCAB - 1) + 1
    one, two = (captured(model, x, mask) for x in (ids, other))
    assert one.keys[0][:, :, :-1].equal(two.keys[0][:, :, :-1])
    assert ((one.keys[1] - two.keys[1])[:, :, 0].abs().amax(-1) > 1e-6).all()
    if family == "t5":
        encoded = model.encoder(input_ids=ids, attention_mask=mask.long())
        with capture_kv(model, stack="decoder") as a, torch.no_grad():
            model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False)
        with capture_kv(model, stack="decoder") as b, torch.no_grad():
            model(encoder_outputs=encoded, decoder_input_ids=other, use_cache=False)
        assert_close(a.kv(mask).keys[1][:, :, :-1], b.kv(mask).keys[1][:, :, :-1], 1e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert", pytest.param("t5", marks=needs_t5)])
def test_padding_changes_nothing_at_real_tokens(family):
    model = tiny_encoder(family)
    lengths = (9, 5, 7)
    sides = {side: padded_batch(lengths, side) for side in ("left", "right")}
    ids, mask = sides["left"]
    wide = (nn.functional.pad(ids, (4, 0)), nn.functional.pad(mask, (4, 0)))
    kvs = [teacher_forward(model, *b, b[1].long()).kv for b in (*sides.values(), wide)]
    for b, length in enumerate(lengths):
        row = sides["right"][0][b : b + 1, :length]
        alone = teacher_forward(model, row, torch.ones_like(row).bool(), torch.ones_like(row)).kv
        for kv in kvs:
            for layer in range(LAYERS):
                assert_close(kv.keys[layer][b, :, kv.mask_BT[b]], alone.keys[layer][0])
                assert_close(kv.values[layer][b, :, kv.mask_BT[b]], alone.values[layer][0])


def test_an_encoder_that_numbers_its_tokens_itself_is_left_to_it():
    model = tiny_encoder("roberta")  # its positions begin at padding_idx + 1
    ids, mask = padded_batch((9, 5, 7), "right")
    hidden = model.roberta(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    kv = teacher_forward(model, ids, mask, mask.long()).kv
    for layer, (_, k, _) in enumerate(slow_encoder_projections(model, hidden)):
        assert_close(kv.keys[layer] * mask[:, None, :, None], k.detach() * mask[:, None, :, None])


def test_an_encoder_with_rotary_positions():
    model = tiny_encoder("modernbert", attention="eager")
    ids, mask = padded_batch()
    kv = captured(model, ids, mask)
    plain = unrotate_keys(kv, model)
    assert (kv.rope, plain.rope) == ("rotated", "unrotated")
    for layer, kind in enumerate(model.config.layer_types):
        inv_freq = getattr(model.model.rotary_emb, f"{kind}_inv_freq")
        assert_close(slow_rotation(plain.keys[layer], plain.positions_BT, inv_freq), kv.keys[layer])
    assert len(set(model.config.layer_types)) == 2


@pytest.mark.parametrize(("family", "stack"), CASES)
def test_gradient_is_that_of_an_explicit_recomputation(family, stack):
    model = tiny_encoder(family, attention="eager")
    ids, mask = padded_batch()
    weighted_sum(captured(model, ids, mask, stack), mask).backward()
    fast = gradients(model)
    states = run(model, ids, mask, stack, output_hidden_states=True)
    hidden = states.decoder_hidden_states if stack == "decoder" else states.hidden_states
    slow = slow_encoder_projections(model, hidden, stack)
    weighted_sum(SimpleNamespace(keys=[k for _, k, _ in slow], values=[v for _, _, v in slow]), mask).backward()
    assert_gradients_close(fast, gradients(model), 2e-5)


# -- sizes ----------------------------------------------------------------------------------------

B, T = 3, 11
SIZED = ["bert", "modernbert", "bart", pytest.param("t5", marks=needs_t5)]


@pytest.mark.parametrize("family", SIZED)
def test_shape_and_flops_of_an_encoder_pass(family):
    model = tiny_encoder(family, attention="eager")
    shape = describe_model(model)
    assert shape == describe_config(model.config) and shape.kind == model_kind(model.config)
    heads = {"bert": (4, 12), "modernbert": (4, 12), "bart": (3, 16), "t5": (T5_HEADS, T5_HEAD)}[family]
    assert (shape.num_heads, shape.head_size) == heads and shape.num_kv_heads == shape.num_heads
    assert (shape.num_layers, shape.hidden_size, shape.intermediate_size) == (LAYERS, HIDDEN, INNER)
    assert (shape.vocab_size, shape.has_rope, shape.tied) == (VOCAB, family == "modernbert", True)
    ids, mask = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
    whole = count(lambda: find_backbone(model)(input_ids=ids, attention_mask=mask.long()))
    forward = forward_flops(shape, B * T, B * T * T)
    assert forward == forward_flops(shape, B * T, B * T * T, with_lm_head=False)
    loose = 1e-2 if family == "modernbert" else 0  # some versions make its angles by a matrix product, which counts
    assert whole == pytest.approx(forward, rel=loose, abs=0)
    for top in range(LAYERS):
        flops = count(lambda top=top: teacher_forward(model, ids, mask, mask.long(), layers=[0, top]))
        assert flops == pytest.approx(capture_flops(shape, B * T, B * T * T, top), rel=loose, abs=0)


@needs_t5
def test_the_decoder_stack_has_sizes_of_its_own():
    gated = tiny_encoder("t5", feed_forward_proj="gated-gelu")
    shape = describe_model(gated, stack="decoder")
    assert shape == describe_config(gated.config, stack="decoder")
    assert (shape.num_layers, shape.mlp_matrices) == (T5_DECODER_LAYERS, 3)
    bart = tiny_encoder("bart")
    shape = describe_model(bart, stack="decoder")
    assert (shape.num_layers, shape.num_heads, shape.head_size, shape.intermediate_size) == (2, 4, 12, 32)
    with pytest.raises(ModelError, match=r"layer 2 is asked for, the model has layers 0-1"):
        capture_kv(gated, layers=[2], stack="decoder")


# -- stacks and layers ----------------------------------------------------------------------------


def test_a_stack_that_is_not_there_is_named():
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: the encoder stack is asked for, .* is a decoder"):
        capture_kv(tiny_model(), stack="encoder")
    with pytest.raises(ModelError, match=r"BertForMaskedLM: the decoder stack is asked for, .* is an encoder"):
        capture_kv(tiny_encoder(), stack="decoder")
    assert capture_kv(tiny_model(), stack="decoder").layers == capture_kv(tiny_model()).layers
    assert text_config(tiny_encoder("bart"), "decoder").num_hidden_layers == 2


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_cross_attention_is_left_out_and_modules_without_number_are_counted(family):
    model = tiny_encoder(family)
    ids, mask = padded_batch()
    expected = captured(model, ids, mask)
    stacks = ["encoder"] if family == "bert" else ["encoder", "decoder"]
    for stack in stacks:
        numbered = numbered_attention(model, stack)
        for _, module in numbered:
            module.layer_idx = None
        again = numbered_attention(model, stack)
        inner = {module: number for number, module in again}
        assert all(inner[module] == number for number, module in numbered)
        assert not any("encoder_attn" in n for n, m in model.named_modules() if m in inner)
    got = captured(model, ids, mask)
    assert all(a.equal(b) for a, b in zip(got.keys, expected.keys, strict=True))


@pytest.mark.parametrize("family", STACKS)
def test_stop_early_skips_everything_above(family):
    model = tiny_encoder(family)
    ids, mask = padded_batch()
    full = captured(model, ids, mask)
    runs, after = [], []
    for n, layer in enumerate(layer_modules(model)):
        layer.register_forward_pre_hook(lambda *_, n=n: runs.append(n))
    with torch.no_grad(), capture_kv(model, layers=[1], stop_early=True) as capture:
        run(model, ids, mask)
        after.append("reached")
    assert runs == [0, 1] and not after
    assert_close(capture.kv(mask).keys[0], full.keys[1], 1e-6)  # without a gradient sdpa takes another kernel


# -- as teachers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STACKS)
def test_a_teacher_that_predicts_nothing(family):
    model = tiny_encoder(family)
    ids, mask = padded_batch()
    segments = mask.long() * PROMPT  # no completion at all: of no concern to an encoder
    out = teacher_forward(model, ids, mask, segments, layers=[2, 0], want_nll=True, want_queries=True)
    assert out.nll_B is None and out.topk_index_BSK is None and out.kv.layers == (0, 2)
    assert out.kv.rope == "none" and len(out.kv.queries) == 2 and len(out.kv.scaling) == 2
    nothing = teacher_forward(model, ids, mask, segments, want_kv=False, want_nll=True)
    assert nothing.kv is None and nothing.nll_B is None
    with pytest.raises(ModelError, match=r"an encoder predicts no next token: it has no logits to distil"):
        teacher_forward(model, ids, mask, segments, want_logits_top_k=3)
