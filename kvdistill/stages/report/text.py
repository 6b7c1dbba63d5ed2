"""How numbers, strangers' text and verdicts are written on the page and in figures. From the summary only."""

from __future__ import annotations

import math
import unicodedata
from typing import Any, TypeGuard

from kvdistill.core.family import BEST_SINGLE

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


def duration(seconds: float | None) -> str:
    if not is_known(seconds):
        return DASH
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _minus(text: str) -> str:
    return text.replace("-", "−")


# -- what controls are -----------------------------------------------------------------------------------

# control -> what its teachers give, and what the arm shows that is better than it
CONTROLS = {
    "placebo": (
        "teacher KV of a mismatched example",
        "it is not the cost, nor a pull towards any states of the teacher: those of this very problem are what helps",
    ),
    "untrained": (
        "targets of teachers with random weights on the right text",
        "it is not that the text is described once more by a network of this shape: what the teachers learned helps",
    ),
    "shuffled": (
        "targets of the right text, its tokens permuted within each segment",
        "it is not what the problem's states are on the whole: that each token is told its own is what helps",
    ),
    "noise": (
        "Gaussian noise with the mean and deviation of each of the teacher's channels",
        "it is not the regularising effect of fixed targets of this size: that they are of a teacher is what helps",
    ),
}


# -- what was found, in words that a newcomer understands -----------------------------------------------


def write_headline(summary: dict[str, Any]) -> str:
    """The verdict on the first declared comparison. With every accuracy near zero, NLL leads."""
    if not summary["accuracy_near_zero"]:
        return _lead(summary, summary["comparisons"], summary["primary"])
    listed = summary["comparisons"] if summary["primary"] == "nll" else summary["secondary_comparisons"]
    best = max(arm["mean"] for arm in summary["arms"].values() if not math.isnan(arm["mean"]))
    return (
        f"Accuracy says nothing here: no arm answers more than {percent(best)} of the held-out questions correctly. "
        f"What can be compared is how surprised each student is by the right answer (NLL, lower is better). "
        f"{_lead(summary, listed, 'nll')}"
    )


def _lead(summary: dict[str, Any], comparisons: list[dict[str, Any]], figure: str) -> str:
    if not comparisons:
        arms = {name: arm if figure == "accuracy" else arm["nll"] for name, arm in summary["arms"].items()}
        known = {name: arm for name, arm in arms.items() if not math.isnan(arm["mean"])}
        if not known:
            return "No arm could be scored."
        best = (max if figure == "accuracy" else min)(known, key=lambda name: known[name]["mean"])
        return (f"The best mean is that of {best}: {amount(known[best], figure)}. The recipe declares no comparison, "
                "so there is no verdict.")  # fmt: skip
    first = comparisons[0]
    shown = {side: amount(found if figure == "accuracy" else found["nll"], figure)
             for side in ("arm", "baseline") if (found := summary["arms"].get(first[side]))}  # fmt: skip
    if first["refused"]:
        scores = "; ".join(f"{first[side]}: {score}" for side, score in shown.items())
        reasons = "; ".join(first["refused"])
        return (
            f"No verdict on {side_name(first, 0)} against {side_name(first, 1)}. {scores}. "
            f"The comparison is refused: {reasons}."
        )
    right = " of the held-out questions right" if figure == "accuracy" else " per answer token (NLL)"
    return (f"{first['arm']}: {shown['arm']}{right}, {difference(first, figure)} over {side_name(first, 1)}; "
            f"{outcome(first, len(comparisons))}.")  # fmt: skip


def side_name(comparison: dict[str, Any], side: int) -> str:
    """The arm (0) or baseline (1) by name; of `best-single` also that it was chosen, if one was."""
    name = comparison["baseline" if side else "arm"]
    chosen = comparison["declared"][side] == BEST_SINGLE != name
    return f"{name} (best single teacher on validation)" if chosen else name


def outcome(comparison: dict[str, Any], family_size: int) -> str:
    """`better (p = 0.002, Holm-adjusted for 4 comparisons)`; for equivalence the p-value is the TOST's."""
    word = comparison["verdict"]
    name, p = ("TOST p", comparison["tost_p_holm"]) if word == "equivalent" else ("p", comparison["p_holm"])
    adjusted = f", Holm-adjusted for {family_size} comparisons" if family_size > 1 else ""
    text = word if word in ("better", "worse") else comparison["sentence"]
    late = "; chosen after the results" if comparison.get("after_results") else ""
    return f"{text} ({name} {p_value(p)}{adjusted}{late})"


def amount(found: dict[str, Any], figure: str) -> str:
    """`80.8 % ± 1.5` or `0.412 ± 0.020 nats`."""
    if math.isnan(found["mean"]):
        return "not measured"
    known = not math.isnan(found["std"])
    if figure == "accuracy":
        return percent(found["mean"]) + (f" ± {100 * found['std']:.1f}" if known else "")
    return number(found["mean"]) + (f" ± {number(found['std'])}" if known else "") + " nats"


def difference(comparison: dict[str, Any], figure: str) -> str:
    if figure == "accuracy":
        return f"{signed(100 * comparison['difference'])} points"
    return f"{signed(comparison['difference'], 3)} nats"


def list_warnings(summary: dict[str, Any]) -> list[str]:
    """What a reader must know before believing anything else on the page."""
    found = []
    if summary["leaks_allowed"]:
        number_found = summary["leaks_found"]
        what = "were not counted" if number_found is None else f"{number_found} found"
        found.append(f"Leaks were allowed (data.leaks=allow; {what}): test problems may be in the training set. "
                     "Nothing on this page is a result.")  # fmt: skip
    if len(summary["seeds"]) < 3:
        found.append(f"Only {len(summary['seeds'])} seed(s): a comparison needs at least 3, 5 are better.")
    return found + summary["notes"]
