"""Mathematical answers in LaTeX: the boxed one, a folded form, and whether two are equal.

Settled here: typesetting, words, exact numbers, percent signs, units, lists. What is left of both answers, single
expressions, goes to math-verify (`checker.py`), in a process with a time limit. Knows no task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from kvdistill.data.answers.checker import CHECKER, Verdict
from kvdistill.data.answers.latex_parts import (
    Listing,
    exact_value,
    interval_of,
    is_relation,
    read_assignment,
    read_listing,
    repeating_as_fraction,
)
from kvdistill.data.answers.latex_units import read_quantity, same_unit
from kvdistill.data.answers.numbers import fold_width, unwrap

_LONGEST = 500  # characters; published answers have at most 159
_MOST_ITEMS = 40
_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)|\\boxed\s+(?P<bare>[^\s{$]+)")
_SPACING = re.compile(
    r"(?P<row>\\\\)|\\[,;: ]|\\q?quad\b|~|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle\b|\\limits\b|\\[()\[\]]"
)
_SIGNS = re.compile(r"\\[$%]|\^\s*\{?\s*\\circ\s*\}?|(?<!\\)[$%]|\\degree\b|°")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_JOINED = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(and|or)\s*\}")
_GROUPED = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|,\s*\\!)\s*(?=[0-9]{3}(?![0-9]))")
_BASE = re.compile(r"\(?[0-9A-Fa-f ]+\)?\s*_\s*\{[0-9]+\}")
_SUBSCRIPT = re.compile(r"_\s*([0-9])(?![0-9])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9a-z]|\\pi))\s*(?:\{([^{}]*)\}|([0-9a-z]|\\pi))")
_UNICODE = {
    "π": "\\pi ", "θ": "\\theta ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "±": "\\pm ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∈": "\\in ", "∅": "\\emptyset ", "²": "^2", "³": "^3",
}  # fmt: skip
_RADICAL = re.compile(r"√\s*(?:([0-9]+|[a-z])|\(([^()]*)\))")
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\l[bB]race(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\r[bB]race(?![A-Za-z])"), r"\\}"),
    (re.compile(r"^(?:\\mathbb\s*\{?R\}?|(?:\\text\{)?all real numbers\}?)$"), r"(-\\infty,\\infty)"),
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
_TWO_NUMBERS = re.compile(r"(?<![/0-9.])[0-9.]+\s+[0-9.]+(?!\s*/|[0-9])")
_MIXED = re.compile(r"(?<![0-9.])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.])")
_FUNCTION = re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|pi|infty)(?![A-Za-z])")
_ROOT = re.compile(r"\\?sqrt\s*\(([^()]*)\)")
_FACTOR = re.compile(r"((?<![_^0-9])[0-9]+|\))\s*\(")
_IMAGINARY = re.compile(r"(?<=[0-9)}])\s*i(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")


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
    return " ".join(_WRAPPED.sub(r"\1", _SIGNS.sub("", _fold_typesetting(text))).split())


def _fold_typesetting(text: str) -> str:
    """Without what is only for the eye; \\text{}, percent and currency signs stay, for they say something."""
    text = unwrap(fold_width(text).strip(), from_text=False)
    for sign, command in _UNICODE.items():
        text = text.replace(sign, command)
    text = _GROUPED.sub("", _JOINED.sub(r" \1 ", text)).replace("\\!", "")
    text = _SPACING.sub(lambda match: match["row"] or " ", text).strip().removesuffix(".")
    text = _RADICAL.sub(r"\\sqrt{\1\2}", text)
    for shown, command in _SYNONYMS:
        text = shown.sub(command, text)
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    return " ".join(_SUBSCRIPT.sub(r"_{\1}", text).split())


def same_latex(answer: str, gold: str) -> bool:
    """Whether two answers are equal; a comparison that takes too long is not."""
    return compare_latex(answer, gold) == "equal"


def compare_latex(answer: str, gold: str) -> Verdict:
    """Equal, different, or undecided (`timeout`: no verdict in time; `failed`: out of memory)."""
    return compare_latex_pairs([(answer, gold)])[0]


def compare_latex_pairs(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Verdicts on many (answer, gold) at once: what is the same for several is asked of math-verify once."""
    ask = cache(CHECKER.compare)
    return [_compare_whole(*pair, ask) for pair in pairs]


_Ask = Callable[[str, str], Verdict]


def _compare_whole(answer: str, gold: str, ask: _Ask) -> Verdict:
    if max(len(answer), len(gold)) > _LONGEST * 10:  # no folding of a megabyte
        return "equal" if answer == gold else "different"
    found, wanted = _fold_typesetting(answer), _fold_typesetting(gold)
    return _compare(found, wanted, ask) if found and wanted else "different"


def _compare(found: str, wanted: str, ask: _Ask) -> Verdict:
    """Two folded texts, of whole answers or of members of a list."""
    if not _bare(found) or not _bare(wanted):
        return "different"
    if _bare(found) == _bare(wanted):
        return "equal"
    if max(len(found), len(wanted)) > _LONGEST:
        return "different"
    assigned = read_assignment(found), read_assignment(wanted)
    if assigned[0] and assigned[1]:
        if assigned[0][0] == assigned[1][0]:
            return _compare(assigned[0][1], assigned[1][1], ask)
    elif assigned[0] and (not is_relation(wanted) or interval_of(wanted)):
        return _compare(assigned[0][1], wanted, ask)
    elif assigned[1] and (not is_relation(found) or interval_of(found)):
        return _compare(found, assigned[1][1], ask)
    lists = _read_lists(found, wanted)
    if any(lists):
        return _compare_lists(lists, (found, wanted), ask)
    if is_relation(found) != is_relation(wanted):
        return "different"
    return _compare_quantities(found, wanted, ask)


def _read_lists(found: str, wanted: str) -> tuple[Listing | None, Listing | None]:
    lists = _read_list(found), _read_list(wanted)
    # an inequality is compared with an interval as one
    if lists[0] and lists[0].is_interval and (interval := interval_of(wanted)):
        return lists[0], _read_list(interval)
    if lists[1] and lists[1].is_interval and (interval := interval_of(found)):
        return _read_list(interval), lists[1]
    return lists


def _read_list(text: str) -> Listing | None:
    return read_listing(text if text.startswith(("(", "[", "\\{")) else _THOUSANDS.sub(_without_commas, text))


def _without_commas(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def _compare_lists(lists: tuple[Listing | None, Listing | None], texts: tuple[str, str], ask: _Ask) -> Verdict:
    one, two = lists
    if one is None or two is None:
        # a set of one is what is in it
        items = [each.items if each else (text,) for each, text in zip(lists, texts, strict=True)]
        return _compare(items[0][0], items[1][0], ask) if len(items[0]) == len(items[1]) == 1 else "different"
    kinds = {one.brackets, two.brackets}
    if len(kinds) > 1 and kinds not in ({"", "{}"}, {"", "()"}):
        return "different"
    if len(one.items) != len(two.items) or len(one.items) > _MOST_ITEMS:
        return "different"
    if one.is_ordered or two.is_ordered:
        return _all_equal(_compare(a, b, ask) for a, b in zip(one.items, two.items, strict=True))
    return _compare_unordered(one.items, list(two.items), ask)


def _compare_unordered(items: Sequence[str], left: list[str], ask: _Ask) -> Verdict:
    for item in items:
        # the same text first; one comparison without a verdict is enough, for each takes its whole time
        text = _bare(item)
        left = [each for each in left if _bare(each) == text] + [each for each in left if _bare(each) != text]
        for n, other in enumerate(left):
            verdict = _compare(item, other, ask)
            if verdict == "equal":
                del left[n]
                break
            if verdict != "different":
                return verdict
        else:
            return "different"
    return "equal"


def _all_equal(verdicts: Iterable[Verdict]) -> Verdict:
    """Different if any is; else undecided if any is."""
    found = set(verdicts)
    order: tuple[Verdict, ...] = ("different", "timeout", "failed")
    return next((verdict for verdict in order if verdict in found), "equal")


def _compare_quantities(found: str, wanted: str, ask: _Ask) -> Verdict:
    one, two = read_quantity(found), read_quantity(wanted)
    if one.is_words or two.is_words:
        return "equal" if _words(found) == _words(wanted) else "different"
    if not same_unit(one.unit, two.unit):
        return "different"
    verdict = _compare_expressions(one.body, two.body, ask)
    if verdict == "equal" or one.is_percent == two.is_percent:
        return verdict
    # 10\% is 0.1, and it is 10 where the question asks for per cent
    per_cent, other = (one, two) if one.is_percent else (two, one)
    value = exact_value(per_cent.body)
    part = f"{(value / 100).numerator}/{(value / 100).denominator}" if value is not None else f"({per_cent.body})/100"
    second = _compare_expressions(part, other.body, ask)
    return second if second != "different" else verdict


def _compare_expressions(found: str, wanted: str, ask: _Ask) -> Verdict:
    if _bare(found) == _bare(wanted):
        return "equal"
    values = exact_value(found), exact_value(wanted)
    if None not in values:
        return "equal" if values[0] == values[1] else "different"
    one, two = fold_latex(found), fold_latex(wanted)
    if any(_BASE.fullmatch(text) or _TWO_NUMBERS.search(text) for text in (one, two)):
        return "different"  # math-verify reads 52_8 as 52 and 2 3 as 5
    if (":" in one and ":" in two) or _differ_in_case(one, two):
        return "different"  # it reads 6:30 as a fraction, and X as x
    return ask(*sorted(map(_for_math_verify, (one, two))))  # sorted, so that the order never matters


def _for_math_verify(text: str) -> str:
    """What it would misread, said plainly: 2(3) is a product, 1 4/5 a mixed number, 10,000 one number."""
    text = _THOUSANDS.sub(_without_commas, repeating_as_fraction(text))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _FUNCTION.sub(r"\\\1 ", _ROOT.sub(r"\\sqrt{\1}", text))
    return _IMAGINARY.sub(r"\\cdot i", _FACTOR.sub(r"\1\\cdot(", text))


def _differ_in_case(one: str, two: str) -> bool:
    """Whether a letter of one is in the other as its capital or small form only: R and r are two variables."""
    first, second = (set(_COMMAND.sub(" ", text)) for text in (one, two))
    return any(c.isalpha() and c.swapcase() in second and c not in second for c in first)


def _words(text: str) -> str:
    """`\\text{(B)}` -> `b`, `9 a.m.` -> `9am`: case, spaces, full stops and brackets around it all do not count."""
    return re.sub(r"[\s.](?![0-9])", "", fold_latex(text).casefold()).replace(" ", "").strip("()")


def _bare(text: str) -> str:
    """Folded, without the spaces that say nothing (2 3 is not 23)."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", fold_latex(text))
