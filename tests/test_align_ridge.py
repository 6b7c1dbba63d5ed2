"""Streaming ridge against the closed form on all rows at once, plain and per head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align import ridge
from kvdistill.align.heads import spread_heads
from kvdistill.align.ridge import RidgeFit, read_heads
from kvdistill.core.errors import AlignmentError, RecipeError

L, I, O = 2, 7, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stream(num_batches: int = 5, offset: float = 0.0):
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(L, I, I, generator=random, dtype=torch.float64)
    for b in range(num_batches):
        x = torch.randn(L, 3, 11 + b, I, generator=random, dtype=torch.float64) @ mix[:, None] + offset
        y = torch.randn(L, 3, 11 + b, O, generator=random, dtype=torch.float64) + x[..., :O] * 0.3
        yield x, y, torch.rand(3, 11 + b, generator=random) > 0.3


def closed_form(x: np.ndarray, y: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    mx, my = x.mean(0), y.mean(0)
    penalty = l2 * len(x) * x.var(0).mean()
    weight = np.linalg.solve((x - mx).T @ (x - mx) + penalty * np.eye(x.shape[1]), (x - mx).T @ (y - my))
    return weight, my - mx @ weight


@pytest.mark.parametrize("l2", [1e-6, 1e-2, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("per_layer_mask", [False, True])
def test_streaming_equals_the_closed_form(l2, offset, per_layer_mask):
    fit = RidgeFit(I, O, L)
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(L)]
    for x, y, mask in stream(offset=offset):
        masks = torch.stack([mask, ~mask]) if per_layer_mask else mask.expand(L, *mask.shape)
        dirty = torch.where(masks[..., None], x, torch.nan)
        fit.update(dirty, y, masks if per_layer_mask else mask)
        for layer in range(L):
            rows[layer].append((x[layer][masks[layer]].numpy(), y[layer][masks[layer]].numpy()))
    weight, bias = fit.solve(l2)
    for layer in range(L):
        x, y = (np.concatenate(part) for part in zip(*rows[layer], strict=True))
        expected_weight, expected_bias = closed_form(x, y, l2)
        np.testing.assert_allclose(weight[layer].numpy(), expected_weight, atol=1e-8)
        np.testing.assert_allclose(bias[layer].numpy(), expected_bias, atol=1e-8 * max(1, offset))


def test_an_exactly_linear_teacher_is_recovered():
    random = torch.Generator().manual_seed(5)
    true = torch.randn(L, I, O, generator=random)
    mix = torch.randn(L, I, I, generator=random)
    fit, held_out = RidgeFit(I, O, L), None
    for _ in range(8):
        x = torch.randn(L, 60, I, generator=random) @ mix + 3
        fit.update(x, x @ true - 2, torch.ones(60, dtype=torch.bool))
        held_out = x
    weight, bias = fit.solve(1e-4)
    y = held_out @ true - 2
    predicted = (held_out.double() @ weight + bias[:, None]).float()
    r2 = 1 - (y - predicted).square().sum((1, 2)) / (y - y.mean(1, keepdim=True)).square().sum((1, 2))
    assert (r2 >= 0.999).all()


def test_the_penalty_does_not_depend_on_scale_or_amount():
    solved = []
    for scale, repeats in ((1.0, 1), (1000.0, 1), (1.0, 3)):
        fit = RidgeFit(I, O, L)
        for x, y, mask in list(stream()) * repeats:
            fit.update(x * scale, y, mask)
        solved.append(fit.solve(0.1)[0] * scale)
    torch.testing.assert_close(solved[1], solved[0], atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(solved[2], solved[0], atol=1e-9, rtol=1e-7)


def test_constant_inputs_predict_the_mean():
    fit = RidgeFit(I, O, L)
    y = torch.randn(L, 20, O)
    fit.update(torch.full((L, 20, I), 4.0), y, torch.ones(20, dtype=torch.bool))
    weight, bias = fit.solve(1e-2)
    assert torch.count_nonzero(weight) == 0
    torch.testing.assert_close(bias.float(), y.mean(1), atol=1e-5, rtol=1e-5)


def test_wrong_use_says_so():
    fit = RidgeFit(I, O, L)
    with pytest.raises(AlignmentError, match="no tokens"):
        fit.solve(0.1)
    with pytest.raises(AlignmentError, match="7 -> 4 channels"):
        fit.update(torch.zeros(L, 3, O), torch.zeros(L, 3, I), torch.ones(3, dtype=torch.bool))
    with pytest.raises(RecipeError, match=r"l2 = 0\.0"):
        fit.solve(0.0)


# -- fp32 products, blocks, weights -------------------------------------------------------------------


def real_like(num_rows: int, num_in: int, num_out: int, offset: float, decay: float, seed: int = 0):
    """fp32 rows whose channels are correlated (singular values fall by `decay` overall) and far from 0."""
    random = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(num_in, num_in, generator=random))[0]
    scale = torch.logspace(0, -np.log10(decay), num_in)
    x = torch.randn(num_rows, num_in, generator=random) * scale @ turn
    y = x @ torch.randn(num_in, num_out, generator=random) + 0.3 * torch.randn(num_rows, num_out, generator=random)
    return x + offset, y - offset


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    return 1 - ((y - predicted) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("decay", [1.0, 1e4])
@pytest.mark.parametrize("l2", [1e-6, 1e-2])
def test_fp32_stream_predicts_as_sklearn_in_fp64(offset, decay, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")  # comes with lm-eval
    x, y = real_like(9000, 96, 40, offset, decay)
    fit = RidgeFit(96, 40)
    for rows in torch.arange(6000).split(1300):
        fit.update(x[None, rows], y[None, rows], torch.ones(len(rows), dtype=torch.bool))
    weight, bias = fit.solve(l2)
    x64, y64 = x.double().numpy(), y.double().numpy()
    alpha = l2 * 6000 * x64[:6000].var(0).mean()
    expected = linear_model.Ridge(alpha=alpha).fit(x64[:6000], y64[:6000])
    held_out = r2(y64[6000:], x64[6000:] @ weight[0].numpy() + bias[0].numpy())
    assert abs(held_out - r2(y64[6000:], expected.predict(x64[6000:]))) < 1e-4
    assert held_out > 0.5
    if (
        decay == 1 or l2 >= 1e-2
    ):  # else the weakest directions are below what fp32 resolves, and matter to no prediction
        size = np.abs(expected.coef_).max()
        np.testing.assert_allclose(weight[0].numpy().T, expected.coef_, atol=1e-4 * size)


def test_tiny_spread_on_large_means():
    x, y = real_like(4000, 24, 7, 0.0, 1.0)
    shifted = (x * 1e-2 + 1e3).clone()  # spread 1e-2 on 1e3: five digits are left of it in fp32
    weight = RidgeFit(24, 7)
    weight.update(shifted[None], y[None], torch.ones(4000, dtype=torch.bool))
    got, bias = weight.solve(1e-6)
    expected, expected_bias = closed_form(shifted.double().numpy(), y.double().numpy(), 1e-6)
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(bias[0].numpy(), expected_bias, rtol=1e-4)


def test_more_channels_than_tokens_and_repeated_channels_stay_finite():
    x, y = real_like(90, 64, 5, 10.0, 1.0)
    x[:, 1] = x[:, 0]
    for l2 in (1e-2, 1e-9, 1e-14):  # the last two are below what fp32 products resolve
        fit = RidgeFit(64, 5)
        fit.update(x[None, :30], y[None, :30], torch.ones(30, dtype=torch.bool))
        weight, bias = fit.solve(l2)
        assert torch.isfinite(weight).all() and torch.isfinite(bias).all()
        predicted = (x.double() @ weight[0] + bias[0]).numpy()
        assert r2(y[:30].double().numpy(), predicted[:30]) > 0.8
        assert r2(y[30:].double().numpy(), predicted[30:]) > 0.1  # half of the directions were never seen


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_blocks_batches_and_order_do_not_matter(block, monkeypatch):
    whole = RidgeFit(I, O, L)
    batches = [(x.float(), y.float(), mask) for x, y, mask in stream()]
    for x, y, mask in batches:
        whole.update(x, y, mask)
    monkeypatch.setattr(ridge, "_BLOCK_ROWS", block)
    other = RidgeFit(I, O, L)
    for x, y, mask in reversed(batches):
        for row in range(x.shape[1]):
            other.update(x[:, row], y[:, row], mask[row])
    for one, two in zip(whole.solve(1e-2), other.solve(1e-2), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@given(extra=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_padding_changes_no_bit(extra, seed):
    random = torch.Generator().manual_seed(seed)
    x, y = torch.randn(L, 6, I, generator=random), torch.randn(L, 6, O, generator=random)
    weight = torch.rand(6, generator=random)
    padded_x = torch.cat([torch.full((L, extra, I), torch.nan), x], 1)
    padded_y = torch.cat([torch.full((L, extra, O), torch.inf), y], 1)
    mask = torch.arange(6 + extra) >= extra
    one, two = RidgeFit(I, O, L), RidgeFit(I, O, L)
    one.update(x, y, torch.ones(6, dtype=torch.bool), weight)
    two.update(padded_x, padded_y, mask, torch.cat([torch.full((extra,), torch.nan), weight]))
    for a, b in zip(one.solve(0.1), two.solve(0.1), strict=True):
        assert torch.equal(a, b)


def test_weights_are_repetitions():
    x, y, mask = next(stream())
    times = torch.randint(0, 4, (L, *mask.shape), generator=torch.Generator().manual_seed(2))
    weighted = RidgeFit(I, O, L)
    weighted.update(x, y, mask, times.double())
    weight, bias = weighted.solve(0.1)
    for layer in range(L):
        n = (times[layer] * mask).flatten()
        rows = [part[layer].flatten(0, 1).repeat_interleave(n, 0).numpy() for part in (x, y)]
        expected, expected_bias = closed_form(*rows, 0.1)
        np.testing.assert_allclose(weight[layer].numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(bias[layer].numpy(), expected_bias, atol=1e-9)


def test_a_layer_may_start_late_but_must_start():
    fit = RidgeFit(I, O, L)
    (x, y, mask), (later_x, later_y, later_mask) = list(stream(2, offset=1e3))
    late = torch.stack([mask, torch.zeros_like(mask)])
    fit.update(x.float(), y.float(), late)
    with pytest.raises(AlignmentError, match="no tokens"):
        fit.solve(0.1)
    fit.update(later_x.float(), later_y.float(), later_mask)
    weight, _ = fit.solve(0.1)
    alone = RidgeFit(I, O, 1)
    alone.update(later_x[1:].float(), later_y[1:].float(), later_mask)
    torch.testing.assert_close(weight[1:], alone.solve(0.1)[0])
    with pytest.raises(AlignmentError, match=r"mask or weight \(2,\)"):
        fit.update(x, y, mask, torch.ones(2))


@pytest.mark.parametrize("ends", [(3, 4, 2, 5), (2, 5, 3, 4), (7, 3, 4, 2), (1, 6, 5, 4), (4, 3, 4, 2)])
def test_per_head_fits_read_their_own_heads_only(ends):
    h, d, g, e = ends
    x, y = real_like(200, h * d, g * e, 2.0, 1.0)
    fit = RidgeFit(h * d, g * e)
    fit.update(x.double()[None], y.double()[None], torch.ones(200, dtype=torch.bool))
    weight, bias = fit.solve(0.05, read_heads(spread_heads(h, g), d))
    blocks = weight[0].view(h, d, g, e)
    for out in range(g):
        reads = [
            i for i in range(h) if i * g < (out + 1) * h and out * h < (i + 1) * g
        ]  # [i/h, ...) meets [out/g, ...)
        own = x.view(200, h, d)[:, reads].flatten(1).double().numpy()
        expected, expected_bias = closed_form(own, y.view(200, g, e)[:, out].double().numpy(), 0.05)
        np.testing.assert_allclose(blocks[reads, :, out].reshape(-1, e).numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(bias[0].view(g, e)[out].numpy(), expected_bias, atol=1e-9)
        others = [i for i in range(h) if i not in reads]
        assert torch.count_nonzero(blocks[others, :, out]) == 0
