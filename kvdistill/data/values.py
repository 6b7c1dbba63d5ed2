"""Answers as values: exact decimals, folded text, and what stands after a task's mark.

Numbers are compared as exact decimals through a canonical string (no floats, no rounding). Knows no task.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

# Full-width ASCII, the ideographic space, half-width Chinese punctuation, curly quotes and the minus sign.
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: 0x20,
    0xFF61: 0x3002,
    0xFF64: 0x3001,
    0x2018: 0x27,
    0x2019: 0x27,
    0x201C: 0x22,
    0x201D: 0x22,
    0x2212: 0x2D,
}
_NUMBER = re.compile(r"([-+]?)\$?([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?\s?%?\.?")
# Possessive, so that a longer expression (`72/5`, `3kg`, `48+24`) is never read as the number it begins with.
# Decimal, percentage, fraction, mixed number: `14.4`, `240%`, `7/10`, `((7)/(10))`, `5((7)/(10))`, `5 7/10`.
_RATIO = re.compile(
    r"(?P<sign>[-+]?)(?:(?:(?P<whole>[0-9]++)(?:\s*(?=\()|\s+))?"
    r"(?P<open>\(?\(?)(?P<top>[0-9]++)\)?/\(?(?P<bottom>[0-9]++)\)?(?P<close>\)?)"
    r"|(?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)\s?(?P<percent>%?))"
)
# What must not follow, or the number is the beginning of something else: 3kg, 44*20, 3千 (but 3千米 is 3 km).
_RATIO_END = re.compile(r"(?![A-Za-z0-9_(%]|\.[0-9]|,[0-9]|\s*[/^*+=:×÷-]|[十百万亿]|千(?![克米瓦]))")
_LEADING = re.compile(r"[-+]?\$?[-+]?(?:[0-9][0-9,]*+(?:\.[0-9]++)?+|\.[0-9]++)(?![\w/^*]|\s?[-+=]\s?[0-9])")


def fold_width(text: str) -> str:
    """NFC, with full-width letters, digits and punctuation as their narrow forms."""
    return unicodedata.normalize("NFC", text).translate(_WIDTH)


def normalise_number(text: str) -> str | None:
    """`$1,080.50` -> `1080.5`, `-0.0` -> `0`, `72.` -> `72`; None where the text is not one decimal number.

    Commas only as thousands separators; a currency or percent sign is dropped.
    """
    match = _NUMBER.fullmatch(fold_width(text).strip())
    if match is None:
        return None
    before, after, whole, part = match.groups(default="")
    if not (whole or part) or (before and after):
        return None
    whole, part = whole.replace(",", "").lstrip("0") or "0", part.rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if "-" in (before, after) and value != "0" else value


def normalise_text(text: str) -> str:
    """Case, width, runs of whitespace and a closing full stop folded."""
    return " ".join(fold_width(text).casefold().split()).removesuffix(".")


def same_number(first: str, second: str) -> bool:
    """Equal as exact decimals; what is not a number equals nothing."""
    number = normalise_number(first)
    return number is not None and number == normalise_number(second)


def same_value(first: str, second: str) -> bool:
    """Equal as numbers where both are numbers, else as folded text."""
    numbers = normalise_number(first), normalise_number(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return normalise_text(first) == normalise_text(second)


def text_after(mark: str, completion: str, *, to_line_end: bool = True) -> str | None:
    """What follows the first `mark`, stripped, to the end of its line (or of the text); None without the mark."""
    _, found, rest = completion.partition(mark)
    if not found:
        return None
    return (rest.lstrip().split("\n", 1)[0] if to_line_end else rest).strip() or None


def leading_number(text: str) -> str | None:
    """The number that `text` begins with, in canonical form; None where it begins with something else."""
    match = _LEADING.match(fold_width(text).lstrip())
    return normalise_number(match[0].rstrip(",")) if match else None


def normalise_ratio(text: str) -> str | None:
    """`14.40` -> `14.4`, `240%` stays, `((14)/(20))` -> `7/10`, `5((7)/(10))` -> `57/10`; None for anything else."""
    text = fold_width(text).strip().removesuffix(".")
    match = _RATIO.fullmatch(text)
    return _ratio_text(match) if match else None


def leading_ratio(text: str) -> str | None:
    """The number, percentage, fraction or mixed number that `text` begins with, in normal form, or None."""
    text = fold_width(text).lstrip()
    match = _RATIO.match(text)
    return _ratio_text(match) if match and _RATIO_END.match(text, match.end()) else None


def same_ratio(first: str, second: str) -> bool:
    """Equal as exact rationals: 25% is 0.25 is 1/4, and 0.33 is not 1/3. What is not a number equals nothing."""
    value = _ratio_value(first)
    return value is not None and value == _ratio_value(second)


def _ratio_value(text: str) -> Fraction | None:
    normal = normalise_ratio(text)
    if normal is None:
        return None
    return Fraction(normal[:-1]) / 100 if normal.endswith("%") else Fraction(normal)


def _ratio_text(match: re.Match[str]) -> str | None:
    sign = "-" if match["sign"] == "-" else ""
    if match["decimal"] is not None:
        number = normalise_number(sign + match["decimal"])
        return None if number is None else number + match["percent"]
    if match[0].count("(") != match[0].count(")") or int(match["bottom"]) == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    return sign + str(value) if value else "0"
