"""Held-out match figures against NumPy definitions over all tokens at once, and known cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.core.errors import AlignmentError
from kvdistill.match import FIGURES, MatchMeter, TeacherMatch

L, B, T, C = 2, 5, 9, 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged_mask(batch: int = B, tokens: int = T, seed: int = 4) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.7


def measure(source: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, pool_size: int = 1024) -> dict:
    meter = MatchMeter(source.shape[0], pool_size)
    meter.add(source, target, mask)
    return meter.figures()


def reference(source_nC: np.ndarray, target_nC: np.ndarray) -> dict[str, float]:
    """All tokens of one layer at once, everything by its definition."""
    s, t = source_nC.astype(np.float64), target_nC.astype(np.float64)
    cs, ct = s - s.mean(0), t - t.mean(0)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]))

    hits = [int(np.argmin([np.sum((x - y) ** 2) for y in t]) == i) for i, x in enumerate(s)]
    return {
        "r2": float(1 - ((s - t) ** 2).sum() / (ct**2).sum()),
        "centred_cosine": cosine(cs, ct),
        "retrieval_top1": float(np.mean(hits)),
        "retrieval_chance": 1 / len(t),
        "cosine": cosine(s, t),
    }


@pytest.mark.parametrize("per_layer_mask", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_figures_are_the_definitions(per_layer_mask: bool, offset: float) -> None:
    """Three batches; padding holds NaN; with a mean of 1000 one-pass sums of squares would be noise."""
    generator = torch.Generator().manual_seed(9)
    target = draw(L, 3 * B, T, C) + offset
    source = target + 0.8 * draw(L, 3 * B, T, C, seed=1) + 0.3
    mask = torch.rand((L, 3 * B, T) if per_layer_mask else (3 * B, T), generator=generator) < 0.7
    full = mask.expand(L, 3 * B, T)
    source, target = (x.masked_fill(~full[..., None], math.nan) for x in (source, target))
    meter = MatchMeter(L)
    for at in (slice(0, 2), slice(2, 7), slice(7, 15)):
        meter.add(source[:, at], target[:, at], mask[..., at, :])
    got = meter.figures()
    layers = [reference(source[l][full[l]].numpy(), target[l][full[l]].numpy()) for l in range(L)]
    for l, expected in enumerate(layers):
        assert got["by_layer"][l]["tokens"] == got["by_layer"][l]["pool"] == int(full[l].sum())
        for name in FIGURES:
            assert got["by_layer"][l][name] == pytest.approx(expected[name], abs=2e-6 if offset == 0 else 2e-4), name
    for name in FIGURES:
        assert got[name] == pytest.approx(np.mean([x[name] for x in got["by_layer"]]))
    assert "reason" not in got


def test_perfect_match() -> None:
    target = draw(L, B, T, C) * 3 + 5
    got = measure(target.clone(), target, ragged_mask())
    for name in ("r2", "centred_cosine", "retrieval_top1", "cosine"):
        assert got[name] == pytest.approx(1, abs=1e-9)


def test_independent_source_has_a_high_cosine_and_nothing_else() -> None:
    """The reason for this file: a shared mean gives cosine .9 and up to vectors that know nothing."""
    shape = (L, 20, 30, 16)
    got = measure(draw(*shape, seed=1) + 4, draw(*shape, seed=2) + 4, torch.ones(20, 30, dtype=torch.bool))
    assert got["cosine"] > 0.9
    assert got["r2"] < -0.5 and abs(got["centred_cosine"]) < 0.05
    assert got["retrieval_chance"] == pytest.approx(1 / 600)
    assert got["retrieval_top1"] < 0.01


def test_the_constant_mean_has_r2_zero_and_retrieves_by_chance() -> None:
    target, mask_BT = draw(L, B, T, C) + 2, ragged_mask()
    mean = torch.stack([target[l][mask_BT].mean(0) for l in range(L)])[:, None, None].expand(L, B, T, C)
    got = measure(mean, target, mask_BT)
    assert got["r2"] == pytest.approx(0, abs=1e-6) and got["centred_cosine"] == pytest.approx(0, abs=0.2)
    assert got["retrieval_top1"] == pytest.approx(got["retrieval_chance"])


def test_scaled_and_shifted_source_is_told_apart() -> None:
    """Centred cosine sees direction only, R2 sees size too."""
    target = draw(L, B, T, C)
    got = measure(0.1 * target + 7, target, ragged_mask())
    assert got["centred_cosine"] == pytest.approx(1, abs=1e-5) and got["r2"] < -10


def test_equal_targets_count_as_one_place() -> None:
    """Texts that start alike have the same vectors there: finding its twin is finding it, and chance says so."""
    target = draw(L, 1, T, C).expand(L, 3, T, C).clone()
    target[:, 1] += 1e-5 * draw(L, T, C, seed=3)  # equal but for rounding
    got = measure(target + 1e-3 * draw(L, 3, T, C, seed=1), target, torch.ones(3, T, dtype=torch.bool))
    assert got["retrieval_top1"] == 1 and got["retrieval_chance"] == pytest.approx(3 / (3 * T))


def test_pool_is_bounded_uniform_and_seeded() -> None:
    """The pool is of pool_size, every token is in it about equally often, the other figures see all tokens."""
    index = torch.arange(200.0)
    target = torch.stack([index, index.square()], -1).view(1, 20, 10, 2)
    mask_BT = torch.ones(20, 10, dtype=torch.bool)
    seen = torch.zeros(200)
    for seed in range(200):
        meter = MatchMeter(1, pool_size=50, seed=seed)
        for at in (slice(0, 1), slice(1, 12), slice(12, 20)):
            meter.add(target[:, at] + 1, target[:, at], mask_BT[at])
        assert meter._pool is not None
        seen[meter._pool[2][0, :, 0].long()] += 1
        if seed == 0:
            assert meter.figures()["pool"] == 50 and meter.figures()["tokens"] == 200
            assert len(set(meter._pool[2][0, :, 0].tolist())) == 50
    assert seen.sum() == 200 * 50  # mean 50 a token, binomial deviation 6
    assert seen.min() > 20 and seen.max() < 80
    assert abs(float(seen[:10].mean() - seen[-80:].mean())) < 8  # early and late batches alike


@settings(max_examples=25, deadline=None)
@given(
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    cut=st.integers(1, B - 1),
    pool=st.sampled_from([4, 11, 1024]),
    seed=st.integers(0, 99),
)
def test_padding_and_batching_change_nothing(left: int, right: int, cut: int, pool: int, seed: int) -> None:
    target = draw(L, B, T, C, seed=seed)
    source, mask_BT = target + draw(L, B, T, C, seed=seed + 1), ragged_mask(seed=seed)
    plain = measure(source, target, mask_BT, pool)

    def pad(x: torch.Tensor, axis: int, value: float) -> torch.Tensor:
        def columns(n: int) -> torch.Tensor:
            return torch.full((*x.shape[:axis], n, *x.shape[axis + 1 :]), value, dtype=x.dtype)

        return torch.cat([columns(left), x, columns(right)], dim=axis)

    meter = MatchMeter(L, pool)
    for at in (slice(0, cut), slice(cut, B)):
        meter.add(pad(source[:, at], 2, math.nan), pad(target[:, at], 2, math.nan), pad(mask_BT[at], 1, False))
    split = meter.figures()
    for name in FIGURES:
        assert split[name] == pytest.approx(plain[name], abs=1e-9), name
        assert [x[name] for x in split["by_layer"]] == pytest.approx([x[name] for x in plain["by_layer"]], abs=1e-9)


def test_undefined_figures_are_nan_with_a_reason() -> None:
    nothing = measure(draw(L, B, T, C), draw(L, B, T, C), torch.zeros(B, T, dtype=torch.bool))
    assert all(math.isnan(nothing[name]) for name in FIGURES) and "no real token" in nothing["reason"]
    target = draw(L, B, T, C)
    target[1] = 3.3
    flat = measure(draw(L, B, T, C), target, ragged_mask())
    assert math.isnan(flat["r2"]) and flat["reason"].startswith("layer 1: the target is the same")
    assert math.isfinite(flat["by_layer"][0]["r2"]) and math.isfinite(flat["cosine"])
    zero = measure(torch.zeros(L, B, T, C), draw(L, B, T, C), ragged_mask())
    assert zero["cosine"] == 0 and math.isfinite(zero["r2"])


def test_half_precision_and_graph_are_taken_as_they_come() -> None:
    source, target = draw(L, B, T, C).requires_grad_(), draw(L, B, T, C, seed=1)
    plain = measure(source, target, ragged_mask())
    half = measure(source.bfloat16(), target.bfloat16(), ragged_mask())
    assert half["r2"] == pytest.approx(plain["r2"], abs=0.05)
    with pytest.raises((AlignmentError, TypeError)):  # TypeError: jaxtyping's own check, where its hook is on
        measure(source, target[..., :-1], ragged_mask())
    with pytest.raises(AlignmentError, match="for 3 layers"):
        MatchMeter(3).add(source, target, ragged_mask())


def test_fragment_of_match_json() -> None:
    match = TeacherMatch(L)
    target, mask_BT = draw(L, B, T, C), ragged_mask()
    match.keys.add(target, target, mask_BT)
    match.values.add(draw(L, B, T, C + 1, seed=1), draw(L, B, T, C + 1, seed=2), mask_BT)  # values may differ in size
    fragment = match.fragment()
    assert set(fragment) == {"k", "v", "by_layer"} and len(fragment["by_layer"]) == L
    for place in (fragment, *fragment["by_layer"]):
        assert place["k"]["r2"] == pytest.approx(1) and place["v"]["r2"] < 0.1
        assert {"r2", "centred_cosine", "retrieval_top1", "cosine"} <= set(place["k"])
    assert json.loads(json.dumps(fragment)) == fragment
