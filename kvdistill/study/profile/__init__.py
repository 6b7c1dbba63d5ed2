"""What `kvdistill profile-alignment` finds out about an arm before anything is trained, and where it is written.

    setting.py   the arm as training would start it: untrained student, fitted aligners, batches
    shapes.py    sizes, maps, tokens with something behind them, parameters, bytes in the store
    numbers.py   largest values, dead channels, non-finite values, stage by stage: where a NaN would come from
    matching.py  match figures at the start, and what a closed-form map reaches; the same for mismatched texts
    timing.py    time and memory of a step, and of a step without teachers

Reads what prepare, capture and fit left; writes `profile/ARM.json` and nothing else. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvdistill.core.config import arm_recipe
from kvdistill.core.errors import ModelError
from kvdistill.core.files import read_json, write_json
from kvdistill.core.layout import profile_folder
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import Recipe
from kvdistill.core.runtime import derive_seed, seed_everything
from kvdistill.study.profile.matching import match_figures
from kvdistill.study.profile.numbers import first_broken_target, number_figures
from kvdistill.study.profile.setting import open_setting
from kvdistill.study.profile.shapes import parameter_figures, shape_figures
from kvdistill.study.profile.timing import step_figures

STEPS = 7  # timed steps: an odd number has a median that was measured
BATCHES = 2  # of training, for shapes and numbers
_PARTS = 5


def profile_alignment(
    recipe: Recipe, run: Path, arms: Sequence[str], progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """Profile these arms (each needs KV) with the recipe's first seed. By arm: what its file holds.

    Raises StoreError where targets or fits are missing.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, arm in enumerate(arms):

        def step(part: int, done: float = 0.0, number: int = number, arm: str = arm) -> None:
            progress("profile-alignment", number * _PARTS + part + done, len(arms) * _PARTS)

        step(0)
        path = profile_folder(run) / f"{arm}.json"
        write_json(path, _profile(recipe, run, arm, step))
        found[arm] = read_json(path)  # as JSON has it: no NaN
        step(_PARTS)
    return found


def _profile(recipe: Recipe, run: Path, arm: str, step: Any) -> dict[str, Any]:
    seed = recipe.seeds[0]
    seed_everything(derive_seed(seed, "profile"))
    setting = open_setting(recipe, run, arm, seed)
    figures: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "teachers": setting.arm.teachers,
        "placebo": setting.arm.placebo,
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "shapes": shape_figures(setting, BATCHES),
        "parameters": parameter_figures(setting),
    }
    step(1)
    figures["numbers"] = number_figures(setting, BATCHES)
    step(2)
    if figures["numbers"]["first_non_finite"] is None:
        figures["match"] = match_figures(setting, lambda done: step(2, 2 * done))
    else:  # a fit of NaN is a NaN
        figures["match"] = {"skipped": "there are non-finite values: see numbers"}
    step(4)
    figures["step"] = step_figures(setting, STEPS)  # last: it may leave gradients behind
    return figures


def refuse_broken_targets(recipe: Recipe, run: Path, arms: Sequence[str]) -> None:
    """Raise ModelError for the first teacher of these arms whose stored keys or values are not all finite."""
    for name in dict.fromkeys(teacher for arm in arms for teacher in arm_recipe(recipe, arm).teachers):
        found = first_broken_target(recipe, run, name)
        if found is not None:
            what = {"k": "keys", "v": "values", "q": "queries"}[found["what"]]
            raise ModelError(
                f"its {what}, as captured, are not all finite: {found['count']:,} values in layer {found['layer']} of "
                f"example {found['example']} are not",
                place=f"teacher {name}",
                fix="look at its weights and dtype (fp16 ends at 65,504) and at capture.dtype; then use a new run_dir",
            )


__all__ = ["profile_alignment", "refuse_broken_targets"]
