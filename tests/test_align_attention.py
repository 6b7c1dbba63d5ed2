"""Fits in the metric of what attention reads, against loops, dense least squares and the plain fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvdistill.align.attention import (
    AttentionRidgeFit,
    attention_rows,
    carry_attention,
    head_shares,
    received_attention,
    teacher_attention,
)
from kvdistill.align.ridge import RidgeFit
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV, AttentionRule
from kvdistill.core.maps import SparseMap

B, Q, G, S, E = 3, 6, 2, 8, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_attention(seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    q, k = torch.randn(B, Q, S, E, generator=random) * 2, torch.randn(B, G, S, E, generator=random) * 2
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, :3], mask[2, 5:] = False, False  # left and right padding
    return q, k, mask


def slow_attention(q, k, mask, causal, scale):
    out = torch.zeros(B, Q, S, S, dtype=torch.float64)
    for b in range(B):
        for j in range(Q):
            for t in range(S):
                keys = [s for s in range(S) if mask[b, s] and (s <= t or not causal)]
                if mask[b, t]:
                    logits = [scale * float(q[b, j, t].double() @ k[b, j // (Q // G), s].double()) for s in keys]
                    exps = np.exp(np.array(logits) - max(logits))
                    out[b, j, t, keys] = torch.from_numpy(exps / exps.sum())
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_rows_are_the_loop(causal, scale):
    q, k, mask = some_attention()
    dirty_q, dirty_k = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k))
    got = attention_rows(dirty_q, dirty_k, mask, rule=AttentionRule(causal=causal), scale=scale)
    expected = slow_attention(q, k, mask, causal, E**-0.5 if scale is None else scale)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(-1), mask[:, None].expand(B, Q, S).float())
    torch.testing.assert_close(received_attention(got).sum(-1), mask.sum(1)[:, None].expand(B, Q).float())
    with pytest.raises(AlignmentError, match="6 query heads on 4 key heads"):
        attention_rows(q, k.repeat(1, 2, 1, 1), mask)


def test_carried_attention():
    a = attention_rows(*some_attention())
    assert carry_attention(a, None) is a
    torch.testing.assert_close(carry_attention(a, SparseMap.identity(S)), a)
    kept = torch.tensor([0, 2, 3, 6])  # whole tokens: the rows and columns kept, summing to 1 again
    got = carry_attention(a, SparseMap.take(kept, S))
    expected = a[:, :, kept][..., kept]
    expected = torch.nan_to_num(expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(got, expected)
    soft = carry_attention(a, SparseMap.interpolate(torch.tensor([[0.5, 3.25, 6.0]] * B), S))
    total = soft.sum(-1)
    assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all() and soft.shape == (B, Q, 3, 3)


def test_head_shares():
    own = head_shares(Q, G, G)
    assert torch.equal(own, torch.tensor([[1.0, 0]] * 3 + [[0.0, 1]] * 3))
    torch.testing.assert_close(
        head_shares(6, 3, 2).sum(0), torch.full((2,), 2.0)
    )  # two queries a head, shares sum to 1


def attention_case(seed: int, J: int = G, num_in: int = 7, size: int = 4):
    """Rows that no linear map fits, and an attention that reads mostly the few tokens where one map is right."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    true = torch.randn(num_in, J * size, generator=random)
    for _ in range(12):
        q, k, mask = some_attention(int(torch.randint(1 << 30, (1,), generator=random)))
        a = attention_rows(q, k, mask)
        x = torch.randn(B, S, num_in, generator=random)
        y = x @ true + torch.randn(B, S, J * size, generator=random)
        y += 0.7 * x[..., :1].square() * (received_attention(a).mean(1) < 1)[..., None]
        batches.append((x, y, mask, a))
    return batches


def read_error(batches, weight, bias, shares, J, size) -> float:
    """Squared error of A (x W + b) against A y over every query head, by einsum."""
    total = 0.0
    for x, y, mask, a in batches:
        error = (x.double() @ weight[0] + bias[0] - y.double()) * mask[..., None]
        read = torch.einsum("bqts,bsje->bqtje", a.double(), error.unflatten(2, (J, size))).square().sum((0, 2, 4))
        total += float((read * shares.double()).sum())
    return total


@pytest.mark.parametrize("J", [2, 3, 1])
def test_values_fit_minimises_the_error_of_what_attention_reads(J):
    batches, size, num_in = attention_case(1, J), 4, 7
    shares = head_shares(Q, G, J)
    fit, plain = AttentionRidgeFit("values", num_in, J, size), RidgeFit(num_in, J * size)
    for x, y, mask, a in batches:
        dirty_x, dirty_y = (part.masked_fill(~mask[..., None], torch.nan) for part in (x, y))
        fit.update_layer(0, dirty_x, dirty_y, mask, a, shares)
        plain.update(dirty_x[None], dirty_y[None], mask)
    weight, bias = fit.solve(1e-9)
    for j in range(J):  # dense: all queries' averaged rows in one least squares
        rows_x, rows_y, rows_w = [], [], []
        for x, y, mask, a in batches:
            for q in range(Q):
                rows_x.append((a[:, q].double() @ x.double())[mask])
                rows_y.append((a[:, q].double() @ y.double())[mask][:, j * size : (j + 1) * size])
                rows_w.append(shares[q, j].double().sqrt().expand(int(mask.sum()))[:, None])
        w = torch.cat(rows_w)
        design = torch.cat([torch.cat(rows_x), torch.ones(len(w), 1)], 1) * w
        best = torch.linalg.lstsq(design, torch.cat(rows_y) * w, driver="gelsd").solution
        torch.testing.assert_close(weight[0][:, j * size : (j + 1) * size], best[:-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bias[0][j * size : (j + 1) * size], best[-1], atol=1e-4, rtol=1e-4)
    ours = read_error(batches, weight, bias, shares, J, size)
    assert ours < 0.98 * read_error(batches, *plain.solve(1e-9), shares, J, size)


def test_keys_fit_weighs_tokens_by_the_attention_they_receive():
    J, size, num_in = G, E, 7
    batches, shares = attention_case(2, J, num_in, size), head_shares(Q, G, J)
    fit, plain = AttentionRidgeFit("keys", num_in, J, size), RidgeFit(num_in, J * size)
    for x, y, mask, a in batches:
        fit.update_layer(0, x, y, mask, a, shares)
        plain.update(x[None], y[None], mask)
    weight, bias = fit.solve(1e-9)
    error = {True: 0.0, False: 0.0}
    metric = torch.randn(size, size, dtype=torch.float64)
    for j in range(J):
        part = slice(j * size, (j + 1) * size)
        received = torch.cat([a[:, shares[:, j] > 0].sum((1, 2))[mask] for _, _, mask, a in batches]).double()
        rows_x = torch.cat([x[mask] for x, _, mask, _ in batches]).double()
        rows_y = torch.cat([y[mask] for _, y, mask, _ in batches]).double()[:, part]
        root = received.sqrt()[:, None]
        design = torch.cat([rows_x, torch.ones(len(rows_x), 1)], 1) * root
        best = torch.linalg.lstsq(design, rows_y * root, driver="gelsd").solution
        torch.testing.assert_close(weight[0][:, part], best[:-1], atol=1e-4, rtol=1e-4)
        for ours, (w, b) in ((True, (weight, bias)), (False, plain.solve(1e-9))):
            wrong = (rows_x @ w[0][:, part] + b[0][part] - rows_y) * root
            error[ours] += float((wrong @ metric).square().sum())  # in any metric of the queries
    assert error[True] < 0.99 * error[False]


def teacher(**options) -> KV:
    q, k, mask = some_attention()
    fields = {"queries": (q, q * 2), "rope": "none", "layers": (4, 6)} | options
    return KV((k, k + 1), (k, k), mask, torch.arange(S).expand(B, S), **fields)


def test_teacher_attention_mixes_layers_and_rotates():
    kv = teacher(scaling=(0.3, 1.0))
    one, two = teacher_attention(kv, [[(4, 1.0)], [(6, 0.25), (4, 0.75)]])
    q, k, mask = some_attention()
    first, second = attention_rows(q, k, mask, scale=0.3), attention_rows(q * 2, k + 1, mask, scale=1.0)
    torch.testing.assert_close(one, first)
    torch.testing.assert_close(two, 0.25 * second + 0.75 * first)
    doubled = next(
        teacher_attention(teacher(rope="unrotated"), [[(4, 1.0)]], rotate=lambda kv: kv.map_layers(lambda x: 2 * x))
    )
    torch.testing.assert_close(doubled, attention_rows(2 * q, 2 * k, mask))
    with pytest.raises(AlignmentError, match=r"needs queries(.|\n)*capture with queries"):
        teacher_attention(teacher(queries=()), [[(4, 1.0)]])
    with pytest.raises(AlignmentError, match="they are unrotated"):
        teacher_attention(teacher(rope="unrotated"), [[(4, 1.0)]])
