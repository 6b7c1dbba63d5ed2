"""Mathematical answers in LaTeX: the boxed one, a folded form, and whether two are equal.

Cheap tests come first (folded text, exact decimals); what is left goes to math-verify, which compares through sympy.
Its time limit is a signal and works in the main thread only, so expressions that could run away (towers of powers,
big factorials) are never given to it, whatever the thread. Knows no task.
"""

from __future__ import annotations

import re
import threading

from kvdistill.data.values import fold_width, normalise_number

_LONGEST = 300  # characters; published answers have at most 159
_TIMEOUT_S = 5
_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)|\\boxed\s+(?P<bare>[^\s{$]+)")
_RUNAWAY = re.compile(r"\^\s*\{?[^{}]*\^|\^\s*\{?\s*-?[0-9]{5}|[0-9]{4}\s*!|!\s*!|[0-9]{40}")
_SPACING = re.compile(r"\\[,;: ]|\\q?quad\b|~|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle\b|\\limits\b")
_SIGNS = re.compile(r"\\[$%]|\^\s*\{?\s*\\circ\s*\}?|(?<!\\)[$%]|\\degree\b")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_BASE = re.compile(r"\(?[0-9A-Fa-f ]+\)?\s*_\s*\{[0-9]+\}")
_SUBSCRIPT = re.compile(r"_\s*([0-9])(?![0-9])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9a-z]|\\pi))\s*(?:\{([^{}]*)\}|([0-9a-z]|\\pi))")


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` with its braces matched, on one line; None without one."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    last = boxes[-1]
    inside = last["bare"] if last["bare"] is not None else _braced(text, last.end())
    return " ".join(inside.split()) or None if inside is not None else None


def _braced(text: str, at: int) -> str | None:
    depth, escaped = 0, False
    for i in range(at, len(text)):
        if escaped:
            escaped = False
        elif text[i] == "\\":
            escaped = True
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[at + 1 : i]
    return None


def fold_latex(text: str) -> str:
    """What is only typesetting taken out: spacing, \\left and \\right, dollar, percent and degree signs, \\text{}."""
    text = _SIGNS.sub("", _SPACING.sub(" ", fold_width(text).replace("\\!", "").strip().removesuffix(".")))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", _WRAPPED.sub(r"\1", text))
    return " ".join(_SUBSCRIPT.sub(r"_{\1}", text).split())


def same_latex(answer: str, gold: str) -> bool:
    """Equal as folded text, as exact decimals, or as math-verify sees it (1/2 is \\frac12 is 0.5)."""
    found, wanted = fold_latex(answer), fold_latex(gold)
    if not found or not wanted:
        return False
    if found.replace(" ", "") == wanted.replace(" ", ""):
        return True
    numbers = normalise_number(found.replace(" ", "")), normalise_number(wanted.replace(" ", ""))
    if None not in numbers:
        return numbers[0] == numbers[1]
    if any(_BASE.fullmatch(text) for text in (found, wanted)):
        return False  # math-verify reads 52_8 as 52
    if any(len(text) > _LONGEST or _RUNAWAY.search(text) for text in (found, wanted)):
        return False
    return _same_expression(numbers[0] or found, numbers[1] or wanted)  # 10,000 is no pair of numbers


def _same_expression(found: str, wanted: str) -> bool:
    from math_verify import parse, verify  # imports sympy: seconds

    timeout = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    parsed = [parse(f"${text}$", parsing_timeout=timeout) for text in (wanted, found)]  # type: ignore[arg-type]
    return bool(all(parsed) and verify(*parsed, timeout_seconds=timeout))
