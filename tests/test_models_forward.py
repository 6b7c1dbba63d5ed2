"""teacher_forward against full logits, log_softmax and a Python loop."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, inputs, padded_batch, slow_projections, tiny_model

from kvdistill.core.errors import DataError, ModelError
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.models import EMPTY_LOGPROB, teacher_forward

LENGTHS = (9, 5, 7)


def batch(side="left"):
    ids, mask = padded_batch(LENGTHS, side)
    segments = torch.zeros_like(ids)
    for b, n in enumerate(LENGTHS):
        start = int(mask[b].long().argmax())
        codes = [PROMPT] * 2 + [REASONING] * (n - 4) + [ANSWER] * 2
        segments[b, start : start + n] = torch.tensor(codes)
    return ids, mask, segments


def slow_predictions(model, ids, mask, segments):
    """(b, t, log-probabilities of token t + 1) for every completion token."""
    logprobs = model(**inputs(ids, mask)).logits.detach().double().log_softmax(-1)
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if mask[b, t] and segments[b, t + 1] in (REASONING, ANSWER):
                yield b, t, logprobs[b, t]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_everything_at_once_against_the_slow_way(family, side):
    model = tiny_model(family, attention="eager")  # gemma2 caps its logits after the head
    ids, mask, segments = batch(side)
    out = teacher_forward(model, ids, mask, segments, layers=[2, 0], want_nll=True, want_logits_top_k=4)
    losses = {b: [] for b in range(3)}
    filled = torch.zeros_like(mask)
    for b, t, logprob in slow_predictions(model, ids, mask, segments):
        losses[b].append(-float(logprob[ids[b, t + 1]]))
        expected, index = logprob.topk(4)
        torch.testing.assert_close(out.topk_logprob_BSK[b, t].double(), expected, rtol=1e-5, atol=1e-5)
        assert out.topk_index_BSK[b, t].equal(index)
        filled[b, t] = True
    for b, n in enumerate(LENGTHS):
        assert len(losses[b]) == n - 2
        assert float(out.nll_B[b]) == pytest.approx(sum(losses[b]) / len(losses[b]), rel=1e-5)
    assert (out.topk_logprob_BSK[~filled] == EMPTY_LOGPROB).all() and (out.topk_index_BSK[~filled] == 0).all()
    assert out.segments_BS.equal(segments)
    kv = out.kv
    assert kv.layers == (0, 2) and kv.rope == ("none" if family == "gpt2" else "unrotated")
    if family != "gemma2":
        slow = slow_projections(model, ids, mask)
        for i, layer in enumerate(kv.layers):
            real = mask[:, None, :, None]
            torch.testing.assert_close(kv.keys[i] * real, slow[layer][1].detach() * real, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(kv.values[i] * real, slow[layer][2].detach() * real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_parts_are_what_the_whole_gives(family):
    model = tiny_model(family)
    ids, mask, segments = batch()
    whole = teacher_forward(model, ids, mask, segments, want_nll=True, want_logits_top_k=VOCAB + 5)
    kv_only = teacher_forward(model, ids, mask, segments, layers=[1])
    nll_only = teacher_forward(model, ids, mask, segments, want_kv=False, want_nll=True)
    nothing = teacher_forward(model, ids, mask, segments, want_kv=False)
    assert kv_only.kv.keys[0].equal(whole.kv.keys[1]) and kv_only.nll_B is None and kv_only.topk_index_BSK is None
    assert nll_only.nll_B.equal(whole.nll_B) and nll_only.kv is None and nll_only.topk_logprob_BSK is None
    assert nothing.kv is None and nothing.nll_B is None
    assert whole.topk_index_BSK.shape[-1] == VOCAB  # never more than there are
    mass = whole.topk_logprob_BSK.exp().sum(-1)
    filled = whole.topk_logprob_BSK[..., 0] > EMPTY_LOGPROB
    torch.testing.assert_close(mass, filled.float())


def test_chunks_change_nothing(monkeypatch):
    model = tiny_model()
    ids, mask, segments = batch()
    whole = teacher_forward(model, ids, mask, segments, want_nll=True, want_logits_top_k=3)
    monkeypatch.setattr("kvdistill.models.forward._CHUNK_ELEMENTS", 2 * VOCAB)
    parts = teacher_forward(model, ids, mask, segments, want_nll=True, want_logits_top_k=3)
    assert parts.nll_B.equal(whole.nll_B) and parts.topk_logprob_BSK.equal(whole.topk_logprob_BSK)
    assert parts.topk_index_BSK.equal(whole.topk_index_BSK)


def test_targets_may_enter_the_students_graph():
    model, student = tiny_model(seed=1), tiny_model(seed=2)
    ids, mask, segments = batch()
    out = teacher_forward(model, ids, mask, segments, want_nll=True, want_logits_top_k=3)
    tensors = [*out.kv.keys, *out.kv.values, out.nll_B, out.topk_logprob_BSK]
    assert not any(x.requires_grad or x.is_inference() for x in tensors)
    logits = student(**inputs(ids, mask)).logits
    loss = (logits.sum(-1, keepdim=True) * out.topk_logprob_BSK).sum() + (logits.mean() * out.kv.keys[0]).sum()
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_runs_without_dropout_and_leaves_modes_as_they_were():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[1].eval()
    ids, mask, segments = batch()
    modes = [m.training for m in model.modules()]
    one, two = (teacher_forward(model, ids, mask, segments, want_nll=True) for _ in range(2))
    assert one.nll_B.equal(two.nll_B) and one.kv.keys[2].equal(two.kv.keys[2])
    assert [m.training for m in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks


def test_no_completion_token_is_an_error_for_nll_only():
    model = tiny_model()
    ids, mask, segments = batch()
    segments[1] = mask[1].long() * PROMPT
    with pytest.raises(DataError, match=r"row 1 of the batch: .*NLL is undefined"):
        teacher_forward(model, ids, mask, segments, want_nll=True)
    out = teacher_forward(model, ids, mask, segments, want_logits_top_k=2)
    assert (out.topk_logprob_BSK[1] == EMPTY_LOGPROB).all() and out.topk_logprob_BSK.isfinite().all()


def test_a_model_without_a_head_is_refused():
    ids, mask, segments = batch()
    backbone = tiny_model("llama").model
    with pytest.raises(ModelError, match="LlamaModel: the model has no LM head"):
        teacher_forward(backbone, ids, mask, segments, want_nll=True)
    assert teacher_forward(backbone, ids, mask, segments).kv.num_layers == 3
