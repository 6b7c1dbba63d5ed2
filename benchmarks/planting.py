"""Leaks of every kind, made from real questions: what a detector has to find. Deterministic; knows no detector.

A kind is a function (question, draws, words) -> the question as it would have leaked, or None where the question
has nothing to change (no name, no punctuation). `words` are those of the whole set.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

CHINESE = "[\u4e00-\u9fff]"
_WORD = re.compile(r"[A-Za-z][A-Za-z']+")
_CALENDAR = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August "
    "September October November December"
)
_NAMES = (
    "Olivia Liam Noor Mateusz Ingrid Kofi Sakura Bjorn Esmeralda Quentin Priya Tobias Wanda Hassan Yvonne Dmitri Zelda "
    "Amara Leopold Fatima Gideon Helga Ravi Saskia"
)
_LITTLE = f"(?<=小)(?!时|学|数|朋|组|于|区|麦)({CHINESE})(?=同学|的|有|和|家|买|看|读|跑|走|今|比|给|身|、|，|每|用|从)"
_SURNAME = "([王李张刘陈杨黄林])(?=老师|叔叔|阿姨|师傅|大伯|奶奶|爷爷|大爷)"
_GIVEN, _SURNAMES = "丽强芳军敏静磊洋勇艳杰娟涛", "赵钱孙周吴郑冯褚卫"
_TO_CHINESE = str.maketrans(",.?!:;()'\"", "，。？！：；（）’”")
_TO_ENGLISH = str.maketrans("，。？！：；（）、．“”", ',.?!:;(),.""')


@dataclass(frozen=True)
class Words:
    """What a set's questions are made of. words: to put in. names: capitalised words it never has in lower case."""

    words: Sequence[str]
    names: frozenset[str]


Kind = Callable[[str, random.Random, Words], str | None]


def words_of(questions: Iterable[str]) -> Words:
    text = " \n".join(questions)
    found = set(_WORD.findall(text))
    names = {word for word in found if word[0].isupper() and word[1:].islower() and word.lower() not in found}
    pairs = set(re.findall(f"{CHINESE}{{2}}", text))
    return Words(sorted(max(found, pairs, key=len)), frozenset(names - set(_CALENDAR.split())))


def change_case(question: str, draws: random.Random, words: Words) -> str:
    return draws.choice([question.upper(), question.lower(), question.title(), question.swapcase()])


def change_spacing(question: str, draws: random.Random, words: Words) -> str:
    return "\n " + re.sub(" ", lambda _: draws.choice(["  ", "\n", "\t", " \u00a0"]), question) + "  "


def widen(question: str, draws: random.Random, words: Words) -> str:
    """Letters, digits and marks in full width."""
    return "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else sign for sign in question)


def change_names(question: str, draws: random.Random, words: Words) -> str | None:
    """Every name another one everywhere; numbers stay."""
    if re.search(CHINESE, question):
        changed = _exchange(question, _LITTLE, _GIVEN, draws)
        changed = _exchange(changed, _SURNAME, _SURNAMES, draws)
    else:
        there = sorted(words.names & set(_WORD.findall(question.replace("'s", ""))))
        pattern = rf"\b({'|'.join(there)})\b" if there else "(?!)"
        changed = _exchange(question, pattern, _NAMES.split(), draws)
    return changed if changed != question else None


def _exchange(question: str, pattern: str, new: Sequence[str], draws: random.Random) -> str:
    there = sorted(set(re.findall(pattern, question)))
    names = dict(zip(there, draws.sample(list(new), min(len(there), len(new))), strict=False))
    return re.sub(pattern, lambda found: names.get(found[0], found[0]), question)


def change_two_words(question: str, draws: random.Random, words: Words) -> str | None:
    """Two words (in Chinese two pairs of characters) for others of the set; never a number in digits."""
    chinese = re.search(CHINESE, question) is not None
    places = [
        found.span() for found in (re.finditer(f"{CHINESE}{{2}}", question) if chinese else _WORD.finditer(question))
    ]
    return _put_in(question, places, draws, words)


def change_any_two(question: str, draws: random.Random, words: Words) -> str | None:
    """Two of what stands between spaces, numbers too; not for texts without spaces."""
    if re.search(CHINESE, question):
        return None
    return _put_in(question, [found.span() for found in re.finditer(r"\S+", question)], draws, words)


def _put_in(question: str, places: Sequence[tuple[int, int]], draws: random.Random, words: Words) -> str | None:
    if len(places) < 2:
        return None
    for start, end in sorted(draws.sample(places, 2), reverse=True):
        question = question[:start] + draws.choice(words.words) + question[end:]
    return question


def change_names_and_two_words(question: str, draws: random.Random, words: Words) -> str | None:
    changed = change_names(question, draws, words)
    return change_two_words(changed, draws, words) if changed else None


def translate_marks(question: str, draws: random.Random, words: Words) -> str | None:
    table = _TO_ENGLISH if re.search(CHINESE, question) else _TO_CHINESE
    changed = question.translate(table)
    return changed if changed != question else None


def drop_marks(question: str, draws: random.Random, words: Words) -> str | None:
    """Everything that is neither a letter, a digit nor a space: decimal points, currency and arithmetic signs too."""
    changed = re.sub(r"[^\w\s]|_", "", question)
    return changed if changed != question else None


EXACT: dict[str, Kind] = {
    "unchanged": lambda question, draws, words: question,
    "case": change_case,
    "spacing": change_spacing,
    "width": widen,
}
NEAR: dict[str, Kind] = {
    "names changed": change_names,
    "two words changed": change_two_words,
    "two words or numbers changed": change_any_two,
    "names and two words changed": change_names_and_two_words,
    "punctuation translated": translate_marks,
    "punctuation dropped": drop_marks,
}


def plant(questions: Sequence[str], kind: Kind, seed: int = 0) -> list[tuple[int, str]]:
    """(number of the question, how it leaked) of every question that the kind can change."""
    words, draws = words_of(questions), random.Random(seed)
    leaked = ((number, kind(question, draws, words)) for number, question in enumerate(questions))
    return [(number, text) for number, text in leaked if text is not None]
