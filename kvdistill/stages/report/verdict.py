"""The first sentences of the page: what was found, in words that a newcomer understands. From the summary only."""

from __future__ import annotations

import math

from kvdistill.stages.report.collect import Row
from kvdistill.stages.report.text import number, p_value, percent, signed


def write_headline(summary: Row) -> str:
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


def _lead(summary: Row, comparisons: list[Row], figure: str) -> str:
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
            f"No verdict on {first['arm']} against {first['baseline']}. {scores}. The comparison is refused: {reasons}."
        )
    right = " of the held-out questions right" if figure == "accuracy" else " per answer token (NLL)"
    return (f"{first['arm']}: {shown['arm']}{right}, {difference(first, figure)} over {first['baseline']}; "
            f"{outcome(first, len(comparisons))}.")  # fmt: skip


def outcome(comparison: Row, family_size: int) -> str:
    """`better (p = 0.002, Holm-adjusted for 4 comparisons)`; for equivalence the p-value is the TOST's."""
    word = comparison["verdict"]
    name, p = ("TOST p", comparison["tost_p_holm"]) if word == "equivalent" else ("p", comparison["p_holm"])
    adjusted = f", Holm-adjusted for {family_size} comparisons" if family_size > 1 else ""
    text = word if word in ("better", "worse") else comparison["sentence"]
    return f"{text} ({name} {p_value(p)}{adjusted})"


def amount(found: Row, figure: str) -> str:
    """`80.8 % ± 1.5` or `0.412 ± 0.020 nats`."""
    if math.isnan(found["mean"]):
        return "not measured"
    known = not math.isnan(found["std"])
    if figure == "accuracy":
        return percent(found["mean"]) + (f" ± {100 * found['std']:.1f}" if known else "")
    return number(found["mean"]) + (f" ± {number(found['std'])}" if known else "") + " nats"


def difference(comparison: Row, figure: str) -> str:
    if figure == "accuracy":
        return f"{signed(100 * comparison['difference'])} points"
    return f"{signed(comparison['difference'], 3)} nats"


def list_warnings(summary: Row) -> list[str]:
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
