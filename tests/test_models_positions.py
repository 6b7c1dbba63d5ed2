"""Rotary scalings at the lengths they were made for: unrotate and rotate against angles out of the papers' formulas.

Positions go well beyond the original length of each published setting. Tolerances: turning there and back, 2e-6 of
the largest entry, however far (one table serves both ways). Against a float64 reference, p * 2^-23 of the largest
entry on top: transformers makes the angle position * frequency in fp32, which at position p is that far off.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    HEAD,
    HEADS,
    LAYERS,
    inputs,
    padded_batch,
    slow_inv_freq,
    slow_projections,
    slow_rotation,
    tiny_encoder,
    tiny_model,
)

from kvdistill.core.kv import KV
from kvdistill.models import capture_kv, rotate_keys, unrotate_keys

SIZE = 16  # of a head here: 8 pairs, so that the ramps of YaRN and Llama 3 have somewhere to go
SCALINGS = {  # (rope_parameters, max_position_embeddings), as published where somebody has published them
    "default": ({"rope_type": "default", "rope_theta": 1e6}, 32768),
    "ntk": ({"rope_type": "default", "rope_theta": 1e4 * 8 ** (SIZE / (SIZE - 2))}, 16384),  # NTK-aware, fixed
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 4096),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 2048),  # NTK-aware, by length
    "yarn": (  # Qwen2.5 beyond 32,768
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "llama3": (  # Llama 3.1
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        131072,
    ),
    "longrope": (  # Phi-3
        {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
        | {"short_factor": [1.0 + 0.1 * i for i in range(SIZE // 2)]}
        | {"long_factor": [1.0 + 4.0 * i for i in range(SIZE // 2)]},
        131072,
    ),
}
FURTHEST = {"default": 40000, "ntk": 20000, "linear": 6000, "dynamic": 5000, "yarn": 60000, "llama3": 20000}
FURTHEST |= {"longrope": 9000}


def scaled_model(name, family="qwen2"):
    rope, longest = SCALINGS[name]
    return tiny_model(
        family, attention="eager", head_dim=SIZE, rope_parameters=dict(rope), max_position_embeddings=longest
    )


def spread_positions(name, B=3, T=9):
    """Real texts' positions, thinned out: from 0 to beyond the original length, another row every time."""
    last = FURTHEST[name]
    g = torch.Generator().manual_seed(5)
    rows = [torch.randperm(last, generator=g)[:T].sort().values for _ in range(B)]
    positions = torch.stack(rows)
    positions[0, -1], positions[1, 0] = last, 0
    return positions


def captured(model, ids, positions, **options):
    mask = torch.ones_like(ids).bool()
    with torch.no_grad(), capture_kv(model, queries=True, **options) as capture:
        model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    return capture.kv(mask, positions)


def assert_near(a, b, tolerance):
    assert float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "qwen2") for name in SCALINGS), ("llama3", "llama"), ("dynamic", "llama")]
)
def test_unrotate_and_rotate_far_beyond_the_original_length(name, family):
    model = scaled_model(name, family)
    ids, positions = padded_batch((9, 9, 9))[0], spread_positions(name)
    kv = captured(model, ids, positions)
    plain = unrotate_keys(kv, model)
    back = rotate_keys(plain, model)
    rope, longest = SCALINGS[name]
    inv_freq, factor = slow_inv_freq(rope, SIZE, FURTHEST[name] + 1, longest)
    drift = FURTHEST[name] * 2**-23
    assert model.model.rotary_emb.attention_scaling == pytest.approx(factor)
    for layer in range(LAYERS):
        assert_near(back.keys[layer], kv.keys[layer], 2e-6)
        assert_near(back.queries[layer], kv.queries[layer], 2e-6)
        assert_near(kv.keys[layer], slow_rotation(plain.keys[layer], positions, inv_freq, factor), 2e-6 + drift)
        assert_near(kv.queries[layer], slow_rotation(plain.queries[layer], positions, inv_freq, factor), 2e-6 + drift)
        norms = plain.keys[layer].norm(dim=-1) * factor  # a turn keeps the length, but for YaRN's and longrope's factor
        assert_near(kv.keys[layer].norm(dim=-1), norms, 2e-6)
    # the first layer's keys are those of the words: nothing of the positions is left in them
    hidden = model.model.embed_tokens(ids)
    attention, normed = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm(hidden)
    assert_near(plain.keys[0], attention.k_proj(normed).unflatten(-1, (-1, SIZE)).transpose(1, 2), 2e-6)
    assert_near(plain.queries[0], attention.q_proj(normed).unflatten(-1, (-1, SIZE)).transpose(1, 2), 2e-6)


def test_the_scalings_turn_by_different_angles():
    angles = {
        name: slow_inv_freq(rope, SIZE, FURTHEST[name] + 1, longest)[0] for name, (rope, longest) in SCALINGS.items()
    }
    names = list(SCALINGS)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.allclose(angles[one], angles[other], rtol=1e-3)


def test_proportional_scaling_leaves_channels_alone():
    rope = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = tiny_model("llama", attention="eager", head_dim=SIZE, rope_parameters=rope)
    positions = torch.arange(27).view(3, 9) * 100
    kv = captured(model, padded_batch((9, 9, 9))[0], positions)
    plain = unrotate_keys(kv, model)
    inv_freq = torch.tensor([1e4 ** (-2 * i / SIZE) for i in range(SIZE // 4)] + [0.0] * (SIZE // 4))
    assert_near(kv.keys[1], slow_rotation(plain.keys[1], positions, inv_freq), 2e-6 + 2700 * 2**-23)
    assert_near(rotate_keys(plain, model).keys[1], kv.keys[1], 2e-6)


def cosines(keys_BHTD):
    unit = torch.nn.functional.normalize(keys_BHTD.double(), dim=-1)
    return unit @ unit.transpose(2, 3)


@pytest.mark.parametrize("name", SCALINGS)
def test_cosines_of_rotated_keys_do_not_see_a_shift_of_all_positions(name):
    """What R-KV's redundancy is made of. Dynamic and longrope angles depend on the last position: there the shift
    stays on one side of the original length."""
    model = scaled_model(name)
    g = torch.Generator().manual_seed(2)
    keys = torch.randn(2, 3, 7, SIZE, generator=g)
    positions = torch.randint(0, 500, (2, 7), generator=g)
    mask = torch.ones(2, 7, dtype=torch.bool)
    plain = KV((keys,), (keys,), mask, positions, "unrotated")
    shift = {"dynamic": 1400, "longrope": 3000}.get(name, FURTHEST[name])
    one, two = (rotate_keys(plain, model, positions + s).keys[0] for s in (0, shift))
    difference = (cosines(one) - cosines(two)).abs().max()
    assert float(difference) <= 4 * (shift + 500) * 2**-23  # two keys, each with two angles that far off
    assert float((one - two).abs().max()) > 0.1
    if name not in ("default", "ntk"):  # and it is not the cosine of the plain keys that was compared
        assert float((cosines(one) - cosines(keys)).abs().max()) > 1e-2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 99))
def test_there_and_back_at_any_two_places(here, there, seed):
    model = STILL
    keys = torch.randn(2, 3, 5, SIZE, generator=torch.Generator().manual_seed(seed))
    start = torch.arange(5).expand(2, 5)
    plain = KV((keys,), (keys,), torch.ones(2, 5, dtype=torch.bool), start, "unrotated")
    turned = rotate_keys(plain, model, start + here)
    again = rotate_keys(unrotate_keys(turned, model), model, start + there)
    assert_near(unrotate_keys(again, model).keys[0], keys, 4e-6)


STILL = scaled_model("llama3")


def test_dynamic_scaling_by_layer_type_forgets_what_ran_before():
    """Gemma 3 has a rotary table for each kind of layer, each with a scaling of its own."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }

    def fresh():
        return tiny_model(
            "gemma3", attention="eager", layer_types=kinds, rope_parameters=rope, max_position_embeddings=8
        )

    model = fresh()
    long, short = padded_batch((30, 28, 29)), padded_batch((12, 9, 11))
    keys = []
    for ids, mask in (long, short, short):
        with torch.no_grad(), capture_kv(model) as capture:
            model(**inputs(ids, mask))
        keys.append(capture.kv(mask))
    other = fresh()
    with torch.no_grad(), capture_kv(other) as capture:
        other(**inputs(*short))
    expected = capture.kv(short[1])
    for layer in range(LAYERS):
        assert keys[1].keys[layer].equal(expected.keys[layer]) and keys[2].keys[layer].equal(expected.keys[layer])
    plain = unrotate_keys(keys[0], model)
    inv_freq, _ = slow_inv_freq(rope["full_attention"], HEAD, 30, 8)
    assert_near(keys[0].keys[1], slow_rotation(plain.keys[1], keys[0].positions_BT, inv_freq), 1e-5)


PARTIAL = {
    "neox": ({"head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 8, 4),
    "phi": ({"hidden_size": 60, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, 10, 4),
    "phi-norm": (
        {"hidden_size": 60, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}, "qk_layernorm": True},
        10,
        4,
    ),
    "phi3": ({"hidden_size": 60, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, 10, 4),
    "stablelm": ({"hidden_size": 60, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, 10, 4),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PARTIAL)
def test_partial_rotary_turns_the_first_channels_only(name, attention):
    changes, size, turned = PARTIAL[name]
    rope = {"rope_type": "default", **changes["rope_parameters"]}
    model = tiny_model(name.split("-")[0], attention=attention, **{**changes, "rope_parameters": rope})
    ids, mask = padded_batch()
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        model(**inputs(ids, mask))
    kv = capture.kv(mask)
    plain = unrotate_keys(kv, model)
    back = rotate_keys(plain, model)
    inv_freq, _ = slow_inv_freq(rope, turned, 9, 64)
    assert kv.rope == "rotated" and kv.keys[0].shape[-1] == size and kv.queries[0].shape[1] == HEADS
    for layer, (q, k, v) in enumerate(slow_projections(model, ids, mask)):
        if name == "phi-norm":
            attention_module = model.model.layers[layer].self_attn
            q, k = attention_module.q_layernorm(q), attention_module.k_layernorm(k)
        assert_near(kv.values[layer], v, 1e-5)
        assert_near(plain.keys[layer], k, 1e-5)
        assert_near(plain.queries[layer], q, 1e-5)
        assert_near(kv.keys[layer], slow_rotation(k.detach(), kv.positions_BT, inv_freq), 1e-5)
        assert_near(back.keys[layer], kv.keys[layer], 2e-6)
        assert kv.keys[layer][..., turned:].equal(plain.keys[layer][..., turned:])
        assert float((kv.keys[layer] - plain.keys[layer])[..., :turned].abs().max()) > 0.05


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_no_rotary_positions_pass_through(family):
    model = tiny_model("gpt2") if family == "gpt2" else tiny_encoder(family)
    ids, mask = padded_batch(side="right")
    given = {"decoder_input_ids": ids} if family == "bart" else {}
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        model(input_ids=ids, attention_mask=mask.long(), **given)
    kv = capture.kv(mask)
    assert kv.rope == "none" and unrotate_keys(kv, model) is kv
    assert rotate_keys(kv, model, torch.zeros_like(ids)) is kv
