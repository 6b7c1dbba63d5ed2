"""What else a capture keeps: hidden states, the scaling of q.k, queries and scores; and what cannot be captured."""

from __future__ import annotations

import pytest
import torch
from test_models_capture import assert_gradients_close, gradients
from test_models_encoders import HAS_T5, needs_t5, run
from test_models_forward import batch
from tiny_models import LAYERS, T5_DECODER_LAYERS, checkpoint_layers, inputs, padded_batch, tiny_encoder, tiny_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from kvdistill.core.errors import AlignmentError, ModelError
from kvdistill.models import capture_kv, teacher_forward, unrotate_keys
from kvdistill.models.capture import _BORROWED, _LISTENERS
from kvdistill.models.structure import layer_modules

NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert not _BORROWED and not _LISTENERS


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- hidden states --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "neox", "bert", pytest.param("t5", marks=needs_t5)])
def test_hidden_states_are_the_outputs_of_the_layers(family):
    encoder = family in ("bert", "t5")
    model = tiny_encoder(family) if encoder else tiny_model(family, **({"head_dim": 8} if family == "neox" else {}))
    ids, mask = padded_batch()
    given = run(model, ids, mask, output_hidden_states=True) if encoder else None
    states = given if encoder else model(**inputs(ids, mask), output_hidden_states=True)
    with capture_kv(model, layers=[2, 0], hidden=True) as capture:
        run(model, ids, mask) if encoder else model(**inputs(ids, mask))
    first, last = capture.hidden()
    assert_close(first, states.hidden_states[1], 1e-6)  # transformers' entry 0 is the embedding
    assert last.shape == first.shape == (*ids.shape, model.config.hidden_size) and capture.kv(mask).layers == (0, 2)
    norm = {"qwen2": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"} | {
        "t5": "encoder.final_layer_norm"
    }
    normed = model.get_submodule(norm[family])(last) if family in norm else last
    assert_close(normed, states.hidden_states[LAYERS], 1e-5)


@needs_t5
def test_hidden_states_of_the_decoder_stack():
    model = tiny_encoder("t5")
    ids, mask = padded_batch()
    states = run(model, ids, mask, "decoder", output_hidden_states=True).decoder_hidden_states
    with capture_kv(model, hidden=True, stack="decoder") as capture:
        run(model, ids, mask, "decoder")
    assert len(capture.hidden()) == T5_DECODER_LAYERS
    assert_close(capture.hidden()[0], states[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_early_stop_waits_for_the_last_hidden_state(family):
    model = tiny_model(family)
    ids, mask = padded_batch()
    states = model(**inputs(ids, mask), output_hidden_states=True).hidden_states
    runs, after = [], []
    for n, layer in enumerate(layer_modules(model)):
        layer.register_forward_pre_hook(lambda *_, n=n: runs.append(n))
    model.lm_head.register_forward_pre_hook(lambda *_: runs.append("head"))
    hooks = [dict(m._forward_hooks) for m in layer_modules(model)]  # output_hidden_states leaves transformers' own
    with torch.no_grad(), capture_kv(model, layers=[1, 0], stop_early=True, hidden=True) as capture:
        model(**inputs(ids, mask))
        after.append("reached")
    assert runs == [0, 1] and not after and capture.kv(mask).layers == (0, 1)
    for n in (0, 1):
        assert_close(capture.hidden()[n], states[n + 1], 1e-6)
    assert [dict(m._forward_hooks) for m in layer_modules(model)] == hooks


def test_hidden_states_carry_the_gradient_with_and_without_checkpointing():
    model = tiny_model("qwen3").train()
    ids, mask = padded_batch()
    weights = [torch.randn(*ids.shape, 48, generator=torch.Generator().manual_seed(n)) for n in range(LAYERS)]

    def loss_of(hidden):
        total = sum((x * w * mask[..., None]).sum() for x, w in zip(hidden, weights, strict=True))
        total.backward()
        return gradients(model)

    def recorded():
        with capture_kv(model, hidden=True) as capture:
            model(**inputs(ids, mask))
        return loss_of(capture.hidden())

    plain = recorded()
    outputs = []
    hooks = [m.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for m in layer_modules(model)]
    model(**inputs(ids, mask))
    for hook in hooks:
        hook.remove()
    assert_gradients_close(plain, loss_of(outputs), 1e-6)
    checkpoint_layers(model)
    assert_gradients_close(recorded(), plain, 1e-6)


def test_hidden_states_that_were_not_asked_for():
    model = tiny_model()
    ids, mask = padded_batch()
    with capture_kv(model, layers=[1]) as capture:
        model(**inputs(ids, mask))
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: layer 1 recorded no hidden states\n.*hidden=True"):
        capture.hidden()
    shared = tiny_model()
    shared.model.layers = nn.ModuleList(list(shared.model.layers)[:2])  # fewer than the config's three
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: its layers do not stand in one list"):
        capture_kv(shared, hidden=True)


# -- the scaling of q.k ---------------------------------------------------------------------------

SCALED = {
    "qwen2": {},
    "gemma3": {"query_pre_attn_scalar": 17, "layer_types": ["full_attention"] * 3},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "phi": {"hidden_size": 60, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}},
    "bert": {},
}


@pytest.mark.parametrize("family", [*SCALED, pytest.param("t5", marks=needs_t5)])
def test_what_was_recorded_is_all_that_attention_needs(family):
    """softmax(scaling q.k + mask)v from the recorded tensors is what the layer's output projection is given."""
    encoder = family in ("bert", "t5")
    model = tiny_encoder(family) if encoder else tiny_model(family, **SCALED[family])
    ids, mask = padded_batch()
    names = ("o_proj", "attn.c_proj", "self_attn.dense", "attention.output.dense", "SelfAttention.o")
    given = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
        for name, module in model.named_modules()
        if name.endswith(names)
    ]
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        run(model, ids, mask) if encoder else model(**inputs(ids, mask))
    for hook in hooks:
        hook.remove()
    kv = capture.kv(mask)
    allowed = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    if not encoder:
        allowed = allowed & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    bias = 0.0
    if family == "t5":
        bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(ids.shape[1], ids.shape[1]).double()
    for layer, (q, k, v) in enumerate(zip(kv.queries, kv.keys, kv.values, strict=True)):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
        logits = (q.double() @ k.transpose(2, 3) * kv.scaling[layer] + bias).masked_fill(~allowed, -1e30)
        output = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert_close(given[layer].double()[mask], output[mask], 1e-4)
    wanted = {"gemma3": [17**-0.5] * 3, "gpt2": [12**-0.5, 12**-0.5 / 2, 12**-0.5 / 3], "t5": [1.0] * 3}
    assert list(kv.scaling) == pytest.approx(wanted.get(family, [kv.keys[0].shape[-1] ** -0.5] * 3))


def test_scaling_goes_where_the_layers_go():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    ids, mask = padded_batch()
    with torch.no_grad(), capture_kv(model) as capture:
        model(**inputs(ids, mask))
    kv = capture.kv(mask)
    assert kv.select_layers([2, 0]).scaling == (kv.scaling[2], kv.scaling[0])
    for other in (kv.detach(), kv.to(torch.float64), kv.map_layers(torch.clone), unrotate_keys(kv, model)):
        assert other.scaling == kv.scaling
    with pytest.raises(AlignmentError, match="1 scalings for 3 layers"):
        type(kv)(kv.keys, kv.values, kv.mask_BT, kv.positions_BT, "none", scaling=(1.0,))


# -- queries and scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_scorer_sees_what_attention_sees(family):
    model = tiny_model(family)
    ids, mask, segments = batch()
    with torch.no_grad(), capture_kv(model, layers=[0, 2], queries=True) as capture:
        model(**inputs(ids, mask))
    expected = capture.kv(mask)
    seen = []

    def scorer(kv, segments_BT):
        seen.append(kv)
        assert segments_BT.equal(segments) and not kv.keys[0].requires_grad
        pairs = zip(kv.keys, kv.values, strict=True)
        norms = torch.stack([torch.stack([k.norm(dim=-1), v.norm(dim=-1)]) for k, v in pairs])
        return norms.permute(2, 4, 0, 1, 3).double()  # [M, 2, B, G, S] -> [B, S, M, 2, G]

    out = teacher_forward(model, ids, mask, segments, layers=[0, 2], want_nll=True, scorer=scorer)
    assert seen[0].rope == expected.rope and seen[0].scaling == expected.scaling
    for a, b in zip((*seen[0].keys, *seen[0].queries), (*expected.keys, *expected.queries), strict=True):
        assert a.equal(b)
    B, T, G = *ids.shape, expected.keys[0].shape[1]
    assert out.scores_BSMRG.shape == (B, T, 2, 2, G) and out.scores_BSMRG.dtype == torch.float32
    assert out.scores_BSMRG[1, 4, 1, 0, 1] == pytest.approx(float(expected.keys[1][1, 1, 4].norm()))
    assert out.nll_B is not None and out.kv.queries == () and out.kv.scaling == expected.scaling
    plain = unrotate_keys(expected, model)
    both = teacher_forward(model, ids, mask, segments, layers=[0, 2], want_queries=True)
    for a, b in zip((*both.kv.queries, *both.kv.keys), (*plain.queries, *plain.keys), strict=True):
        assert a.equal(b)
    assert both.scores_BSMRG is None
    with pytest.raises(AlignmentError, match=rf"the scorer gave \(3, 9\)\n.*= \(3, 9, 3, kinds, {G}\)"):
        teacher_forward(model, ids, mask, segments, scorer=lambda kv, s: s.float())


# -- what cannot be captured ----------------------------------------------------------------------


class OwnAttention(nn.Module):
    """Attention as code that comes with a model may write it: no interface anywhere in its file."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states, **_):
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), None


def with_own_attention(layers):
    model = tiny_model("llama")
    for n in layers:
        model.model.layers[n].self_attn = OwnAttention(model.config, n)
    return model.eval()


def test_attention_of_its_own_is_named_before_anything_runs():
    model = with_own_attention(range(LAYERS))
    for layer in model.model.layers:
        layer.layer_idx = None
    ids, mask = padded_batch()
    assert torch.isfinite(model(**inputs(ids, mask)).logits).all()
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: layer 0 \(OwnAttention\) .*bypasses transformers' att"):
        capture_kv(model)
    mixed = with_own_attention([1])
    with torch.no_grad(), capture_kv(mixed) as capture:
        mixed(**inputs(ids, mask))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: layer 1 recorded no keys"):
        capture.kv(mask)
    assert teacher_forward(mixed, ids, mask, mask.long(), layers=[0, 2]).kv.layers == (0, 2)


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_models_without_attention_are_named(family):
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, **NONE}
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes, state_size=4)).eval()
    else:
        model = RwkvForCausalLM(RwkvConfig(**sizes, attention_hidden_size=16, context_length=32)).eval()
    ids, mask = padded_batch()
    with pytest.raises(ModelError, match=rf"(?i){family}ForCausalLM: layer 0 \({family}\w+\) .*it has no attention"):
        teacher_forward(model, ids, mask, mask.long())
    segments = mask.long() * 3
    out = teacher_forward(model, ids, mask, segments, want_kv=False, want_nll=True)  # its logits serve all the same
    assert out.kv is None and bool(out.nll_B.isfinite().all())


@pytest.mark.skipif(HAS_T5, reason="this transformers' T5 goes through the attention interface")
def test_an_older_t5_is_named():
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration: layer 0 .*bypasses(?s:.*)newer than 5\.13"):
        capture_kv(tiny_encoder("t5", attention="eager"))
