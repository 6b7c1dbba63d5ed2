"""Which tokens stay, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align.time import time_map
from kvdistill.compress import (
    kept_by_layer,
    kept_tokens,
    rkv_layer_scores,
    rkv_scores,
    rkv_select,
    selection_map,
    share_that_drops,
)
from kvdistill.core.errors import AlignmentError, RecipeError

EXAMPLES = settings(max_examples=60, deadline=None)
codes = st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4).map(torch.tensor)


@EXAMPLES
@given(segments=codes, mode=st.sampled_from(["full", "right", "crop"]), keep=st.integers(1, 8))
def test_kept_tokens_is_the_loop(segments, mode, keep):
    kept = kept_tokens(mode, segments, keep)
    for b, row in enumerate(segments.tolist()):
        reasoning = [i for i, code in enumerate(row) if code == 2]
        stays = {"full": reasoning, "right": reasoning[-keep:], "crop": reasoning[:keep]}[mode]
        assert [i for i, k in enumerate(kept[b].tolist()) if k] == sorted(
            stays + [i for i, code in enumerate(row) if code in (1, 3)]
        )


@EXAMPLES
@given(segments=codes, mode=st.sampled_from(["right", "crop"]), keep=st.integers(1, 8), left=st.integers(0, 4))
def test_padding_never_changes_what_is_kept(segments, mode, keep, left):
    padded = torch.nn.functional.pad(segments, (left, 3))
    kept = kept_tokens(mode, padded, keep)
    assert torch.equal(kept[:, left : left + 7], kept_tokens(mode, segments, keep))
    assert kept[:, :left].sum() + kept[:, left + 7 :].sum() == 0


@EXAMPLES
@given(segments=codes, spare=st.integers(0, 3))
def test_selection_packs_in_time_order_and_masks_spare_slots(segments, spare):
    kept = segments == 2
    slots = int(kept.sum(1).max()) + spare or 1
    mapping = selection_map(kept, slots)
    assert mapping.index.shape == (segments.shape[0], slots, 1)
    x = torch.arange(7.0).expand(segments.shape[0], 7) + 1
    got, mask = mapping.apply(x, 1), mapping.mask()
    for b in range(segments.shape[0]):
        expected = [i + 1.0 for i in range(7) if kept[b, i]]
        assert got[b, mask[b]].tolist() == expected
        assert mask[b].tolist() == [True] * len(expected) + [False] * (slots - len(expected))


def test_more_slots_than_tokens_altogether():
    mapping = selection_map(torch.tensor([[True, False, True]]), 5)
    assert mapping.index[0, :2, 0].tolist() == [0, 2]
    assert mapping.mask().tolist() == [[True, True, False, False, False]]


def test_compression_removes_source_tokens_of_a_time_map():
    segments = torch.tensor([[1, 2, 2, 2, 3]])
    kept = kept_tokens("right", segments, 1)
    mapping = time_map("pad", segments, segments).masked_source(kept)
    assert mapping.mask().tolist() == [[True, False, False, True, True]]


# -- drawn and spread ----------------------------------------------------------------------------------------


@EXAMPLES
@given(segments=codes, keep=st.integers(1, 8), seed=st.integers(0, 99), left=st.integers(0, 4))
def test_random_draws_by_the_examples_own_seed(segments, keep, seed, left):
    B = segments.shape[0]
    keys = [seed + 7 * b for b in range(B)]
    kept = kept_tokens("random", segments, keep, keys_B=keys)
    reasoning = segments == 2
    assert torch.equal(kept & ~reasoning, (segments == 1) | (segments == 3))
    assert torch.equal((kept & reasoning).sum(1), reasoning.sum(1).clamp(max=keep))
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(segments, (left, 5))[order]
    again = kept_tokens("random", padded, keep, keys_B=torch.tensor(keys)[order])
    assert torch.equal(again[:, left : left + 7], kept[order])


def test_random_takes_every_token_equally_often():
    segments = torch.full((2000, 5), 2)
    kept = kept_tokens("random", segments, 2, keys_B=range(2000))
    assert (kept.float().mean(0) - 0.4).abs().max() < 0.04


@EXAMPLES
@given(segments=codes, keep=st.integers(1, 8), left=st.integers(0, 4))
def test_uniform_is_spread_over_the_reasoning(segments, keep, left):
    kept = kept_tokens("uniform", segments, keep)
    for b, row in enumerate(segments.tolist()):
        reasoning = [i for i, code in enumerate(row) if code == 2]
        ranks = [r for r, i in enumerate(reasoning) if kept[b, i]]
        n = min(keep, len(reasoning))
        assert len(ranks) == n
        if n:
            ideal = [i * (len(reasoning) - 1) / max(1, n - 1) for i in range(n)]
            assert all(abs(a - c) <= 0.5 for a, c in zip(ranks, ideal, strict=True))
        assert all(kept[b, i] == (code in (1, 3)) for i, code in enumerate(row) if code != 2)
    padded = torch.nn.functional.pad(segments, (left, 3))
    assert torch.equal(kept_tokens("uniform", padded, keep)[:, left : left + 7], kept)


def test_none_and_full():
    segments = torch.tensor([[0, 1, 2, 2, 3, 0]])
    assert kept_tokens("none", segments).tolist() == [[False, True, False, False, True, False]]
    assert kept_tokens("full", segments).tolist() == [[False, True, True, True, True, False]]


@EXAMPLES
@given(segments=codes, keep=st.none() | st.integers(1, 8), seed=st.integers(0, 99), left=st.integers(0, 4))
def test_steps_keeps_the_ends_of_the_last_steps(segments, keep, seed, left):
    ends = torch.rand(segments.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept = kept_tokens("steps", segments, keep, ends_BS=ends)
    for b, row in enumerate(segments.tolist()):
        of_steps = [i for i, code in enumerate(row) if code == 2 and ends[b, i]]
        expected = of_steps if keep is None else of_steps[-keep:]
        others = [i for i, code in enumerate(row) if code in (1, 3)]
        assert kept[b].nonzero().squeeze(1).tolist() == sorted(expected + others)
    padded = [torch.nn.functional.pad(x, (left, 3), value=fill) for x, fill in ((segments, 0), (ends, True))]
    again = kept_tokens("steps", padded[0], keep, ends_BS=padded[1])
    assert torch.equal(again[:, left : left + 7], kept) and int(again.sum()) == int(kept.sum())


@EXAMPLES
@given(segments=codes, keep=st.integers(1, 8), num_layers=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_share_that_drops_is_counted_example_by_example(segments, keep, num_layers, seed):
    kept = kept_tokens("right", segments, keep)
    if num_layers:  # layers keep different tokens, some of them all
        drawn = torch.rand(num_layers, *segments.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
        kept = kept_tokens("full", segments) & drawn
    with_reasoning = [b for b, row in enumerate(segments.tolist()) if 2 in row]
    dropping = [
        b
        for b in with_reasoning
        if any(not layer[b][i] for layer in kept.reshape(-1, *segments.shape) for i in range(7) if segments[b, i] == 2)
    ]
    assert share_that_drops(kept, segments) == len(dropping) / max(1, len(with_reasoning))
    if not num_layers:  # where there is room for every token, nothing is dropped, whatever selects
        longest = int((segments == 2).sum(1).max())
        assert (share_that_drops(kept, segments) == 0) == (keep >= longest)


# -- R-KV ----------------------------------------------------------------------------------------------------


def slow_scores(query, key, segments, scaling):
    """Per example and head, with the n x n matrix of cosines."""
    B, Q, S, _ = query.shape
    G = key.shape[1]
    scores = torch.zeros(B, 2, G, S)
    for b in range(B):
        reasoning = [i for i in range(S) if segments[b, i] == 2]
        answer = [i for i in range(S) if segments[b, i] == 3]
        n = len(reasoning)
        if not n:
            continue
        for g in range(G):
            keys = key[b, g, reasoning].double()
            rows = []
            for a in answer:
                logits = [query[b, q, a].double() @ keys.T * scaling for q in range(g * Q // G, (g + 1) * Q // G)]
                rows.append(torch.stack(logits).amax(0).softmax(0))
            importance = torch.stack(rows).mean(0) if rows else torch.full((n,), 1 / n).double()
            cosine = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
            mean = cosine.fill_diagonal_(0).sum(1) / max(1, n - 1)
            scores[b, 0, g, reasoning] = importance.float()
            scores[b, 1, g, reasoning] = (-mean).softmax(0).float()
    return scores


def assert_best(kept, score, member, keep, tolerance=1e-5):
    """As many as there should be, and none left out that is better than one taken."""
    n = int(member.sum())
    assert int(kept.sum()) == min(keep, n)
    assert not (kept & ~member).any()
    left_out = member & ~kept
    if left_out.any() and kept.any():
        assert score[left_out].max() <= score[kept].min() + tolerance / n


def tensors(seed, B, Q, G, S, E):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(B, Q, S, E, generator=random) * 2, torch.randn(B, G, S, E, generator=random) * 2


@EXAMPLES
@given(
    segments=codes,
    seed=st.integers(0, 999),
    heads=st.sampled_from([(2, 2), (6, 2), (3, 1)]),
    scaling=st.sampled_from([None, 0.7]),
    keep=st.integers(1, 8),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_rkv_is_the_loop(segments, seed, heads, scaling, keep, share):
    (B, S), (Q, G), E = segments.shape, heads, 5
    query, key = tensors(seed, B, Q, G, S, E)
    scores = rkv_scores(query, key, segments, scaling=scaling)
    expected = slow_scores(query, key, segments, E**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=1e-5)
    reasoning = segments == 2
    some = reasoning.any(1).float()
    torch.testing.assert_close(scores.sum(-1), some[:, None, None].expand(B, 2, G))
    assert (scores.masked_select(~reasoning[:, None, None].expand_as(scores)) == 0).all()
    kept, joined = rkv_select(scores, keep, share), share * expected[:, 0] + (1 - share) * expected[:, 1]
    together = kept_by_layer(scores, keep, share)
    assert torch.equal(
        kept_tokens("r-kv", segments, keep, scores=scores, importance_share=share),
        together | (segments == 1) | (segments == 3),
    )
    for b in range(B):
        assert_best(together[b], joined[b].mean(0), reasoning[b], keep)
        for g in range(G):
            assert_best(kept[b, g], joined[b, g], reasoning[b], keep)


def test_rkv_of_many_layers_is_that_of_each():
    segments = torch.tensor([[0, 1, 2, 2, 2, 2, 3, 3], [1, 2, 2, 3, 0, 0, 0, 0], [1, 1, 3, 3, 0, 0, 0, 0]])
    layers = [tensors(m, 3, 4, 2, 8, 6) for m in range(5)]
    scores = rkv_layer_scores([q for q, _ in layers], [k for _, k in layers], segments)
    assert scores.shape == (5, 3, 2, 2, 8)
    for m, (query, key) in enumerate(layers):
        torch.testing.assert_close(scores[m], rkv_scores(query, key, segments), atol=0, rtol=0)
        assert torch.equal(rkv_select(scores, 2)[m], rkv_select(scores[m], 2))
        assert torch.equal(kept_by_layer(scores, 2)[m], kept_by_layer(scores[m], 2))
    kept = kept_tokens("r-kv", segments, 2, scores=scores)
    assert kept.shape == (5, 3, 8)
    assert kept[:, 2].tolist() == [[True] * 4 + [False] * 4] * 5


@pytest.mark.parametrize("extra", [8, 64, 200])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_never_changes_the_selection(extra, side):
    B, n = 3, 40
    segments = torch.zeros(B, 60, dtype=torch.int64)
    for b in range(B):
        segments[b, : 4 + n - 9 * b + 6] = torch.tensor([1] * 4 + [2] * (n - 9 * b) + [3] * 6)
    query, key = tensors(1, B, 4, 2, 60, 16)
    left, right = {"left": (extra, 0), "right": (0, extra), "both": (extra, extra)}[side]
    wide = torch.nn.functional.pad(segments, (left, right))
    padded = [torch.nn.functional.pad(x, (0, 0, left, right), value=float("nan")) for x in (query, key)]
    plain, other = rkv_scores(query, key, segments), rkv_scores(*padded, wide)
    assert torch.equal(other[..., left : left + 60], plain)
    for share in (0.0, 0.1, 1.0):
        assert torch.equal(rkv_select(other, 12, share)[..., left : left + 60], rkv_select(plain, 12, share))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(rkv_scores(query[order], key[order], segments[order]), plain[order])


def test_rkv_by_hand():
    segments = torch.tensor([[1, 2, 2, 2, 3]])
    key = torch.tensor([[9.0, 9], [1, 0], [1, 0], [0, 1], [9, 9]])[None, None]
    query = torch.tensor([[9.0, 9], [9, 9], [9, 9], [9, 9], [0, math.log(2)]])[None, None]
    scores = rkv_scores(query, key, segments, scaling=1.0)[0, :, 0, 1:4]
    torch.testing.assert_close(scores[0], torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(scores[1], torch.tensor([-0.5, -0.5, 0.0]).softmax(0))
    kept = rkv_select(rkv_scores(query, key, segments, scaling=1.0), 2)
    assert kept[0, 0].tolist() == [False, True, False, True, False], "of two equal tokens the earlier one"


@EXAMPLES
@given(n=st.integers(1, 70), keep=st.integers(1, 80), size=st.sampled_from([3, 16]), seed=st.integers(0, 99))
def test_equal_keys_share_and_go_by_time(n, keep, size, seed):
    segments = torch.tensor([[1] + [2] * n + [3] * 2])
    query, key = tensors(seed, 1, 2, 2, n + 3, size)
    key = key[:, :, :1].expand_as(key)
    scores = rkv_scores(query, key, segments)
    torch.testing.assert_close(scores[0, :, :, 1 : n + 1], torch.full((2, 2, n), 1 / n))
    expected = [False] + [i < keep for i in range(n)] + [False] * 2
    for share in (0.0, 0.1, 1.0):
        assert rkv_select(scores, keep, share)[0].tolist() == [expected] * 2


@EXAMPLES
@given(seed=st.integers(0, 99), power=st.integers(-12, 12))
def test_redundancy_knows_directions_only(seed, power):
    segments = torch.tensor([[1, 2, 2, 2, 2, 2, 3]])
    query, key = tensors(seed, 1, 2, 2, 7, 5)
    scale = torch.rand(1, 2, 7, 1, generator=torch.Generator().manual_seed(seed)) + 0.5
    redundancy = rkv_scores(query, key, segments)[:, 1]
    scaled = rkv_scores(query, key * scale * 10.0**power, segments)
    assert torch.isfinite(scaled).all()
    torch.testing.assert_close(scaled[:, 1], redundancy, atol=1e-6, rtol=1e-5)


def test_half_precision_is_summed_in_fp32():
    segments = torch.tensor([[1, 2, 2, 2, 3]])
    query, key = tensors(3, 1, 2, 1, 5, 64)
    key = key * 9000 / key.abs().amax()
    scores = rkv_scores(query.half(), key.half(), segments)  # the squares are far beyond half precision
    torch.testing.assert_close(scores, slow_scores(query.half(), key.half(), segments, 1 / 8), atol=1e-3, rtol=1e-3)
    assert scores.dtype == torch.float32


def test_keys_of_zeros_and_texts_without_reasoning_or_answer():
    segments = torch.tensor([[1, 2, 2, 2], [1, 3, 3, 0], [0, 0, 0, 0]])
    query, key = tensors(0, 3, 2, 2, 4, 5)
    key[0, :, 1] = 0
    scores = rkv_scores(query, key, segments)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[0, 0, :, 1:], torch.full((2, 3), 1 / 3), msg="no answer: all alike")
    assert (scores[1:] == 0).all()
    assert not rkv_select(scores, 2)[1:].any()


@EXAMPLES
@given(segments=codes, seed=st.integers(0, 99), slots=st.integers(7, 9))
def test_as_many_slots_as_tokens_is_the_identity(segments, seed, slots):
    query, key = tensors(seed, segments.shape[0], 4, 2, 7, 5)
    scores = torch.stack([rkv_scores(query, key, segments)] * 3)
    kept = rkv_select(scores, slots)
    reasoning = (segments == 2)[None, :, None].expand_as(kept)
    assert torch.equal(kept, reasoning)
    mapping = selection_map(kept, slots)
    assert mapping.index.shape == (3, segments.shape[0], 2, slots, 1)
    assert torch.equal(mapping.mask().sum(-1), reasoning.sum(-1))
    x = torch.randn(3, segments.shape[0], 2, 7, 16)
    got = mapping.apply(x, 3)
    assert torch.equal(got[mapping.mask()], x[reasoning])
    assert (got[~mapping.mask()] == 0).all()


@EXAMPLES
@given(seed=st.integers(0, 999), keep=st.integers(1, 6))
def test_slots_per_layer_and_head_stand_in_time_order(seed, keep):
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(2, 3, 4, 6, generator=random).argsort(-1) < keep
    mapping = selection_map(kept, keep)
    for place in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        assert mapping.index[place][:, 0].tolist() == [i for i in range(6) if kept[place][i]]
    assert mapping.mask().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: kept_tokens("r-kv", s, 3), AlignmentError, "r-kv without scores"),
        (lambda s: kept_tokens("r-kv", s), RecipeError, r"compress\.keep: r-kv with keep = None"),
        (lambda s: kept_tokens("steps", s, 3), AlignmentError, "steps without the tokens that end them"),
        (lambda s: kept_tokens("steps", s, 0, ends_BS=s > 1), RecipeError, "steps with keep = 0"),
        (lambda s: kept_tokens("uniform", s, 0), RecipeError, "uniform with keep = 0"),
        (lambda s: kept_tokens("random", s, 3), AlignmentError, "random compression of 1 examples with 0 seeds"),
        (lambda s: kept_tokens("random", s, 3, keys_B=[1, 2]), AlignmentError, "1 examples with 2 seeds"),
        (lambda s: rkv_select(torch.zeros(1, 2, 4, 3), 3, 1.5), RecipeError, r"importance_share = 1\.5"),
        (lambda s: rkv_scores(*tensors(0, 1, 3, 2, 3, 5), s), AlignmentError, "multiple of key heads"),
        (lambda s: rkv_layer_scores([], [], s), AlignmentError, "0 layers of queries"),
    ],
)
def test_what_is_missing_or_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.tensor([[1, 2, 3]]))


def test_wrong_words():
    segments = torch.tensor([[1, 2, 3]])
    with pytest.raises(RecipeError, match="unknown compression 'h2o'"):
        kept_tokens("h2o", segments, 3)
    with pytest.raises(RecipeError, match="keep = None"):
        kept_tokens("crop", segments)
    with pytest.raises(AlignmentError, match="3 kept tokens for 2 slots"):
        selection_map(segments > 0, 2)
