"""unrotate_keys and rotate_keys against complex arithmetic, for every scaling; frames, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import inputs, padded_batch, slow_projections, slow_rotation, tiny_model, yarn_factor
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    Gemma3TextConfig,
    Olmo3Config,
    SmolLM3Config,
)

from kvdistill.core.errors import AlignmentError
from kvdistill.models import capture_kv, rotary_only, rotate_keys, unrotate_keys
from kvdistill.models.rope import turn_pairs, turning_layers

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 5e3},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def scaled_model(name, family="llama", max_positions=64):
    # dynamic scaling acts on texts longer than max_position_embeddings
    return tiny_model(
        family, attention="eager", rope_parameters=dict(SCALINGS[name]), max_position_embeddings=max_positions
    )


def captured(model, ids, mask, **options):
    with torch.no_grad(), capture_kv(model, **options) as capture:
        model(**inputs(ids, mask))
    return capture.kv(mask)


@pytest.mark.parametrize("name", SCALINGS)
def test_unrotate_is_exact_for_every_scaling(name):
    model = scaled_model(name, max_positions=8 if name == "dynamic" else 64)
    ids, mask = padded_batch((23, 5, 17))
    kv = captured(model, ids, mask, queries=True)
    plain = unrotate_keys(kv, model)
    back = rotate_keys(plain, model)
    factor = yarn_factor(4.0) if name == "yarn" else 1.0
    assert model.model.rotary_emb.attention_scaling == pytest.approx(factor)
    assert (plain.rope, back.rope) == ("unrotated", "rotated")
    for layer, (q, k, v) in enumerate(slow_projections(model, ids, mask)):
        scale = float(k.detach().abs().max())
        assert float((plain.keys[layer] - k).detach().abs().max()) <= 1e-5 * scale
        assert float((plain.queries[layer] - q).detach().abs().max()) <= 1e-5 * float(q.detach().abs().max())
        assert float((back.keys[layer] - kv.keys[layer]).abs().max()) <= 1e-5 * scale
        slow = slow_rotation(k, kv.positions_BT, model.model.rotary_emb.inv_freq, factor)
        torch.testing.assert_close(kv.keys[layer], slow, rtol=1e-5, atol=1e-5)
        assert kv.values[layer] is plain.values[layer] and v.shape == plain.values[layer].shape


def test_scalings_do_differ():
    ids, mask = padded_batch((23, 5, 17))
    keys = {n: captured(scaled_model(n, max_positions=8), ids, mask).keys[0] for n in SCALINGS}
    for name in ("linear", "dynamic", "yarn", "llama3"):
        assert (keys[name] - keys["default"]).abs().max() > 1e-2


def test_dynamic_scaling_does_not_depend_on_what_ran_before():
    long, short = padded_batch((30, 28, 29)), padded_batch((12, 9, 11))
    model, fresh = (scaled_model("dynamic", max_positions=8) for _ in range(2))
    first = captured(model, *long)
    second = captured(model, *short)  # transformers alone would go on with the angles of 30 positions
    assert second.keys[1].equal(captured(fresh, *short).keys[1])
    unrotate_keys(second, model)  # the once-only look at the layout is over
    model(**inputs(*long))  # grows again, outside of any capture
    for kv, batch in ((second, short), (first, long)):
        plain = unrotate_keys(kv, model)
        for layer, (_, k, _) in enumerate(slow_projections(scaled_model("dynamic", max_positions=8), *batch)):
            torch.testing.assert_close(plain.keys[layer], k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotate_at_other_positions(name):
    model = scaled_model(name)
    ids, mask = padded_batch()
    plain = unrotate_keys(captured(model, ids, mask), model)
    shifted = torch.randint(0, 40, plain.positions_BT.shape, generator=torch.Generator().manual_seed(4))
    turned = rotate_keys(plain, model, shifted)
    assert turned.positions_BT.equal(shifted)
    factor = yarn_factor(4.0) if name == "yarn" else 1.0
    slow = slow_rotation(plain.keys[2], shifted, model.model.rotary_emb.inv_freq, factor)
    torch.testing.assert_close(turned.keys[2], slow, rtol=1e-5, atol=1e-5)


def test_inner_products_depend_on_distance_only():
    model = scaled_model("default")
    ids, mask = padded_batch((9, 9, 9))
    plain = unrotate_keys(captured(model, ids, mask, queries=True, layers=[1]), model)
    near, far = (rotate_keys(plain, model, plain.positions_BT + s) for s in (0, 13))
    group = near.queries[0].shape[1] // near.keys[0].shape[1]
    scores = [kv.queries[0] @ kv.keys[0].repeat_interleave(group, dim=1).transpose(2, 3) for kv in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)


def test_frames_are_kept():
    model, gpt2 = scaled_model("default"), tiny_model("gpt2")
    ids, mask = padded_batch()
    kv = captured(model, ids, mask)
    plain = unrotate_keys(kv, model)
    with pytest.raises(AlignmentError, match="already unrotated"):
        unrotate_keys(plain, model)
    with pytest.raises(AlignmentError, match="already rotated"):
        rotate_keys(kv, model)
    with pytest.raises(AlignmentError, match="this model has none"):
        unrotate_keys(kv, gpt2)
    none = captured(gpt2, ids, mask)
    assert unrotate_keys(none, gpt2) is none and rotate_keys(none, gpt2) is none


def test_half_precision_keys_are_turned_in_fp32():
    model = scaled_model("yarn")
    ids, mask = padded_batch()
    kv = captured(model, ids, mask)
    half = kv.map_layers(lambda x: x.bfloat16())
    plain, exact = unrotate_keys(half, model), unrotate_keys(half.map_layers(lambda x: x.float()), model)
    for a, b in zip(plain.keys, exact.keys, strict=True):
        assert a.dtype == torch.bfloat16 and a.equal(b.bfloat16())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99)
)
def test_turn_pairs_is_a_rotation(B, H, T, r, rest, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, H, T, 2 * r + rest, generator=g)
    angle = torch.randn(B, 1, T, r, generator=g)
    (turned,) = turn_pairs(angle.cos(), angle.sin(), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    (back,) = turn_pairs(angle.cos(), -angle.sin(), turned)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    c, s = angle.cos(), angle.sin()
    low, high = x[..., :r], x[..., r : 2 * r]
    slow = torch.cat([low * c - high * s, high * c + low * s, x[..., 2 * r :]], dim=-1)
    torch.testing.assert_close(turned, slow, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_turn_is_autograds():
    g = torch.Generator().manual_seed(0)
    angle = torch.randn(2, 1, 5, 3, generator=g)
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()
    x, y = (torch.randn(2, h, 5, 7, generator=g, requires_grad=True) for h in (3, 4))
    weights = [torch.randn(2, h, 5, 7, generator=g) for h in (3, 4)]
    turned = turn_pairs(cos, sin, x, y)
    fast = torch.autograd.grad(sum((t * t * w).sum() for t, w in zip(turned, weights, strict=True)), [x, y])
    slow_turned = [
        torch.cat([z[..., :3] * cos - z[..., 3:6] * sin, z[..., 3:6] * cos + z[..., :3] * sin, z[..., 6:]], dim=-1)
        for z in (x, y)
    ]
    slow = torch.autograd.grad(sum((t * t * w).sum() for t, w in zip(slow_turned, weights, strict=True)), [x, y])
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (only_one,) = torch.autograd.grad(turn_pairs(cos, sin, x, y)[1].sum(), [y])
    assert only_one.shape == y.shape


def neighbours_turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Channels (2i, 2i + 1) as one complex number, turned by position * base^(-2i/D)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    angles = positions[:, None, :, None] * base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1]).double()
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


SIZES = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6} | {
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def shaken(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.08)
    return model.eval()


@pytest.mark.parametrize("kind", [CohereConfig, Cohere2Config])
def test_channels_that_turn_with_their_neighbour_are_unrotated(kind: type) -> None:
    own = {"head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]} if kind is Cohere2Config else {}
    model = shaken(kind(**SIZES, num_hidden_layers=2, **own))
    ids, mask = padded_batch((11, 6))
    kv = captured(model, ids, mask, queries=True)
    plain = unrotate_keys(kv, model)
    hidden = model.model(**inputs(ids, mask), output_hidden_states=True).hidden_states
    for layer, module in enumerate(model.model.layers):
        projected = module.self_attn.k_proj(module.input_layernorm(hidden[layer])).unflatten(-1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(plain.keys[layer], projected.detach(), rtol=1e-4, atol=1e-5)
        turns = kind is CohereConfig or layer == 0
        slow = neighbours_turned(projected, kv.positions_BT, model.config.rope_parameters["rope_theta"])
        torch.testing.assert_close(kv.keys[layer], slow.float() if turns else projected, rtol=1e-4, atol=1e-5)
    back = rotate_keys(plain, model)
    for one, other in zip([*back.keys, *back.queries], [*kv.keys, *kv.queries], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "own", "turns"),
    [
        (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}, [True, False, True]),
        (
            Exaone4Config,
            {"head_dim": 4, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
            [True, True, False],
        ),
        (
            Exaone4Config,
            {"head_dim": 4, "sliding_window": None, "layer_types": ["full_attention"] * 3},
            [True, True, True],
        ),
    ],
)
def test_layers_without_rotation_are_left_alone(kind: type, own: dict, turns: list) -> None:
    model = shaken(kind(**SIZES, num_hidden_layers=3, **own))
    ids, mask = padded_batch((11, 6))
    kv = captured(model, ids, mask)
    plain = unrotate_keys(kv, model)
    assert turning_layers(model, kv.layers) == turns
    assert [not torch.equal(a, b) for a, b in zip(plain.keys, kv.keys, strict=True)] == turns
    with torch.no_grad(), capture_kv(model) as capture:
        model(**inputs(ids, mask) | {"position_ids": kv.positions_BT + 5})
    moved = unrotate_keys(capture.kv(mask, kv.positions_BT + 5), model)
    for one, other in zip(plain.keys, moved.keys, strict=True):
        real = mask[:, None, :, None]
        torch.testing.assert_close(one * real, other * real, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Gemma3TextConfig, Olmo3Config])
def test_rotation_without_weights_knows_every_kind_of_layer(kind: type) -> None:
    """Its rotary module once knew the kinds of the first layer only: KeyError: full_attention."""
    own = {"head_dim": 4, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    config = kind(**SIZES, num_hidden_layers=2, **own)
    model = shaken(config)
    ids, mask = padded_batch((11, 6))
    kv = captured(model, ids, mask, queries=True)
    again = rotate_keys(unrotate_keys(kv, model), rotary_only(config))
    for one, other in zip([*again.keys, *again.queries], [*kv.keys, *kv.queries], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
