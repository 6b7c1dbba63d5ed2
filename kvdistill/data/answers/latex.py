"""Mathematical answers in LaTeX: the boxed one, a folded form, and whether two are equal.

Settled here: typesetting, words, exact numbers, percent signs, units, lists. What is left of both answers, single
expressions, goes to math-verify (`checker.py`), in a process with a time limit. Knows no task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from kvdistill.data.answers.checker import CHECKER, Verdict
from kvdistill.data.answers.latex_parts import (
    Listing,
    exact_value,
    is_relation,
    read_assignment,
    read_listing,
    read_quantity,
    repeating_as_fraction,
    same_unit,
)
from kvdistill.data.answers.numbers import fold_width, unwrap

_LONGEST = 500  # characters; published answers have at most 159
_MOST_ITEMS = 40
_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)|\\boxed\s+(?P<bare>[^\s{$]+)")
_UNICODE = str.maketrans(
    {
        "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "±": "\\pm ", "≠": "\\ne ", "∪": "\\cup ",
        "∈": "\\in ", "∅": "\\emptyset ", "²": "^2", "³": "^3",
    }
)  # fmt: skip
# What is only for the eye, and several ways of writing one thing; in this order.
_TYPESETTING = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(and|or)\s*\}", r" \1 "),
        (r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|,\s*\\!)\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\!", ""),
        (r"(?<!\\)(?:\\[,;: ()\[\]]|\\q?quad\b|\\(?:left|right)(?![a-z])|\\(?:displaystyle|limits)\b)|~", " "),
        (r"\.?\s*\Z", ""),
        (r"√\s*(?:([0-9]+|[a-z])|\(([^()]*)\))", r"\\sqrt{\1\2}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"<=|\\leqq(?![A-Za-z])", r"\\le "),
        (r">=|\\geqq(?![A-Za-z])", r"\\ge "),
        (r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\l[bB]race(?![A-Za-z])", r"\\{"),
        (r"\\r[bB]race(?![A-Za-z])", r"\\}"),
        (r"^\s*(?:\\mathbb\s*\{?R\}?|(?:\\text\{)?all real numbers\}?)$", r"(-\\infty,\\infty)"),
        (
            r"\\frac\s*(?:\{([^{}]*)\}|([0-9a-z]|\\pi))\s*(?:\{([^{}]*)\}|([0-9a-z]|\\pi))",
            r"\\frac{\1\2}{\3\4}",
        ),
        (r"_\s*([0-9])(?![0-9])", r"_{\1}"),
    )
)
_SIGNS = re.compile(r"\\[$%]|\^\s*\{?\s*\\circ\s*\}?|(?<!\\)[$%]|\\degree\b|°")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
# What math-verify misreads: 52_8 as 52 and 2 3 as 5. And what it reads when it is said plainly: 2(3) is a product.
_MISREAD = re.compile(r"\(?[0-9A-Fa-f ]+\)?\s*_\s*\{[0-9]+\}|.*(?<![/0-9.])[0-9.]+\s+[0-9.].*")
_FUNCTION = re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|pi|infty)(?![A-Za-z])")
_FACTOR = re.compile(r"((?<![_^0-9])[0-9]+|\))\s*\(")
_IMAGINARY = re.compile(r"(?<=[0-9)}])\s*i(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` with its braces matched, on one line; None without one."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    inside, at = boxes[-1]["bare"], boxes[-1].end()
    if inside is None:
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text[at:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                inside = text[at + 1 : at + brace.start()]
                break
    return " ".join((inside or "").split()) or None


def fold_latex(text: str) -> str:
    """What is only typesetting taken out: spacing, \\left and \\right, dollar, percent and degree signs, \\text{}."""
    return " ".join(_WRAPPED.sub(r"\1", _SIGNS.sub("", _fold_typesetting(text))).split())


def _fold_typesetting(text: str) -> str:
    """Without what is only for the eye; \\text{}, percent and currency signs stay, for they say something."""
    text = unwrap(fold_width(text).strip(), from_text=False).translate(_UNICODE)
    for pattern, plain in _TYPESETTING:
        text = pattern.sub(plain, text)
    return " ".join(text.split())


def same_latex(answer: str, gold: str) -> bool:
    """Whether two answers are equal; a comparison that takes too long is not."""
    return compare_latex(answer, gold) == "equal"


def compare_latex(answer: str, gold: str) -> Verdict:
    """Equal, different, or undecided (`timeout`: no verdict in time; `failed`: out of memory)."""
    return compare_latex_pairs([(answer, gold)])[0]


def compare_latex_pairs(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Verdicts on many (answer, gold); what is the same for several of them is asked of math-verify once."""
    ask = cache(CHECKER.compare)
    verdicts: list[Verdict] = []
    for answer, gold in pairs:
        if max(len(answer), len(gold)) > _LONGEST * 10:  # no folding of a megabyte
            verdicts.append("equal" if answer == gold else "different")
        else:
            verdicts.append(_compare(_fold_typesetting(answer), _fold_typesetting(gold), ask))
    return verdicts


_Ask = Callable[[str, str], Verdict]


def _compare(found: str, wanted: str, ask: _Ask) -> Verdict:
    """Two folded texts, of whole answers or of members of a list."""
    if not _bare(found) or not _bare(wanted):
        return "different"
    if _bare(found) == _bare(wanted):
        return "equal"
    if max(len(found), len(wanted)) > _LONGEST:
        return "different"
    (name, value), (other, other_value) = read_assignment(found), read_assignment(wanted)
    bare = wanted if name else found
    # x = 2 is 2, but it is not 2x = 2
    if name == other if name and other else (name or other) and "=" not in bare and "\\ne" not in bare:
        return _compare(value, other_value, ask)
    one, two = _read_list(found), _read_list(wanted)
    if is_relation(found) != is_relation(wanted):
        said, listing = (one, two) if is_relation(found) else (two, one)
        if listing.brackets == "∪" and not said.brackets:  # several inequalities, each of which may be an interval
            return _compare_lists(Listing("∪", said.items), listing, ask)
        if said.is_one and listing.is_interval:
            return ask(*sorted((fold_latex(found), fold_latex(wanted))))
        if said.is_one:
            return "different"
    return _compare_quantities(found, wanted, ask) if one.is_one and two.is_one else _compare_lists(one, two, ask)


def _read_list(text: str) -> Listing:
    return read_listing(text if text.startswith(("(", "[", "\\{")) else _THOUSANDS.sub(_without_commas, text))


def _without_commas(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def _compare_lists(one: Listing, two: Listing, ask: _Ask) -> Verdict:
    """Two lists, of which one may be a single answer: a set of one is what is in it."""
    kinds = {one.brackets, two.brackets}
    if len(kinds) > 1 and kinds not in ({"", "{}"}, {"", "()"}):
        return "different"
    if len(one.items) != len(two.items) or len(one.items) > _MOST_ITEMS:
        return "different"
    if one.is_ordered or two.is_ordered:
        found = {_compare(a, b, ask) for a, b in zip(one.items, two.items, strict=True)}
        order: tuple[Verdict, ...] = ("different", "timeout", "failed")
        return next((verdict for verdict in order if verdict in found), "equal")
    left = list(two.items)
    for item in one.items:
        # the same text first; one comparison without a verdict is enough, for each takes its whole time
        text = _bare(item)
        left.sort(key=lambda each: _bare(each) != text)
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
    if _MISREAD.fullmatch(one) or _MISREAD.fullmatch(two) or (":" in one and ":" in two):  # 6:30 is no fraction
        return "different"
    # math-verify reads X as x, but R and r are two variables
    letters, others = (set(_COMMAND.sub(" ", text)) for text in (one, two))
    if any(c.isalpha() and c.swapcase() in others and c not in others for c in letters):
        return "different"
    said = []
    for text in (one, two):
        text = _FUNCTION.sub(r"\\\1 ", _THOUSANDS.sub(_without_commas, repeating_as_fraction(text)))
        said.append(_IMAGINARY.sub(r"\\cdot i", _FACTOR.sub(r"\1\\cdot(", text)))
    return ask(*sorted(said))  # sorted, so that the order never matters


def _words(text: str) -> str:
    """`\\text{(B)}` -> `b`, `9 a.m.` -> `9am`: case, spaces, full stops and brackets around it all do not count."""
    return re.sub(r"[\s.](?![0-9])", "", fold_latex(text).casefold()).replace(" ", "").strip("()")


def _bare(text: str) -> str:
    """Folded, without the spaces that say nothing (2 3 is not 23)."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", fold_latex(text))
