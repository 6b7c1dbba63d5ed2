"""How numbers and strangers' text are written on the page and in figures. Knows nothing of what they mean."""

from __future__ import annotations

import math
import unicodedata

DASH = "–"
_INVISIBLE = {0x00AD, 0x034F, 0x061C, 0x115F, 0x1160, 0x180E, 0x2028, 0x2029, 0x3164, 0xFEFF, 0xFFA0}


def make_visible(text: str, *, keep: str = "\n\t") -> str:
    """Control, format and private characters as visible marks: ESC becomes ⟨U+001B⟩.

    Not as control pictures such as ␛, which many fonts lack. Nothing a model writes can then reorder, hide or colour
    the text around it. Characters in `keep` stay.
    """
    return "".join(c if c in keep else _mark(c) for c in text)


def _mark(char: str) -> str:
    code = ord(char)
    hidden = code in _INVISIBLE or unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn")
    return f"⟨U+{code:04X}⟩" if hidden else char


def is_known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if is_known(value) else DASH  # type: ignore[operator]


def number(value: float | None, digits: int = 3) -> str:
    return _minus(f"{value:.{digits}f}") if is_known(value) else DASH


def signed(value: float | None, digits: int = 1) -> str:
    return _minus(f"{value:+.{digits}f}") if is_known(value) else DASH


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{round(value):,}".replace(",", "\u202f") if is_known(value) else DASH  # type: ignore[arg-type]


def p_value(value: float | None) -> str:
    """`= 0.0123`, `< 0.0001`, or a dash."""
    if not is_known(value):
        return DASH
    return "< 0.0001" if value < 1e-4 else f"= {value:.{4 if value < 0.01 else 3}f}"  # type: ignore[operator]


def with_prefix(value: float | None, unit: str) -> str:
    """1.53e12 FLOP -> `1.53 TFLOP`."""
    if not is_known(value):
        return DASH
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:  # type: ignore[arg-type]
            return f"{value / 10**power:.3g} {prefix}{unit}"  # type: ignore[operator]
    return f"{value:.3g} {unit}"


def size(num_bytes: float | None) -> str:
    if not is_known(num_bytes):
        return DASH
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:  # type: ignore[operator]
            return f"{num_bytes / 2**power:.3g} {unit}"  # type: ignore[operator]
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float | None) -> str:
    if not is_known(seconds):
        return DASH
    if seconds < 120:  # type: ignore[operator]
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)  # type: ignore[operator]
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _minus(text: str) -> str:
    return text.replace("-", "−")
