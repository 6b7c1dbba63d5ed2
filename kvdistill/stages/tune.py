"""The stages before training where arms are tuned (`tune`): trials under other values, and the choice among them.

A trial is a training like any other, with a tuning seed, in a folder of its own (`arms/ARM@tuneN/seed-N/`), of which
log, ledger and mark are kept. The choice reads nothing but the trials' validation points; no trial is ever evaluated.
Which trials there are and by what rule is `core/tuning.py`'s.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvdistill.arms.arm import Arm
from kvdistill.arms.costs import all_sharers, run_flops, shared_keys, trial_sharers
from kvdistill.arms.experiment import Experiment
from kvdistill.core.costs import trial_flops
from kvdistill.core.errors import Diverged, RunFolderError
from kvdistill.core.files import read_json, read_json_lines, write_json
from kvdistill.core.layout import CHECKPOINTS, arm_folder, folder_lock, trained_mark
from kvdistill.core.marks import check_marked, read_mark, sealed, write_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.tuning import (
    edges,
    judged_by,
    read_tuned,
    rule_of,
    tuned_path,
)
from kvdistill.stages.train import MADE, train_student

FIX = "run the study again: this trial is then trained anew"


def try_values(arm: Arm, progress: Progress = silent) -> None:
    """Train a trial. One that diverges is finished too: these values are none to choose, and cost what they would."""
    try:
        train_student(arm, progress)
    except Diverged as error:
        with folder_lock(arm.folder, wait=True):
            flops, shared = (
                run_flops(arm, arm.training_order()),
                shared_keys(arm.recipe, arm.seed, arm.experiment.recipe),
            )
            write_json(arm.folder / "ledger.json", {"flops": flops, "shared": shared})
            steps = arm.recipe.train.steps
            facts = {"arm": arm.name, "seed": arm.seed, "steps": steps, "diverged": error.what}
            write_mark(trained_mark(arm.folder), facts, MADE)
            shutil.rmtree(arm.folder / CHECKPOINTS, ignore_errors=True)


def choose_values(experiment: Experiment, progress: Progress = silent) -> None:
    """Write `tuned.json`: every tuned arm's trials and the values chosen. What was chosen before stays.

    Raises Diverged where no trial of an arm can be chosen, RunFolderError for a trial that is not there or altered,
    and where arms were tuned by another rule before.
    """
    recipe, run = experiment.recipe, experiment.run
    assert recipe.tune is not None
    path, by = tuned_path(run), judged_by(recipe)
    arms, before = read_tuned(run), read_mark(path) or {}
    if arms and before["rule"] != rule_of(by):
        what = "other arms were tuned by another rule before, and the same search for all is the same rule for all"
        raise RunFolderError(what, place=str(path), fix=f"set tune.by: {before['by']}, or begin in a new run_dir")
    sharers = all_sharers(experiment), trial_sharers(experiment)
    for name in (name for name in recipe.arms if recipe.tuned_as(name) == name and name not in arms):
        trials = {trial: one.values for trial, one in experiment.trials.items() if one.arm == name}
        rows: list[dict[str, Any]] = []
        spent = 0.0
        for number, (trial, values) in enumerate(trials.items(), start=1):
            each = {str(seed): _judged(arm_folder(run, trial, seed)) for seed in recipe.tune.seeds}
            for seed in recipe.tune.seeds:
                ledger = read_json(arm_folder(run, trial, seed) / "ledger.json")
                spent += trial_flops(ledger["flops"], ledger["shared"], *sharers)
            figures = {figure: _mean([one[figure] for one in each.values()]) for figure in ("accuracy", "nll")}
            rows.append({"trial": number, "values": values, **figures, "seeds": each})
        chosen = choose(rows, by)
        if chosen is None:
            what = f"every trial of arm {name!r} diverged or has no validation {by}: there is nothing to choose"
            raise Diverged(what, place="tune.grid.train", fix="lower the learning rates, in a new run_dir")
        arms[name] = {
            "chosen": rows[chosen]["trial"],
            "values": rows[chosen]["values"],
            "at_edge": edges([*trials.values()], rows[chosen]["values"]),
            "flops": spent,
            "trials": rows,
        }
    said = {"schema": 1, "rule": rule_of(by), "by": by, "seeds": recipe.tune.seeds}
    write_json(path, sealed({**said, "arms": arms}))


def choose(rows: Sequence[dict[str, Any]], by: str) -> int | None:
    """Which trial, by the rule (`core.tuning.rule_of`); None where no trial has the figure that chooses."""

    def badness(row: dict[str, Any], figure: str) -> float:
        value = row[figure]
        return math.inf if value is None else -value if figure == "accuracy" else value

    other = "nll" if by == "accuracy" else "accuracy"
    best = min(range(len(rows)), key=lambda i: (badness(rows[i], by), badness(rows[i], other), i), default=None)
    return None if best is None or rows[best][by] is None else best


def _judged(folder: Path) -> dict[str, Any]:
    """Step, accuracy and NLL on validation problems of the weights that a trial kept; None for a figure it lacks."""
    mark = read_mark(trained_mark(folder))
    if mark is None:
        raise RunFolderError("this trial is not trained", place=str(folder), fix="run the study again")
    check_marked(trained_mark(folder), fix=FIX)
    if "diverged" in mark:
        return {"step": None, "accuracy": None, "nll": None, "diverged": mark["diverged"]}
    step = mark["selection"]["chosen_step"] if "selection" in mark else mark["steps"]
    points = {row["step"]: row["val"] for row in read_json_lines(folder / "log.jsonl") if "val" in row}
    found = {figure: points[step].get(figure) for figure in ("accuracy", "nll")}
    return {"step": step} | {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a trial that diverges with any seed is none to choose."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None
