"""A question as its wording and its numbers, and how much of one wording stands in another.

The wording is the words in their order with `#` for every number; the values are the numbers and arithmetic signs in
their order. Punctuation is in neither. What is the same problem and what is another is decided in `near.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import lt
from sys import intern
from typing import NamedTuple

from kvdistill.data.answers.numbers import fold_width

CJK_WEIGHT = 0.5  # a Chinese, Japanese or Korean character is half a word
MAX_ALIGNED = 500  # words between the first and the last difference; beyond that their order is not looked at

NUMBER = "#"  # stands for every number in a wording
ONE = "one"  # among the values; it is an article or pronoun more often than a number, so it is a word as well
_ONES = ("one", "一")

_CJK = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_BEFORE_CJK = "\u2e7f"
_TOKEN = re.compile(
    rf"(?P<number>[0-9]+(?:\.[0-9]+)*(?:/[0-9]+)?)|(?P<cjk>[{_CJK}])|(?P<word>[^\W\d_{_CJK}]+|[^\W_])"
    r"|(?P<sign>[-+*/=<>^×÷±])"
)
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_STOPS = str.maketrans("。`", ".'") | _INVISIBLE
_LISTS = str.maketrans("、", ",") | _STOPS
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_INSIDE_WORD = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")
# A hyphen or slash at a word, or a dash that no number follows, is punctuation; between 3 and x it is a sign.
_PROSE = re.compile(
    r"(?<=[^\W\d_]{2})[-/]|[-/](?=[^\W\d_]{2})|(?<=[^\W\d_]{2} )-(?![0-9.])|-(?= [^\W\d_]{2})|-{2,}|\*{2,}"
)
_TWO_AND_MORE = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_AS_THEY_ARE = "hundred thousand million billion dozen half third quarter twice thrice double triple 万 亿"
_VALUES = {
    **{word: str(n) for n, word in enumerate(_TWO_AND_MORE.split(), 2)},
    **{word: str(10 * n) for n, word in enumerate(_TENS.split(), 2)},
    **{word: word for word in _AS_THEY_ARE.split()},
    **{word: str(n) for n, word in enumerate("二三四五六七八九十", 2)},
    **{"zero": "0", "零": "0", "〇": "0", "两": "2", "半": "half"},  # 百 and 千 are parts of words more often
}
_TWENTY_ONE = re.compile(rf"\b({'|'.join(_TENS.split())})[- ](one|{'|'.join(_TWO_AND_MORE.split()[:8])})\b")


@dataclass(slots=True)
class Wording:
    """words: in their order, numbers as `#`. types: the different ones but `#`. size, types_size: their weights."""

    words: tuple[str, ...]
    types: frozenset[str] = field(init=False)
    size: float = field(init=False)
    types_size: float = field(init=False)

    def __post_init__(self) -> None:
        self.types = frozenset(self.words) - {NUMBER}
        self.size, self.types_size = weigh(self.words), weigh(self.types)


class Parts(NamedTuple):
    """A question taken apart. folded: case, spacing and width folded. values: numbers and signs in their order.

    letters: a hash of letters and digits alone, for this process only.
    """

    folded: str
    wording: Wording
    values: tuple[str, ...]
    letters: int


def take_apart(question: str) -> Parts:
    """`Tom has 1,080 apples, half …` -> (tom, has, #, apples, #, …) and (1080, half, …)."""
    folded = fold_question(question)
    text = _THOUSANDS.sub("", _INSIDE_WORD.sub("", folded.translate(_STOPS)))
    text = _TWENTY_ONE.sub(lambda found: str(int(_VALUES[found[1]]) + int(_VALUES.get(found[2], "1"))), text)
    words: list[str] = []
    values: list[str] = []
    for found in _TOKEN.finditer(_PROSE.sub(" ", text)):
        token, kind = found[0], found.lastgroup
        if kind == "sign":
            values.append(token)
            continue
        value = _VALUES.get(token)
        if kind == "number":  # 5.0 is 5; 1.2.3 and 5.0/2 stay
            value = token.rstrip("0").rstrip(".") if token.count(".") == 1 and "/" not in token else token
        if value is not None or token in _ONES:
            values.append(ONE if value is None else intern(value))
        words.append(intern(token) if value is None else NUMBER)
    letters = hash("".join(filter(str.isalnum, folded)))
    return Parts(folded, Wording(tuple(words)), tuple(values), letters)


def fold_question(text: str) -> str:
    """Lower case, narrow punctuation, single spaces."""
    narrow = text if text.isascii() else fold_width(text)
    return " ".join(narrow.casefold().split())


def question_hash(text: str) -> str:
    """128 bits of SHA-256 of the folded question, in hex: what a problem is known by (`doc_hash`)."""
    return hashlib.sha256(fold_question(text).encode()).hexdigest()[:32]


def are_equal_but_for_marks(a: str, b: str) -> bool:
    """Whether the folded texts are equal without the marks that one of them never has: it lost them.

    A mark that both have stays: in a text with full stops, 2.5 is not 25. Chinese stops and commas are as the others.
    """
    a, b = a.translate(_LISTS), b.translate(_LISTS)
    marks_a, marks_b = ({sign for sign in text if not sign.isalnum()} for text in (a, b))
    lost = {ord(mark): None for mark in (marks_a ^ marks_b) | {" "}}
    return (marks_a <= marks_b or marks_b <= marks_a) and a.translate(lost) == b.translate(lost)


def weigh(words: Collection[str]) -> float:
    """Number of words, a character of a script without spaces counting half."""
    return len(words) - (1 - CJK_WEIGHT) * sum(map(lt, repeat(_BEFORE_CJK), words))


def most_similar(a: Wording, b: Wording) -> float:
    """`compare` never gives more: every word that only one of them has was changed."""
    changed = max(max(a.types_size, b.types_size) - weigh(a.types & b.types), abs(a.size - b.size))
    return 1 - changed / max(a.size, b.size)


def share_in_place(a: Wording, b: Wording) -> float:
    """Words in common in the same order, of the longer's; an upper bound where there are very many."""
    first, second = _trim(a.words, b.words)
    if min(len(first), len(second)) > MAX_ALIGNED:
        common = (Counter(first) & Counter(second)).total()
    else:
        rows = _common_rows(first, second)
        common = len(first) - rows[-1].bit_count() if rows else 0
    return 1 - (max(len(first), len(second)) - common) / max(len(a.words), len(b.words))


def compare(a: Wording, b: Wording) -> tuple[float, bool]:
    """Share of words at their place, 0 to 1, and whether one has a number where the other has nothing.

    A word that is replaced by the same other word everywhere counts once. The same from both sides.
    """
    if a.words == b.words:
        return 1.0, False
    first, second = _trim(*sorted((a.words, b.words)))
    if min(len(first), len(second)) > MAX_ALIGNED:
        x, y = Counter(first), Counter(second)
        changed, has_more = max(weigh(list(one.elements())) for one in (x - y, y - x)), False
    else:
        changed, has_more = _count_changes(first, second)
    return max(0.0, 1 - changed / max(a.size, b.size)), has_more


def _trim(a: Sequence[str], b: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Both without what they begin and end with in common."""
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    end = next((i for i in range(shorter - start) if a[-1 - i] != b[-1 - i]), shorter - start)
    return a[start : len(a) - end], b[start : len(b) - end]


def _count_changes(a: Sequence[str], b: Sequence[str]) -> tuple[float, bool]:
    """Weight of what was replaced, put in and left out, and whether a number was put in or left out."""
    replaced: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
    changed, has_more = 0.0, False
    for old, new in differences(a, b):
        if len(old) == len(new):
            replaced.update(((x,), (y,)) for x, y in zip(old, new, strict=True))
        elif old and new:
            replaced[tuple(old), tuple(new)] += 1
        else:
            changed += weigh([*old, *new])
            has_more = has_more or NUMBER in old or NUMBER in new
    in_a, in_b = Counter(a), Counter(b)
    for (x, y), times in replaced.items():
        everywhere = len(x) + len(y) > 2 or in_a[x[0]] == in_b[y[0]] == times
        changed += max(weigh(x), weigh(y)) * (1 if everywhere else times)
    return changed, has_more


def differences(a: Sequence[str], b: Sequence[str]) -> list[tuple[Sequence[str], Sequence[str]]]:
    """What stands between the words of a longest common subsequence, from the end: part of `a`, part of `b`."""
    rows = _common_rows(a, b)
    found = []
    i, j = end_a, end_b = len(a), len(b)
    while i and j:
        if rows[j - 1] >> (i - 1) & 1:
            i -= 1
        elif j > 1 and not rows[j - 2] >> (i - 1) & 1:
            j -= 1
        else:
            if i < end_a or j < end_b:
                found.append((a[i:end_a], b[j:end_b]))
            i, j = end_a, end_b = i - 1, j - 1
    if end_a or end_b:
        found.append((a[:end_a], b[:end_b]))
    return found


def _common_rows(a: Sequence[str], b: Sequence[str]) -> list[int]:
    """Bit vectors of the longest common subsequence (Hyyrö 2004): one for each word of `b`, a bit for each of `a`.

    The zeros of the last one are as many as the words in common.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    mask = bits = (1 << len(a)) - 1
    rows = []
    for word in b:
        hits = bits & places.get(word, 0)
        bits = ((bits + hits) | (bits - hits)) & mask
        rows.append(bits)
    return rows
