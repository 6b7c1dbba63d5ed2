"""A command's result, in words for the terminal. Text from data is made harmless before it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def printable(text: object) -> str:
    """Control characters (and with them terminal escapes) made visible."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def as_text(result: Mapping[str, Any]) -> str:
    """A short table for a study, else one line per entry."""
    lines: list[str] = []
    summary = result.get("summary") or {}
    arms = summary.get("arms") or {}
    if arms:
        width = max(len(printable(name)) for name in arms)
        for name, arm in arms.items():
            lines.append(f"  {printable(name):<{width}}  {_share(arm.get('mean'))} ± {_share(arm.get('std'))}")
        for row in summary.get("comparisons") or []:
            if row.get("verdict"):
                lines.append(
                    f"  {printable(row['arm'])} against {printable(row['baseline'])}: {printable(row['verdict'])}"
                )
    for key, value in result.items():
        if key != "summary" and not isinstance(value, Mapping | list):
            lines.append(f"{key.replace('_', ' ')}: {printable(value)}")
        elif key != "summary" and isinstance(value, list):
            lines.append(f"{key.replace('_', ' ')}:")
            lines += [f"  {printable(item)}" for item in value]
        elif key != "summary" and isinstance(value, Mapping):
            lines.append(f"{key.replace('_', ' ')}:")
            lines += [f"  {printable(name)}: {printable(item)}" for name, item in value.items()]
    return "\n".join(lines)


def _share(value: object) -> str:
    return f"{100 * value:5.1f}" if isinstance(value, int | float) else "    –"
