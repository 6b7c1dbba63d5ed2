"""A training that is over, as the beginning of a longer one: for arms of `report.curves` under a constant schedule.

The last checkpoint and the log go to the folder of the arm that goes on (`core.budgets.continued` says which), before
this one's mark is written; that arm then resumes from it as after any interruption, to the same bits as if it had been
trained by itself. Where nothing was handed over (an older study, a kill) it trains from the first step.
"""

from __future__ import annotations

import shutil
from typing import Any

from kvdistill.arms.arm import Arm
from kvdistill.core.budgets import continued
from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import read_json, replacing_folder, write_bytes, write_json
from kvdistill.core.layout import CHECKPOINTS, arm_folder, folder_lock, trained_mark
from kvdistill.core.marks import read_mark
from kvdistill.stages.train.checkpoint import newest_checkpoint

HANDED_OVER = "handed-over.json"  # beside the checkpoint


def hand_over(arm: Arm) -> None:
    """Give the last checkpoint of this training to the arm that goes on from it, if there is one and it has none."""
    experiment = arm.experiment
    pairs = continued(experiment.recipe, experiment.arms).items()
    longer = next((name for name, before in pairs if before == arm.name), None)
    last = newest_checkpoint(arm.folder / CHECKPOINTS)
    if longer is None or last is None or last.name != f"checkpoint-{arm.recipe.train.steps}":
        return
    folder = arm_folder(experiment.run, longer, arm.seed)
    try:
        with folder_lock(folder, wait=False):  # somebody who trains it already needs nothing
            if read_mark(trained_mark(folder)) is None and newest_checkpoint(folder / CHECKPOINTS) is None:
                write_bytes(folder / "log.jsonl", (arm.folder / "log.jsonl").read_bytes())
                wall_s, cpu_s = read_json(last / "state.json")["seconds"]
                said = {"arm": arm.name, "steps": arm.recipe.train.steps, "seconds": wall_s, "cpu_seconds": cpu_s}
                write_json(folder / CHECKPOINTS / HANDED_OVER, said)
                with replacing_folder(folder / CHECKPOINTS / last.name) as part:
                    shutil.copytree(last, part, dirs_exist_ok=True)
    except RunFolderError:
        return


def went_on_from(arm: Arm) -> dict[str, Any] | None:
    """Which arm's training this one goes on from, its steps and its seconds; None: it began by itself."""
    note = arm.folder / CHECKPOINTS / HANDED_OVER
    return read_json(note) if note.exists() else None
