"""Token maps against loops over samples and pairs of tokens: made-up spans, and five real tokenizers on real rows."""

from __future__ import annotations

import csv
import functools
import json
from itertools import pairwise, permutations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from chat_templates import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvdistill.align.tokens import require_common_text, same_tokens, token_coverage, token_map
from kvdistill.core.errors import AlignmentError
from kvdistill.core.maps import SparseMap
from kvdistill.core.segments import END, PADDING_ROLE, START, TEXT, TURN, UNKNOWN
from kvdistill.data.spans import token_spans

NAMES = ["gpt2", "qwen2.5", "llama3", "t5-small", "bert-base-uncased"]
WHOLE = ["gpt2", "qwen2.5", "llama3"]  # these write any text
EXAMPLES = settings(max_examples=60, deadline=None)
ODD = [
    "Café naïve cafe\u0301 e\u0302\u0301 — ½ ﬁne ①",
    "👩\u200d👩\u200d👧 pays 1234567 🤷🏽\u200d♀️!",
    "line one\r\n\r\n\tline  two   \r\nend ",
    "小明有12个苹果，吃了3个。한국어 각 \u1100\u1161\u11a8",
    "x",
]

Token = tuple[int, float, float]  # role, start, end


class Batch(NamedTuple):
    spans: Tensor
    roles: Tensor


def padded(texts: list[list[Token]], sides: list[int] | None = None, extra: int = 0) -> Batch:
    """Rows of tokens; `sides[b]` paddings of what is missing go to the left. What padding holds must not matter."""
    width = max(1, max(map(len, texts)) + extra)
    spans, roles = torch.tensor([0.0, 5.0]).repeat(len(texts), width, 1), torch.zeros(len(texts), width).long()
    for b, text in enumerate(texts):
        left = min(sides[b], width - len(text)) if sides else 0
        for i, (role, start, end) in enumerate(text, left):
            spans[b, i], roles[b, i] = torch.tensor([start, end]), role
    return Batch(spans, roles)


def mapped(source: Batch, target: Batch) -> SparseMap:
    return token_map(source.spans, target.spans, source.roles, target.roles)


def slow_row(source: list[Token], target: list[Token], t: int) -> dict[int, float]:
    """What target token t reads, by place in the source."""
    role, start, end = target[t]
    if role in (START, TURN, END):
        peers, mine = ([i for i, token in enumerate(side) if token[0] == role] for side in (source, target))
        if not peers:
            return {}
        order = mine.index(t)
        if role == END:
            return {peers[min(order, len(peers) - 1)]: 1.0}
        return {peers[max(len(peers) - (len(mine) - order), 0)]: 1.0}
    if role not in (TEXT, UNKNOWN):
        return {}
    if end <= start:
        here = [i for i, (r, a, b) in enumerate(source) if r in (TEXT, UNKNOWN) and b <= a == start]
        before = sum(r in (TEXT, UNKNOWN) and b <= a == start for r, a, b in target[:t])
        return {here[before]: 1.0} if before < len(here) else {}
    weights = {}
    for i, (other, a, b) in enumerate(source):
        if other == TEXT or (other == UNKNOWN and role == UNKNOWN):
            shared = min(b, end) - max(a, start)
            if b > a and shared > 1e-3:
                weights[i] = shared / (b - a + end - start - shared)
    return {i: w / sum(weights.values()) for i, w in weights.items()}


def slow_map(source: Batch, target: Batch) -> Tensor:
    """Dense [B, T, S], one pair of tokens at a time."""
    dense = torch.zeros(*target.roles.shape, source.roles.shape[1])
    for b in range(dense.shape[0]):
        sides = [
            [(r, *s) for r, s in zip(x.roles[b].tolist(), x.spans[b].tolist(), strict=True)] for x in (source, target)
        ]
        for t in range(dense.shape[1]):
            for s, weight in slow_row(*sides, t).items():
                dense[b, t, s] = weight
    return dense


def assert_map_is_the_loop(source: Batch, target: Batch) -> SparseMap:
    mapping = mapped(source, target)
    torch.testing.assert_close(mapping.to_dense(), slow_map(source, target), atol=1e-6, rtol=0)
    torch.testing.assert_close(mapping.weight.sum(-1), mapping.mask().float())
    read = (source.roles != PADDING_ROLE)[:, None].expand(-1, mapping.n_out, -1).gather(2, mapping.index)
    assert read[mapping.mask()].all(), "a row with weight names a padding token, even with weight 0"
    assert not mapping.mask()[target.roles == PADDING_ROLE].any()
    assert (mapping.weight >= 0).all() and mapping.index.shape[-1] == max(1, int((mapping.weight > 0).sum(-1).max()))
    return mapping


# -- made-up spans -------------------------------------------------------------------------------------


@st.composite
def segmentations(draw, length: int, *, only_text: bool = False) -> list[Token]:
    """Quarters of characters cut at random: gaps, tokens without characters, unknown ones, special ones around."""
    cuts = sorted(draw(st.lists(st.integers(0, 4 * length), max_size=12)))
    kinds = st.sampled_from([TEXT] * 6 if only_text else [TEXT] * 6 + [UNKNOWN, None])
    text = [(draw(kinds), a / 4, b / 4) for a, b in pairwise(cuts)]
    found = [token for token in text if token[0] is not None and (not only_text or token[2] > token[1])]
    if only_text:
        return found
    turn = draw(st.integers(0, len(found)))
    special = [[(role, 0.0, 0.0)] * draw(st.integers(0, 3)) for role in (START, TURN, END)]
    return [*special[0], *found[:turn], *special[1], *found[turn:], *special[2]]


@st.composite
def pairs(draw, *, only_text: bool = False) -> tuple[Batch, Batch]:
    B = draw(st.integers(1, 3))
    lengths = [draw(st.integers(0, 9)) for _ in range(B)]
    sides = [[draw(st.integers(0, 4)) for _ in range(B)] for _ in range(2)]
    texts = [[draw(segmentations(n, only_text=only_text)) for n in lengths] for _ in range(2)]
    extra = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    return padded(texts[0], sides[0], extra[0]), padded(texts[1], sides[1], extra[1])


@EXAMPLES
@given(pair=pairs())
def test_token_map_is_the_loop(pair: tuple[Batch, Batch]) -> None:
    assert_map_is_the_loop(*pair)


@EXAMPLES
@given(
    source=st.lists(st.tuples(st.just(TEXT), st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=8),
    target=st.lists(st.tuples(st.just(TEXT), st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=7),
)
def test_spans_in_any_order_and_on_top_of_each_other(source: list[Token], target: list[Token]) -> None:
    sides = [[(role, float(a), float(a + n)) for role, a, n in side] for side in (source, target)]
    assert_map_is_the_loop(padded([sides[0]]), padded([sides[1]]))


@EXAMPLES
@given(pair=pairs(), left=st.lists(st.integers(0, 5), min_size=6, max_size=6), extra=st.integers(0, 4))
def test_padding_changes_nothing_at_real_tokens(pair: tuple[Batch, Batch], left: list[int], extra: int) -> None:
    moved = []
    for side, lefts, more in zip(pair, (left[:3], left[3:]), (extra, extra + 1), strict=True):
        texts = [
            [(r, *s) for r, s in zip(roles.tolist(), spans.tolist(), strict=True) if r]
            for roles, spans in zip(side.roles, side.spans, strict=True)
        ]
        moved.append(padded(texts, lefts, more))
    plain, other = mapped(*pair).to_dense(), mapped(*moved).to_dense()
    for b in range(plain.shape[0]):
        reals = [[side.roles[b] != 0 for side in sides] for sides in (pair, moved)]
        parts = [dense[b][t][:, s] for dense, (s, t) in zip((plain, other), reals, strict=True)]
        torch.testing.assert_close(*parts, atol=1e-7, rtol=0)


@EXAMPLES
@given(pair=pairs(), seed=st.integers(0, 99))
def test_samples_do_not_see_each_other(pair: tuple[Batch, Batch], seed: int) -> None:
    whole = mapped(*pair).to_dense()
    order = torch.randperm(whole.shape[0], generator=torch.Generator().manual_seed(seed))
    permuted = mapped(*(Batch(side.spans[order], side.roles[order]) for side in pair))
    torch.testing.assert_close(permuted.to_dense(), whole[order], atol=1e-7, rtol=0)
    alone = mapped(*(Batch(side.spans[:1], side.roles[:1]) for side in pair))
    torch.testing.assert_close(alone.to_dense(), whole[:1], atol=1e-7, rtol=0)


@EXAMPLES
@given(pair=pairs())
def test_equal_spans_are_the_identity(pair: tuple[Batch, Batch]) -> None:
    side = pair[0]
    mapping = mapped(side, side)
    assert torch.equal(mapping.to_dense(), torch.diag_embed((side.roles != 0).float()))
    assert mapping.is_identity() == bool((side.roles != 0).all())
    assert same_tokens(side.spans, side.spans, side.roles, side.roles)


@EXAMPLES
@given(pair=pairs())
def test_the_shortcut_is_taken_only_where_the_map_is_the_identity(pair: tuple[Batch, Batch]) -> None:
    source, target = pair
    if same_tokens(source.spans, target.spans, source.roles, target.roles):
        assert torch.equal(mapped(source, target).to_dense(), torch.diag_embed((target.roles != 0).float()))


@EXAMPLES
@given(pair=pairs(only_text=True))
def test_later_tokens_never_read_earlier_text(pair: tuple[Batch, Batch]) -> None:
    mapping = mapped(*pair)
    for index, weight in zip(mapping.index, mapping.weight, strict=True):
        read = [row[w > 0].tolist() for row, w in zip(index, weight, strict=True) if (w > 0).any()]
        assert all(a[-1] <= b[0] for a, b in pairwise(read))
        assert all(row == list(range(row[0], row[-1] + 1)) for row in read), "disjoint spans: neighbours, in order"


@EXAMPLES
@given(pair=pairs())
def test_coverage_is_counted_quarter_by_quarter(pair: tuple[Batch, Batch]) -> None:
    source, target = pair
    found = token_coverage(source.spans, target.spans, source.roles, target.roles)
    dense = slow_map(source, target)
    for b in range(dense.shape[0]):
        readers = quarters(target, b, (TEXT, UNKNOWN))
        told, guessed = quarters(source, b, (TEXT,)), quarters(source, b, (UNKNOWN,))
        unknown, known = quarters(target, b, (UNKNOWN,)), quarters(target, b, (TEXT,))
        lost = [q for q in known if q not in told] + [q for q in unknown if q not in told and q not in guessed]
        unread = [q for q in told if q not in readers] + [q for q in guessed if q not in unknown]
        text = (target.roles[b] == TEXT) | (target.roles[b] == UNKNOWN)
        text &= target.spans[b, :, 1] > target.spans[b, :, 0]
        expected = (len(readers), len(lost), len(told) + len(guessed), len(unread))
        torch.testing.assert_close(torch.stack([x[b] for x in found[:4]]), torch.tensor(expected) / 4)
        assert found.target_tokens_B[b] == text.sum() and found.empty_tokens_B[b] == (dense[b][text].sum(-1) == 0).sum()
        if readers:
            assert found.lost_share_B[b] == pytest.approx(len(lost) / len(readers), abs=1e-6)
        else:
            assert found.lost_share_B[b].isnan() and found.empty_share_B[b].isnan()


def quarters(side: Batch, b: int, roles: tuple[int, ...]) -> list[int]:
    """Numbers of the quarter characters in tokens of these roles."""
    tokens = zip(side.roles[b].tolist(), side.spans[b].tolist(), strict=True)
    return [q for role, (start, end) in tokens if role in roles for q in range(round(4 * start), round(4 * end))]


def test_a_known_case_by_hand() -> None:
    source = padded([[(START, 0, 0), (TEXT, 0, 2), (TEXT, 2, 6), (TEXT, 6, 7), (END, 0, 0)]])
    target = padded([[(TEXT, 0, 3), (TEXT, 3, 6), (TEXT, 6, 7), (TEXT, 7, 9), (END, 0, 0), (START, 0, 0)]])
    expected = torch.zeros(6, 5)
    first, second = 2 / 3, 1 / 6  # of [0, 3) with [0, 2) and with [2, 6)
    expected[0, 1], expected[0, 2] = first / (first + second), second / (first + second)
    expected[1, 2] = expected[2, 3] = expected[4, 4] = expected[5, 0] = 1
    torch.testing.assert_close(assert_map_is_the_loop(source, target).to_dense()[0], expected)


@pytest.mark.parametrize(
    "role,num_source,num_target,expected",
    [
        (START, 1, 3, [0, 0, 0]),
        (START, 3, 1, [2]),
        (START, 2, 3, [0, 0, 1]),
        (TURN, 4, 2, [2, 3]),
        (TURN, 0, 2, []),
        (END, 1, 3, [0, 0, 0]),
        (END, 3, 1, [0]),
        (END, 2, 3, [0, 1, 1]),
    ],
)
def test_special_tokens_by_role(role: int, num_source: int, num_target: int, expected: list[int]) -> None:
    text = (TEXT, 0.0, 1.0)
    source, target = ([(role, 0.0, 0.0)] * n + [text] for n in (num_source, num_target))
    mapping = assert_map_is_the_loop(padded([source], [2], 2), padded([target], [1], 3))
    rows = mapping.index[0, 1 : 1 + num_target, 0] - 2
    assert rows[mapping.mask()[0, 1 : 1 + num_target]].tolist() == expected


def test_only_unknown_tokens_read_unknown_text() -> None:
    source = padded([[(TEXT, 0, 2), (UNKNOWN, 2, 5)]])
    target = padded([[(TEXT, 0, 3), (TEXT, 3, 4), (UNKNOWN, 4, 5)]])
    assert torch.equal(assert_map_is_the_loop(source, target).to_dense()[0], torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
    as_text = Batch(source.spans, torch.full_like(source.roles, TEXT))
    assert assert_map_is_the_loop(as_text, target).to_dense()[0, 1].tolist() == [0, 1]
    lost_B = token_coverage(source.spans, target.spans, source.roles, target.roles).lost_characters_B
    assert lost_B.tolist() == [2], "[2, 4) is there, but nobody tells it"


def test_coverage_counts_no_character_twice() -> None:
    source, target = padded([[(TEXT, 0, 2), (TEXT, 0, 2), (TEXT, 1, 2)]]), padded([[(TEXT, 0, 4)]])
    found = token_coverage(source.spans, target.spans, source.roles, target.roles)
    assert found.lost_characters_B.tolist() == [0]  # 5 in common, never more than the token's own 4
    assert found.unread_characters_B.tolist() == [0]


def test_only_spans_of_text_decide_on_the_shortcut() -> None:
    source = padded([[(START, 0, 0), (TEXT, 0, 2)]], [1], 1)
    other = Batch(source.spans.clone(), source.roles)
    other.spans[0, :2] = 9.0  # padding and beginning-of-text
    assert same_tokens(source.spans, other.spans, source.roles, other.roles)
    other.spans[0, 2, 1] = 3.0
    assert not same_tokens(source.spans, other.spans, source.roles, other.roles)


def test_whole_and_double_precision_spans() -> None:
    source, target = padded([[(TEXT, 0, 2), (TEXT, 2, 5)]]), padded([[(TEXT, 0, 4), (TEXT, 4, 5)]])
    expected = mapped(source, target)
    for kind in (torch.int32, torch.int64, torch.float64):
        found = token_map(source.spans.to(kind), target.spans.to(kind), source.roles.int(), target.roles.to(torch.int8))
        assert torch.equal(found.to_dense(), expected.to_dense()) and found.weight.dtype == torch.float32


def test_nothing_of_the_padding_reaches_the_student() -> None:
    source = padded([[(TEXT, 0, 2), (TEXT, 2, 5)], [(TEXT, 0, 5)]], [0, 1], 1)
    target = padded([[(TEXT, 0, 1), (TEXT, 1, 4)], [(TEXT, 0, 3)]], [1, 0])
    x_BGSE = torch.randn(2, 3, source.roles.shape[1], 4)
    x_BGSE.masked_fill_((source.roles == 0)[:, None, :, None], float("nan"))
    assert not mapped(source, target).apply(x_BGSE, 2).isnan().any()


def test_different_batches_and_no_common_text_are_refused() -> None:
    source = padded([[(TEXT, 0, 2)], [(TEXT, 0, 2), (START, 0, 0)], []])
    target = padded([[(TEXT, 0, 2)], [(TEXT, 4, 6), (START, 0, 0)], []])
    with pytest.raises(AlignmentError, match="1 teacher texts and 3 student texts"):
        token_map(source.spans[:1], target.spans, source.roles[:1], target.roles)
    mapping = mapped(source, target)
    with pytest.raises(AlignmentError, match=r"example 1: no token.*in common\n  fix: .*align\.time=segment"):
        require_common_text(mapping, target.roles)
    with pytest.raises(AlignmentError, match="example 72:"):
        require_common_text(mapping, target.roles, [71, 72, 73])
    require_common_text(mapped(source, source), source.roles)


# -- real tokenizers on real rows ----------------------------------------------------------------------


@functools.cache
def rows(root: Path, each: int) -> list[str]:
    """English, Chinese and odd texts."""
    with (root / "gsm8k/train.jsonl").open(encoding="utf-8") as lines:
        found = [
            f"{row['question']}\n{row['answer']}" for row, _ in zip(map(json.loads, lines), range(each), strict=False)
        ]
    chinese = (root / "math23k/math23k_test.json").read_text(encoding="utf-8")
    decoder, place = json.JSONDecoder(), 0
    for _ in range(each):
        row, place = decoder.raw_decode(chinese, chinese.index("{", place))
        found.append(f"{row['original_text']} {row['equation']}")
    with (root / "cmmlu/test/agronomy.csv").open(encoding="utf-8", newline="") as lines:
        table = [row for row, _ in zip(csv.reader(lines), range(each + 1), strict=False)]
    return found + ["\n".join(row[1:]) for row in table[1:]] + ODD


@functools.cache
def batch_of(root: Path, name: str, each: int, side: int = 0) -> Batch:
    tokenizer = load(f"root:{name}", str(root))
    texts = []
    for spans in token_spans(tokenizer, rows(root, each)):
        roles = [UNKNOWN if unknown else TEXT for unknown in spans.is_unknown]
        text = list(zip(roles, spans.start.tolist(), spans.end.tolist(), strict=True))
        texts.append([(START, 0.0, 0.0), *text, (END, 0.0, 0.0)] if name in ("llama3", "bert-base-uncased") else text)
    return padded(texts, [side] * len(texts))


@pytest.mark.parametrize("teacher,student", list(permutations(NAMES, 2)))
def test_every_pair_of_tokenizers_is_the_loop(data_root: Path, teacher: str, student: str) -> None:
    source, target = batch_of(data_root, teacher, 3), batch_of(data_root, student, 3, side=7)
    mapping = assert_map_is_the_loop(source, target)
    require_common_text(mapping, target.roles)
    is_text = (target.roles == TEXT) & (target.spans[..., 1] > target.spans[..., 0])
    if teacher in WHOLE:
        assert mapping.mask()[is_text].all(), "a teacher that writes every text leaves no row empty"


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokenizer_is_the_identity(data_root: Path, name: str) -> None:
    source, target = batch_of(data_root, name, 12), batch_of(data_root, name, 12, side=5)
    same = mapped(source, source)
    assert torch.equal(same.to_dense(), torch.diag_embed((source.roles != 0).float()))
    assert same_tokens(source.spans, source.spans, source.roles, source.roles)
    dense = mapped(source, target).to_dense()  # padded on the other side
    for b in range(0, len(source.roles), 4):
        real_S, real_T = source.roles[b] != 0, target.roles[b] != 0
        assert torch.equal(dense[b][real_T][:, real_S], torch.eye(int(real_S.sum())))
        one = Batch(source.spans[b, real_S][None], source.roles[b, real_S][None])
        assert mapped(one, one).is_identity()


@pytest.mark.parametrize("teacher,between,student", [("qwen2.5", "llama3", "gpt2"), ("gpt2", "t5-small", "qwen2.5")])
def test_through_a_third_tokenizer_rows_stay_stochastic(
    data_root: Path, teacher: str, between: str, student: str
) -> None:
    first, middle, last = (batch_of(data_root, name, 6) for name in (teacher, between, student))
    through = mapped(middle, last).compose(mapped(first, middle)).normalised()
    torch.testing.assert_close(through.weight.sum(-1), through.mask().float())
    if between in WHOLE:
        text = last.roles == TEXT
        assert torch.equal(through.mask()[text], mapped(first, last).mask()[text])


def sides_of(root: Path, teacher: str, student: str, text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = []
    for name in (teacher, student):
        [spans] = token_spans(load(f"root:{name}", str(root)), [text])
        roles = [UNKNOWN if unknown else TEXT for unknown in spans.is_unknown]
        sides.append(padded([list(zip(roles, spans.start.tolist(), spans.end.tolist(), strict=True))]))
    return sides[0].spans, sides[1].spans, sides[0].roles, sides[1].roles


def test_what_one_side_cannot_write_is_counted(data_root: Path) -> None:
    whole = token_coverage(*sides_of(data_root, "gpt2", "qwen2.5", "小明 has 12"))
    assert whole.lost_share_B.tolist() == [0]
    half = token_coverage(*sides_of(data_root, "t5-small", "qwen2.5", "苹果12"))  # T5 writes the digits only
    assert half.lost_share_B.tolist() == [0.5] and half.unread_share_B.tolist() == [0.5]
    assert half.empty_tokens_B.tolist() == [1] and half.target_tokens_B.tolist() == [3]
    other_way = token_coverage(*sides_of(data_root, "qwen2.5", "t5-small", "苹果12"))
    assert other_way.lost_share_B.tolist() == [0] and other_way.unread_share_B.tolist() == [0]
    spaces = token_coverage(*sides_of(data_root, "bert-base-uncased", "gpt2", "a b\r\nc"))  # BERT drops white space
    assert spaces.lost_characters_B.tolist() == [3] and spaces.empty_tokens_B.tolist() == [2]


def test_a_text_the_teacher_cannot_write_at_all(data_root: Path) -> None:
    sides = sides_of(data_root, "t5-small", "qwen2.5", "苹果")
    with pytest.raises(AlignmentError, match="example 0: no token of the teacher"):
        require_common_text(token_map(*sides), sides[3])
