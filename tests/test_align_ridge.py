"""Streaming ridge against the closed form on all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvdistill.align.ridge import RidgeFit
from kvdistill.core.runtime import AlignmentError, RecipeError

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
