"""A command's result, in words for the terminal. Text from data is made harmless before it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvdistill.core.quoting import printable


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
    if "data" in result:
        lines += _data_table(result["data"])
    if "leaks" in result:
        lines += _leak_lines(result["leaks"])
    if "evaluations" in result:
        from kvdistill.cli.evaluation_text import evaluation_table

        lines += evaluation_table(result["evaluations"])
    if "layers" in result or "profiles" in result:
        from kvdistill.cli.profile_text import layer_lines, profile_lines

        lines += layer_lines(result.get("layers") or {}) + profile_lines(result.get("profiles") or {})
    for key, value in result.items():
        if key in ("data", "leaks", "evaluations", "layers", "profiles"):
            continue
        if key != "summary" and not isinstance(value, Mapping | list):
            lines.append(f"{key.replace('_', ' ')}: {printable(value)}")
        elif key != "summary" and isinstance(value, list):
            lines.append(f"{key.replace('_', ' ')}:")
            lines += [f"  {printable(item)}" for item in value]
        elif key != "summary" and isinstance(value, Mapping) and value:
            lines.append(f"{key.replace('_', ' ')}:")
            lines += [f"  {printable(name)}: {printable(item)}" for name, item in value.items()]
    return "\n".join(lines)


_SPLITS = ("train", "val", "test", "teach")
_SHOWN_PAIRS = 10


def _data_table(data: Mapping[str, Any]) -> list[str]:
    """Rows by task, style and split; what was left out; the fingerprint."""
    rows = [
        [task, style, *(n.get(s, 0) for s in _SPLITS)] for task, st in data["table"].items() for style, n in st.items()
    ]
    total = ["", "all", *(sum(row[2 + i] for row in rows) for i in range(len(_SPLITS)))]
    cells = [["task", "style", *_SPLITS], *([printable(cell) for cell in row] for row in [*rows, total])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  " + "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    for what, words in (("too_long", "longer than data.max_length"), ("dropped", "leaks, taken out of training")):
        left_out = {task: sum(n.get(what, 0) for n in splits.values()) for task, splits in data["tasks"].items()}
        if any(left_out.values()):
            named = ", ".join(f"{printable(task)} {number}" for task, number in left_out.items() if number)
            lines.append(f"left out, {words}: {named}")
    lines += [_own_text(name, found) for name, found in data.get("teachers", {}).items()]
    return [*lines, f"fingerprint: {data['fingerprint']['all']}"]


def _own_text(name: str, found: Mapping[str, Any]) -> str:
    """What a teacher reads that the student does not, and what of the text is lost between their tokenizers."""
    own = found["tokenizer"]
    reads = [f"own tokenizer ({own['size']:,} pieces)"] if own else []
    reads += ["own chains"] if found["own_chains"] else []
    line = f"teacher {printable(name)}: {', '.join(reads)}"
    if lost := found["lost"]:
        line += f"; of the student's text {_share(lost['characters']).strip()} % of the characters and "
        line += f"{_share(lost['tokens']).strip()} % of the tokens have nothing behind them"
        line += f" ({lost['examples']:,} whole examples)" if lost["examples"] else ""
    return line


def _leak_lines(leaks: Mapping[str, Any]) -> list[str]:
    """What was held against what, the counts, and the first pairs with both texts."""
    learned = sum(leaks["problems"].get(split, 0) for split in ("train", "teach", "val"))
    against = ", ".join(f"{printable(name)} {count:,}" for name, count in leaks["held_against"]["evaluations"].items())
    lines = [
        f"held {learned:,} problems that are learned from against val, test" + (f" and {against}" if against else "")
    ]
    if leaks["evaluations_not_at_hand"]:
        lines.append(f"not held against (not at hand): {', '.join(leaks['evaluations_not_at_hand'])}")
    for pair in leaks["leaks"][:_SHOWN_PAIRS]:
        for place, text in ((pair["first"], pair["question"]), (pair["second"], pair["other"])):
            where = " / ".join(printable(place[part]) for part in ("split", "task", "id"))
            lines.append(f"  {pair['kind']:<5} {pair['similarity']:.2f}  {where}: {_one_line(text)}")
    if leaks["num_pairs_found"] > _SHOWN_PAIRS:
        lines.append(f"  … {leaks['num_pairs_found'] - _SHOWN_PAIRS:,} more pairs in the report")
    lines += [f"pairs, {kind}: {number:,}" for kind, number in leaks["pairs_by_kind"].items()]
    dropped = sum(sum(tasks.values()) for tasks in leaks["dropped"].values())
    if dropped:
        lines.append(f"taken out of what is learned from: {dropped:,} problems")
    if leaks["num_variants"]:
        lines.append(f"the same sentences with other numbers (no leak): {leaks['num_variants']:,} pairs")
    lines.append(f"leaks left: {leaks['num_leaks']:,}")
    return lines


def _one_line(text: str, length: int = 100) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def _share(value: object) -> str:
    return f"{100 * value:5.1f}" if isinstance(value, int | float) else "    –"
