"""What a LaTeX answer is made of: a list, tuple, set, interval or union; an assignment; an inequality; an exact number.

Only the text is looked at; nothing is computed but fractions. `latex.py` compares the pieces. Knows no task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from kvdistill.data.answers.numbers import ratio_value

_LONGEST = 500  # characters of a number
_OPEN, _CLOSE = "([{", ")]}"
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_PM, _MP = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
_NAME = r"[A-Za-z\\][A-Za-z\\ (){}|,'_]*(?:_\{?[0-9a-z]\}?|\^\{?-1\}?\([a-z]\))?"
_ASSIGNMENT = re.compile(rf"(?P<name>{_NAME}|[^A-Za-z\\=<>≤≥]+)\s*(?:=|\\in(?![A-Za-z]))\s*(?P<rest>[^=]+)")
_SUM = re.compile(r"(?P<name>[A-Za-z\\][A-Za-z\\ +*-]*)=(?P<rest>[^=]+)")
_VARIABLE = r"[A-Za-z](?:_\{?[0-9A-Za-z]\}?)?|\\[a-z]+"
_SIDE = r"[^<>≤≥=]+"
_BETWEEN = re.compile(rf"(?P<low>{_SIDE})(?P<first>[<≤])\s*(?:{_VARIABLE})\s*(?P<second>[<≤])(?P<high>{_SIDE})")
_BEYOND = re.compile(rf"\s*(?:{_VARIABLE})\s*(?P<sign>[<>≤≥])(?P<end>{_SIDE})")
_BEFORE = re.compile(rf"(?P<end>{_SIDE})(?P<sign>[<>≤≥])\s*(?:{_VARIABLE})\s*")
_RELATIONS = (
    (re.compile(r"\\(?:leq?|leqslant|leqq)(?![A-Za-z])|<="), "≤"),
    (re.compile(r"\\(?:geq?|geqslant|geqq)(?![A-Za-z])|>="), "≥"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
)
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_FRACTION = re.compile(r"\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_REPEATING = re.compile(
    r"(?P<whole>[0-9]*)\.(?P<part>[0-9]*)\\(?:overline|bar|dot)\s*(?:\{(?P<cycle>[0-9]+)\}|(?P<one>[0-9]))"
)
_POWER = re.compile(r"\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*(-?[0-9]{1,2})\s*\}?$")


@dataclass(frozen=True)
class Listing:
    """Several things: brackets is `()`, `[)`, `{}` and so on, empty for a bare list, `∪` for a union."""

    brackets: str
    items: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        return self.brackets not in ("", "{}", "∪")

    @property
    def is_interval(self) -> bool:
        """Whether it may be one (`(1,2)` may be a point as well), or is a union."""
        return self.brackets not in ("", "{}") and (self.brackets == "∪" or len(self.items) == 2)


def read_listing(text: str) -> Listing | None:
    """`(1,2]`, `\\{a, b\\}`, `3, 5 and 7`, `[0,1] \\cup (2,3)`, `1 \\pm x` (which is two); None for one thing."""
    parts = _split(text, re.compile(r"\\cup(?![A-Za-z])"))
    if len(parts) > 1:
        return Listing("∪", tuple(parts))
    brackets, inside = _brackets(text)
    items = [each for part in _split(inside, _SEPARATOR) for each in _both_signs(part)]
    if not all(items) or (len(items) < 2 and brackets != "{}"):
        return None
    return Listing(brackets, tuple(items))


def _brackets(text: str) -> tuple[str, str]:
    """The brackets around the whole text and what is inside; TeX's grouping braces are none."""
    text = text.strip()
    if text.startswith("\\{") and text.endswith("\\}") and _closes_at(text, 1) == len(text) - 1:
        return "{}", text[2:-2]
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at(text, 0) == len(text) - 1:
        return text[0] + text[-1], text[1:-1]
    return "", text


def _closes_at(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in _OPEN) - (text[i] in _CLOSE)
        if depth == 0:
            return i
    return -1


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` cut at the separators outside all brackets; in one piece where brackets do not match."""
    pieces, depth, start, i = [], 0, 0, 0
    while i < len(text):
        match = separator.match(text, i) if depth == 0 else None
        if match:
            pieces.append(text[start:i].strip())
            start = i = match.end()
            continue
        depth += (text[i] in _OPEN) - (text[i] in _CLOSE)
        i += 1
    pieces.append(text[start:].strip())
    if depth != 0:
        return [text.strip()]
    # ", and" is one separator
    return [piece for n, piece in enumerate(pieces) if piece or n in (0, len(pieces) - 1) or not pieces[n - 1]]


def _both_signs(text: str) -> list[str]:
    if not _PM.search(text):
        return [text]
    upper, lower = _MP.sub("-", _PM.sub("+", text)), _MP.sub("+", _PM.sub("-", text))
    return [upper.strip().removeprefix("+").strip(), lower.strip()]


def read_assignment(text: str) -> tuple[str, str] | None:
    """`x = 3` -> (`x`, `3`); also `x \\in [0,1]`, `f(x)=2x`, `2+3=5`. None for `2x = 6`, `a=1, b=2`."""
    match = _ASSIGNMENT.fullmatch(text.strip())
    if match is None:  # `a+b = 12` says what a sum is; `4x-5y = -50` is a line
        match = _SUM.fullmatch(text.strip())
        match = match if match and exact_value(match["rest"]) is not None else None
    return ("".join(match["name"].split()), match["rest"].strip()) if match else None


def is_relation(text: str) -> bool:
    """Whether the text says that something equals, is less or greater."""
    return any(sign in plain_relations(text) for sign in "=<>≤≥") or "\\ne" in text


def plain_relations(text: str) -> str:
    """With <, >, ≤ and ≥ for TeX's names of them."""
    for pattern, sign in _RELATIONS:
        text = pattern.sub(sign, text)
    return text


def interval_of(text: str) -> str | None:
    """`2 < x \\le 5` -> `(2,5]`, `x \\ge 3` -> `[3,\\infty)`, `x<1 or x>2` -> a union; None for anything else."""
    pieces = _split(plain_relations(text), re.compile(r"\bor\b"))
    intervals = [_one_interval(piece) for piece in pieces]
    return " \\cup ".join(each for each in intervals if each) if all(intervals) else None


def _one_interval(text: str) -> str | None:
    match = _BETWEEN.fullmatch(text)
    if match:
        opening, closing = "(["[match["first"] == "≤"], ")]"[match["second"] == "≤"]
        return f"{opening}{match['low'].strip()},{match['high'].strip()}{closing}"
    match = _BEYOND.fullmatch(text) or _BEFORE.fullmatch(text)
    if match is None:
        return None
    sign = match["sign"] if match.re is _BEYOND else _TURNED[match["sign"]]
    end = match["end"].strip()
    if sign in ("<", "≤"):
        return f"(-\\infty,{end}{')' if sign == '<' else ']'}"
    return f"{'(' if sign == '>' else '['}{end},\\infty)"


def exact_value(text: str) -> Fraction | None:
    """The value of a decimal, fraction, mixed number, repeating decimal or number times a power of ten, or None."""
    if len(text) > _LONGEST:
        return None
    text = repeating_as_fraction(text)
    power = _POWER.search(text)
    text = text[: power.start()] if power else text
    text = _FRACTION.sub(r"((\1)/(\2))", text)
    if "$" in text or "%" in text:
        return None
    value = ratio_value(re.sub(r"^([-+])\s+", r"\1", text.strip()))
    return value if value is None or not power else value * Fraction(10) ** int(power[1])


def repeating_as_fraction(text: str) -> str:
    """`0.1\\overline{6}` -> `\\frac{1}{6}`."""

    def fraction(match: re.Match[str]) -> str:
        part, cycle = match["part"], match["cycle"] or match["one"]
        nines = 10 ** len(cycle) - 1
        value = int((match["whole"] or "0") + part) + Fraction(int(cycle), nines)
        value /= 10 ** len(part)
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _REPEATING.sub(fraction, text)
