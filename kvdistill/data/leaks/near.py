"""Near duplicates: questions that are another question, reworded a little.

`NearIndex` holds the questions that others are held against (test sets, evaluations); the others stream through it.

*exact*    Equal after folding case, spacing and width.
*near*     Equal up to punctuation. Or the numbers and arithmetic signs are the same in the same order, and three
           quarters of the words stand at their place; with three different numbers in common, 60 % do. Names that are
           exchanged throughout count once each. Up to two numbers may have been exchanged for words (whoever changes
           words at random hits one), none for another number.
*variant*  As near but with other numbers, or of one family (below): another problem, and no leak.

Numbers are compared by value: three is 3, 1,080.50 is 1080.5. Chinese, Japanese and Korean characters are words that
weigh half. A question of fewer than five different words, or of fewer than eight with its numbers (`3*4+5*6`, very
short ones), is compared up to punctuation only, and a formula not even that: there a changed word is a changed problem.

*Families.* Questions made from one template are near each other and still different problems. How far different
problems stand apart is read off the index: a question is near an indexed one only where it is three times as near
as that one's third-nearest neighbour in the index is (among those with the same numbers and half of the words).

Not found: a question told in other words or in another order (shuffled options, swapped clauses), translated, or with
another text around it. Found though it is another problem: one word changed that changes everything (maximum to
minimum), and in a question without numbers a name that is its content; a quarter of the words is the limit there too.

Candidates come from MinHash signatures of the sets of words, 64 bands of 3, two bands in common: of sets that share a
half, 99.8 % meet. Each is then compared word by word, so MinHash decides only who is compared. Measured by
`python -m benchmarks leaks`, whose README has the figures. Pure; knows no task.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from kvdistill.data.leaks.wording import (
    NUMBER,
    ONE,
    Parts,
    Wording,
    are_equal_but_for_marks,
    compare,
    most_similar,
    share_in_place,
    take_apart,
)

Kind = Literal["exact", "near", "variant"]

SIMILAR = 0.75
SIMILAR_WITH_NUMBERS, ENOUGH_NUMBERS = 0.60, 3
IN_PLACE = 0.50  # however many names were exchanged
LOST_VALUES = 2
FEWEST_WORDS, FEWEST_WITH_NUMBERS = 5, 8
FAMILY, FAMILY_RATIO, FAMILY_SIMILAR = 3, 3.0, 0.50

BANDS, ROWS, HITS = 64, 3, 2
MAX_MET = 128  # wordings looked at for one question, those with the most bands in common (more where they tie)
MAX_COMPARED = 32  # of them compared word by word, those with the most words in place; texts of a wording told apart
MAX_VARIANTS = 5  # shown for one question


@dataclass(frozen=True, slots=True)
class Match:
    """An indexed question that the asked one is (exact, near) or resembles (variant). similarity: 0 to 1."""

    key: Hashable
    kind: Kind
    similarity: float


@dataclass(slots=True)
class _Entry:
    """An indexed text, and the keys of the questions that have it."""

    parts: Parts
    keys: list[Hashable]


@dataclass(slots=True)
class _Group:
    """A wording of the index with its texts. equal: those with the same values. first: the one to show of very many."""

    wording: Wording
    texts: list[int] = field(default_factory=list)
    equal: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    first: int = -1


class NearIndex:
    """Questions that others are held against. Memory grows with these only (5 KB each), never with those asked about.

    In which order questions are added does not change what is found.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._by_folded: dict[str, int] = {}
        self._by_letters: dict[int, list[int]] = {}
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._comparable: list[_Group] = []
        self._bands = _Bands()
        self._family: dict[int, list[tuple[float, str]]] = {}

    def add(self, key: Hashable, question: str) -> None:
        """Hold `question` under `key`; several keys may have the same question."""
        parts = take_apart(question)
        known = self._by_folded.get(parts.folded)
        if known is not None:
            self._entries[known].keys.append(key)
            return
        self._family.clear()
        number = self._by_folded[parts.folded] = len(self._entries)
        group = self._groups.get(parts.wording.words)
        if group is None:
            group = self._groups[parts.wording.words] = _Group(parts.wording)
            if _is_comparable(parts.wording):
                self._bands.add(parts.wording.types)
                self._comparable.append(group)
        self._entries.append(_Entry(parts._replace(wording=group.wording), [key]))
        self._by_letters.setdefault(parts.letters, []).append(number)
        group.texts.append(number)
        group.equal.setdefault(parts.values, []).append(number)
        if group.first < 0 or parts.folded < self._entries[group.first].parts.folded:
            group.first = number

    def matches(self, question: str) -> list[Match]:
        """Every indexed question that this one is, then at most five that it resembles; the most similar first."""
        parts = take_apart(question)
        found: list[tuple[int, float, str, Kind, list[Hashable]]] = []
        for number, similarity, is_near in self._close(parts, SIMILAR_WITH_NUMBERS):
            folded, keys = self._entries[number].parts.folded, self._entries[number].keys
            if folded == parts.folded:
                found.append((0, -1.0, folded, "exact", keys))
            elif is_near and self._stands_out(number, 1 - similarity, parts.folded):
                found.append((1, -similarity, folded, "near", keys))
            elif similarity >= SIMILAR:
                found.append((2, -similarity, folded, "variant", keys))
        found.sort(key=itemgetter(0, 1, 2))
        num_leaks = sum(rank < 2 for rank, *_ in found)
        shown = found[: num_leaks + MAX_VARIANTS]
        return [Match(key, kind, -negative) for _, negative, _, kind, keys in shown for key in keys]

    def _close(self, parts: Parts, least: float) -> list[tuple[int, float, bool]]:
        """Number, similarity, and whether it is near but for families, of the texts that are `least` similar."""
        asked, same = parts.wording, self._by_folded.get(parts.folded)
        found = {} if same is None else {same: (1.0, True)}
        if len(asked.types) >= 3:  # else it is a formula, and every mark counts
            for number in self._by_letters.get(parts.letters, ()):
                if number not in found and are_equal_but_for_marks(parts.folded, self._entries[number].parts.folded):
                    found[number] = 1.0, True
        if _is_comparable(asked):
            groups = self._candidates(asked, least)
            for group, (similarity, has_more) in zip(groups, [compare(asked, g.wording) for g in groups], strict=True):
                texts: Sequence[int] = group.texts if similarity >= least else ()
                if len(texts) > MAX_COMPARED:  # of very many those with equal numbers, or else one: every number counts
                    texts = group.equal.get(parts.values, [group.first])
                for number in texts:
                    if number not in found:
                        values = self._entries[number].parts.values
                        found[number] = similarity, _is_near(similarity, has_more, parts.values, values, least)
        return [(number, similarity, is_near) for number, (similarity, is_near) in found.items()]

    def _candidates(self, asked: Wording, least: float) -> list[_Group]:
        """The most promising first, as far as they can be `least` similar at all."""
        found = (self._comparable[place] for place in self._bands.find(asked.types))
        kept = ((share_in_place(asked, one.wording), one) for one in found if most_similar(asked, one.wording) >= least)
        ranked = [(-share, one.wording.words, one) for share, one in kept if share >= IN_PLACE]
        return [one for *_, one in sorted(ranked, key=itemgetter(0, 1))[:MAX_COMPARED]]

    def _stands_out(self, number: int, distance: float, folded: str) -> bool:
        """Whether a text is nearer to the indexed one than the other problems of its family are, if it has one."""
        if number not in self._family:
            parts = self._entries[number].parts
            close = self._close(parts, FAMILY_SIMILAR)
            near = ((1 - similarity, self._entries[n].parts.folded) for n, similarity, is_near in close if is_near)
            self._family[number] = sorted(one for one in near if one[1] != parts.folded)[: FAMILY + 1]
        others = [far for far, other in self._family[number] if other != folded]
        third = others[FAMILY - 1] if len(others) >= FAMILY else math.inf
        return third > 0 and distance * FAMILY_RATIO <= third


def _is_comparable(wording: Wording) -> bool:
    words = wording.types_size
    return words >= FEWEST_WORDS and words + wording.words.count(NUMBER) >= FEWEST_WITH_NUMBERS


def _is_near(similarity: float, has_more: bool, a: Sequence[str], b: Sequence[str], least: float) -> bool:
    """The rule for near; with `least` below it, the rule for a neighbour in a family.

    a, b: the values of both. Those that only one of them has are lost, at most two, in the same order; `one` may come
    and go, but it may not become another number.
    """
    num_lost = 0
    if a != b:
        fewer, more = sorted((a, b), key=lambda values: len(values) - values.count(ONE))
        short, long = ([value for value in values if value != ONE] for values in (fewer, more))
        rest, num_lost = iter(long), len(long) - len(short)
        if num_lost > LOST_VALUES or not all(value in rest for value in short):
            return False
        if num_lost and has_more:  # a number was put in, not exchanged for a word
            return False
        if set(Counter(long) - Counter(short)) - {"1"} and fewer.count(ONE) > more.count(ONE):
            return False
    if similarity >= SIMILAR:
        return True
    numbers = {value for value in a if value[0].isalnum()} - {ONE}
    return least < SIMILAR_WITH_NUMBERS or (num_lost == 0 and len(numbers) >= ENOUGH_NUMBERS)


class _Bands:
    """Which sets of words share enough bands of their MinHash signatures with a given one.

    One sorted array of 64-bit hashes: less than a kilobyte a set, where datasketch's own tables take 16 (measured).
    """

    def __init__(self) -> None:
        self._new: list[np.ndarray] = []
        self._keys, self._ids = np.empty(0, np.uint64), np.empty(0, np.int32)

    def add(self, types: frozenset[str]) -> None:
        self._new.append(_sign(types))

    def find(self, types: frozenset[str]) -> list[int]:
        """Numbers of the MAX_MET sets with the most bands in common, counted from 0 in the order they were added."""
        if self._new:
            start = len(self._keys) // BANDS
            all_keys = np.concatenate([self._keys, *self._new])
            new_ids = np.repeat(np.arange(start, start + len(self._new), dtype=np.int32), BANDS)
            order = np.argsort(all_keys, kind="stable")
            self._keys, self._ids = all_keys[order], np.concatenate([self._ids, new_ids])[order]
            self._new = []
        keys = _sign(types)
        firsts, ends = (np.searchsorted(self._keys, keys, side).tolist() for side in ("left", "right"))
        hits = [self._ids[first:end] for first, end in zip(firsts, ends, strict=True) if first < end]
        if not hits:
            return []
        counts = np.bincount(np.concatenate(hits))
        least = HITS if len(counts) <= MAX_MET else max(HITS, np.partition(counts, -MAX_MET)[-MAX_MET])
        return np.flatnonzero(counts >= least).tolist()


def _sign(types: frozenset[str]) -> np.ndarray:
    """One 64-bit hash for each band of the MinHash signature."""
    signature = _blank().copy()
    words = [word.encode() for word in types]
    for start in range(0, len(words), 1000):  # the whole of a long text at once would be a matrix of its size
        signature.update_batch(words[start : start + 1000])
    rows = signature.hashvalues.astype(np.uint64).reshape(BANDS, ROWS)
    keys = np.arange(1, BANDS + 1, dtype=np.uint64)
    for row in rows.T:  # wraps around 2**64
        keys = (keys ^ row) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


@cache
def _blank() -> Any:
    from datasketch import MinHash  # takes three quarters of a second

    return MinHash(num_perm=BANDS * ROWS, seed=1)
