"""Which tokens stay, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align.time import time_map
from kvdistill.compress import kept_tokens, selection_map
from kvdistill.core.runtime import AlignmentError, RecipeError

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


def test_wrong_words():
    segments = torch.tensor([[1, 2, 3]])
    with pytest.raises(RecipeError, match="unknown compression 'r-kv'"):
        kept_tokens("r-kv", segments, 3)
    with pytest.raises(RecipeError, match="keep = None"):
        kept_tokens("crop", segments)
    with pytest.raises(AlignmentError, match="3 kept tokens for 2 slots"):
        selection_map(segments > 0, 2)
