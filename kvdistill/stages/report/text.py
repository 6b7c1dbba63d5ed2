"""How numbers, strangers' text and verdicts are written on the page and in figures. From the summary only."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any, TypeGuard

from kvdistill.core.family import BEST_SINGLE
from kvdistill.stages.report.language import ENGLISH, Words

DASH = "–"
_INVISIBLE = {0x00AD, 0x034F, 0x061C, 0x115F, 0x1160, 0x180E, 0x2028, 0x2029, 0x3164, 0xFEFF, 0xFFA0}


def make_visible(text: str, *, keep: str = "\n\t") -> str:
    """Control, format and private characters as visible marks: ESC becomes ⟨U+001B⟩.

    Not as control pictures such as ␛, which many fonts lack. Nothing a model writes can then reorder, hide or colour
    the text around it. Characters in `keep` stay.
    """
    hidden = {
        c for c in set(text) - set(keep)
        if ord(c) in _INVISIBLE or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn")
    }  # fmt: skip
    return "".join(f"⟨U+{ord(c):04X}⟩" if c in hidden else c for c in text) if hidden else text


def is_known(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if is_known(value) else DASH


def number(value: float | None, digits: int = 3) -> str:
    return _minus(f"{value:.{digits}f}") if is_known(value) else DASH


def signed(value: float | None, digits: int = 1) -> str:
    return _minus(f"{value:+.{digits}f}") if is_known(value) else DASH


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{round(value):,}".replace(",", "\u202f") if is_known(value) else DASH


def p_value(value: float | None) -> str:
    """`= 0.0123`, `< 0.0001`, or a dash."""
    if not is_known(value):
        return DASH
    return "< 0.0001" if value < 1e-4 else f"= {value:.{4 if value < 0.01 else 3}f}"


def with_prefix(value: float | None, unit: str) -> str:
    """1.53e12 FLOP -> `1.53 TFLOP`."""
    if not is_known(value):
        return DASH
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def size(num_bytes: float | None) -> str:
    if not is_known(num_bytes):
        return DASH
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float | None, words: Words = ENGLISH) -> str:
    if not is_known(seconds):
        return DASH
    if seconds < 120:
        return words("units.seconds", seconds=f"{seconds:.3g}")
    minutes = round(seconds / 60)
    if minutes < 120:
        return words("units.minutes", minutes=minutes)
    return words("units.hours", hours=minutes // 60, minutes=f"{minutes % 60:02d}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


# -- what controls are -----------------------------------------------------------------------------------

# control (or texts) -> what the arm learns from, and what cannot be why another arm is better than it
CONTROLS = {
    "placebo": (
        "teacher KV of a mismatched example",
        "the cost of teachers, and a pull towards any of their states",
    ),
    "untrained": (
        "targets of teachers with random weights on the right text",
        "the text told once more by a network of this shape, whatever it has learned",
    ),
    "shuffled": (
        "targets of the right text, its tokens permuted within each segment",
        "what this problem’s states are on the whole, whichever token has which",
    ),
    "noise": (
        "noise with the mean and deviation of each of the teachers’ channels, the same at every visit",
        "fixed targets of this size as such, which regularise",
    ),
    "teachers": (
        "plain fine-tuning on the problems that the teachers studied, too",
        "the problems that the teachers have seen and the student has not",
    ),
    "written": (
        "plain fine-tuning on right solutions that the teachers wrote, too (sequence-level distillation)",
        "what the same teachers can pass on in writing",
    ),
}


def write_harm(row: dict[str, Any], figure: str, words: Words = ENGLISH) -> str:
    """Whether a control did harm, from its row (`controls.describe_controls`)."""
    if row["harm"] is None:
        return words("controls.harm_unknown")
    found = {"apart": difference({"difference": row["difference"]}, figure, words), "plain": row["plain"]}
    if not row["harm"]:
        return words("controls.no_harm", **found)
    return words(f"controls.harm_{row['harm']}", p=p_value(row["p_holm"]), **found)


def write_texts(said: Mapping[str, Any], words: Words = ENGLISH) -> str:
    """What an arm read beside its own texts, from its ledger."""
    if not said:
        return words("controls.not_trained")
    key = "beside" if said["beside"] else "nothing_beside"
    parts = [words(f"controls.{key}", beside=count(said["beside"]), own=count(said["own"]))]
    if written := said.get("written") or {}:
        answers, right = (sum(one[key] for one in written.values()) for key in ("answers", "right"))
        parts.append(words("controls.written", right=count(right), answers=count(answers)))
    return words("page.semicolon").join(parts)


# -- what was found, in words that a newcomer understands -----------------------------------------------


def write_headline(summary: dict[str, Any], words: Words = ENGLISH) -> str:
    """The verdict on the first declared comparison: first what the curve of its arm shows, if there is one, then how
    far the two are apart at equal budgets. With every accuracy near zero, NLL leads."""
    if not summary["accuracy_near_zero"]:
        return _lead(summary, summary["comparisons"], summary["primary"], words)
    listed = summary["comparisons"] if summary["primary"] == "nll" else summary["secondary_comparisons"]
    best = max(arm["mean"] for arm in summary["arms"].values() if not math.isnan(arm["mean"]))
    return words("verdict.accuracy_says_nothing", best=percent(best), lead=_lead(summary, listed, "nll", words))


def _lead(summary: dict[str, Any], comparisons: list[dict[str, Any]], figure: str, words: Words) -> str:
    lead, first = _compared(summary, comparisons, figure, words), next(iter(comparisons), None)
    if not (curve := _curve_of(summary, first, words)):
        return lead
    if first is None or first["refused"]:
        return words("verdict.after_curve_alone", curve=curve, lead=lead)
    return words("verdict.after_curve", curve=curve, parity=words.message(first["at_equal"]), lead=lead)


def _curve_of(summary: dict[str, Any], first: dict[str, Any] | None, words: Words) -> str:
    """What the curve of the first comparison's arm shows; of an arm without one that of its baseline, else the first
    that there is: the recipe decides, not the results."""
    curves = summary.get("curves")
    if not curves or not curves["against"]:
        return ""
    bases = {row["name"]: row["arm"] for row in curves["rows"]}  # `ce@x2` is a point of the curve of `ce`
    asked = [bases.get(first[side]) for side in ("arm", "baseline")] if first else []
    by_arm = {one["arm"]: one for one in curves["against"]}
    lead: str = next((by_arm[name] for name in asked if name in by_arm), curves["against"][0])["lead"]
    family = len(summary["comparisons"])
    if not lead or family < 2:
        return lead
    return lead + words("curve.unadjusted", n=family, percent=curves["percent"])


def _compared(summary: dict[str, Any], comparisons: list[dict[str, Any]], figure: str, words: Words) -> str:
    if not comparisons:
        arms = {name: arm if figure == "accuracy" else arm["nll"] for name, arm in summary["arms"].items()}
        known = {name: arm for name, arm in arms.items() if not math.isnan(arm["mean"])}
        if not known:
            return words("verdict.none_scored")
        best = (max if figure == "accuracy" else min)(known, key=lambda name: known[name]["mean"])
        return words("verdict.best_mean", arm=best, amount=amount(known[best], figure, words))
    first = comparisons[0]
    shown = {side: amount(found if figure == "accuracy" else found["nll"], figure, words)
             for side in ("arm", "baseline") if (found := summary["arms"].get(first[side]))}  # fmt: skip
    names = {"arm": first["arm"], "baseline": side_name(first, 1, words)}
    if first["refused"]:
        names["arm"] = side_name(first, 0, words)
        scores = [words("verdict.score", arm=first[side], amount=score) for side, score in shown.items()]
        reasons = [words.message(reason) for reason in first["refused"]]
        parted = words("page.semicolon")
        return words("verdict.no_verdict", **names, scores=parted.join(scores), reasons=parted.join(reasons))
    found = {"amount": shown["arm"], "difference": difference(first, figure, words)}
    return words(f"verdict.lead_{figure}", **names, **found, outcome=outcome(first, len(comparisons), words))


def side_name(comparison: dict[str, Any], side: int, words: Words = ENGLISH) -> str:
    """The arm (0) or baseline (1) by name; of `best-single` also that it was chosen, if one was."""
    name: str = comparison["baseline" if side else "arm"]
    chosen = comparison["declared"][side] == BEST_SINGLE != name
    return words("verdict.best_single", arm=name) if chosen else name


def sentence(comparison: dict[str, Any], words: Words = ENGLISH) -> str:
    """What was found, or every reason why nothing could be."""
    if comparison["refused"]:
        reasons = words("page.semicolon").join(words.message(reason) for reason in comparison["refused"])
        return words("verdict.refused", reasons=reasons)
    return words.message(comparison["sentence"])


def comparison_lines(summary: dict[str, Any], words: Words = ENGLISH) -> list[str]:
    """What the terminal shows of the declared comparisons before the verdict: a line for each, as the page has it."""
    lines = []
    if summary["comparisons"] and not summary["declared"]["time"]:
        lines.append(words("told.declared_unknown"))
    for one in summary["comparisons"]:
        said = words("told.against", arm=one["arm"], baseline=one["baseline"], said=sentence(one, words))
        if one["at_equal"] != "steps" and not one["refused"]:
            said += words("told.aside", said=at_equal(one, words))
        if one["after_results"]:
            said += words("told.aside", said=words("told.late"))
        lines.append(said + (words("page.semicolon") + one["caution"] if one.get("caution") else ""))
    return lines


def at_equal(comparison: dict[str, Any], words: Words = ENGLISH) -> str:
    """`at equal total FLOPs, amortised`: what both sides spent alike."""
    return words("verdict.at_equal", parity=words.message(comparison["at_equal"]))


def outcome(comparison: dict[str, Any], family_size: int, words: Words = ENGLISH) -> str:
    """`better (p = 0.002, Holm-adjusted for 4 comparisons)`; for equivalence the p-value is the TOST's."""
    word = comparison["verdict"]
    name, p = ("TOST p", comparison["tost_p_holm"]) if word == "equivalent" else ("p", comparison["p_holm"])
    text = words(f"verdicts.{word}") if word in ("better", "worse") else words.message(comparison["sentence"])
    late = words("verdict.late") if comparison.get("after_results") else ""
    adjusted = words("verdict.holm", n=family_size)
    said = words("verdict.outcome", text=text, name=name, p=p_value(p), adjusted=adjusted, late=late)
    caution = comparison.get("caution")
    return said + (words("page.semicolon") + caution if caution else "")


def amount(found: dict[str, Any], figure: str, words: Words = ENGLISH) -> str:
    """`80.8 % ± 1.5` or `0.412 ± 0.020 nats`."""
    if math.isnan(found["mean"]):
        return words("verdict.not_measured")
    known = not math.isnan(found["std"])
    if figure == "accuracy":
        return percent(found["mean"]) + (f" ± {100 * found['std']:.1f}" if known else "")
    return words("verdict.nats", value=number(found["mean"]) + (f" ± {number(found['std'])}" if known else ""))


def difference(comparison: dict[str, Any], figure: str, words: Words = ENGLISH) -> str:
    if figure == "accuracy":
        return words("verdict.points", value=signed(100 * comparison["difference"]))
    return words("verdict.nats", value=signed(comparison["difference"], 3))


def list_warnings(summary: dict[str, Any], words: Words = ENGLISH) -> list[str]:
    """What a reader must know before believing anything else on the page."""
    found = []
    if summary["leaks_allowed"]:
        number_found = summary["leaks_found"]
        counted = "verdict.leaks_uncounted" if number_found is None else "verdict.leaks"
        found.append(words(counted, found=number_found))
    if (seeds := len(summary["seeds"])) < 3:
        found.append(words("verdict.few_seeds", n=seeds))
    return found + [words.message(note) for note in summary["notes"]]
