"""Columns, and words that fit the width of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kvdistill.core.quoting import printable

WIDTH = 100


def in_columns(rows: Sequence[Sequence[str]], left: int, words: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Columns side by side: the first `left` and those of `words` to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    said_last = any(row[last][:1].isalpha() for row in rows[1:])
    is_word = [i < left or i in words or (i == last and said_last) for i in range(len(widths))]
    lines = []
    for row in rows:
        cells = zip(row, widths, is_word, strict=True)
        lines.append(indent + "  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in cells).rstrip())
    return lines


def wrapped(*notes: str) -> list[str]:
    each = (textwrap.wrap(note, WIDTH - 2, initial_indent="  ", subsequent_indent="    ") for note in notes)
    return [line for lines in each for line in lines]


def shortened(name: str, length: int = 16) -> str:
    name = printable(name)
    return name if len(name) <= length else "…" + name[1 - length :]


def beginning_of(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def in_points(value: object) -> str:
    return f"{100 * value:5.1f}" if isinstance(value, int | float) else "    –"
