"""The table of evaluation results, for the terminal: at most 100 columns, text from data made harmless before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvdistill.core.quoting import printable

_HEADER = ("evaluation", "asked", "n", "score", "lm-eval", "in", "out", "passes", "s", "cut", "lost")
_LEFT = 2  # columns of words; the others are figures
_WIDEST_NAME = 15


def evaluation_table(results: Mapping[str, Any]) -> list[str]:
    """Lines: a row per evaluation (and per member where one of them is the score), the macro average, what to know."""
    rows: list[tuple[str, ...]] = [_HEADER]
    notes: list[str] = []
    for name, found in results["evaluations"].items():
        rows.append(_row(name, found))
        members = found.get("members") or {}
        if found.get("scored_by"):
            rows += [_row(f" {member}", figures) for member, figures in members.items()]
            notes.append(f"{name} is scored by {found['scored_by']}")
        elif len(members) > 1:
            notes.append(f"{name}: mean over the questions of {len(members)} members (each in results.json)")
        notes += [f"{name}: {note}" for note in found.get("notes", ())]
        if not found["complete"]:
            notes.append(f"{name}: not finished, and not in the average")
    macro, counted = results["macro_average"], results["in_macro_average"]
    if macro is not None:
        rows.append((f"mean of {len(counted)}", "", "", _percent(macro), *[""] * (len(_HEADER) - 4)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < _LEFT else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return [*lines, *(printable(note) for note in notes), *_LEGEND]


_LEGEND = (
    "score: percent by our answer rules ± standard error; lm-eval: its own metric, percent",
    "in, out: tokens; passes: forward passes; s: seconds; each per question",
    "cut: questions whose prompt did not fit; lost: characters that the tokenizer cannot write",
)


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    name = printable(name)
    name = name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "…"
    if found.get("score") is None:
        return (name, "", str(found["questions"]), *["–"] * (len(_HEADER) - 3))
    metric = found["metrics"].get(found["metric"])
    return (
        name,
        f"{_asked(found['style'])} {'choice' if found['mode'] == 'likelihood' else 'text'}",
        f"{found['questions']}",
        f"{_percent(found['score'])}±{_percent(found['stderr'])}",
        _percent(metric),
        *(_number(found[key]) for key in ("tokens_in", "tokens_out", "forward_passes")),
        _seconds(found["seconds"]),
        _percent(found["truncated"], 0),
        _percent(found["unspelled"], 0),
    )


def _asked(style: str) -> str:
    shots = style.removeprefix("fewshot-")
    return f"{shots}-shot" if shots.isdecimal() else style


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}" + ("%" if digits == 0 else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.01 else f"{value:.4f}"
