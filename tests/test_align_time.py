"""Time maps against loops over samples and tokens."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.align.time import (
    MAX_HALF_WIDTH,
    SegmentIdentifier,
    TimeWarper,
    same_places,
    segment_report,
    time_map,
)
from kvdistill.compress import kept_tokens
from kvdistill.core.errors import AlignmentError, RecipeError

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


# -- ratio and smoothness ------------------------------------------------------------------------------------

shares = st.dictionaries(st.sampled_from(["prompt", "reasoning", "answer"]), st.sampled_from([0.1, 0.25, 0.5, 0.7, 1]))
widths = st.dictionaries(
    st.sampled_from(["prompt", "reasoning", "answer"]), st.sampled_from([0, 0.5, 1, 1.5, 2.5, 4, 40])
)
CODES = {"prompt": 1, "reasoning": 2, "answer": 3}


def thinned(members: list[int], ratio: float) -> list[int]:
    n = len(members)
    taken = max(1, math.ceil(Fraction(str(ratio)) * n)) if n else 0
    if taken <= 1:
        return members[:taken]
    half = Fraction(1, 2)
    ranks = []
    for j in range(taken):
        place = Fraction(j * (n - 1), taken - 1)
        down = place - math.floor(place) <= half if 2 * j <= taken - 1 else place - math.floor(place) < half
        ranks.append(math.floor(place) + (0 if down else 1))
    return [members[r] for r in ranks]


def windows(sources: list[int], targets: list[int], wide: list[float], row: torch.Tensor) -> None:
    """One triangle per target token, tap by tap."""
    last = len(sources) - 1
    for i, t in enumerate(targets):
        if not sources:
            continue
        u = 0.0 if len(targets) == 1 else i * last / (len(targets) - 1)
        apart = last / max(1, len(targets) - 1)
        half = max(1.0, min(wide[t] * apart, MAX_HALF_WIDTH, u, last - u))
        taps = {j: 1 - abs(j - u) / half for j in range(last + 1) if abs(j - u) < half}
        for j, weight in taps.items():
            row[t, sources[j]] += weight / sum(taps.values())


def slow_shaped(mode, source, target, ratio, smoothness):
    dense = torch.zeros(source.shape[0], target.shape[1], source.shape[1])
    wide_of = {code: smoothness.get(name, 0.0) for name, code in CODES.items()} | {0: 0.0}
    for b in range(source.shape[0]):
        theirs, mine = source[b].tolist(), target[b].tolist()
        read = {
            code: thinned([i for i, c in enumerate(theirs) if c == code], ratio.get(name, 1))
            for name, code in CODES.items()
        }
        wide = [wide_of[code] for code in mine]
        if mode == "proportional":
            windows(
                sorted(i for part in read.values() for i in part), [i for i, c in enumerate(mine) if c], wide, dense[b]
            )
        else:
            for code in (1, 2, 3):
                windows(read[code], [i for i, c in enumerate(mine) if c == code], wide, dense[b])
    return dense


@EXAMPLES
@given(pair=pairs(), mode=st.sampled_from(["proportional", "segment"]), ratio=shares, smoothness=widths)
def test_ratio_and_smoothness_are_the_loop(pair, mode, ratio, smoothness):
    mapping = time_map(mode, *pair, ratio=ratio, smoothness=smoothness)
    torch.testing.assert_close(mapping.to_dense(), slow_shaped(mode, *pair, ratio, smoothness), atol=1e-5, rtol=0)
    torch.testing.assert_close(mapping.weight.sum(-1), mapping.mask().float())
    assert torch.equal(mapping.mask(), time_map(mode, *pair).mask()), "the settings empty no row and fill none"
    assert mapping.index.shape[-1] <= 2 * MAX_HALF_WIDTH
    read = (pair[0] != 0)[:, None].expand(-1, mapping.n_out, -1).gather(2, mapping.index)
    assert read[mapping.mask()].all()
    if same_places(mode, *pair, ratio=ratio, smoothness=smoothness):
        assert TimeWarper(mode, ratio, smoothness).map(*pair) is None
        identity = torch.diag_embed((pair[1] != 0).float())
        torch.testing.assert_close(mapping.to_dense(), identity, atol=0, rtol=0)


@EXAMPLES
@given(
    longer=st.integers(1, 90),
    shorter=st.integers(1, 40),
    ratio=st.sampled_from([0.05, 0.3, 0.5, 1]),
    wide=st.sampled_from([0, 1, 2, 5]),
    left=st.integers(0, 3),
)
def test_a_longer_chain_onto_a_shorter_one(longer, shorter, ratio, wide, left):
    """Another reasoning text of the teacher's own: in order, both ends on both ends, nothing from outside."""
    source = pad_texts([[1] * 3 + [2] * longer + [3] * 2], [left], extra=left + 1)
    target = pad_texts([[1] * 4 + [2] * shorter + [3]], [0], extra=2)
    mapping = time_map("segment", source, target, ratio={"reasoning": ratio}, smoothness={"reasoning": wide})
    dense = mapping.to_dense()[0].double()
    rows = dense[4 : 4 + shorter]
    inside = rows[:, left + 3 : left + 3 + longer]
    torch.testing.assert_close(inside.sum(1), torch.ones(shorter, dtype=torch.float64))
    places = inside @ torch.arange(longer).double()
    assert (places.diff() >= -1e-5).all()
    assert inside[0, 0] == 1
    if shorter > 1 and (longer == 1 or ratio * longer > 1):
        assert inside[-1, -1] == 1
        if ratio == 1:  # reversed time, reversed map
            torch.testing.assert_close(inside.flip(0, 1), inside, atol=1e-6, rtol=0)


@EXAMPLES
@given(
    texts=st.lists(st.tuples(text, text), min_size=1, max_size=3),
    sides=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    mode=st.sampled_from(["proportional", "segment"]),
    ratio=shares,
    smoothness=widths,
)
def test_padding_and_order_change_no_shaped_map(texts, sides, mode, ratio, smoothness):
    sources, targets, n = [list(a) for a, _ in texts], [list(b) for _, b in texts], len(texts)
    settings = {"ratio": ratio, "smoothness": smoothness}
    plain = (pad_texts(sources, [0] * n), pad_texts(targets, [0] * n))
    padded = (pad_texts(sources[::-1], sides[:n], 8), pad_texts(targets[::-1], sides[n : 2 * n], 5))
    here, there = (time_map(mode, *pair, **settings).to_dense() for pair in (plain, padded))
    for b in range(n):
        s, t = (x[b] != 0 for x in plain)
        far_s, far_t = (x[n - 1 - b] != 0 for x in padded)
        torch.testing.assert_close(here[b][t][:, s], there[n - 1 - b][far_t][:, far_s], atol=0, rtol=0)


@EXAMPLES
@given(pair=pairs(), mode=st.sampled_from(["right", "crop", "uniform", "none"]), keep=st.integers(1, 6), wide=widths)
def test_compression_after_shaping_reads_kept_tokens_only(pair, mode, keep, wide):
    kept = kept_tokens(mode, pair[0], keep)
    mapping = time_map("segment", *pair, smoothness=wide).masked_source(kept)
    dense = mapping.to_dense()
    assert (dense * ~kept[:, None] == 0).all()
    torch.testing.assert_close(dense.sum(-1), mapping.mask().float())


def test_smoothness_by_hand():
    source, target = torch.tensor([[2] * 9]), torch.tensor([[2] * 5])
    dense = time_map("segment", source, target, smoothness={"reasoning": 1}).to_dense()[0]
    expected = torch.zeros(5, 9)
    expected[0, 0] = expected[4, 8] = 1
    for row in (1, 2, 3):
        expected[row, 2 * row - 1 : 2 * row + 2] = torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(dense, expected)
    half = time_map("segment", source, target, ratio={"reasoning": 0.5}).to_dense()[0]
    assert half.argmax(1).tolist() == [0, 2, 4, 6, 8]
    # more student tokens than teacher tokens: a window of up to one step stays linear interpolation
    up = {"reasoning": 1.0}
    assert torch.equal(
        time_map("segment", target, source, smoothness=up).to_dense(), time_map("segment", target, source).to_dense()
    )
    assert same_places("segment", source, source, smoothness=up)
    assert not same_places("segment", source, source, smoothness={"reasoning": 1.5})
    assert same_places("segment", source, source, smoothness={"answer": 1.5})
    assert not same_places("segment", source, source, ratio={"reasoning": 0.9 - 0.1})
    assert same_places("segment", source, source, ratio={"prompt": 0.5})
    thirty = time_map("segment", torch.full((1, 30), 2), torch.full((1, 3), 2), ratio={"reasoning": 0.1}).to_dense()[0]
    assert thirty.argmax(1).tolist() == [0, 14, 29]
    assert thirty.max(1).values.tolist() == [1, 1, 1]


def test_segment_report_counts_what_one_side_lacks():
    source = torch.tensor([[1, 2, 3], [1, 3, 0], [1, 3, 0], [1, 2, 0]])
    target = torch.tensor([[0, 1, 2], [1, 2, 3], [0, 1, 3], [1, 2, 3]])
    assert segment_report(source, target) == {
        "prompt_missing_in_teacher": 0,
        "prompt_missing_in_student": 0,
        "reasoning_missing_in_teacher": 1,
        "reasoning_missing_in_student": 0,
        "answer_missing_in_teacher": 1,
        "answer_missing_in_student": 1,
    }


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("segment", {"ratio": {"thought": 0.5}}, r"align\.segment_ratio: unknown segment 'thought'"),
        ("segment", {"ratio": {"answer": 0.0}}, r"align\.segment_ratio: answer: 0.0"),
        ("proportional", {"ratio": {"answer": 1.5}}, "above 0 and at most 1"),
        ("segment", {"smoothness": {"answer": -1}}, r"align\.smoothness: answer: -1"),
        ("segment", {"smoothness": {"answer": float("nan")}}, r"align\.smoothness: answer: nan"),
        ("segment", {"smoothness": {"answer": float("inf")}}, "finite"),
        ("pad", {"smoothness": {"answer": 1}}, r"align\.smoothness: time mode pad takes whole tokens"),
        ("index", {"ratio": {"answer": 0.5}}, r"align\.segment_ratio: time mode index takes whole tokens"),
    ],
)
def test_wrong_settings_say_so(mode, settings, words):
    pair = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3]])
    for call in (lambda: time_map(mode, *pair, **settings), lambda: TimeWarper(mode, **settings)):
        with pytest.raises(RecipeError, match=words):
            call()
    with pytest.raises(RecipeError, match=words):
        same_places(mode, *pair, **settings)


def test_settings_that_change_nothing_fit_every_mode():
    pair = torch.tensor([[1, 2, 2, 3]]), torch.tensor([[1, 2, 3]])
    for mode in MODES:
        same = time_map(mode, *pair, ratio={"prompt": 1}, smoothness={"answer": 0})
        assert torch.equal(same.to_dense(), time_map(mode, *pair).to_dense())


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
