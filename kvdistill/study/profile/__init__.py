"""What `kvdistill profile-alignment` finds out about an arm before anything is trained, and where it is written.

    shapes.py    sizes, maps, tokens with something behind them, parameters, bytes in the store
    numbers.py   largest values, dead channels, non-finite values, stage by stage: where a NaN would come from;
                 what share of the gradient each term has, and the weight that would be right for it
    matching.py  match figures at the start, and what a closed-form map reaches; the same for mismatched texts
    timing.py    time and memory of a step, and of a step without teachers

Reads what prepare, capture and fit left; writes `profile/ARM.json` and nothing else. Trains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kvdistill.arms.arm import Arm
from kvdistill.arms.experiment import Experiment
from kvdistill.core.errors import ModelError
from kvdistill.core.files import read_json, write_json
from kvdistill.core.layout import profile_folder
from kvdistill.core.progress import Progress, silent
from kvdistill.core.runtime import derive_seed, seed_everything
from kvdistill.study.profile.matching import match_figures, num_texts
from kvdistill.study.profile.numbers import first_broken_target, number_figures
from kvdistill.study.profile.shapes import parameter_figures, shape_figures
from kvdistill.study.profile.timing import num_steps_in_all, num_timed, step_figures

STEPS = 7  # timed steps at most: an odd number has a median that was measured
PASSES_PER_STEP = 3
BATCHES = 2  # of training, for shapes and numbers


def profile_alignment(
    experiment: Experiment, arms: Sequence[str], progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """Profile these arms (each needs KV) with the recipe's first seed. By arm: what its file holds.

    Raises StoreError where targets or fits are missing.
    """
    found: dict[str, dict[str, Any]] = {}
    seed = experiment.recipe.seeds[0]
    for number, name in enumerate(arms):
        seed_everything(derive_seed(seed, "profile"))
        arm = experiment.arm(name, seed)
        work = _work(arm, STEPS)

        def step(part: str, done: float = 0.0, *, number: int = number, work: dict[str, float] = work) -> None:
            """So much of this part is done, and all of the parts before it."""
            before = sum(list(work.values())[: list(work).index(part)])
            share = (before + work[part] * done) / sum(work.values())
            progress("profile-alignment", number + share, float(len(arms)))

        step("shapes")
        arm.distiller.eval()
        figures: dict[str, Any] = {
            "arm": name,
            "seed": seed,
            "teachers": arm.recipe.teachers,
            "control": arm.recipe.control,
            "device": str(arm.device),
            "threads": torch.get_num_threads(),
            "shapes": shape_figures(arm, BATCHES),
            "parameters": parameter_figures(arm),
        }
        step("numbers")
        begun = time.perf_counter()
        figures["numbers"] = number_figures(arm, BATCHES)
        step_s = (time.perf_counter() - begun) * PASSES_PER_STEP * arm.recipe.train.batch_size
        num_steps = num_timed(step_s / work["numbers"], STEPS)
        work |= _work(arm, num_steps)
        step("match")
        if figures["numbers"]["first_non_finite"] is None:
            figures["match"] = match_figures(arm, partial(step, "match"))
        else:  # a fit of NaN is a NaN
            figures["match"] = {"skipped": "there are non-finite values: see numbers"}
        figures["step"] = step_figures(arm, num_steps, partial(step, "step"))  # last: it may leave gradients behind
        path = profile_folder(experiment.run) / f"{name}.json"
        write_json(path, figures)
        found[name] = read_json(path)  # as JSON has it: no NaN
        step("step", 1.0)
    return found


def _work(arm: Arm, num_steps: int) -> dict[str, float]:
    """What each part takes, in passes of one text through the student (a backward pass is two): for the time to go."""
    size, teachers = arm.recipe.train.batch_size, len(arm.recipe.teachers)
    fit_texts, held_out = num_texts(arm)
    return {
        "shapes": BATCHES * size,
        "numbers": BATCHES * size * (1 + PASSES_PER_STEP + 2 * (1 + teachers)),  # a gradient for every share
        "match": 2 * teachers * (fit_texts + held_out),
        "step": num_steps_in_all(arm, num_steps) * size * PASSES_PER_STEP,
    }


def refuse_broken_targets(experiment: Experiment, arms: Sequence[str]) -> None:
    """Raise ModelError for the first teacher of these arms whose stored keys or values are not all finite."""
    for name in dict.fromkeys(name for arm in arms for name in experiment.arms[arm].reads):
        found = first_broken_target(experiment.teacher(name))
        if found is not None:
            what = {"k": "keys", "v": "values", "q": "queries"}[found["what"]]
            raise ModelError(
                f"its {what}, as captured, are not all finite: {found['count']:,} values in layer {found['layer']} of "
                f"example {found['example']} are not",
                place=f"teacher {name}",
                fix="look at its weights and dtype (fp16 ends at 65,504) and at capture.dtype; then use a new run_dir",
            )


__all__ = ["profile_alignment", "refuse_broken_targets"]
