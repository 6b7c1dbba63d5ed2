"""Windows, soft caps and sinks: attention made again against loops, and against what models themselves attend to."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import inputs, padded_batch, tiny_encoder, tiny_model
from torch import Tensor

from kvdistill.align.attention import attention_rows
from kvdistill.arms.batches import Batch, token_counts
from kvdistill.arms.teacher_pass import token_scores
from kvdistill.compress import rkv_layer_scores
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV, AttentionRule
from kvdistill.core.recipe import ArmRecipe
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.fuse import fuse_caches
from kvdistill.losses import QKV, AttentionOutputKVLoss, StructuralKVLoss, answer_attention, blocks
from kvdistill.models import capture_kv

L, B, T, H, G, D = 3, 2, 9, 2, 3, 4
Q = H * G
RULES = {
    "window": [AttentionRule(window=3), AttentionRule(), AttentionRule(window=5)],
    "cap": [AttentionRule(cap=1.3), AttentionRule(), AttentionRule(cap=0.7)],
    "sink": [AttentionRule(sink=torch.arange(Q) / 3.0), AttentionRule(), AttentionRule(sink=1 - torch.arange(Q) / 2.0)],
    "all": [AttentionRule(window=4, cap=0.9, sink=torch.arange(Q) / 4.0)] * L,
    "encoder": [AttentionRule(causal=False, window=w) for w in (3, None, 2)],
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def side(seed: int) -> QKV:
    return QKV(
        draw(L, B, T, Q, D, seed=seed), draw(L, B, T, H, D, seed=seed + 1), draw(L, B, T, H, D + 1, seed=seed + 2)
    )


def real_tokens() -> Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, -2:] = False
    return mask


def slow_row(q: Tensor, keys: Tensor, query: int, head: int, rule: AttentionRule, real: Tensor) -> list[float]:
    """One query's weights, by a loop over the keys [T, D]."""
    logits = []
    for place in range(len(keys)):
        ahead = query - place
        seen = bool(real[place]) and (ahead >= 0 or not rule.causal)
        if rule.window is not None and abs(ahead) >= rule.window:
            seen = False
        logit = float(q @ keys[place]) * D**-0.5
        if rule.cap is not None:
            logit = rule.cap * math.tanh(logit / rule.cap)
        logits.append(math.exp(logit) if seen else 0.0)
    total = sum(logits) + (0.0 if rule.sink is None else math.exp(float(rule.sink[head])))
    return [x / total for x in logits]


def slow_rows(one: QKV, rules: list[AttentionRule], mask: Tensor) -> Tensor:
    """[L, B, Q, T, T]; 0 where a query is not real."""
    out = torch.zeros(L, B, Q, T, T, dtype=torch.float64)
    for l in range(L):
        for b in range(B):
            for h in range(Q):
                for t in range(T):
                    if mask[b, t]:
                        row = slow_row(one.q[l, b, t, h], one.k[l, b, :, h // G], t, h, rules[l], mask[b])
                        out[l, b, h, t] = torch.tensor(row, dtype=torch.float64)
    return out


@pytest.mark.parametrize("name", RULES)
def test_rows_follow_the_rule_of_their_layer(name: str) -> None:
    one, rules, mask = side(1), RULES[name], real_tokens()
    slow = slow_rows(one, rules, mask)
    for l, rule in enumerate(rules):
        rows = attention_rows(one.q[l].transpose(1, 2), one.k[l].transpose(1, 2), mask, rule=rule)
        torch.testing.assert_close(rows, slow[l].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_token_weights_follow_the_rule_of_their_layer(name: str) -> None:
    one, rules, mask = side(2), RULES[name], real_tokens()
    answer = torch.zeros(B, T, dtype=torch.bool)
    answer[:, 5:8] = True
    paid = (slow_rows(one, rules, mask) * answer[:, None, :, None]).sum((2, 3))
    slow = paid * mask.sum(1)[:, None] / paid.sum(-1, keepdim=True)
    torch.testing.assert_close(answer_attention(one.q, one.k, answer, mask, rules=rules), slow)
    if name != "cap":
        plain = answer_attention(one.q, one.k, answer, mask)
        assert float((plain - slow).abs().max()) > 0.05


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rows", [2, 64])
def test_distances_follow_the_rule_of_their_layer(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", rows)
    source, target, rules, mask = side(3), side(7), RULES[name], real_tokens()
    p, q = slow_rows(target, rules, mask), slow_rows(source, rules, mask)
    left = [(1 - x.sum(-1)).clamp_min(0) for x in (p, q)]  # what the sinks took
    divergence = torch.where(p > 0, p * (p / q.clamp_min(1e-300)).log(), 0.0).sum(-1)
    divergence = divergence + torch.where(left[0] > 1e-12, left[0] * (left[0] / left[1].clamp_min(1e-300)).log(), 0.0)
    slow = divergence.mean(2) * mask
    got = StructuralKVLoss(0.0, 0.0, 1.0)(source, target, mask, rules)
    torch.testing.assert_close(got, slow, rtol=1e-6, atol=1e-9)
    read = [x @ one.v.repeat_interleave(G, dim=3).transpose(2, 3) for x, one in ((q, source), (p, target))]
    output = (read[0] - read[1]).square().mean((2, 4)) * mask
    torch.testing.assert_close(AttentionOutputKVLoss()(source, target, mask, rules), output, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["all", "encoder"])
@pytest.mark.parametrize("kind", [StructuralKVLoss, AttentionOutputKVLoss])
def test_gradients_follow_the_rule_of_their_layer(name: str, kind: type) -> None:
    mask, rules = torch.tensor([[True, True, False, True]]), RULES[name]
    parts = [x[:, :1, :4].clone().requires_grad_() for one in (side(3), side(7)) for x in one]

    def value(*given: Tensor) -> Tensor:
        return kind()(QKV(*given[:3]), QKV(*given[3:]), mask, rules).sum()

    assert torch.autograd.gradcheck(value, parts)


def test_importance_counts_what_the_answer_sees() -> None:
    segments = torch.tensor([[1, 2, 2, 2, 2, 2, 3, 3, 3], [1, 1, 2, 2, 2, 3, 3, 0, 0]])
    queries, keys = draw(B, Q, T, D).float(), draw(B, H, T, D, seed=5).float()
    for rule in (
        AttentionRule(window=4),
        AttentionRule(window=2, cap=0.8),
        AttentionRule(cap=0.8),
        AttentionRule(window=1),
    ):
        got = rkv_layer_scores([queries], [keys], segments, rules=[rule])[0]
        for b in range(B):
            reasoning = [t for t in range(T) if segments[b, t] == REASONING]
            answer = [t for t in range(T) if segments[b, t] == ANSWER]
            for h in range(H):
                shares = []
                for a in answer:
                    seen = [t for t in reasoning if rule.window is None or a - t < rule.window]
                    logits = [
                        max(float(queries[b, h * G + g, a] @ keys[b, h, t]) * D**-0.5 for g in range(G)) for t in seen
                    ]
                    if rule.cap is not None:
                        logits = [rule.cap * math.tanh(x / rule.cap) for x in logits]
                    if seen:
                        total = sum(map(math.exp, logits))
                        shares.append({t: math.exp(x) / total for t, x in zip(seen, logits, strict=True)})
                for t in reasoning:
                    even = 1 / len(reasoning)
                    slow = sum(s.get(t, 0.0) for s in shares) / len(shares) if shares else even
                    assert float(got[b, 0, h, t]) == pytest.approx(slow, abs=1e-6)


def run(model, ids, mask, **options):
    with torch.no_grad(), capture_kv(model, queries=True, **options) as capture:
        out = model(**inputs(ids, mask), output_attentions=True)
    return capture.kv(mask), out.attentions


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 5}),
        ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 7}),
        ("gemma3", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("qwen2", {}),
    ],
)
def test_weights_are_the_models_own_beyond_its_window(family: str, settings: dict) -> None:
    model = tiny_model(family, attention="eager", **settings)
    ids, mask = padded_batch((17, 11), side="right")
    kv, theirs = run(model, ids, mask)
    windows = [rule.window for rule in kv.rules]
    assert (
        windows == {"mistral": [5, 5, 5], "gemma2": [5, None, 5], "gemma3": [5, None, 5], "qwen2": [None] * 3}[family]
    )
    for i, weights in enumerate(theirs):
        rows = attention_rows(kv.queries[i], kv.keys[i], mask, rule=kv.rules[i], scale=kv.scaling[i])
        torch.testing.assert_close(rows, weights * mask[:, None, :, None], rtol=1e-4, atol=1e-5)
    segments = torch.full_like(ids, REASONING) * mask
    segments[:, 8:] = ANSWER * mask[:, 8:]
    segments[:, :2] = PROMPT
    paid = token_scores(kv, segments)[:, :, :, 2, 0]
    for i, weights in enumerate(theirs):
        answer = (weights * (segments == ANSWER)[:, None, :, None]).sum((1, 2))
        slow = answer * mask.sum(1, keepdim=True) / answer.sum(1, keepdim=True)
        torch.testing.assert_close(paid[:, :, i], slow * mask, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_an_encoder_sees_both_ways_or_is_refused(family: str) -> None:
    model = tiny_encoder(family, attention="eager")
    ids, mask = padded_batch((17, 11), side="right")
    runs = model.get_encoder() if family == "t5" else model
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        theirs = runs(input_ids=ids, attention_mask=mask.long(), output_attentions=True).attentions
    kv = capture.kv(mask)
    assert [rule.causal for rule in kv.rules] == [False] * 3
    if family == "t5":
        with pytest.raises(AlignmentError, match="by the distance of two tokens"):
            token_scores(kv, torch.where(mask, ANSWER, 0))
        return
    for i, weights in enumerate(theirs):
        rows = attention_rows(kv.queries[i], kv.keys[i], mask, rule=kv.rules[i], scale=kv.scaling[i])
        torch.testing.assert_close(rows, weights * mask[:, None, :, None], rtol=1e-4, atol=1e-5)


def test_rules_go_with_their_layers_and_through_json() -> None:
    one = AttentionRule(causal=False, window=3, cap=2.0, sink=torch.tensor([0.5, 1.5]), biased=True)
    back = AttentionRule.from_json(one.as_json())
    assert back == one and torch.equal(back.sink, one.sink)
    x = torch.zeros(1, 2, 4, 3)
    kv = KV((x,) * 2, (x,) * 2, torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None], "none", rules=(one, back))
    assert kv.select_layers([1]).rules == (back,)
    assert KV(kv.keys, kv.values, kv.mask_BT, kv.positions_BT, "none").rules == (AttentionRule(),) * 2


def test_a_fused_cache_is_averaged_over_the_tokens_it_has() -> None:
    """Two teachers that have different tokens: the mean is over their union, and not over the larger of both."""
    masks = {
        "a": torch.tensor([[1, 1, 0, 0, 0]], dtype=torch.bool),
        "b": torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.bool),
    }
    batch = Batch(torch.ones(1, 5, dtype=torch.long), torch.full((1, 5), REASONING), ["x"], kv_masks=masks)

    def arm(weights: list[float] | None = None) -> ArmRecipe:
        fuse = {"fuse_at": "kv", "weights": weights}
        return ArmRecipe.model_validate(
            {"teachers": ["a", "b"], "fuse": fuse, "align": {}, "compress": {}, "loss": {}, "train": {}}
        )

    assert token_counts(batch, arm()).tolist() == [4, 2, 3, 5]
    target = torch.ones(1, 1, 5, 2)
    _, fused = fuse_caches([target, target], list(masks.values()), torch.full((2, 1, 1, 1), 0.5))
    assert int(fused.sum()) == 5
    assert token_counts(batch, arm([1.0, 0.0])).tolist()[-1] == 2  # whom nobody listens to adds no token
    assert (
        int(fuse_caches([target, target], list(masks.values()), torch.tensor([1.0, 0]).view(2, 1, 1, 1))[1].sum()) == 2
    )
    per_layer = masks["a"].expand(3, 1, 5).clone()
    per_layer[2] = False
    batch.kv_masks["a"] = per_layer
    assert token_counts(batch, arm()).tolist()[-1] == pytest.approx((5 + 5 + 3) / 3)
