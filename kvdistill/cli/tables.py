"""A command's result, in words for the terminal: tables of at most 100 columns, text from data made harmless first.

Knows the results of `kvdistill.study`'s functions and of `evaluate MODEL`, which are plain data; no torch.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kvdistill.cli.columns import WIDTH, beginning_of, in_columns, in_points, shortened, wrapped
from kvdistill.cli.profiles import layer_lines, profile_lines
from kvdistill.core.quoting import printable


def as_text(result: Mapping[str, Any]) -> str:
    """A short table for a study, the tables of what else is in it, and a line per other entry."""
    lines: list[str] = []
    summary = result.get("summary") or {}
    arms = summary.get("arms") or {}
    if arms:
        lines += _arm_lines(arms, summary.get("primary", "accuracy"))
        lines += [f"  {printable(line)}" for line in summary.get("not_asked") or []]
    shown = {
        "data": _data_table,
        "leaks": _leak_lines,
        "evaluations": evaluation_table,
        "layers": layer_lines,
        "profiles": profile_lines,
        "expanded": expanded_lines,
        "studies": study_lines,
    }
    for key, as_lines in shown.items():
        lines += as_lines(result[key]) if key in result else []
    for key, value in result.items():
        if key in ("summary", *shown):
            continue
        name = key.replace("_", " ")
        if isinstance(value, list):
            lines += [f"{name}:", *(f"  {printable(item)}" for item in value)]
        elif isinstance(value, Mapping):
            lines += [f"{name}:"] if value else []
            lines += [f"  {printable(inner)}: {printable(item)}" for inner, item in value.items()]
        else:
            lines.append(f"{name}: {printable(value)}")
    return "\n".join(lines + _verdict_lines(summary))


def _verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the page says of the declared comparisons, in its language and figure: one by one, of curves, and last what
    it leads with."""
    curves = summary.get("curves") or {}
    lines = wrapped(*map(printable, [*(summary.get("told") or ()), *(curves.get("sentences") or ())]))
    if summary.get("headline"):
        lines += textwrap.wrap(printable(summary["headline"]), WIDTH)
    return lines


def _arm_lines(arms: Mapping[str, Any], primary: str) -> list[str]:
    """The figure that verdicts are about first: a study whose primary figure is NLL may have no right answer yet."""
    rows = [["", "accuracy, %", "NLL, answer", "NLL, reasoning"]]
    for name, arm in arms.items():
        row = [printable(name), f"{in_points(arm.get('mean'))} ± {in_points(arm.get('std'))}"]
        for figure in ("nll", "nll_reasoning"):
            found = arm.get(figure) or {}
            known = isinstance(found.get("mean"), int | float)
            spread = f" ± {found['std']:.3f}" if known and isinstance(found.get("std"), int | float) else ""
            row.append(f"{found['mean']:.3f}{spread}" if known else "–")
        rows.append(row)
    order = [0, 1, 2, 3] if primary == "accuracy" else [0, 2, 3, 1]
    order = [i for i in order if i != 3 or any(row[3] != "–" for row in rows[1:])]
    return in_columns([[row[i] for i in order] for row in rows], left=1)


# -- recipes: arms and their cost, and studies side by side --------------------------------------------


def expanded_lines(found: Mapping[str, Any]) -> list[str]:
    """Arms with what they change, then what each costs for one seed, and all of them for all seeds."""
    arms, seeds = found["arms"], len(found["seeds"])
    lines = [f"{printable(found['name'])}: {len(arms)} arms, {seeds} seed{'s' if seeds != 1 else ''}"]
    for name, arm in arms.items():
        said = ", ".join(f"{key}: {_plain(value)}" for key, value in arm["changes"].items())
        said += f"{'; ' if said else ''}steps matched to {arm['match']}" if arm["match"] else ""
        said = (said or "the recipe as it is") + (" (by report.curves)" if arm["derived"] else "")
        lines += wrapped(f"{printable(name)}: {printable(said)}")
    columns = {"steps": "steps", "data": "problems", "tokens": "tokens", "student_flops": "student FLOPs"}
    columns |= {"total_flops": "all FLOPs", "amortised_flops": "amortised"}
    shown = [key for key in columns if any(arm[key] is not None for arm in arms.values())]
    rows = [["one seed", *(columns[key] for key in shown)]]
    for name, arm in arms.items():
        mark = "≤ " if arm.get("at_most") else "~ " if arm.get("estimated") else ""
        rows.append([shortened(name, 28), *(_cost(key, arm[key], mark) for key in shown)])
    sums = ["all runs"]
    for key in shown:
        each = [arm[key] for arm in arms.values()]
        whole = None if None in each or key == "total_flops" else seeds * sum(each)
        sums.append(_cost(key, whole, ""))
    lines += ["", *in_columns([*rows, sums], left=1)]
    if (student := found["student"]) is not None:
        part = "" if student["trained"] == student["parameters"] else f", {student['trained']:,} of them trained"
        lines += wrapped(f"student: {student['parameters']:,} parameters{part}")
    return lines + wrapped(printable(f"cost: {found['basis']}"), *(printable(note) for note in found["notes"]))


def study_lines(found: Mapping[str, Any]) -> list[str]:
    """One row a study and arm, after what tells the studies apart."""
    rows = [["study", "arm", "accuracy, %", "NLL, answer"]]
    lines = []
    for name, study in found.items():
        said = ", ".join(f"{key}: {_plain(value)}" for key, value in study["differs"].items())
        lines += wrapped(printable(f"{name}: {said or 'differs in nothing'}"))
        for number, (arm, figures) in enumerate(study["arms"].items()):
            nll = figures["nll"]
            spread = "–" if nll["mean"] is None else f"{nll['mean']:.3f} ± {nll['std'] or 0:.3f}"
            accuracy = f"{in_points(figures['mean'])} ± {in_points(figures['std'])}"
            rows.append([shortened(name, 28) if not number else "", shortened(arm, 28), accuracy, spread])
    return [*lines, "", *in_columns(rows, left=2)]


def _plain(value: object) -> str:
    """A recipe's value in one line, as YAML would have it."""
    return json.dumps(value, ensure_ascii=False).replace('"', "") if not isinstance(value, str) else value


def _cost(key: str, value: float | None, mark: str) -> str:
    return "–" if value is None else mark + (f"{value:.3g}" if key.endswith("flops") else f"{value:,.0f}")


# -- data, and leaks in it ----------------------------------------------------------------------------

_SPLITS = ("train", "val", "test", "teach")
_SHOWN_PAIRS = 10


def _data_table(data: Mapping[str, Any]) -> list[str]:
    """Rows by task, style and split; what was left out; what teachers read that the student does not; fingerprint."""
    rows = [
        [task, style, *(n.get(s, 0) for s in _SPLITS)] for task, st in data["table"].items() for style, n in st.items()
    ]
    total = ["", "all", *(sum(row[2 + i] for row in rows) for i in range(len(_SPLITS)))]
    lines = in_columns(
        [["task", "style", *_SPLITS], *([printable(cell) for cell in row] for row in [*rows, total])], left=2
    )
    for what, words in (
        ("too_long", "longer than data.max_length"),
        ("dropped", "leaks, taken out of training"),
        ("replaced", "longer than data.max_length, the next problem in place of each"),
    ):
        left_out = {task: sum(n.get(what, 0) for n in splits.values()) for task, splits in data["tasks"].items()}
        if any(left_out.values()):
            named = ", ".join(f"{printable(task)} {number}" for task, number in left_out.items() if number)
            lines.append(f"left out, {words}: {named}")
    for name, found in data.get("teachers", {}).items():
        own, lost = found["tokenizer"], found["lost"]
        reads = [f"own tokenizer ({own['size']:,} pieces)"] if own else []
        reads += ["own chains"] if found["own_chains"] else []
        line = f"teacher {printable(name)}: {', '.join(reads)}"
        if lost:
            line += f"; of the student's text {in_points(lost['characters']).strip()} % of the characters and "
            line += f"{in_points(lost['tokens']).strip()} % of the tokens have nothing behind them"
            line += f" ({lost['examples']:,} whole examples)" if lost["examples"] else ""
        lines.append(line)
    if seeds := data.get("seeds"):
        lines.append(f"training problems of its own has each seed, of as many: {', '.join(seeds)}")
    for task, found in data.get("noticed", {}).items():
        if unused := found["unused_columns"]:
            lines.append(f"{printable(task)}: columns that nothing is made of: {', '.join(map(printable, unused))}")
        if number := found.get("numbers_with_words"):
            lines.append(
                f"{printable(task)}: {number:,} answers are a number with words ({printable(found['one_of_them'])}), "
                "compared as text; `answer: number` reads the number"
            )
    for task, styles in data.get("examples", {}).items():
        for style, row in styles.items():
            lines.append(f"one {printable(task)} row, style {printable(style)}, as a model reads it:")
            for part in ("prompt", "reasoning", "answer"):
                for number, line in enumerate(row[part].splitlines() or [""]):
                    lines.append(f"  {part if not number else '':<9} |{beginning_of(printable(line), WIDTH - 13)}")
    return [*lines, f"fingerprint: {data['fingerprint']['all']}"]


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
            text = beginning_of(" ".join(text.split()), 100)
            lines.append(f"  {pair['kind']:<5} {pair['similarity']:.2f}  {where}: {text}")
    if leaks["num_pairs_found"] > _SHOWN_PAIRS:
        lines.append(f"  … {leaks['num_pairs_found'] - _SHOWN_PAIRS:,} more pairs in the report")
    lines += [f"pairs, {kind}: {number:,}" for kind, number in leaks["pairs_by_kind"].items()]
    dropped = sum(sum(tasks.values()) for tasks in leaks["dropped"].values())
    if dropped:
        lines.append(f"taken out of what is learned from: {dropped:,} problems")
    if leaks["num_variants"]:
        lines.append(f"the same sentences with other numbers (no leak): {leaks['num_variants']:,} pairs")
    for seed, found in leaks.get("seeds", {}).items():
        out = sum(sum(tasks.values()) for tasks in found["dropped"].values())
        taken = f", {out:,} problems taken out" if out else ""
        lines.append(
            f"problems of seed {seed}: {found['num_pairs_found']:,} pairs{taken}, leaks left {found['num_leaks']:,}"
        )
    lines.append(f"leaks left: {leaks['num_leaks']:,}")
    return lines


# -- evaluations --------------------------------------------------------------------------------------

_HEADER = ("evaluation", "asked", "n", "score", "lm-eval", "in", "out", "passes", "s", "cut", "lost")
_WIDEST_NAME = 15
_LEGEND = (
    "score: percent by our answer rules ± standard error; lm-eval: its own metric, percent",
    "in, out: tokens; passes: forward passes; s: seconds; each per question",
    "cut: questions whose prompt did not fit; lost: characters that the tokenizer cannot write",
)


def evaluation_table(results: Mapping[str, Any]) -> list[str]:
    """Lines: a row per evaluation (and per member where one of them is the score), the macro average, what to know."""
    rows: list[Sequence[str]] = [_HEADER]
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
    return [*in_columns(rows, left=2, indent=""), *(printable(note) for note in notes), *_LEGEND]


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    name = beginning_of(name, _WIDEST_NAME)
    if found.get("score") is None:
        return (name, "", str(found["questions"]), *["–"] * (len(_HEADER) - 3))
    shots = found["style"].removeprefix("fewshot-")
    asked = f"{shots}-shot" if shots.isdecimal() else found["style"]
    seconds = found["seconds"]
    return (
        name,
        f"{asked} {'choice' if found['mode'] == 'likelihood' else 'text'}",
        f"{found['questions']}",
        f"{_percent(found['score'])}±{_percent(found['stderr'])}",
        _percent(found["metrics"].get(found["metric"])),
        *("–" if found[key] is None else f"{found[key]:.0f}" for key in ("tokens_in", "tokens_out", "forward_passes")),
        "–" if seconds is None else f"{seconds:.2f}" if seconds >= 0.01 else f"{seconds:.4f}",
        _percent(found["truncated"], 0),
        _percent(found["unspelled"], 0),
    )


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}" + ("%" if digits == 0 else "")
