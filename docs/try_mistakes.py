"""Tries malformed inputs and damaged files, and writes what came of it into docs/reliability.md, between two marks.

    python docs/try_mistakes.py            both tables (about twenty minutes on two cores)
    python docs/try_mistakes.py mistakes   the first alone: malformed recipes, values, flags, rows, folders
    python docs/try_mistakes.py damages    the second alone: every kind of file of a run, damaged in four ways

The cases are those of the tests (tests/mistakes.py, tests/damages.py), tried in this process. Nothing is left behind.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from damages import HOWS, copy_study, damage, judge, kinds, make_study, one_more_arm, results  # noqa: E402
from mistakes import mistakes  # noqa: E402
from test_mistakes import stop_before_training  # noqa: E402
from tiny_recipe import PROGRESS, invoke  # noqa: E402

PAGE = HERE / "reliability.md"


def write_section(name: str, lines: list[str]) -> None:
    """Put the lines between the marks of this name, at the end of the page where it has none yet."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Reliability\n"
    begin, end = f"<!-- {name}: made by docs/try_mistakes.py -->", f"<!-- end of {name} -->"
    section = "\n".join([begin, *lines, end])
    if begin in text:
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: section, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    PAGE.write_text(text, encoding="utf-8")


def try_mistakes() -> list[str]:
    rows, slowest, good = [], 0.0, 0
    for case in mistakes():
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            words = case.words(Path(folder))
            patch.chdir(folder)
            begun = time.monotonic()
            try:
                answer = invoke(patch, *words, work=stop_before_training)
                code, said = answer.code, [x for x in answer.err.splitlines() if not PROGRESS.match(x)]
            except Exception as error:
                code, said = 1, [f"{type(error).__name__}: {error}"]
            seconds = time.monotonic() - begun
            first = next((x for x in said if x.startswith(("kvdistill: ", "Error: "))), said[0] if said else "")
            first = first.replace(folder, "…").removeprefix("kvdistill: ").replace("|", "\\|").replace("`", "'")
            slowest, good = max(slowest, seconds), good + (code == 2)
            shown = f"{case.name[:70]}".replace("|", "\\|").replace("`", "'")
            rows.append(f"| {case.group} | `{shown}` | {code} | {first[:160]} |")
    return [
        "## Malformed inputs",
        "",
        f"{len(rows)} inputs, {good} of them end with exit code 2 and one message; the slowest took {slowest:.1f} s.",
        "",
        "| what | input | exit code | message (its beginning) |",
        "|---|---|---|---|",
        *rows,
    ]


def try_damages() -> list[str]:
    table: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        recipe = make_study(root, patch)
        with tempfile.TemporaryDirectory() as place:
            run = copy_study(root / "run", Path(place))
            code, said = one_more_arm(patch, recipe, run)
            assert code == 0, said
            right = results(run)
        for kind, files in kinds(root / "run").items():
            for how in HOWS:
                with tempfile.TemporaryDirectory() as place:
                    run = copy_study(root / "run", Path(place))
                    file = run / files[0].relative_to(root / "run")
                    outcome = "–"
                    if damage(run, file, how):
                        outcome = judge(run, file, *one_more_arm(patch, recipe, run), right)
                    table.setdefault(kind, {})[how] = outcome.replace(place, "…").replace("|", "\\|")
                    print(kind, how, outcome, flush=True)
    counts = Counter(outcome.split(":")[0] for row in table.values() for outcome in row.values() if outcome != "–")
    return [
        "## Damaged files in a run folder",
        "",
        "A finished study, one file of each kind damaged, then the same command with one more arm. *named*: exit code",
        "2 and a message with the file or its folder. *made anew*: all results are those of an undamaged folder, and",
        "the file too.",
        "*said*: what was declared before training is unknown then; page, terminal and statistics say so.",
        "*holds no result*: all results are those of an undamaged folder, and the file is a note, a log or a figure.",
        "",
        ", ".join(f"{number} {what}" for what, number in counts.most_common()) + ".",
        "",
        f"| file | {' | '.join(HOWS)} |",
        "|---" * (len(HOWS) + 1) + "|",
        *(f"| `{kind}` | {' | '.join(row[how] for how in HOWS)} |" for kind, row in table.items()),
    ]


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["mistakes", "damages"]
    if "mistakes" in wanted:
        write_section("mistakes", try_mistakes())
    if "damages" in wanted:
        write_section("damages", try_damages())
