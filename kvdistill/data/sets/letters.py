"""The lettered form of a multiple choice question, and which letter a generated text gives as its answer.

A letter counts where the text marks it (`the answer is (C)`, `答案：B`, `选B`, `\\boxed{D}`) or begins with it as a
label (`B`, `(b)`, `B. text`). An article ("A planet"), the text of a choice without its letter, and two letters are no
answer. Knows no evaluation and no file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kvdistill.data.answers.numbers import fold_width, normalise_number

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TEMPLATES = {
    "en": ("Question: ", "Answer with the letter of the right choice.\nAnswer:"),
    "zh": ("问题：", "请只回答正确选项的字母。\n答案："),
}


@dataclass(frozen=True)
class Lettered:
    """One multiple choice question to be answered by writing a letter.

    prompt: ends in `Answer:` or `答案：`. letters: as many as there are choices, in the order in which they are shown.
    gold: the right one. natives: the letter of each choice in the order of lm-eval's definition.
    texts: the choices as shown.
    """

    prompt: str
    letters: tuple[str, ...]
    gold: str
    natives: tuple[str, ...]
    texts: tuple[str, ...]

    def read(self, completion: str) -> str | None:
        """The letter that `completion` gives; a number stands for a letter only where no choice is a number."""
        digits = all(normalise_number(text) is None for text in self.texts)
        return read_letter(completion, self.letters, digits=digits)


def write_lettered(
    question: str, choices: Sequence[str], right: int, language: str, *, shown: Sequence[int] | None = None
) -> Lettered:
    """`choices` and `right` in the definition's order; shown: indices into it in the order to show them."""
    order = list(range(len(choices)) if shown is None else shown)
    letters = tuple(ALPHABET[: len(choices)])
    texts = tuple(choices[i].strip() for i in order)
    opening, ending = _TEMPLATES[language]
    prompt = f"{opening}{question.strip()}\n{list_choices(texts)}\n{ending}"
    natives = tuple(letters[order.index(i)] for i in range(len(choices)))
    return Lettered(prompt, letters, natives[right], natives, texts)


def list_choices(texts: Sequence[str]) -> str:
    """One line a choice: `A. text`."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(ALPHABET, texts, strict=False))


def read_letter(completion: str, letters: Sequence[str] = "ABCD", *, digits: bool = False) -> str | None:
    """The one letter that a completion answers with, upper case; None without one or with several.

    A letter alone on the first line is the answer whatever follows; then come marked letters, which must agree with
    each other and with a label at the beginning. digits: `2` (alone, or marked) is B.
    """
    text = _NEXT_QUESTION.split(_single_spaced(fold_width(completion)), maxsplit=1)[0]
    forms = _forms("".join(letters), digits)
    begins, end = forms.label_at(text, 0)
    if begins and begins != _SEVERAL and not text[end:].split("\n", 1)[0].strip(" .。!,;:"):
        return begins
    found = {
        forms.label_at(text, match.end())[0] for mark in _MARKS for match in mark.finditer(text) if not match["not"]
    }
    found |= {match["label"] for match in forms.called_right.finditer(text)}
    if not forms.is_list(text):
        found.add(begins)
    found.discard("")
    return found.pop() if len(found) == 1 and _SEVERAL not in found else None


def read_label(text: str, letters: Sequence[str]) -> str | None:
    """The letter that `text` begins with as a label: `(B)`, `b.`, `B because …`; None for several or none."""
    letter, _ = _forms("".join(letters), False).label_at(_single_spaced(fold_width(text)), 0)
    return letter if letter and letter != _SEVERAL else None


def _single_spaced(text: str) -> str:
    """Runs of spaces as one, no blank lines: what follows is searched for in time that grows with the text only."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if not line.isspace()).strip()


_SEVERAL = "several"
# Where a model goes on to write the next question by itself, its answer has ended.
_NEXT_QUESTION = re.compile(r"\n(?:Question|Q|Problem|问题|题目)\s*[:0-9]")
# What may stand before a letter: quotes, brackets, TeX, "option".
_OPEN = (
    r"(?P<open>(?:[\s*_\"'`$(\[{【「]|\\boxed|\\text(?:bf)?|\\mathrm|\\[(\[]"
    r"|(?:[Oo]ption|[Cc]hoice|[Ll]etter)\b|选项){0,16}+)"
)
_CLOSE = r"(?P<close>[)\]}*_\"'`$】」]*+)"
# What may stand behind a letter without brackets. Behind a space only what goes on from an answer:
# "B because" and "B is correct", but not "A planet", "B vitamins" or "B is wrong".
_RIGHT = r"is\s+(?:the\s+)?(?:most\s+|only\s+)?(?:correct|right|best|true|accurate)\b"
_RIGHT_ZH = r"(?:选项|项)?(?:是|为)?(?:正确|对(?=$|[\s,，.。的]))"
_BEHIND = re.compile(
    rf"""\s*$ | [ \t]*\n | \s*[;!?,。；！？，、] | \s*因为 | (?:选项|项)(?=$|[\s。，,.;；:]) | {_RIGHT_ZH}
      | \.(?![0-9]\b) (?![A-Za-z](?![A-Za-z]))  # "B." and "B.text", not "B.C." or "e.g."
      | :(?![A-Za-z0-9])                         # "B: text", not the ratio "A:B"
      | \s+[-–—]\s
      | \s+(?:because|since|as|which|therefore|so|{_RIGHT}|is\s+the\s+(?:\w+\s+)?(?:answer|choice|option))\b
    """,
    re.VERBOSE,
)
_RULED_OUT = re.compile(r"\s*(?:is|was)\s*(?:not|n't|wrong|incorrect|false)\b|\s*(?:选项|项)?(?:是|为)?(?:错|不)")
_ONE_NUMBER = re.compile(r"\.?[ \t]*(?:\n|$)")
# Behind these stands the answer, where a letter follows.
_MARKS = (
    re.compile(
        r"(?P<not>\bno\s+)?\b(?:answer|choice|option)(?:\s+(?:choice|option|letter))?(?:\s+to\s+th(?:e|is)\s+question)?[*_]*\s*"
        r"(?:is|are|would\s+be|should\s+be|must\s+be|=|:|\n)(?:\s+(?:therefore|thus|then|clearly|most\s+likely|likely))?\s*:?",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<not>(?:\bnot|n't|\bnever|\bcannot)\s+(?:\w+\s+)?)?\b(?:choose|select|pick|say|go(?:ing)?\s+with)\s+(?:the\s+)?",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<not>(?!))?\\boxed\s*(?=\{)"),
    re.compile(r"(?P<not>[不非])?答案\s*(?:应该|应当|应|就|选项)?[*_】]*\s*(?:是|为|选择|选|:|=|\s)*"),
    re.compile(r"(?P<not>[不勿别]|不[能应会可该]|排除)?选(?!项)(?:择)?(?:是|为|:)?"),
    re.compile(r"(?P<not>错误)?选项(?:是|为|:)"),
)


@dataclass(frozen=True)
class _Forms:
    """How one set of letters may be written."""

    label: re.Pattern[str]
    second: re.Pattern[str]
    line: re.Pattern[str]
    called_right: re.Pattern[str]
    letters: str

    def label_at(self, text: str, start: int) -> tuple[str, int]:
        """The letter (or `""`, or `several`) that stands as a label at `start`, and where it ends."""
        match = self.label.match(text, start)
        if match is None:
            return "", start
        sign, end = match["label"], match.end()
        if self.second.match(text, end):
            return _SEVERAL, end
        if _RULED_OUT.match(text, end):
            return "", end
        if sign.isdigit():
            return (self.letters[int(sign) - 1] if _ONE_NUMBER.match(text, end) else ""), end
        enclosed = match["close"].strip("_'") and (match["open"].strip() or ")" in match["close"])
        if enclosed or _BEHIND.match(text, end):
            return sign.upper(), end
        return "", end

    def is_list(self, text: str) -> bool:
        """Whether several lines begin with different labels: the choices written out again, not an answer."""
        return len({match["label"].upper() for match in self.line.finditer(text)}) > 1


@lru_cache(maxsize=64)
def _forms(letters: str, digits: bool) -> _Forms:
    upper, either = f"[{letters}]", f"[{letters}{letters.lower()}]"
    number = f"|[1-{len(letters)}](?![0-9])" if digits and len(letters) <= 9 else ""
    joint = r"[ \t]*+(?:,|，|、|/|&|\+|;|\band\b|\bor\b|和|或|与|及|)[ \t]*+"
    return _Forms(
        label=re.compile(rf"{_OPEN}(?P<label>{either}(?![A-Za-z0-9]){number}){_CLOSE}"),
        # "B or C"; but "B, A planet", "B) I think" and "B, e.g. rain" go on with a sentence
        second=re.compile(rf"{joint}[(\[]?{either}(?![A-Za-z0-9'])(?!\.[a-z])(?!\s+(?!and\b|or\b)[a-z])"),
        line=re.compile(rf"(?m)^\**[(\[]?(?P<label>{either})[.)\]:、]"),
        called_right=re.compile(rf"(?<![A-Za-z0-9'.])(?P<label>{upper})[)\]*]*(?:\s+{_RIGHT}|{_RIGHT_ZH})"),
        letters=letters,
    )
