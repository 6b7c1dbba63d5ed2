"""Strangers' text in our messages: short, on one line, without anything a terminal would obey.

Error messages name what they found in a data set; a text of ten megabytes or an escape sequence must not reach the
screen that way. Knows no file and no row.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LENGTH = 80
_NAMES_SHOWN = 12
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LENGTH
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 4, 4, 4


def printable(text: object) -> str:
    """Control characters (and with them terminal escapes) made visible."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def json_line(value: object) -> str:
    """The value as one line of JSON, letters as they are, and whatever a terminal would obey escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def quoted(value: object) -> str:
    """The value as Python would write it, at most 80 characters, control characters escaped: `'a\\x1b[31m'`."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 1]}…"


def shown(text: object, length: int = _LENGTH) -> str:
    """The text's first line, at most `length` characters, control characters escaped; without quotes."""
    lines = str(text)[: 4 * length].strip().splitlines()
    line = printable(lines[0]) if lines else ""
    return line if len(line) <= length else f"{line[: length - 1]}…"


def at_line(path: Path, number: int | None = None) -> str:
    """`file:line`, or the file alone, with control characters of its name escaped."""
    name = str(path)
    name = name if name.isprintable() else printable(name)
    return name if number is None else f"{name}:{number}"


def first_difference(there: Any, now: Any, where: str = "", *, length: int = 60) -> str | None:
    """Where two JSON values differ first, and how: `train.steps (100 there, 200 now)`; None where they are equal.

    Of a mapping that stands under a key `members` only the keys that both have are compared.
    length: of each value that is shown.
    """
    if there == now:
        return None
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        keys = {*there} & {*now} if where.endswith(".members") else {*there, *now}
        named = ((key, f"{where}.{key}" if where else str(key)) for key in sorted(keys))
        found = (first_difference(there.get(key), now.get(key), name, length=length) for key, name in named)
        return next((one for one in found if one), None)
    if isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        inner = ((i, f"{where}.{i}" if where else str(i)) for i in range(len(now)))
        found = (first_difference(there[i], now[i], name, length=length) for i, name in inner)
        return next((one for one in found if one), None)
    old, new = (json.dumps(value, ensure_ascii=False)[:length] for value in (there, now))
    return f"{where} ({old} there, {new} now)"


def missing(column: str, present: Iterable[object]) -> str:
    """`is missing; did you mean 'x'?`, or what is there instead."""
    names = [str(name) for name in present]
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(column.casefold(), folded, n=1)
    if near:
        return f"is missing; did you mean {quoted(folded[near[0]])}?"
    if not names:
        return "is missing"
    more = f", … ({len(names)} in all)" if len(names) > _NAMES_SHOWN else ""
    return f"is missing; there are {', '.join(map(quoted, names[:_NAMES_SHOWN]))}{more}"
