"""Time maps against loops over samples and tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align.time import SegmentIdentifier, TimeWarper, same_places, time_map
from kvdistill.core.runtime import AlignmentError, RecipeError

MODES = ["index", "pad", "proportional", "segment"]
EXAMPLES = settings(max_examples=60, deadline=None)

text = st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 4)).map(
    lambda n: [1] * n[0] + [2] * n[1] + [3] * n[2]
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pad_texts(texts: list[list[int]], sides: list[int], extra: int = 0) -> torch.Tensor:
    """Rows of segment codes; `sides[b]` zeros of what is missing go to the left, the rest to the right."""
    width = max(1, max(map(len, texts)) + extra)
    rows = []
    for codes, side in zip(texts, sides, strict=True):
        left = min(side, width - len(codes))
        rows.append([0] * left + codes + [0] * (width - len(codes) - left))
    return torch.tensor(rows)


def stretch(sources: list[int], targets: list[int], row: torch.Tensor) -> None:
    for i, t in enumerate(targets):
        if not sources:
            continue
        u = 0.0 if len(targets) == 1 else i * (len(sources) - 1) / (len(targets) - 1)
        low = int(u + 1e-9)
        row[t, sources[low]] += 1 - (u - low)
        if u - low > 1e-9:
            row[t, sources[low + 1]] += u - low


def slow_map(mode: str, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dense [B, T, S], one sample, one token at a time."""
    dense = torch.zeros(source.shape[0], target.shape[1], source.shape[1])
    for b in range(source.shape[0]):
        reals = (
            [i for i, code in enumerate(source[b].tolist()) if code],
            [i for i, code in enumerate(target[b].tolist()) if code],
        )
        if mode in ("index", "pad"):
            for s, t in zip(*reals, strict=False):
                dense[b, t, s] = 1
        elif mode == "proportional":
            stretch(*reals, dense[b])
        else:
            for code in (1, 2, 3):
                stretch(
                    [i for i in reals[0] if source[b, i] == code],
                    [i for i in reals[1] if target[b, i] == code],
                    dense[b],
                )
    return dense


@st.composite
def pairs(draw):
    B = draw(st.integers(1, 4))
    sources, targets = ([draw(text) for _ in range(B)] for _ in range(2))
    sides = [[draw(st.integers(0, 4)) for _ in range(B)] for _ in range(2)]
    return (
        pad_texts(sources, sides[0], draw(st.integers(0, 3))),
        pad_texts(targets, sides[1], draw(st.integers(0, 3))),
    )


@EXAMPLES
@given(pair=pairs(), mode=st.sampled_from(MODES))
def test_time_map_is_the_loop(pair, mode):
    mapping = time_map(mode, *pair)
    torch.testing.assert_close(mapping.to_dense(), slow_map(mode, *pair), atol=1e-5, rtol=0)
    torch.testing.assert_close(mapping.weight.sum(-1), mapping.mask().float())
    assert not mapping.mask()[pair[1] == 0].any(), "a padding slot of the student has something behind it"
    read = (pair[0] != 0)[:, None].expand(-1, mapping.n_out, -1).gather(2, mapping.index)
    assert read[mapping.mask()].all(), "a row with weight names a padding token, even with weight 0"


@EXAMPLES
@given(
    texts=st.lists(st.tuples(text, text), min_size=1, max_size=3),
    sides=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    extra=st.integers(0, 4),
    mode=st.sampled_from(MODES),
)
def test_padding_changes_nothing_at_real_tokens(texts, sides, extra, mode):
    sources, targets = [list(a) for a, _ in texts], [list(b) for _, b in texts]
    n = len(texts)
    plain = (pad_texts(sources, [0] * n), pad_texts(targets, [0] * n))
    padded = (pad_texts(sources, sides[:n], extra), pad_texts(targets, sides[n : 2 * n], extra + 1))
    for b in range(n):
        real = [[x[b] != 0 for x in pair] for pair in (plain, padded)]
        dense = [time_map(mode, *pair).to_dense()[b] for pair in (plain, padded)]
        torch.testing.assert_close(*(d[t][:, s] for d, (s, t) in zip(dense, real, strict=True)), atol=0, rtol=0)


@EXAMPLES
@given(pair=pairs(), mode=st.sampled_from(MODES), seed=st.integers(0, 99))
def test_samples_do_not_see_each_other(pair, mode, seed):
    order = torch.randperm(pair[0].shape[0], generator=torch.Generator().manual_seed(seed))
    whole = time_map(mode, *pair).to_dense()
    torch.testing.assert_close(time_map(mode, pair[0][order], pair[1][order]).to_dense(), whole[order], atol=0, rtol=0)


@EXAMPLES
@given(pair=pairs(), mode=st.sampled_from(MODES))
def test_same_texts_at_same_places_need_no_map(pair, mode):
    codes = pair[0]
    assert TimeWarper(mode).map(codes, codes.clone()) is None
    real = codes != 0
    identity = torch.diag_embed(real.float())
    torch.testing.assert_close(time_map(mode, codes, codes).to_dense(), identity, atol=0, rtol=0)


@EXAMPLES
@given(pair=pairs(), mode=st.sampled_from(MODES))
def test_the_shortcut_is_taken_only_where_the_map_is_the_identity(pair, mode):
    if same_places(mode, *pair):
        identity = torch.diag_embed((pair[1] != 0).float())
        torch.testing.assert_close(time_map(mode, *pair).to_dense(), identity, atol=0, rtol=0)


def test_long_texts_of_equal_length_stay_the_identity():
    source = pad_texts([[1] * 3001], [0])
    target = pad_texts([[1] * 3001], [7], extra=7)
    mapping = time_map("proportional", source, target)
    row = mapping.to_dense()[0, 7:]
    assert torch.equal(row, torch.eye(3001))


def test_a_known_case_by_hand():
    source = torch.tensor([[1, 1, 2, 2, 2, 3]])
    target = torch.tensor([[0, 1, 2, 2, 3, 3]])
    dense = time_map("segment", source, target).to_dense()[0]
    expected = torch.zeros(6, 6)
    expected[1, 0] = 1  # one prompt token reads the first
    expected[2, 2] = expected[3, 4] = 1  # two over three: the ends
    expected[4, 5] = expected[5, 5] = 1  # two over one
    assert torch.equal(dense, expected)
    mean = time_map("proportional", torch.tensor([[1, 1]]), torch.tensor([[1, 1, 1]])).to_dense()[0]
    assert torch.equal(mean, torch.tensor([[1, 0], [0.5, 0.5], [0, 1]]))


def test_a_missing_segment_leaves_its_slots_empty():
    mapping = time_map("segment", torch.tensor([[1, 1, 3]]), torch.tensor([[1, 2, 2, 3]]))
    assert mapping.mask().tolist() == [[True, False, False, True]]


def test_old_words_and_unknown_words():
    pair = torch.tensor([[1, 2, 2, 3, 0]]), torch.tensor([[0, 1, 2, 3]])
    for old, new in (("truncate", "index"), ("soft", "segment")):
        assert torch.equal(time_map(old, *pair).to_dense(), time_map(new, *pair).to_dense())
        assert TimeWarper(old).mode == new
    with pytest.raises(RecipeError, match=r"align\.time.*'dtw'"):
        time_map("dtw", *pair)
    with pytest.raises(AlignmentError, match="2 teacher texts and 1"):
        time_map("index", torch.ones(2, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))


def test_time_warper_warps_and_leaves_alone():
    source, target = torch.tensor([[1, 1, 1, 0], [1, 2, 2, 3]]), torch.tensor([[0, 1, 1], [1, 2, 3]])
    x = torch.randn(2, 5, 4, 6)
    warped, mask = TimeWarper("proportional")(x, source, target)
    assert warped.shape == (2, 5, 3, 6)
    torch.testing.assert_close(warped[0, :, 1], x[0, :, 0])
    torch.testing.assert_close(warped[0, :, 2], x[0, :, 2])
    assert mask.tolist() == [[False, True, True], [True, True, True]]
    same, _ = TimeWarper("proportional")(x, source, source)
    assert same is x


def test_segments_from_offsets():
    spans = {"prompt": (0, 5), "reasoning": (5, 9), "answer": (9, 12)}
    offsets = [(0, 0), (0, 3), (3, 6), (6, 9), (9, 12), (0, 0), (0, 0)]
    identifier = SegmentIdentifier()
    assert identifier.identify(offsets, spans) == [1, 1, 1, 2, 3, 3, 3]
    assert identifier(offsets, spans, [1, 1, 1, 1, 1, 1, 0]) == [1, 1, 1, 2, 3, 3, 0]


def test_segments_skip_an_empty_reasoning_and_keep_inner_specials():
    spans = {"prompt": (0, 4), "reasoning": (4, 4), "answer": (4, 6)}
    assert SegmentIdentifier().identify([(0, 2), (0, 0), (2, 4), (4, 6)], spans) == [1, 1, 1, 3]


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), min_size=2, max_size=2), widths=st.lists(st.integers(1, 4), min_size=1))
def test_segments_are_where_each_token_starts(cuts, widths):
    a, b = sorted(cuts)
    spans = {"prompt": (0, a), "reasoning": (a, b), "answer": (b, 100)}
    offsets, at = [], 0
    for width in widths:
        offsets.append((at, at + width))
        at += width
    expected = [1 if start < a else 2 if start < b else 3 for start, _ in offsets]
    assert SegmentIdentifier().identify(offsets, spans) == expected


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ({"prompt": (0, 5), "answer": (3, 9)}, "one before ends at 5"),
        ({"prompt": (0, 5), "thought": (5, 9)}, "unknown segment 'thought'"),
        ({"prompt": (0, 0)}, "without any segment"),
    ],
)
def test_wrong_spans_say_so(spans, words):
    with pytest.raises(AlignmentError, match=words):
        SegmentIdentifier().identify([(0, 2)], spans)
