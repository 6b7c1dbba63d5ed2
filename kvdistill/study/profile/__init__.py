"""What `kvdistill profile-alignment` finds out about an arm before anything is trained, and where it is written.

    shapes.py    sizes, maps, tokens with something behind them, parameters, bytes in the store
    numbers.py   largest values, dead channels, non-finite values, stage by stage: where a NaN would come from
    matching.py  match figures at the start, and what a closed-form map reaches; the same for mismatched texts
    timing.py    time and memory of a step, and of a step without teachers

Reads what prepare, capture and fit left; writes `profile/ARM.json` and nothing else. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kvdistill.arms.experiment import Experiment
from kvdistill.core.errors import ModelError
from kvdistill.core.files import read_json, write_json
from kvdistill.core.layout import profile_folder
from kvdistill.core.progress import Progress, silent
from kvdistill.core.runtime import derive_seed, seed_everything
from kvdistill.study.profile.matching import match_figures
from kvdistill.study.profile.numbers import first_broken_target, number_figures
from kvdistill.study.profile.shapes import parameter_figures, shape_figures
from kvdistill.study.profile.timing import step_figures

STEPS = 7  # timed steps: an odd number has a median that was measured
BATCHES = 2  # of training, for shapes and numbers
_PARTS = 5


def profile_alignment(
    experiment: Experiment, arms: Sequence[str], progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """Profile these arms (each needs KV) with the recipe's first seed. By arm: what its file holds.

    Raises StoreError where targets or fits are missing.
    """
    found: dict[str, dict[str, Any]] = {}
    seed = experiment.recipe.seeds[0]
    for number, name in enumerate(arms):

        def step(part: int, parts: int = 0, done: float = 0.0, *, number: int = number) -> None:
            progress("profile-alignment", number * _PARTS + part + parts * done, len(arms) * _PARTS)

        step(0)
        seed_everything(derive_seed(seed, "profile"))
        arm = experiment.arm(name, seed)
        arm.distiller.eval()
        figures: dict[str, Any] = {
            "arm": name,
            "seed": seed,
            "teachers": arm.recipe.teachers,
            "placebo": arm.recipe.placebo,
            "device": str(arm.device),
            "threads": torch.get_num_threads(),
            "shapes": shape_figures(arm, BATCHES),
            "parameters": parameter_figures(arm),
        }
        step(1)
        figures["numbers"] = number_figures(arm, BATCHES)
        step(2)
        if figures["numbers"]["first_non_finite"] is None:
            figures["match"] = match_figures(arm, partial(step, 2, 2))
        else:  # a fit of NaN is a NaN
            figures["match"] = {"skipped": "there are non-finite values: see numbers"}
        step(4)
        figures["step"] = step_figures(arm, STEPS)  # last: it may leave gradients behind
        path = profile_folder(experiment.run) / f"{name}.json"
        write_json(path, figures)
        found[name] = read_json(path)  # as JSON has it: no NaN
        step(_PARTS)
    return found


def refuse_broken_targets(experiment: Experiment, arms: Sequence[str]) -> None:
    """Raise ModelError for the first teacher of these arms whose stored keys or values are not all finite."""
    for name in dict.fromkeys(teacher for arm in arms for teacher in experiment.arms[arm].teachers):
        found = first_broken_target(experiment.teachers[name])
        if found is not None:
            what = {"k": "keys", "v": "values", "q": "queries"}[found["what"]]
            raise ModelError(
                f"its {what}, as captured, are not all finite: {found['count']:,} values in layer {found['layer']} of "
                f"example {found['example']} are not",
                place=f"teacher {name}",
                fix="look at its weights and dtype (fp16 ends at 65,504) and at capture.dtype; then use a new run_dir",
            )


__all__ = ["profile_alignment", "refuse_broken_targets"]
