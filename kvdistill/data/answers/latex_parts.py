"""What a LaTeX answer is made of: a list, an assignment, an inequality, an exact number, a number with its unit.

Only the text is looked at; nothing is computed but fractions. `latex.py` compares the pieces. Knows no task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from kvdistill.data.answers.numbers import ratio_value

_OPEN, _CLOSE = "([{", ")]}"
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_BRACKETED = re.compile(r"\\\{(?P<set>.*)\\\}|(?P<open>[(\[])(?P<inside>.*)(?P<close>[)\]])")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
_PM, _MP = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
_NAME = r"[A-Za-z\\][A-Za-z\\ (){}|,'_]*(?:_\{?[0-9a-z]\}?|\^\{?-1\}?\([a-z]\))?"
_ASSIGNMENT = re.compile(rf"(?P<name>{_NAME}|[^A-Za-z\\=<>≤≥]+)\s*(?:=|\\in(?![A-Za-z]))\s*(?P<rest>[^=]+)")
_SUM = re.compile(r"(?P<name>[A-Za-z\\][A-Za-z\\ +*-]*)=(?P<rest>[^=]+)")
_RELATION = re.compile(r"[=<>≤≥]|\\(?:[lg](?:eq?|eqq|eqslant|t)(?![A-Za-z])|ne)")
_FRACTION = re.compile(r"\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_REPEATING = re.compile(
    r"(?P<whole>[0-9]*)\.(?P<part>[0-9]*)\\(?:overline|bar|dot)\s*(?:\{(?P<cycle>[0-9]+)\}|(?P<one>[0-9]))"
)
_TIMES_POWER = re.compile(r"\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*(-?[0-9]{1,2})\s*\}?$")

# Units are compared by name and never converted.
_UNITS = (  # each in its short form, then by its other names, of which the longer ones have a plural in s
    *("in inch inches", "ft foot feet", "yd yard", "mi mile", "mm millimeter millimetre", "cm centimeter centimetre"),
    *("m meter metre", "km kilometer kilometre", "g gram", "kg kilogram", "lb lbs pound", "oz ounce"),
    *("l liter litre", "ml milliliter millilitre", "s sec secs second", "min mins minute", "h hr hrs hour"),
    *("$ dollar usd", "cent", "deg degree", "mph"),
)
_NAMES = {
    form: names.split()[0]
    for names in _UNITS
    for name in names.split()
    for form in (name, name + "s" * (len(name) > 3))
}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_COMMAND = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox)\s*"
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
_TYPESET = re.compile(rf"(?P<body>.*[0-9}})a-z!])\s*{_COMMAND}\{{(?P<unit>[^{{}}]*)\}}{_POWER}")
_BARE = re.compile(rf"(?P<body>.*(?:[0-9}})]|\\pi))\s*(?P<unit>[A-Za-z][A-Za-z./ ]*?){_POWER}")
_AMOUNT = re.compile(r"[0-9]|\\pi|\\sqrt")
# Words after a number that say more than a unit does.
_NO_UNIT = re.compile(
    r"\b(?:[ap]\.?\s?m\b\.?|and|or|to|by|if|is|mod|base|plus|minus|times|over|more|less|than|squared|cubed|factorial|"
    r"hundred|thousand|[mbtr]+illions?|dozen|half|halves|thirds?|quarters?|fourths?|[a-z]*teen|pi|sqrt|sin|cos|tan|"
    r"cot|sec|csc|log|ln|[a-d])\b",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"(?P<body>.*?)\s*(?:\\?%|\\text\s*\{\s*(?:percent|%)\s*\}|\bper\s?cent)")
_CURRENCY = re.compile(r"(?P<sign>[-+]?)\s*\\?\$\s*(?P<body>(?![-+]).+)")
_DEGREES = re.compile(r"(?P<body>.*\S)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)")
_WORDS = re.compile(rf"{_COMMAND}\{{[^{{}}]*[A-Za-z][^{{}}]*\}}")
_LONG_WORD = re.compile(
    r"(?<![A-Za-z\\{])(?!(?:sqrt|frac|arc(?:sin|cos|tan)|[sc]inh|cosh|infty|infinity|cdot|times|begin|[bpv]?matrix)"
    r"(?![A-Za-z]))[A-Za-z]{4,}"
)


@dataclass(frozen=True)
class Listing:
    """Brackets is `()`, `[)`, `{}` and so on, empty for a bare list or a single thing, `∪` for a union."""

    brackets: str
    items: tuple[str, ...]

    @property
    def is_one(self) -> bool:
        return not self.brackets and len(self.items) == 1

    @property
    def is_ordered(self) -> bool:
        return self.brackets not in ("", "{}", "∪")

    @property
    def is_interval(self) -> bool:
        """Whether it may be one (`(1,2)` may be a point as well), or is a union."""
        return self.brackets not in ("", "{}") and (self.brackets == "∪" or len(self.items) == 2)


def read_listing(text: str) -> Listing:
    """`(1,2]`, `\\{a, b\\}`, `3, 5 and 7`, `[0,1] \\cup (2,3)`, `1 \\pm x` (which is two), or one thing."""
    text = text.strip()
    parts = _split(text, _UNION)
    if len(parts) > 1:
        return Listing("∪", tuple(parts))
    brackets, inside = "", text
    match = _BRACKETED.fullmatch(text)
    if match and _closes_at(text, 0 if match["open"] else 1) == len(text) - 1:
        brackets, inside = (match["open"] + match["close"], match["inside"]) if match["open"] else ("{}", match["set"])
    items: list[str] = []
    for part in _split(inside, _SEPARATOR):
        if _PM.search(part):
            items.append(_MP.sub("-", _PM.sub("+", part)).strip().removeprefix("+").strip())
            items.append(_MP.sub("+", _PM.sub("-", part)).strip())
        else:
            items.append(part)
    if not all(items) or (len(items) < 2 and brackets != "{}"):
        return Listing("", (text,))
    return Listing(brackets, tuple(items))


def _closes_at(text: str, start: int) -> int:
    depths = accumulate((sign in _OPEN) - (sign in _CLOSE) for sign in text[start:])
    return next((place for place, depth in enumerate(depths, start) if depth == 0), -1)


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


def read_assignment(text: str) -> tuple[str, str]:
    """`x = 3` -> (`x`, `3`); also `x \\in [0,1]`, `f(x)=2x`, `2+3=5`. No name and all of `2x = 6`, `a=1, b=2`."""
    match = _ASSIGNMENT.fullmatch(text.strip())
    if match is None:  # `a+b = 12` says what a sum is; `4x-5y = -50` is a line
        match = _SUM.fullmatch(text.strip())
        match = match if match and exact_value(match["rest"]) is not None else None
    return ("".join(match["name"].split()), match["rest"].strip()) if match else ("", text)


def is_relation(text: str) -> bool:
    """Whether the text says that something equals, is less or greater."""
    return bool(_RELATION.search(text))


def exact_value(text: str) -> Fraction | None:
    """The value of a decimal, fraction, mixed number, repeating decimal or number times a power of ten, or None."""
    text = _FRACTION.sub(r"((\1)/(\2))", repeating_as_fraction(text))
    power = _TIMES_POWER.search(text)
    value = ratio_value(text[: power.start()] if power else text)
    return value * Fraction(10) ** int(power[1]) if value is not None and power else value


def repeating_as_fraction(text: str) -> str:
    """`0.1\\overline{6}` -> `\\frac{1}{6}`."""

    def fraction(match: re.Match[str]) -> str:
        part, cycle = match["part"], match["cycle"] or match["one"]
        nines = 10 ** len(cycle) - 1
        value = int((match["whole"] or "0") + part) + Fraction(int(cycle), nines)
        value /= 10 ** len(part)
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _REPEATING.sub(fraction, text)


@dataclass(frozen=True)
class Quantity:
    """body: the number or expression, still LaTeX. words: the whole answer is words, to be compared as text."""

    body: str
    unit: str = ""
    is_percent: bool = False
    is_words: bool = False


def read_quantity(text: str) -> Quantity:
    """Take the unit or sign off one answer; `text` is not a list."""
    text = text.strip()
    match = _PERCENT.fullmatch(text)
    if match and _AMOUNT.search(match["body"]):
        return Quantity(match["body"], is_percent=True)
    match = _CURRENCY.fullmatch(text)
    if match:
        return Quantity(match["sign"] + match["body"], "$")
    match = _DEGREES.fullmatch(text)
    if match:
        return Quantity(match["body"], "deg")
    match = _TYPESET.fullmatch(text)
    if match and _AMOUNT.search(match["body"]) and _is_unit(match["unit"]):
        return Quantity(match["body"], _with_power(match))
    match = _BARE.fullmatch(text)
    if match and _is_unit(match["unit"]) and "/" not in match["unit"]:
        # without \text{} the letters may be variables: only names of two letters, or, behind a number, words of three
        is_number = exact_value(match["body"]) is not None
        words = [word.strip(".").casefold() for word in match["unit"].split()]
        if all((len(w) > 1 and w in _NAMES) or w in _POWERS or (len(w) > 2 and is_number) for w in words):
            return Quantity(match["body"], _with_power(match))
    return Quantity(text, is_words=bool(_WORDS.search(text) or _LONG_WORD.search(text)))


def same_unit(first: str, second: str) -> bool:
    """Whether two units may mean the same: an answer may leave it out, or say more words (`children tickets`)."""
    if not first or not second:
        return True
    (words, power), (others, other_power) = _parts(first), _parts(second)
    return power == other_power and (words <= others or others <= words)


def _is_unit(unit: str) -> bool:
    return bool(re.search("[A-Za-z]", unit)) and not _NO_UNIT.search(unit)


def _with_power(match: re.Match[str]) -> str:
    return match["unit"].strip() + (f"^{match['power']}" if match["power"] else "")


def _parts(unit: str) -> tuple[frozenset[str], str]:
    """The words of a unit in one spelling, and whether they are squared or cubed."""
    name, _, power = unit.casefold().partition("^")
    words = [word for word in re.findall(r"[a-z$¢]+", name.replace(".", "")) if word not in ("unit", "units")]
    power = next((_POWERS[word] for word in words if word in _POWERS), power)
    words = [word for word in words if word not in _POWERS]
    return frozenset(_NAMES.get(word) or (word.removesuffix("s") if len(word) > 3 else word) for word in words), power
