"""Chinese numerals as digits: `一百二十个` -> `120个`, `三分之二` -> `2/3`, `百分之五` -> `5%`, `9万` -> `90000`.

Only a numeral written as it should be is read (`一百零五`, not the colloquial `一百五`), and only at the beginning of a
text. Knows no task.
"""

from __future__ import annotations

import re

_DIGITS = {
    c: value for value, cs in enumerate(("零〇", "一", "二两", "三", "四", "五", "六", "七", "八", "九")) for c in cs
}
_PLACES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_WORD = r"(?:[零〇一二两三四五六七八九十百万亿]|千(?![克米瓦卡]))+"
_ANY = rf"(?:[0-9]+(?:\.[0-9]+)?|{_WORD}(?:点[零〇一二三四五六七八九]+)?)"
_FRACTION = re.compile(rf"(?:(?P<whole>{_ANY})又)?(?P<bottom>{_ANY})分之(?P<top>{_ANY})")
_MIXED = re.compile(r"(?P<whole>[0-9]+)又(?=\(?[0-9])")
_ROUND = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<places>百?万|千?万|百?亿|千?亿|百|千(?![克米瓦卡]))")
_PLAIN = re.compile(rf"{_WORD}(?:点[零〇一二三四五六七八九]+)?")


def spell_in_digits(text: str) -> str:
    """`text` with the Chinese number that it begins with in digits; as it is where it begins with none."""
    sign, rest = ("-", text[1:]) if text.startswith("负") else ("", text)
    for pattern, write in _FORMS:
        match = pattern.match(rest)
        if match:
            written = write(match)
            return text if written is None else sign + written + rest[match.end() :]
    return sign + rest


def read_numeral(text: str) -> int | None:
    """`一万零五` -> 10005; None where that is not how a number is written."""
    total = section = digit = 0
    for char in text:
        if char in _DIGITS:
            digit = _DIGITS[char]
        elif _PLACES[char] < 10**4:
            section, digit = section + (digit or 1) * _PLACES[char], 0
        elif char == "万":
            total, section, digit = total + (section + digit) * 10**4, 0, 0
        else:
            total, section, digit = (total + section + digit) * 10**8, 0, 0
    total += section + digit
    given = re.sub("(?<![一二三四五六七八九])十", "一十", text.replace("两", "二").replace("〇", "零"))
    return total if given == _write_numeral(total) else None


def _write_numeral(number: int) -> str:
    """As it is read aloud, with 一十 for ten."""
    for place in (10**8, 10**4):
        if number >= place:
            high, low = divmod(number, place)
            gap = "零" if low and low < place // 10 else ""
            return (
                _write_numeral(high) + ("亿" if place == 10**8 else "万") + (gap + _write_numeral(low) if low else "")
            )
    written, gap = "", ""
    for place, sign in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, place)
        if digit:
            written, gap = written + gap + "零一二三四五六七八九"[digit] + sign, ""
        elif written:
            gap = "零"
    return written or "零"


def _digits(text: str) -> str | None:
    if text[0].isascii():
        return text
    whole, point, part = text.partition("点")
    number = read_numeral(whole)
    if number is None:
        return None
    return f"{number}.{''.join(str(_DIGITS[c]) for c in part)}" if point else str(number)


def _write_fraction(match: re.Match[str]) -> str | None:
    if match["bottom"] == "百" and not match["whole"]:
        top = _digits(match["top"])
        return None if top is None else f"{top}%"
    parts = [_digits(match[name]) for name in ("whole", "top", "bottom") if match[name]]
    if None in parts:
        return None
    *whole, top, bottom = parts
    return " ".join([*map(str, whole), f"{top}/{bottom}"])


def _write_round(match: re.Match[str]) -> str:
    num_zeros = sum(len(str(_PLACES[place])) - 1 for place in match["places"])
    whole, _, part = match["number"].partition(".")
    part = part.ljust(num_zeros, "0")
    return (whole + part[:num_zeros] + ("." + part[num_zeros:] if part[num_zeros:] else "")).lstrip("0") or "0"


# the longer forms first: 三分之二 begins with a numeral as well
_FORMS = (
    (_FRACTION, _write_fraction),
    (_MIXED, lambda match: f"{match['whole']} "),
    (_ROUND, _write_round),
    (_PLAIN, lambda match: _digits(match[0])),
)
