"""Answers as values: exact decimals and rationals, folded text, and what stands after a task's mark.

Numbers are compared exactly, decimals through a canonical string (no floats, no rounding). A longer answer gives the
number that it begins with, and only where it does not go on to another one: `51 dollars` is 51; `5 or 6`, `5 1/2`,
`72/5` and `5 feet 6` are not 5. Knows no task.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from kvdistill.data.answers.chinese import spell_in_digits

_LONGEST = 1000  # characters of a number or of an answer that is looked into; published ones have at most 200

# Full-width ASCII, the ideographic space, half-width Chinese punctuation, wide pound and yen signs, curly quotes,
# hyphens and the minus sign.
_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    "\u3000\uff61\uff64\uffe1\uffe5\u2018\u2019\u201c\u201d\u2010\u2011\u2212", " \u3002\u3001\xa3\xa5''\"\"---"
)
_SIGN = "[-+–]"  # with the en dash, which word processors make of a minus
_CURRENCY = r"(?:(?:US|Rs\.?)?\s?[$€£¥₹]|(?:USD|EUR|GBP|RMB|CNY|INR)\b)\s?"
_THIN = "\u00a0\u2007\u2009\u200a\u202f"  # spaces that group digits; a plain space does not
_WHOLE = rf"(?:[0-9]{{1,3}}(?:,[0-9]{{3}})++|[0-9]{{1,3}}(?:[{_THIN}][0-9]{{3}})++|[0-9]++)"
_POWER = r"(?:[eE](?P<e>[-+]?[0-9]{1,2})|\s?[×x*]\s?10\s?\^\s?\(?(?P<ten>[-+]?[0-9]{1,2})\)?)"
# one decimal number: sign and currency in either order, thousands separated, 1.5e3, 1.5 × 10^3
_DECIMAL = (
    rf"(?P<sign>{_SIGN}?)\s?(?:{_CURRENCY})?(?P<inner>{_SIGN}?)"
    rf"(?:(?P<whole>{_WHOLE})(?:\.(?P<part>[0-9]++))?|\.(?P<only>[0-9]++))(?:{_POWER}(?![0-9]))?"
)
_NUMBER = re.compile(rf"{_DECIMAL}\s?%?\.?")
# Percentage, fraction, mixed number: `240%`, `7/10`, `((7)/(10))`, `5((7)/(10))`, `5 7/10`.
_RATIO = re.compile(
    r"(?P<sign>[-+–]?)(?:(?P<whole>[0-9]++)(?:\s*(?=\()|\s+))?"
    r"(?P<open>\(?\(?)(?P<top>[0-9]++)\)?\s?/\s?\(?(?P<bottom>[0-9]++)\)?(?P<close>\)?)"
)
_PERCENTAGE = re.compile(rf"(?P<number>{_DECIMAL})\s?(?P<percent>%?)")


def fold_width(text: str) -> str:
    """NFC, with full-width letters, digits and punctuation as their narrow forms."""
    if text.isascii():  # most texts: nothing to do, and this is called for every problem
        return text
    return unicodedata.normalize("NFC", text).translate(_WIDTH)


def normalise_number(text: str) -> str | None:
    """`$1,080.50` -> `1080.5`, `-0.0` -> `0`, `72.` -> `72`, `1e3` -> `1000`; None where the text is not one number.

    Commas and thin spaces only as thousands separators; a currency or percent sign is dropped.
    """
    match = _NUMBER.fullmatch(fold_width(text).strip())
    return _decimal_text(match) if match else None


def _decimal_text(match: re.Match[str]) -> str | None:
    """The canonical form of what _DECIMAL matched; None for two signs."""
    if match["sign"] and match["inner"]:
        return None
    whole = "".join(c for c in match["whole"] or "" if c in "0123456789")
    part = match["part"] or match["only"] or ""
    power = int(match["e"] or match["ten"] or 0)
    digits, point = whole + part, len(whole) + power
    digits = digits.rjust(len(digits) - min(point, 0), "0").ljust(point, "0")
    point = max(point, 0)
    whole, part = digits[:point].lstrip("0") or "0", digits[point:].rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if (match["sign"] or match["inner"]) in ("-", "–") and value != "0" else value


def normalise_text(text: str) -> str:
    """Case, width, runs of whitespace and a closing full stop folded."""
    return " ".join(fold_width(text).casefold().split()).removesuffix(".")


def same_number(first: str, second: str) -> bool:
    """Equal as exact decimals; what is not a number equals nothing."""
    number = normalise_number(first)
    return number is not None and number == normalise_number(second)


def same_value(first: str, second: str) -> bool:
    """Equal as numbers where both are numbers, else as folded text; what wraps a whole answer does not count."""
    if first == second:
        return True
    numbers = normalise_number(first), normalise_number(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if normalise_text(first) == normalise_text(second):
        return True
    bare = unwrap(first), unwrap(second)
    return bare != (first, second) and same_value(*bare)


_SPECIAL = re.compile(r"<\|\w+\|>|</s>|<eos>|<end_of_turn>")


def text_after(mark: str, completion: str, *, to_line_end: bool = True) -> str | None:
    """What follows the first `mark`, stripped, to the end of its line (or of the text); None without the mark.

    A mark that is repeated on the line closes the answer, and so does a special token: `#### 72 ####`, `#### 72</s>`.
    """
    _, found, rest = completion.partition(mark)
    if not found:
        return None
    if not to_line_end:
        return rest.strip() or None
    line = rest.lstrip(mark[-1]).lstrip().split("\n", 1)[0].partition(mark)[0]
    return _SPECIAL.split(line, maxsplit=1)[0].strip() or None


_LEAD = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore|then|and)\b,?\s*)?(?:the\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:answer|result|solution)\s*(?:is|=|:)+\s*:?\s*(?=\S)"
    r"|\s*(?:所以|因此)?,?(?:最终|正确)?答(?:案)?\s*(?:应该|应)?(?:是|为|:|=)+\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"(\*\*|__|\*|_|`+)(?P<inside>(?:(?!\1).)+)\1",
        r"\$\$?(?P<inside>[^$]+)\$\$?",
        r"\\\((?P<inside>.+)\\\)",
        r"\\\[(?P<inside>.+)\\\]",
        r"\\f?boxed\s*\{(?P<inside>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}",
        r"\"(?P<inside>[^\"]+)\"",
        r"“(?P<inside>[^”]+)”",
    )
]


_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf))\s*\{(?P<inside>[^{}]+)\}")


def unwrap(text: str, *, from_text: bool = True) -> str:
    """`**Paris**.`, `\\boxed{Paris}`, `"Paris"`, `The answer is Paris` -> `Paris`: what is around the whole answer.

    from_text: also out of `\\text{}`.
    """
    while len(text) <= _LONGEST:
        bare = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
        bare = bare.strip()
        for wrapper in (*_WRAPPERS, _TEXT) if from_text else _WRAPPERS:
            match = wrapper.fullmatch(bare.removesuffix("."))
            if match:
                bare = match["inside"]
        if bare == text or not bare:
            return text
        text = bare
    return text


def normalise_ratio(text: str) -> str | None:
    """`14.40` -> `14.4`, `240%` stays, `((14)/(20))` -> `7/10`, `5((7)/(10))` -> `57/10`; None for anything else."""
    text = fold_width(text).strip().removesuffix(".")
    if len(text) > _LONGEST:
        return None
    ratio = _RATIO.fullmatch(text)
    if ratio:
        return _ratio_text(ratio)
    match = _PERCENTAGE.fullmatch(text)
    number = normalise_number(match["number"]) if match else None
    return None if match is None or number is None else number + match["percent"]


def _ratio_text(match: re.Match[str]) -> str | None:
    """The reduced form of what _RATIO matched; None for a zero below or an open bracket."""
    if match[0].count("(") != match[0].count(")") or int(match["bottom"]) == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    return ("-" if match["sign"] in ("-", "–") else "") + str(value) if value else "0"


def same_ratio(first: str, second: str) -> bool:
    """Equal as exact rationals: 25% is 0.25 is 1/4, and 0.33 is not 1/3. What is not a number equals nothing."""
    value = ratio_value(first)
    return value is not None and value == ratio_value(second)


def ratio_value(text: str) -> Fraction | None:
    """The exact value of a decimal, percentage, fraction or mixed number; None for anything else."""
    normal = normalise_ratio(text)
    if normal is None:
        return None
    return Fraction(normal[:-1]) / 100 if normal.endswith("%") else Fraction(normal)


# Typesetting around and inside numbers; braces go last, when what they group has been read.
_TYPESETTING = (
    (re.compile(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\(?:f?boxed|fbox|text(?:bf|it|rm)?|math(?:rm|bf)|left|right)(?![A-Za-z])"), ""),
    (re.compile(r"\\[!,;: ()\[\]]|\\(?=[$%#&])|\*\*|__|`"), ""),
    (re.compile(r"\$([^$]*)\$"), r"\1"),
    (re.compile(r"(?<=[0-9])\s?[$€£¥]"), ""),
    (re.compile(r"[{}]"), ""),
)
_BRACKETED = re.compile(r"[(\[]\s*([^()\[\]/]+?)\s*[)\]]\.?")
_ROUND = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_AMOUNT = re.compile(
    rf"(?P<number>{_DECIMAL})(?P<round>(?:\s?(?:{'|'.join(_ROUND)})\b)*)(?P<percent>\s?(?:%|per\s?cent\b))?"
)
_GLUED = (
    r"(?:[kcm]?m|k?g|[hsL]|mph|lbs?|oz|ft|in|hrs?|mins?|secs?|m[lL]|USD|usd|cents?|dollars?|feet|inches|degrees?|[ap]m)"
    r"(?![A-Za-z])"
)
_COUNT = (
    rf"(?:{_CURRENCY})?"
    r"(?:\.?[0-9]|(?:(?:a\s+)?(?:half|third|quarter)|one|two|three|four|five|six|seven|eight|nine|ten)\b)"
)
# What must not follow a number, or the text says another one.
_GOES_ON = re.compile(
    rf"""[.,']?[0-9] | (?!{_GLUED})[A-Za-z_] | \s*[(\[]\(?[0-9]+\)?/ | [½⅓⅔¼¾十百千万亿半](?![克米瓦卡])
      | \s*[-+–:]\s?[(.$]?[0-9] | \s*[/*^×÷·=<>] | \s*[xX]\s*[0-9] | \s[0-9]
      | \s*(?:squared|cubed|factorial|mod)\b
      | \s+(?:[A-Za-z%]+\s+){{0,3}}?(?:and|to|plus|minus|times|over)\s+{_COUNT}  # 5 hours and 30 minutes
      | \s+(?:[A-Za-z%]+\s+){{0,3}}?or\b                                        # 5 or 6, 5 or more
      | \s*(?!(?:in|for|of|on|at|from|after|per|with|by)\b)[A-Za-z]+\s+[0-9]     # 5 feet 6
      | \s*[,;、]\s?(?:and\s|or\s)?(?:{_CURRENCY})?[0-9][0-9.,]*\s*(?:$|[,;.、]|and\b|or\b|和|或)  # 5, 6
      | \s*(?:或|和|到|至|~)\s*[0-9]
      | [\u4e00-\u9fff]{{1,2}}\s?[0-9] | [\u4e00-\u9fff]?[元角时米吨克][一二三四五六七八九十两]             # 5元5角""",
    re.VERBOSE,
)
_CLAUSE = re.compile(r",(?![0-9])|[;(。、]|\.(?![0-9])")


def leading_number(text: str) -> str | None:
    """The number that `text` begins with, in canonical form; None where it says none, another one or several.

    Words may follow, and a unit, currency or percent sign; an equation says what stands alone on one side.
    """
    return _leading(text, _decimal_amount)


def leading_ratio(text: str) -> str | None:
    """The number, percentage, fraction or mixed number that `text` begins with, in normal form, or None."""
    return _leading(text, _ratio_amount)


def _leading(text: str, read: Callable[[str], str | None]) -> str | None:
    text = fold_width(text)[:_LONGEST]
    for pattern, kept in _TYPESETTING:
        text = pattern.sub(kept, text)
    text = _LEAD.sub("", text.strip("*_ \t\"'"), count=1).lstrip("=*_ \t")
    bracketed = _BRACKETED.fullmatch(text)
    text = bracketed[1] if bracketed else text
    value = read(text)
    if value is not None or "=" not in text:
        return value
    sides = _CLAUSE.split(text, maxsplit=1)[0].split("=")
    first, last = read(sides[0].strip()), read(sides[-1].strip())
    return last or first if None in (first, last) or first == last else None


def _decimal_amount(text: str) -> str | None:
    text = spell_in_digits(text)
    match = _AMOUNT.match(text)
    if match is None or _GOES_ON.match(text, match.end()):
        return None
    number = _decimal_text(match)
    power = sum(_ROUND[word] for word in match["round"].split())
    return normalise_number(f"{number}e{power}") if number and power else number


def _ratio_amount(text: str) -> str | None:
    text = spell_in_digits(text)
    match = _RATIO.match(text)
    if match and not _GOES_ON.match(text, match.end()):
        return _ratio_text(match)
    number = _decimal_amount(text)
    percent = _AMOUNT.match(text)
    return number if number is None or percent is None or not percent["percent"] else f"{number}%"
