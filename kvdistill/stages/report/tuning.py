"""What tuning tried and chose, as a table: every trial of every arm, from `tuned.json`. Knows no pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvdistill.core.marks import read_sealed
from kvdistill.core.recipe import Recipe
from kvdistill.core.tuning import TUNABLE, tuned_path
from kvdistill.stages.report.language import ENGLISH, Words


def tuning_table(recipe: Recipe, run: Path) -> dict[str, Any] | None:
    """None where nothing is tuned, or nothing chosen yet. Raises RunFolderError for an altered file.

    rule, by, seeds: in words, the figure, the tuning seeds. keys: what was searched, in the order of `rows`' columns.
    chosen: arm -> its values, its number of trials, the keys of which an edge of the range was chosen, and the FLOPs
    that its search took. rows: one a trial, in the order of the recipe (`tuning_rows` has them as cells).
    """
    if recipe.tune is None or not tuned_path(run).is_file():
        return None
    said = read_sealed(tuned_path(run), fix="delete it and run the study again: values are chosen from the same trials")
    arms = {name: said["arms"][name] for name in recipe.arms if name in said["arms"]}
    used = {key for arm in arms.values() for key in arm["values"]}
    rows = [
        {
            "arm": name,
            "trial": trial["trial"],
            "values": trial["values"],
            "accuracy": trial["accuracy"],
            "nll": trial["nll"],
            "diverged": any("diverged" in one for one in trial["seeds"].values()),
            "chosen": trial["trial"] == arm["chosen"],
        }
        for name, arm in arms.items()
        for trial in arm["trials"]
    ]
    chosen = {
        name: {"values": arm["values"], "trials": len(arm["trials"]), "at_edge": arm["at_edge"], "flops": arm["flops"]}
        for name, arm in arms.items()
    }
    keys = [key for key in TUNABLE if key in used]
    return {
        "rule": said["rule"],
        "by": said["by"],
        "seeds": said["seeds"],
        "keys": keys,
        "chosen": chosen,
        "rows": rows,
    }


def chosen_words(table: dict[str, Any] | None) -> dict[str, str]:
    """By arm what was chosen, in a line: `learning_rate 0.004 (trial 4 of 4), at the edge: learning_rate`."""
    found = {}
    for row in (table or {"rows": []})["rows"]:
        if row["chosen"]:
            one = table["chosen"][row["arm"]] if table else {}
            values = ", ".join(f"{key.partition('.')[2]} {value:g}" for key, value in row["values"].items())
            edge = ", ".join(key.partition(".")[2] for key in one["at_edge"])
            found[row["arm"]] = f"{values} (trial {row['trial']} of {one['trials']})" + (
                f"; at the edge of what was tried: {edge}" if edge else ""
            )
    return found


def tuning_rows(
    table: dict[str, Any], *, chosen_only: bool = False, words: Words = ENGLISH
) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table, for a page: arm, trial, a column a key (`–`: it does nothing for the arm), accuracy
    in %, NLL, and whether it was chosen."""
    names = [key.partition(".")[2] for key in table["keys"]]
    figures = [words("arms.accuracy"), words("tuning.nll")]
    head = [words("page.arm"), words("tuning.trial"), *names, *figures, words("tuning.chosen")]
    rows = []
    for row in table["rows"]:
        if chosen_only and not row["chosen"]:
            continue
        of = words("tuning.of", trial=row["trial"], trials=table["chosen"][row["arm"]]["trials"])
        values = [f"{row['values'][key]:g}" if key in row["values"] else "–" for key in table["keys"]]
        figures = [words("tuning.diverged")] * 2
        if not row["diverged"]:
            accuracy, nll = row["accuracy"], row["nll"]
            figures = ["–" if accuracy is None else f"{100 * accuracy:.1f}", "–" if nll is None else f"{nll:.4g}"]
        rows.append([row["arm"], of, *values, *figures, words("tuning.chosen") if row["chosen"] else ""])
    return head, rows
