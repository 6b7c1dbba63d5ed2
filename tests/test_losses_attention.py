"""Losses that look at attention, against loops over layers, examples, heads and tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvdistill.core.errors import AlignmentError
from kvdistill.core.recipe import LossRecipe
from kvdistill.losses import (
    QKV,
    AttentionOutputKVLoss,
    CKAKVLoss,
    StructuralKVLoss,
    answer_attention,
    blocks,
    build_distance,
    cosine_distance,
    masked_token_mean,
    normalise_token_weights,
)

L, B, T, H, G, D, DV = 2, 3, 7, 2, 3, 4, 5
Q = H * G
ATTENTION = [StructuralKVLoss, AttentionOutputKVLoss]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def side(seed: int, dtype: torch.dtype = torch.float64, tokens: int = T, scale: float = 1.5) -> QKV:
    shapes = ((L, B, tokens, Q, D), (L, B, tokens, H, D), (L, B, tokens, H, DV))
    return QKV(*(scale * draw(*shape, seed=3 * seed + i, dtype=dtype) for i, shape in enumerate(shapes)))


def with_graph(one: QKV) -> QKV:
    return QKV(*(x.clone().requires_grad_() for x in one))


def holes(tokens: int = T) -> torch.Tensor:
    """Left, right and inner padding; the first token, the only real one, and none."""
    mask_BT = torch.ones(B, tokens, dtype=torch.bool)
    mask_BT[0, 0] = mask_BT[0, 3] = mask_BT[0, -1] = False
    mask_BT[1, 2:] = False
    return mask_BT


@pytest.fixture(params=[2, 3, 64], ids=lambda r: f"rows{r}")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "ROWS", request.param)
    return request.param


# -- the slow references ----------------------------------------------------------------------


def row_of(one: QKV, mask: torch.Tensor, l: int, b: int, i: int, t: int, causal: bool, scaling: float) -> list[float]:
    """Probability of each token s for query head i of token t, one product at a time."""
    logits = []
    for s in range(one.k.shape[2]):
        if bool(mask[b, s]) and (s <= t or not causal):
            logits.append(scaling * float(one.q[l, b, t, i].double() @ one.k[l, b, s, i // G].double()))
        else:
            logits.append(-math.inf)
    largest = max(logits)
    parts = [math.exp(x - largest) for x in logits]
    return [p / sum(parts) for p in parts]


def loop_structural(s: QKV, t: QKV, mask: torch.Tensor, weights=(1, 1, 1), causal=True, scaling=D**-0.5):
    out = torch.zeros(L, B, s.k.shape[2], dtype=torch.float64)
    for l in range(L):
        for b in range(B):
            for n in range(out.shape[2]):
                if not mask[b, n]:
                    continue
                for weight, x, y in ((weights[0], s.k, t.k), (weights[1], s.v, t.v)):
                    for h in range(H):
                        u, v = x[l, b, n, h].double(), y[l, b, n, h].double()
                        out[l, b, n] += weight * (1 - float(u @ v) / float(u.norm() * v.norm())) / H
                for i in range(Q):
                    p, q = (row_of(one, mask, l, b, i, n, causal, scaling) for one in (t, s))
                    kl = sum(a * math.log(a / c) for a, c in zip(p, q, strict=True) if a > 0)
                    out[l, b, n] += weights[2] * kl / Q
    return out


def loop_output(s: QKV, t: QKV, mask: torch.Tensor, causal=True, scaling=D**-0.5):
    out = torch.zeros(L, B, s.k.shape[2], dtype=torch.float64)
    for l in range(L):
        for b in range(B):
            for n in range(out.shape[2]):
                for i in range(Q if mask[b, n] else 0):
                    read = []
                    for one in (s, t):
                        row = row_of(one, mask, l, b, i, n, causal, scaling)
                        read.append(sum(p * one.v[l, b, m, i // G].double() for m, p in enumerate(row) if p > 0))
                    out[l, b, n] += float(((read[0] - read[1]) ** 2).sum()) / (Q * DV)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_structural_is_the_loop(rows: int, causal: bool, chunk_bytes: int) -> None:
    s, t, mask = side(0), side(1), holes()
    weights = (0.7, 1.3, 2.1)
    distance = StructuralKVLoss(*weights, scaling=0.8, causal=causal, chunk_bytes=chunk_bytes)
    expected = loop_structural(s, t, mask, weights, causal, 0.8)
    torch.testing.assert_close(distance(s, t, mask), expected, rtol=1e-6, atol=1e-7)  # the norms' floor is 1e-8
    single = distance(*(QKV(*(x.float() for x in one)) for one in (s, t)), mask)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_attention_output_is_the_loop(rows: int, causal: bool, chunk_bytes: int) -> None:
    s, t, mask = side(0), side(1), holes()
    distance = AttentionOutputKVLoss(scaling=0.8, causal=causal, chunk_bytes=chunk_bytes)
    expected = loop_output(s, t, mask, causal, 0.8)
    torch.testing.assert_close(distance(s, t, mask), expected, rtol=1e-10, atol=1e-12)
    single = distance(*(QKV(*(x.float() for x in one)) for one in (s, t)), mask)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


def test_default_scale_is_one_over_the_root_of_the_size() -> None:
    s, t, mask = side(0), side(1), holes()
    torch.testing.assert_close(StructuralKVLoss()(s, t, mask), loop_structural(s, t, mask), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(AttentionOutputKVLoss()(s, t, mask), loop_output(s, t, mask))


# -- gradients --------------------------------------------------------------------------------


def plain(kind: type, s: QKV, t: QKV, mask: torch.Tensor, causal: bool) -> torch.Tensor:
    """The definition in whole tensors, for autograd."""
    T = s.k.shape[2]
    allowed = mask[None, :, None, None, :].expand(L, B, 1, T, T)
    allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril() if causal else allowed
    rows, read = [], []
    for q, k, v in (s, t):
        k, v = (x.repeat_interleave(G, dim=3) for x in (k, v))
        logits = torch.einsum("lbtid,lbsid->lbits", q, k) * D**-0.5
        rows.append(torch.where(allowed, logits, -1e30).log_softmax(-1))
        read.append(torch.einsum("lbits,lbsid->lbtid", rows[-1].exp(), v))
    if kind is AttentionOutputKVLoss:
        return ((read[0] - read[1]) ** 2).mean((3, 4)) * mask
    kl = (rows[1].exp() * (rows[1] - rows[0])).sum(-1).mean(2)
    cosine = [torch.nn.functional.cosine_similarity(x, y, dim=-1).mean(-1) for x, y in ((s.k, t.k), (s.v, t.v))]
    return (2 - cosine[0] - cosine[1] + kl) * mask


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_autograds(kind: type, causal: bool, rows: int) -> None:
    """Of both sides (a trainable projector in student space has one on the target)."""
    mask, weight = holes(), draw(L, B, T, seed=9, dtype=torch.float64)
    found = []
    for call in (kind(causal=causal, chunk_bytes=700), lambda s, t, m: plain(kind, s, t, m, causal)):
        s, t = with_graph(side(0)), with_graph(side(1))
        value = call(s, t, mask)
        grads = torch.autograd.grad((value * weight).sum(), [*s, *t], allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*s, *t], strict=True)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the norms' floor


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("of", ["source", "target"])
def test_gradcheck(kind: type, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", 2)
    shapes = ((1, 2, 3, 2, 2), (1, 2, 3, 1, 2), (1, 2, 3, 1, 3))
    one, other = (QKV(*(draw(*x, seed=3 * n + i, dtype=torch.float64) for i, x in enumerate(shapes))) for n in (0, 1))
    mask = torch.tensor([[True, True, True], [False, True, True]])

    def call(*moving: torch.Tensor) -> torch.Tensor:
        pair = (QKV(*moving), other) if of == "source" else (other, QKV(*moving))
        return kind()(*pair, mask)

    assert torch.autograd.gradcheck(call, tuple(x.requires_grad_() for x in one))


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    for kind in ATTENTION:
        s, t = side(0), side(1)
        s.v.requires_grad_(), t.k.requires_grad_()
        kind()(s, t, holes()).sum().backward()
        assert s.v.grad is not None and t.k.grad is not None and s.q.grad is None and t.q.grad is None
    with torch.no_grad():
        assert not StructuralKVLoss()(with_graph(side(0)), side(1), holes()).requires_grad


def test_cosine_distance_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdistill.losses import tokens

    monkeypatch.setattr(tokens, "CACHED_NUMBERS", 3 * D)  # three rows at a time, the last part shorter
    s, t = (draw(2, 5, D, seed=i, dtype=torch.float64).transpose(0, 1).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradcheck(cosine_distance, (s, t))
    expected = 1 - torch.nn.functional.cosine_similarity(s, t, dim=-1)
    torch.testing.assert_close(cosine_distance(s, t), expected, rtol=1e-7, atol=1e-7)


# -- properties -------------------------------------------------------------------------------


@given(
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    kind=st.sampled_from(ATTENTION),
    causal=st.booleans(),
    junk=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
)
def test_padding_changes_nothing(left: int, right: int, kind: type, causal: bool, junk: float) -> None:
    """Columns on either side, whatever they hold: same distances, same gradients, nothing at the padding."""
    s, t, mask = side(0), side(1), holes()

    def pad(x: torch.Tensor, value: float, axis: int) -> torch.Tensor:
        shape = list(x.shape)
        parts = [torch.full((*shape[:axis], n, *shape[axis + 1 :]), value, dtype=x.dtype) for n in (left, right)]
        return torch.cat([parts[0], x, parts[1]], axis)

    wide = with_graph(QKV(*(pad(x, junk, 2) for x in s)))
    value = kind(causal=causal)(wide, QKV(*(pad(x, -junk, 2) for x in t)), pad(mask, False, 1))
    narrow = with_graph(s)
    expected = kind(causal=causal)(narrow, t, mask)
    real = slice(left, left + T)
    torch.testing.assert_close(value[:, :, real], expected)
    assert value[:, :, :left].abs().sum() == 0 and value[:, :, real.stop :].abs().sum() == 0
    grads = torch.autograd.grad(value.sum(), wide, allow_unused=True)
    for wide_grad, grad in zip(grads, torch.autograd.grad(expected.sum(), narrow, allow_unused=True), strict=True):
        if grad is not None:
            torch.testing.assert_close(wide_grad[:, :, real], grad)
            assert wide_grad[:, :, :left].abs().sum() == 0 and wide_grad[:, :, real.stop :].abs().sum() == 0


@pytest.mark.parametrize("kind", ATTENTION)
def test_masked_tokens_are_no_keys_on_either_side(kind: type) -> None:
    """Changing a masked token of either side changes no other token's row, later ones included."""
    s, t, mask = side(0), side(1), holes()
    before = kind()(s, t, mask)
    for one in (s, t):
        for x in one:
            x[:, ~mask] = 17.0
    assert torch.equal(kind()(s, t, mask), before)


@pytest.mark.parametrize("kind", ATTENTION)
def test_zero_at_identity_and_in_lone_rows(kind: type) -> None:
    s, mask = with_graph(side(0, torch.float32)), holes()
    value = kind()(s, QKV(*(x.detach() for x in s)), mask)
    grads = torch.autograd.grad(value.sum(), [x for x in s], allow_unused=True)
    assert value.abs().max() < 1e-6 and all(g is None or g.abs().max() < 1e-6 for g in grads)
    rows_only = StructuralKVLoss(k_weight=0, v_weight=0)(side(0), side(1), mask)
    first = torch.tensor([1, 0, 0])  # of each example: it sees itself alone
    assert rows_only[:, torch.arange(B), first].abs().max() == 0
    assert rows_only.min() > -1e-12 and rows_only[:, 0, 4].min() > 0


@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_divergence_is_not_negative_and_examples_do_not_mix(seed: int, scale: float) -> None:
    s, t = (side(seed + i, torch.float32, scale=scale) for i in (0, 1))
    distance = StructuralKVLoss(k_weight=0, v_weight=0)
    value = distance(s, t, holes())
    assert value.isfinite().all() and value.min() >= -1e-4 * max(1.0, value.max().item())
    order, layers = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    moved = distance(*(QKV(*(x[layers][:, order] for x in one)) for one in (s, t)), holes()[order])
    torch.testing.assert_close(moved, value[layers][:, order])


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("zero", ["source", "target", "both"])
def test_zero_vectors_and_huge_logits_are_finite(kind: type, zero: str) -> None:
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0] = True
    s, t = side(0, torch.float32, scale=1e3), side(1, torch.float32, scale=1e3)
    for name, one in (("source", s), ("target", t)):
        if zero in (name, "both"):
            for x in one:
                x.zero_()
    s, t = with_graph(s), with_graph(t)
    value = kind()(s, t, mask)
    value.sum().backward()
    assert value.isfinite().all() and (value[:, 1:] == 0).all()
    assert all(x.grad is None or x.grad.isfinite().all() for x in (*s, *t))


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_accumulate_in_fp32(kind: type, dtype: torch.dtype) -> None:
    s, t = with_graph(side(0, dtype)), side(1, dtype)
    value = kind()(s, t, holes())
    value.sum().backward()
    assert value.dtype == torch.float32 and s.k.grad.dtype == dtype
    as_float = [with_graph(QKV(*(x.detach().float() for x in one))) for one in (s, t)]
    expected = kind()(*as_float, holes())
    torch.testing.assert_close(value, expected)
    expected.sum().backward()
    # keys get two gradients (rows, cosine), each rounded to the input's dtype: a unit in the last place of the larger
    torch.testing.assert_close(s.k.grad.float(), as_float[0].k.grad, rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("kind", ATTENTION)
def test_autocast_does_not_reach_the_products(kind: type) -> None:
    s, t = with_graph(side(0, torch.float32)), side(1, torch.float32)
    expected = kind()(s, t, holes())
    (grad,) = torch.autograd.grad(expected.sum(), s.k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = kind()(s, t, holes())
        (other,) = torch.autograd.grad(value.sum(), s.k)
    assert torch.equal(value, expected) and torch.equal(grad, other)


@pytest.mark.parametrize("kind", ATTENTION)
def test_splitting_a_batch_changes_nothing(kind: type) -> None:
    mask = holes()
    found = []
    for parts in ([B], [1, 2]):
        s, t, total, start = with_graph(side(0)), side(1), 0.0, 0
        for size in parts:
            at = slice(start, start + size)
            distance = kind()(QKV(*(x[:, at] for x in s)), QKV(*(x[:, at] for x in t)), mask[at])
            loss = masked_token_mean(distance, mask[at], None, mask.sum())
            loss.backward()
            total, start = total + loss.detach(), start + size
        found.append((total, s.k.grad))
    torch.testing.assert_close(*found)


def test_per_layer_mask() -> None:
    s, t, mask = side(0), side(1), holes()
    masks = torch.stack([mask, ~mask])
    value = StructuralKVLoss()(s, t, masks)
    torch.testing.assert_close(value[0], StructuralKVLoss()(s, t, mask)[0])
    torch.testing.assert_close(value[1], StructuralKVLoss()(s, t, ~mask)[1])


@pytest.mark.parametrize("kind", ATTENTION)
def test_any_strides(kind: type) -> None:
    """Heads before tokens in memory, layers shared: as tensors that come from a model may lie."""
    s, t, mask = side(0), side(1), holes()
    turned = with_graph(QKV(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in s)))
    shared = QKV(*(x[:1].expand(L, -1, -1, -1, -1) for x in t))
    straight = with_graph(s)
    value, expected = (kind()(x, y, mask) for x, y in ((turned, shared), (straight, QKV(*(x.clone() for x in shared)))))
    torch.testing.assert_close(value, expected)
    weight = draw(L, B, T, seed=5, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad(v, x, weight) for v, x in ((value, turned), (expected, straight))), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_shapes_that_do_not_fit_are_refused() -> None:
    s, t, mask = side(0), side(1), holes()
    with pytest.raises(AlignmentError, match=r"queries of the source(.|\n)*query heads too"):
        StructuralKVLoss()(s, t._replace(q=t.q[:, :, :, :4]), mask)
    with pytest.raises(AlignmentError, match=r"queries \(2, 3, 7, 5, 4\)(.|\n)*multiple of key heads"):
        StructuralKVLoss()(s._replace(q=s.q[:, :, :, :5]), t._replace(q=t.q[:, :, :, :5]), mask)
    with pytest.raises((AlignmentError, TypeError)):
        AttentionOutputKVLoss()(s, t, mask[:, 1:])


# -- memory -----------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The most numbers any result of an operation held."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("what", ["structural", "attention_output", "answer"])
def test_memory_is_that_of_one_chunk(what: str) -> None:
    layers, batch, tokens, heads, size = 6, 2, 192, 3, 2
    s, t = (QKV(*(draw(layers, batch, tokens, heads, size, seed=3 * n + i) for i in range(3))) for n in (0, 1))
    s, mask = with_graph(s), torch.ones(batch, tokens, dtype=torch.bool)
    one_chunk = heads * blocks.ROWS * tokens  # of the smallest chunk: one sample, one block of queries
    with LargestTensor() as seen:
        if what == "answer":
            answer_attention(t.q, t.k, mask, mask, chunk_bytes=4 * one_chunk)
        else:
            kind = {"structural": StructuralKVLoss, "attention_output": AttentionOutputKVLoss}[what]
            kind(chunk_bytes=4 * one_chunk)(s, t, mask).sum().backward()
    assert one_chunk <= seen.numel < 2 * one_chunk < batch * heads * tokens * tokens


# -- cka --------------------------------------------------------------------------------------


def loop_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased HSIC of Song et al. 2012, term by term, in float64."""

    def hsic(k: torch.Tensor, l: torch.Tensor) -> float:
        n = len(k)
        k, l = k - k.diag().diag(), l - l.diag().diag()
        middle = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)
        return float(((k * l).sum() + middle) / (n * (n - 3)))

    k, l = (z.double() @ z.double().T for z in (x, y))
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def test_cka_is_the_loop_over_real_tokens() -> None:
    x, y, mask = draw(L, B, T, 6, dtype=torch.float64), draw(L, B, T, 5, seed=1, dtype=torch.float64), holes()
    y = y + x[..., :5]
    value = CKAKVLoss()(x, y, mask)
    for l in range(L):
        assert value[l][mask].tolist() == pytest.approx([1 - loop_cka(x[l][mask], y[l][mask])] * int(mask.sum()))
    assert (value[:, ~mask] == 0).all()
    turn = torch.linalg.qr(draw(6, 6, seed=2, dtype=torch.float64))[0]
    assert CKAKVLoss()(x, 3 * x @ turn, mask).abs().max() < 1e-6
    junk = x.masked_fill(~mask[..., None], 1e4)
    torch.testing.assert_close(CKAKVLoss()(junk, y, mask), value)


def test_cka_gradient_and_few_tokens() -> None:
    x = draw(1, 2, 4, 3, dtype=torch.float64).requires_grad_()
    y, mask = draw(1, 2, 4, 2, seed=1, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    mask[0, 0] = False
    assert torch.autograd.gradcheck(lambda z: CKAKVLoss()(z, y, mask), (x,))
    mask[:] = False
    mask[0, :3] = True
    value = CKAKVLoss()(x, y, mask)
    value.sum().backward()
    assert value.shape == (1, 2, 4) and (value == 0).all() and (x.grad == 0).all()
    half = CKAKVLoss()(draw(L, B, T, 3).bfloat16(), draw(L, B, T, 3, seed=1).bfloat16(), holes())
    assert half.dtype == torch.float32 and half.isfinite().all()
    with pytest.raises((AlignmentError, TypeError)):
        CKAKVLoss()(x, y[:, :1], mask)


# -- token weights ----------------------------------------------------------------------------


def loop_answer_attention(one: QKV, answer: torch.Tensor, mask: torch.Tensor, causal: bool) -> torch.Tensor:
    out = torch.zeros(L, B, T, dtype=torch.float64)
    for l in range(L):
        for b in range(B):
            for t in range(T):
                if answer[b, t] and mask[b, t]:
                    for i in range(Q):
                        out[l, b] += torch.tensor(row_of(one, mask, l, b, i, t, causal, D**-0.5), dtype=torch.float64)
            total = out[l, b].sum()
            out[l, b] = out[l, b] * mask[b].sum() / total if total > 0 else mask[b].double()
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_answer_attention_is_the_loop(rows: int, causal: bool, chunk_bytes: int) -> None:
    one, mask = side(0), holes()
    answer = torch.zeros(B, T, dtype=torch.bool)
    answer[0, 3:] = True  # two of these four are padding
    answer[2, 5:] = True  # the second example has no answer
    weight = answer_attention(with_graph(one).q, one.k, answer, mask, causal=causal, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(weight, loop_answer_attention(one, answer, mask, causal))
    torch.testing.assert_close(weight.sum(-1), mask.sum(-1).double().expand(L, B))
    assert (weight[1, 1] == mask[1]).all() and not weight.requires_grad
    moved = normalise_token_weights(weight * 3, mask)
    torch.testing.assert_close(moved, weight)
    each_LBT = mask & (torch.rand(L, B, T) < 0.7)  # every layer keeps tokens of its own
    apart = torch.stack([normalise_token_weights(weight[l : l + 1], each_LBT[l])[0] for l in range(L)])
    torch.testing.assert_close(normalise_token_weights(weight, each_LBT), apart, rtol=0, atol=0)


def test_no_real_token_gives_no_weight() -> None:
    one, none = side(0), torch.zeros(B, T, dtype=torch.bool)
    assert (answer_attention(one.q, one.k, ~none, none) == 0).all()
    with pytest.raises((AlignmentError, TypeError)):
        answer_attention(one.q, one.k, none[:, 1:], none)


# -- the recipe -------------------------------------------------------------------------------


def test_recipe_reaches_every_setting() -> None:
    recipe = LossRecipe(kind="structural", structural_k=0.2, structural_v=0.3, structural_attention=0.4)
    assert build_distance(recipe) == StructuralKVLoss(0.2, 0.3, 0.4)
    assert build_distance(LossRecipe(kind="attention_output")) == AttentionOutputKVLoss()
    assert build_distance(LossRecipe(kind="cka")) == CKAKVLoss()
    needs = {k: build_distance(LossRecipe(kind=k)) for k in ("mse", "cka", "structural", "attention_output")}
    assert [d.needs_queries for d in needs.values()] == [False, False, True, True]
    assert [d.needs_mask for d in needs.values()] == [False, True, True, True]
    assert [LossRecipe(kind=k).compares_attention for k in needs] == [False, False, True, True]
    switched_off = StructuralKVLoss(0.0, 0.0, 0.0)(side(0), side(1), holes())
    assert switched_off.shape == (L, B, T) and (switched_off == 0).all()
