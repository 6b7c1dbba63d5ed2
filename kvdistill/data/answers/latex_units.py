"""An answer's number or expression, and what else it says: its unit, a percent sign, or that it is words.

`440\\text{ cm}^2` and `440 square centimeters` are 440 in cm^2; `9\\text{ a.m.}` is words, for a.m. is no unit. Units
are compared by name and never converted. Knows no task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvdistill.data.answers.latex_parts import exact_value

_SAME_NAME = {
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "l": "liter liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "$": "dollar dollars usd",
    "¢": "cent cents",
    "deg": "degree degrees",
    "mph": "",
}
_NAMES = {name: short for short, names in _SAME_NAME.items() for name in (short, *names.split())}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_GLUED = re.compile(
    r"(?:[kcm]m|kg|mph|lbs?|oz|ft|in|yd|mi|m[lL]|cents?|dollars?|feet|inches|degrees?)(?:\^\{?[23]\}?)?"
)
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
_CURRENCY = re.compile(r"(?P<sign>[-+]?)\s*\\?\$\s*(?P<body>(?![-+]).+)|(?P<before>.+[0-9])\s*\\?\$")
_DEGREES = re.compile(r"(?P<body>.*\S)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°)")
_WORDS = re.compile(rf"{_COMMAND}\{{[^{{}}]*[A-Za-z][^{{}}]*\}}")
_LONG_WORD = re.compile(
    r"(?<![A-Za-z\\{])(?!(?:sqrt|frac|arc(?:sin|cos|tan)|[sc]inh|cosh|infty|infinity|cdot|times|begin|[bpv]?matrix)"
    r"(?![A-Za-z]))[A-Za-z]{4,}"
)


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
        return Quantity(match["before"] or match["sign"] + match["body"], "$")
    match = _DEGREES.fullmatch(text)
    if match:
        return Quantity(match["body"], "deg")
    match = _TYPESET.fullmatch(text)
    if match and _AMOUNT.search(match["body"]) and _is_unit(match["unit"]):
        return Quantity(match["body"], _with_power(match))
    match = _BARE.fullmatch(text)
    if match and _is_bare_unit(match["unit"].strip(), known=exact_value(match["body"]) is None):
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


def _is_bare_unit(unit: str, *, known: bool) -> bool:
    """Without \\text{} the letters may be variables: known names of two letters and more, or, behind a plain number,
    any words of three."""
    if not _is_unit(unit) or "/" in unit:
        return False
    if _GLUED.fullmatch(unit):
        return True
    words = [word.strip(".").casefold() for word in unit.split()]
    return all((len(word) > 1 and word in _NAMES) or word in _POWERS or (len(word) > 2 and not known) for word in words)


def _with_power(match: re.Match[str]) -> str:
    return match["unit"].strip() + (f"^{match['power']}" if match["power"] else "")


def _parts(unit: str) -> tuple[frozenset[str], str]:
    """The words of a unit in one spelling, and whether they are squared or cubed."""
    name, _, power = unit.casefold().partition("^")
    words = [word for word in re.findall(r"[a-z$¢]+", name.replace(".", "")) if word not in ("unit", "units")]
    power = next((_POWERS[word] for word in words if word in _POWERS), power)
    words = [word for word in words if word not in _POWERS]
    return frozenset(_NAMES.get(word) or (word.removesuffix("s") if len(word) > 3 else word) for word in words), power
