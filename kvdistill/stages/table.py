"""The one table of stages: verb -> function, what a job of it is about, what comes before it, its cost and its mark.

    prepare ─▶ check ─▶ teach ─▶ map-layers ─▶ capture ─▶ fit ─▶ train ─▶ evaluate ─▶ report
                          └───────────────────▶ write ──────────────┘

Where arms are tuned, `try` (a training under other values, with a tuning seed) and `tune` (the choice) come before
train.

A study is a graph of `Job`s (`study/plan.py`). Whoever does one, a pool of workers, a rehearsal or a launcher, calls
`perform`. Importing this loads no stage and no torch; a job's stage is imported when it is done.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.config import asked_hash
from kvdistill.core.layout import (
    arm_folder,
    evaluated_mark,
    file_lock,
    locks_folder,
    replicate_folder,
    teacher_folder,
    trained_mark,
    written_folder,
    written_mark,
)
from kvdistill.core.marks import read_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.tuning import read_tuned, tuned_path


@dataclass(frozen=True)
class Job:
    """One call of a stage, as plain data: strings and numbers, so that JSON can carry it.

    id: `VERB`, `VERB:TEACHER` or `VERB:ARM:SEED`; `VERB:SEED`, `VERB:TEACHER:SEED` of what each seed has of its own.
    arguments: `run`, the folder, and what the job is about: `teacher`, `arm`, `seed`.
    after: ids of the jobs that must be done before.
    cost: for order and the time to go; about one training step of a student without teachers, of the recipe's size.
    mark: a file below the run folder that says it is done; None where the stage looks for itself.
    """

    id: str
    verb: str
    arguments: Mapping[str, str | int]
    after: tuple[str, ...]
    cost: float
    mark: str | None


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    function: `module:name`, called with what it takes and `progress`.
    needs: verbs whose jobs, of the same teacher, arm and seed, come first.
    cost: of a job, from the recipe and what the job is about (an arm as its own complete recipe).
    about: `teacher`, or `arm` and `seed`; and a `seed` where each has data or teachers of its own.
    takes: `recipe` (and the run folder, and the seed), the `experiment` that these make, or its `teacher` or `arm` of
        the job.
    mark: from the run folder and what the job is about. alone: its jobs share folders, so one is done at a time.
    """

    function: str
    needs: tuple[str, ...]
    cost: Callable[..., float]
    about: tuple[str, ...] = ()
    mark: Callable[..., Path] | None = None
    alone: bool = False
    takes: Literal["recipe", "experiment", "teacher", "arm"] = "recipe"


ARM = ("arm", "seed")
STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "kvdistill.stages.table:prepare", ("prepare",), lambda recipe, seed=None: 10 + recipe.data.num_learned / 200
    ),
    "check": Stage("kvdistill.stages.table:check", ("prepare",), lambda recipe, seed=None: 10.0, takes="experiment"),
    "teach": Stage(
        "kvdistill.stages.train:train_teacher",
        ("check",),
        lambda recipe, teacher, seed=None: float(next(t.optimiser.steps for t in recipe.teachers if t.name == teacher)),
        about=("teacher",),
        mark=lambda run, teacher, seed=None: trained_mark(
            teacher_folder(run if seed is None else replicate_folder(run, seed), teacher)
        ),
        takes="teacher",
    ),
    "write": Stage(
        "kvdistill.stages.write:write",
        ("check", "teach"),
        lambda recipe, teacher, seed=None: 5 + recipe.write.per_question * _num_asked(recipe) / recipe.train.batch_size,
        about=("teacher",),
        mark=lambda run, teacher, seed=None: written_mark(
            written_folder(run if seed is None else replicate_folder(run, seed), teacher)
        ),
        takes="teacher",
    ),
    "map-layers": Stage(
        "kvdistill.stages.layers:map_layers",
        ("check", "teach"),
        lambda recipe, seed=None: 5.0 * len(recipe.teachers),
        takes="experiment",
    ),
    "capture": Stage(
        "kvdistill.stages.capture:capture",
        ("check", "teach", "map-layers"),
        lambda recipe, teacher, seed=None: 5 + recipe.data.num_learned / (3 * recipe.train.batch_size),
        about=("teacher",),
        takes="teacher",
    ),
    "fit": Stage(
        "kvdistill.stages.fit:fit",
        ("check", "map-layers", "capture"),
        lambda recipe, arm, seed: 1 + arm.align.calibration_examples / recipe.train.batch_size / 3,
        about=ARM,
        takes="arm",
        alone=True,  # arms and seeds that align alike share a fit
    ),
    "try": Stage(
        "kvdistill.stages.tune:try_values",
        ("check", "write", "fit"),
        lambda recipe, arm, seed: _training_cost(recipe, arm),
        about=ARM,
        takes="arm",
        mark=lambda run, arm, seed: trained_mark(arm_folder(run, arm, seed)),
    ),
    "tune": Stage(
        "kvdistill.stages.tune:choose_values",
        ("check", "try"),
        lambda recipe: 1.0,
        takes="experiment",
        mark=tuned_path,
    ),
    "train": Stage(
        "kvdistill.stages.train:train_student",
        ("check", "write", "fit", "tune"),
        lambda recipe, arm, seed: _training_cost(recipe, arm),
        about=ARM,
        takes="arm",
        mark=lambda run, arm, seed: trained_mark(arm_folder(run, arm, seed)),
    ),
    "evaluate": Stage(
        "kvdistill.stages.evaluate:evaluate",
        ("check", "train"),
        lambda recipe, arm, seed: 0.05 * recipe.train.steps,
        about=ARM,
        takes="arm",
        mark=lambda run, arm, seed: evaluated_mark(arm_folder(run, arm, seed)),
    ),
    "report": Stage("kvdistill.stages.report:report", ("evaluate",), lambda recipe: 10.0),
}


def _training_cost(recipe: Recipe, arm: ArmRecipe) -> float:
    """Of a student, in steps of the recipe's size without teachers."""
    return (
        arm.train.steps
        * (arm.train.batch_size * arm.train.accumulation / (recipe.train.batch_size * recipe.train.accumulation))
        * (1 + 0.25 * len(arm.teachers) if arm.needs_kv or arm.needs_logits else 1.0)
    )


def _num_asked(recipe: Recipe) -> int:
    """About how many questions a teacher is asked for solutions."""
    counts = (getattr(task, recipe.write.questions) for task in recipe.data.tasks)
    return sum(min(count, recipe.write.limit or count) for count in counts)


def is_done(job: Job, recipe: Recipe) -> bool:
    """Whether a job's mark is there; of an evaluation, whether it asked what the recipe asks now; of tuning, whether
    the values of all arms are chosen."""
    run = Path(str(job.arguments["run"]))
    mark = None if job.mark is None else read_mark(run / job.mark)
    if mark is None or job.verb not in ("evaluate", "tune"):
        return mark is not None
    return is_tuned(recipe, run) if job.verb == "tune" else mark.get("asked") == asked_hash(recipe)


def is_tuned(recipe: Recipe, run: Path) -> bool:
    """Whether values are chosen for every arm that is to be tuned."""
    chosen = read_tuned(run)
    return all(name in chosen for name in recipe.arms if recipe.tuned_as(name) == name)


def perform(job: Job, recipe: Recipe, progress: Progress = silent) -> None:
    """Do a job in this process. Where another process is at it, wait for that one, and see then whether it is done.

    Raises KVDistillError for whatever a user can mend.
    """
    stage, run = STAGES[job.verb], Path(str(job.arguments["run"]))
    if job.verb == "prepare":
        progress = _prepare_progress(progress)
    module, _, name = stage.function.partition(":")
    lock = locks_folder(run) / (job.verb if stage.alone else job.id)
    at_work = file_lock(locks_folder(run) / "working", wait=True, shared=True)  # for as long as we live
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # of a torchrun: training has one lock for all, held by the first
    with at_work, file_lock(lock, wait=True) if ranks == 1 else nullcontext():
        if ranks > 1 or not is_done(job, recipe):
            function, said = getattr(importlib.import_module(module), name), job.arguments.get("seed")
            seed = None if said is None else int(said)
            if stage.takes == "recipe":
                function(recipe, run, progress=progress, **({} if seed is None else {"seed": seed}))
                return
            from kvdistill.arms.experiment import Experiment  # imports torch

            subject: Any = Experiment(recipe, run).of(seed)
            if stage.takes == "teacher":
                subject = subject.teacher(str(job.arguments["teacher"]))
            elif stage.takes == "arm":
                subject = subject.arm(str(job.arguments["arm"]), seed)
            function(subject, progress=progress)


def prepare(recipe: Recipe, run: Path, progress: Progress = silent, seed: int | None = None) -> None:
    """The data, of all seeds or of one; before all, what is wrong with models whatever the data says."""
    from kvdistill.arms.checks import check_sizes
    from kvdistill.stages.prepare import prepare as prepare_data

    if seed is None:
        check_sizes(recipe, run)
    prepare_data(recipe, run, progress, seed=seed)


def check(experiment: Any, progress: Progress = silent) -> None:
    """Models, the data of public evaluations, and the budgets of all arms: before anything is trained."""
    from kvdistill.arms.checks import check_models

    check_models(experiment, progress)
    if experiment.recipe.evaluate.tasks:
        from kvdistill.stages.evaluate import check_public

        check_public(experiment.recipe, experiment.run)
    from kvdistill.arms.budget import TrainingBudgetController

    TrainingBudgetController(experiment).write()


def _prepare_progress(progress: Progress) -> Progress:
    """The phases of `prepare` as one bar."""
    parts = {"loading tasks": 0.2, "reading evaluations": 0.3, "checking for leaks": 0.2, "encoding train": 0.2}
    rest = (1 - sum(parts.values())) / 3  # encoding of the other splits
    begins: dict[str, float] = {}

    def report(what: str, done: float, total: float) -> None:
        part = parts.get(what, rest)
        begin = begins.setdefault(what, sum(parts.get(earlier, rest) for earlier in begins))
        progress("prepare", min(1.0, begin + part * done / total) if total else begin, 1.0)

    return report
