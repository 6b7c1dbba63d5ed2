"""capture_kv against keys and values recomputed by hand; gradients, checkpointing, padding, early stop, nesting."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    FAMILIES,
    HEADS,
    HIDDEN,
    LAYERS,
    checkpoint_layers,
    inputs,
    padded_batch,
    slow_projections,
    slow_rotation,
    tiny_model,
)
from torch import nn
from transformers import GPT2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from kvdistill.core.errors import ModelError
from kvdistill.core.recipe import LoraRecipe
from kvdistill.models import add_lora, capture_kv, positions_from_mask, unrotate_keys
from kvdistill.models.capture import _BORROWED, _LISTENERS


def assert_close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert not _BORROWED and not _LISTENERS


def captured(model, ids, mask, **options):
    with capture_kv(model, **options) as capture:
        model(**inputs(ids, mask))
    return capture.kv(mask)


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    assert positions_from_mask(mask).equal(expected) and positions_from_mask(mask.bool()).equal(expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_tensors_are_the_projections_rotated(family, attention):
    model = tiny_model(family, attention=attention)
    ids, mask = padded_batch()
    kv = captured(model, ids, mask, queries=True)
    assert kv.rope == ("none" if family == "gpt2" else "rotated") and kv.layers == tuple(range(LAYERS))
    plain = unrotate_keys(kv, model)
    positions = positions_from_mask(mask)
    for layer, (q, k, v) in enumerate(slow_projections(model, ids, mask)):
        assert_close(kv.values[layer], v)
        assert_close(plain.keys[layer], k)
        assert_close(plain.queries[layer], q)
        if family != "gpt2":
            inv_freq = model.model.rotary_emb.inv_freq
            assert_close(kv.keys[layer], slow_rotation(k, positions, inv_freq))
            assert_close(kv.queries[layer], slow_rotation(q, positions, inv_freq))


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
OTHERS = {
    "gemma2": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 16},
    "phi3": {"hidden_size": 60, "rope_parameters": PARTIAL},
    "neox": {"head_dim": 8, "rope_parameters": PARTIAL | {"partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_unrotate_to_what_their_rotation_inverts(family):
    model = tiny_model(family, attention="eager", **OTHERS[family])
    ids, mask = padded_batch()
    kv = captured(model, ids, mask)
    plain = unrotate_keys(kv, model)
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    for layer in range(LAYERS):
        kind = getattr(model.config, "layer_types", [None] * LAYERS)[layer] if family == "gemma3" else None
        inv_freq = getattr(rotary, f"{kind}_inv_freq") if kind else rotary.inv_freq
        assert_close(slow_rotation(plain.keys[layer], kv.positions_BT, inv_freq), kv.keys[layer])
        assert (plain.keys[layer] - kv.keys[layer]).abs().max() > 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_changes_no_logit_and_restores(family, attention):
    model = tiny_model(family, attention=attention)
    ids, mask = padded_batch(side="right")
    before = model(**inputs(ids, mask)).logits
    with capture_kv(model, layers=[1]) as capture:
        inside = model(**inputs(ids, mask)).logits
        assert model.config._attn_implementation == f"kvdistill_{attention}"
    assert inside.equal(before) and model.config._attn_implementation == attention
    assert capture.kv(mask).layers == (1,)
    assert not model.get_decoder()._forward_hooks and not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_at_real_tokens(family):
    model = tiny_model(family)
    lengths = (9, 5, 7)
    sides = {side: padded_batch(lengths, side) for side in ("left", "right")}
    ids, mask = sides["left"]
    wide = (nn.functional.pad(ids, (4, 0)), nn.functional.pad(mask, (4, 0)))
    kvs = {name: unrotate_keys(captured(model, *b), model) for name, b in {**sides, "wide": wide}.items()}
    for b in range(len(lengths)):
        row = sides["right"][0][b : b + 1, : lengths[b]]
        alone = unrotate_keys(captured(model, row, torch.ones_like(row).bool()), model)
        for kv in kvs.values():
            for layer in range(LAYERS):
                assert_close(kv.keys[layer][b, :, kv.mask_BT[b]], alone.keys[layer][0])
                assert_close(kv.values[layer][b, :, kv.mask_BT[b]], alone.values[layer][0])


def weighted_sum(kv, mask):
    """A scalar in which every real key and value of every layer has a weight of its own."""
    total = torch.zeros(())
    for number, x in enumerate((*kv.keys, *kv.values)):
        g = torch.Generator().manual_seed(number)
        total = total + (x * torch.randn(x.shape, generator=g) * mask[:, None, :, None]).sum()
    return total


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_gradients_close(a, b, tolerance):
    assert a.keys() == b.keys() and len(a) > 5
    for name in a:
        scale = max(float(b[name].abs().max()), 1e-3)
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_an_explicit_recomputation(family):
    model = tiny_model(family, attention="eager")
    ids, mask = padded_batch()
    weighted_sum(unrotate_keys(captured(model, ids, mask), model), mask).backward()
    fast = gradients(model)

    slow = slow_projections(model, ids, mask)
    recomputed = SimpleNamespace(keys=[k for _, k, _ in slow], values=[v for _, _, v in slow])
    weighted_sum(recomputed, mask).backward()
    assert_gradients_close(fast, gradients(model), 2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family, inside, attention):
    model = tiny_model(family, attention=attention).train()
    ids, mask = padded_batch()

    def run():
        with capture_kv(model) as capture:
            logits = model(**inputs(ids, mask)).logits
            kv = capture.kv(mask)
            keys = [id(k) for k in kv.keys]
            loss = weighted_sum(unrotate_keys(kv, model), mask) + logits[mask].square().sum()
            if inside:
                loss.backward()
                assert [id(k) for k in capture.kv(mask).keys] == keys  # the recomputation recorded nothing
        if not inside:
            loss.backward()
        return loss.detach(), gradients(model)

    loss, plain = run()
    checkpoint_layers(model)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    loss_checkpointed, checkpointed = run()
    assert_close(loss_checkpointed, loss, 1e-6)
    assert_gradients_close(checkpointed, plain, 1e-6)


def test_reentrant_checkpointing_is_refused():
    model = tiny_model().train()
    checkpoint_layers(model, reentrant=True)
    ids, mask = padded_batch()
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: layer 0 .*reentrant"):
        captured(model, ids, mask)
    assert model.config._attn_implementation == "sdpa"


def test_autocast_records_with_gradient():
    model = tiny_model("llama")
    ids, mask = padded_batch()
    exact = captured(model, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        kv = captured(model, ids, mask)
    plain = unrotate_keys(kv, model)
    assert plain.values[0].dtype == torch.bfloat16
    for a, b in zip(kv.keys, exact.keys, strict=True):
        assert (a.float() - b).abs().max() < 0.05 * b.abs().max()
    weighted_sum(plain, mask).backward()
    assert float(model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum()) > 0


def count_runs(model):
    runs = []
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".attn.c_proj", ".mlp", "k_proj", "c_attn", "lm_head")):
            module.register_forward_hook(lambda *_, name=name: runs.append(name))
    return runs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stop_early_skips_everything_above(family):
    model = tiny_model(family)
    ids, mask = padded_batch()
    full = captured(model, ids, mask)
    runs, after = count_runs(model), []
    with torch.no_grad(), capture_kv(model, layers=[1, 0], stop_early=True) as capture:
        model(**inputs(ids, mask))
        after.append("reached")
    kv = capture.kv(mask)
    assert not after and kv.layers == (0, 1)
    for layer in (0, 1):
        assert kv.keys[layer].equal(full.keys[layer]) and kv.values[layer].equal(full.values[layer])
    kinds = [(name.split(".")[2], name.rsplit(".", 1)[-1]) for name in runs]
    projection = "k_proj" if family == "llama" else "c_attn"
    output = "o_proj" if family == "llama" else "c_proj"
    assert kinds == [("0", projection), ("0", output), ("0", "mlp"), ("1", projection)]
    assert model(**inputs(ids, mask)).logits.shape[0] == 3 and "lm_head" in runs


def test_restores_after_an_exception_and_lets_it_through():
    model = tiny_model()
    ids, mask = padded_batch()
    before = model(**inputs(ids, mask)).logits
    with pytest.raises(RuntimeError, match="mine"), capture_kv(model):
        model(**inputs(ids, mask))
        raise RuntimeError("mine")
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture_kv(model, stop_early=True):
        model(**inputs(ids, mask))
    hook.remove()
    assert model.config._attn_implementation == "sdpa" and model(**inputs(ids, mask)).logits.equal(before)


def test_student_and_two_teachers_at_once():
    student, teacher, other = tiny_model(seed=1), tiny_model("gpt2", seed=2), tiny_model("llama", seed=3)
    ids, mask = padded_batch()
    alone = [captured(m, ids, mask) for m in (student, teacher, other)]
    with capture_kv(student) as outer:
        student(**inputs(ids, mask))
        kvs = []
        with torch.no_grad(), capture_kv(teacher) as inner, capture_kv(other, layers=[0], stop_early=True) as stopped:
            teacher(**inputs(ids, mask))
            other(**inputs(ids, mask))
        kvs = [outer.kv(mask), inner.kv(mask), stopped.kv(mask)]
    for kv, expected in zip(kvs, alone, strict=True):
        for i, layer in enumerate(kv.layers):
            assert kv.keys[i].equal(expected.keys[layer])
    assert kvs[0].keys[0].requires_grad and not kvs[1].keys[0].requires_grad


def test_two_captures_of_one_model_stop_where_the_inner_one_says():
    model = tiny_model()
    ids, mask = padded_batch()
    reached = []
    with torch.no_grad(), capture_kv(model, layers=[0, 2]) as outer:
        with capture_kv(model, layers=[1], stop_early=True) as inner:
            model(**inputs(ids, mask))
        reached.append(1)
        assert inner.kv(mask).layers == (1,)
        with pytest.raises(ModelError, match="layer 2 recorded no keys"):
            outer.kv(mask)
    with torch.no_grad(), capture_kv(model, layers=[1], stop_early=True) as outer:
        with capture_kv(model, layers=[0, 1, 2]):
            model(**inputs(ids, mask))
        reached.append(2)  # the outer capture's stop passes through the inner one
    assert reached == [1] and outer.kv(mask).num_layers == 1


def test_models_that_share_one_config_object_do_not_mix():
    one = tiny_model(seed=1)
    two = type(one)(one.config).eval()
    assert one.config is two.config
    ids, mask = padded_batch()
    expected = captured(one, ids, mask)
    with capture_kv(one) as first, capture_kv(two) as second:
        one(**inputs(ids, mask))
        two(**inputs(ids, mask))
    assert first.kv(mask).keys[1].equal(expected.keys[1]) and not second.kv(mask).keys[1].equal(expected.keys[1])
    assert one.config._attn_implementation == "sdpa"


def test_captures_may_end_in_any_order_and_the_last_forward_counts():
    model = tiny_model()
    ids, mask = padded_batch()
    shorter, shorter_mask = ids[:, 3:], mask[:, 3:]
    first, second = capture_kv(model, layers=[0]), capture_kv(model, layers=[2])
    first.__enter__()
    second.__enter__()
    model(**inputs(ids, mask))
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == "kvdistill_sdpa"
    model(**inputs(shorter, shorter_mask))
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    assert first.kv(mask).keys[0].shape[2] == 9 and second.kv(shorter_mask).keys[0].shape[2] == 6


def test_peft_and_ddp_wrapped_models():
    plain = tiny_model("llama")
    ids, mask = padded_batch()
    expected = captured(plain, ids, mask)
    wrapped = add_lora(copy.deepcopy(plain), LoraRecipe(r=2, target_modules=["k_proj", "v_proj"]), seed=3)
    kv = captured(wrapped, ids, mask)  # fresh adapters add nothing
    assert all(a.equal(b) for a, b in zip(kv.keys, expected.keys, strict=True))
    weighted_sum(unrotate_keys(kv, wrapped), mask).backward()
    grads = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grads and all("lora_B" in n for n in grads)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(plain.train())
        kv = captured(ddp, ids, mask)
        assert all(a.equal(b) for a, b in zip(kv.keys, expected.keys, strict=True))
        weighted_sum(unrotate_keys(kv, ddp), mask).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_gpt2_keeps_its_upcast_attention_under_eager():
    model = tiny_model("gpt2", attention="eager", reorder_and_upcast_attn=True)
    called = []
    own = GPT2Attention._upcast_and_reordered_attn
    for block in model.transformer.h:
        block.attn._upcast_and_reordered_attn = lambda *a, m=block.attn: (called.append(1), own(m, *a))[1]
    ids, mask = padded_batch()
    before = model(**inputs(ids, mask)).logits
    with capture_kv(model):
        assert model(**inputs(ids, mask)).logits.equal(before)
    assert len(called) == 2 * LAYERS


def test_flash_attention_sees_its_own_name():
    seen = []

    def flash_stand_in(module, query, key, value, mask, **kwargs):
        seen.append((module.config._attn_implementation, query.shape[1], key.shape[1]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    AttentionInterface.register("flash_stand_in", flash_stand_in)
    model = tiny_model()
    model.config._attn_implementation = "flash_stand_in"
    ids, mask = padded_batch((9, 9, 9))
    kv = captured(model, ids, mask)
    assert seen == [("flash_stand_in", HEADS, 2)] * LAYERS and kv.num_layers == LAYERS
    assert model.config._attn_implementation == "flash_stand_in"


def test_errors_name_model_and_layer():
    model = tiny_model()
    ids, mask = padded_batch()
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: layer 7 is asked for.* 0-2"):
        capture_kv(model, layers=[0, 7])
    with pytest.raises(ModelError, match="no layer is asked for"):
        capture_kv(model, layers=[])
    with capture_kv(model) as capture:
        pass
    with pytest.raises(ModelError, match="Qwen2ForCausalLM: no layer recorded any key"):
        capture.kv(mask)
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(ModelError, match="Qwen2ForCausalLM: layer 1 recorded no keys"):
        captured(model, ids, mask)
    assert captured(model, ids, mask, layers=[0, 2]).layers == (0, 2)
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        capture_kv(nn.Linear(2, 2))


def test_mixed_head_sizes_are_named():
    model = tiny_model("gpt2")
    other = GPT2Config(n_embd=HIDDEN, n_head=2, n_layer=LAYERS, attn_pdrop=0.0, resid_pdrop=0.0)
    other._attn_implementation = "sdpa"
    model.transformer.h[2].attn = GPT2Attention(other, layer_idx=2).eval()
    ids, mask = padded_batch()
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel: layer 2 has \(heads, size\) \(2, 24\).*mixed head sizes"):
        captured(model, ids, mask)
    assert other._attn_implementation == "sdpa"
    assert captured(model, ids, mask, layers=[0, 1]).num_layers == 2
