"""What a study still has to do: a recipe and what lies in its run folder in, a graph of jobs out.

    prepare ─▶ check ─▶ teach:T ─▶ map-layers ─▶ capture:T ─▶ fit:A:S ─▶ train:A:S ─▶ evaluate:A:S ─▶ report
                           └─────────────────▶ write:T ──────────────────────┘

Where arms are tuned, try:A@tuneN:S of every trial, with fits of its own, and tune come before every train.
Where each seed has data of its own (`replicate`), there are prepare:S, check:S, map-layers:S and capture:T:S; where it
has teachers of its own, teach:T:S, map-layers:S and capture:T:S.

Pure but for reading marks. `run`, a dry run, the verbs of single stages and every launcher read
the same graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import continued, read_budgets
from kvdistill.core.config import asked_hash
from kvdistill.core.layout import arm_folder, evaluated_mark
from kvdistill.core.marks import read_mark
from kvdistill.core.recipe import UNTRAINED, ArmRecipe, Recipe
from kvdistill.core.tuning import trials_of
from kvdistill.stages.table import STAGES, Job, is_done, is_tuned

STUDY = ("teach", "evaluate", "report")  # what a whole study is after; everything else only comes before it
Runs = Sequence[tuple[str, int]]


def plan(
    recipe: Recipe, run: Path, goals: Collection[str] = STUDY, *, before: bool = True, runs: Runs | None = None
) -> list[Job]:
    """The jobs that are left to do, each after those it waits for.

    goals: verbs whose jobs are wanted.
    before: with all that must be done before; else the user has done that, and only the check of the models and the
        maps of layers come first.
    runs: arms with seeds; unset: those that are not evaluated.
    """
    whole = runs is None
    if runs is None:
        runs = [(a, s) for s in recipe.seeds for a in recipe.every_arm]
        runs = [pair for pair in runs if not is_evaluated(recipe, run, *pair)]
    arms = {name: arm_recipe(recipe, name) for name in recipe.every_arm}
    for name, planned in read_budgets(run).items():  # steps of arms that are matched, once they are known
        if name in arms and arms[name].match is not None:
            train = arms[name].train.model_copy(update={"steps": planned["steps"]})
            arms[name] = arms[name].model_copy(update={"train": train})
    trying: list[tuple[str, int]] = []  # trials of arms that are tuned, until values are chosen
    if recipe.tune is not None and runs and not is_tuned(recipe, run):
        arms |= {name: trial.recipe for name, trial in trials_of(recipe).items()}
        trying = [(name, seed) for seed in recipe.tune.seeds for name in arms if name not in recipe.every_arm]
    used = {name for arm, _ in [*runs, *trying] for name in arms[arm].reads}
    writers = {name for arm, _ in [*runs, *trying] for name in arms[arm].writers}
    maps = any(a.needs_kv and a.align.layers == "cka" and a.align.layer_map is None for a in arms.values())
    of_runs = recipe.seeds if whole else dict.fromkeys(s for _, s in runs)
    seeds: list[dict[str, Any]] = [{"seed": s} for s in dict.fromkeys([*of_runs, *(s for _, s in trying)])]
    # what there is once for all seeds, or for each
    of_data = seeds if recipe.varies_data else [{}]
    of_teachers = seeds if recipe.varies_teachers else [{}]
    of_targets = seeds if recipe.varies_data or recipe.varies_teachers else [{}]
    goes_on_from = continued(recipe, arms)
    about: dict[str, list[dict[str, Any]]] = {
        "prepare": [{}, *(seeds if recipe.varies_data else ())],
        "check": of_data,
        "teach": [{"teacher": t.name, **one} for one in of_teachers for t in recipe.teachers if t.scratch is not None],
        "write": [{"teacher": t.name, **one} for one in of_targets for t in recipe.teachers if t.name in writers],
        "map-layers": of_targets if maps or "map-layers" in goals else [],
        "capture": [
            {"teacher": name, **one}
            for one in of_targets
            for t in recipe.teachers
            for name in (t.name, t.name + UNTRAINED)
            if name in used
        ],
        "fit": [{"arm": arm, "seed": seed} for arm, seed in [*trying, *runs] if arms[arm].teachers],
        "try": [{"arm": arm, "seed": seed} for arm, seed in trying],
        "tune": [{}] if trying else [],
        "train": [{"arm": arm, "seed": seed} for arm, seed in runs],
    }
    about["evaluate"] = about["train"]
    tunes = {"try", "tune"} if {"train", "tune"} & {*goals} else {*()}
    allowed = STAGES if before else {*goals, *tunes, "check", "map-layers"}
    jobs: dict[str, Job] = {}
    for verb, stage in STAGES.items():
        for mine in about.get(verb, [{}]) if verb in allowed else []:
            after = [job.id for job in jobs.values() if job.verb in stage.needs and _waits(verb, mine, job, arms)]
            shorter = goes_on_from.get(str(mine.get("arm")))
            if verb == "train" and shorter is not None:
                after += [f"train:{shorter}:{mine['seed']}"] if f"train:{shorter}:{mine['seed']}" in jobs else []
            identity = ":".join([verb, *map(str, mine.values())])
            mark = None if stage.mark is None else stage.mark(run, **mine).relative_to(run).as_posix()
            cost = stage.cost(recipe, **mine | ({"arm": arms[mine["arm"]]} if "arm" in mine else {}))
            if verb == "train" and shorter is not None and f"train:{shorter}:{mine['seed']}" in after:
                cost = max(0.0, cost - stage.cost(recipe, **mine | {"arm": arms[shorter]}))
            jobs[identity] = Job(identity, verb, {"run": str(run), **mine}, tuple(after), cost, mark)
    return _left_to_do(list(jobs.values()), recipe, goals)


def _waits(verb: str, mine: Mapping[str, Any], job: Job, arms: Mapping[str, ArmRecipe]) -> bool:
    """Whether a job of `verb` about `mine` (a teacher; an arm and a seed) waits for this one, of a verb that it needs:
    of the same arm and seed, and of a teacher whose targets, or solutions, it reads."""
    about = job.arguments
    alike = all(mine.get(key, about[key]) == about[key] for key in ("arm", "seed") if key in about)
    if not (alike or verb == "check"):  # the data of all seeds is known to be good before anything is trained
        return False
    if "arm" in mine:
        arm = arms[mine["arm"]]
        return about.get("teacher") in (None, *(arm.writers if job.verb == "write" else arm.reads))
    return "teacher" not in mine or about.get("teacher") in (None, mine["teacher"])


def is_evaluated(recipe: Recipe, run: Path, arm: str, seed: int) -> bool:
    """Whether a student's answers to what the recipe asks are there."""
    mark = read_mark(evaluated_mark(arm_folder(run, arm, seed)))
    return mark is not None and mark.get("asked") == asked_hash(recipe)


def _left_to_do(jobs: Sequence[Job], recipe: Recipe, goals: Collection[str]) -> list[Job]:
    """Without the jobs whose mark is there, and those that no wanted job waits for any more."""
    kept: list[Job] = []
    awaited: set[str] = set()
    for job in reversed(jobs):
        if (job.verb in goals or job.id in awaited) and not is_done(job, recipe):
            kept.append(job)
            awaited |= {*job.after}
    there = {job.id for job in kept}
    return [replace(job, after=tuple(other for other in job.after if other in there)) for job in reversed(kept)]
