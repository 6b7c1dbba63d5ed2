"""The whole study, locally: every stage in the order of the data, skipping what is finished.

    prepare ─▶ teachers (those trained on the spot) ─▶ capture ─▶ fit ─▶ train + evaluate, arms × seeds ─▶ report

Stages meet on disk only; this file decides what runs when, and never touches a tensor (it does not import torch).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvdistill.core.config import arm_recipe, recipe_hash, run_folder
from kvdistill.core.errors import RecipeError, RunFolderError
from kvdistill.core.files import read_json, sha256_of, write_json
from kvdistill.core.layout import (
    arm_folder,
    data_folder,
    evaluated_mark,
    folder_lock,
    teacher_folder,
    trained_mark,
)
from kvdistill.core.progress import Progress
from kvdistill.core.provenance import machine_facts, package_versions
from kvdistill.core.recipe import Recipe
from kvdistill.workers import Job, Workers, num_workers, stage_function

# sections a finished model depends on: a run folder made with others is refused
_BASE = ("data", "teachers", "student", "capture", "train")


def run_study(recipe: Recipe, progress: Progress, *, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run every stage (or the named ones) and return what the command prints: folder, seconds, files.

    Raises KVDistillError for whatever a user can mend; what is finished stays.
    """
    run = run_folder(recipe)
    begun_wall, begun_cpu = time.time(), time.process_time()
    claim_run_folder(recipe, run)
    with folder_lock(run, wait=False):
        if not stages and is_finished(recipe, run):
            return {**result_of(run), "already_finished": True}
        try:
            run_waves(
                recipe, [(n, jobs) for n, jobs in plan(recipe, run) if jobs and (not stages or n in stages)], progress
            )
        finally:  # a call that was interrupted counts too
            add_provenance(run, begun_wall, begun_cpu)
        if not stages or "report" in stages:
            from kvdistill.report import report

            report(recipe, run, progress=progress)
        if not stages:
            write_json(run / "study.json", {"recipe": study_hash(recipe), "finished": True})
        return result_of(run)


def run_waves(recipe: Recipe, waves: list[tuple[str, list[Job]]], progress: Progress) -> None:
    """One wave after another on one pool of workers."""
    if not waves:
        return
    widest = max(len(jobs) for _, jobs in waves)
    workers = num_workers(recipe.hardware.workers, widest, recipe.hardware.device)
    with Workers(workers, recipe.hardware.threads) as pool:
        for name, jobs in waves:
            pool.run(jobs, progress, f"{recipe.name}: {name}")


def plan(recipe: Recipe, run: Path) -> list[tuple[str, list[Job]]]:
    """The waves of jobs that are not done yet, in order."""
    waves: list[tuple[str, list[Job]]] = []
    waves.append(("prepare", [Job("prepare", "prepare", (recipe, run), 1.0)]))
    teachers = [
        Job(f"teacher {t.name}", "train_teacher", (recipe, run, t.name), float(t.optimiser.steps))
        for t in recipe.teachers
        if t.scratch is not None and not trained_mark(teacher_folder(run, t.name)).exists()
    ]
    waves.append(("teachers", teachers))
    runs = [(arm, seed) for seed in recipe.seeds for arm in recipe.arms]
    todo = [pair for pair in runs if not evaluated_mark(arm_folder(run, *pair)).exists()]
    used = {name for arm, _ in todo for name in arm_recipe(recipe, arm).teachers}
    captured = [
        Job(f"capture {t.name}", "capture", (recipe, run, t.name), 1.0) for t in recipe.teachers if t.name in used
    ]
    waves.append(("capture", captured))
    fits = [(arm, seed) for arm, seed in todo if arm_recipe(recipe, arm).teachers]
    waves.append(("fit", [Job("fit", "fit", (recipe, run, fits), 1.0)] if fits else []))
    students = [
        Job(f"{arm} seed {seed}", "student", (recipe, run, arm, seed), _student_cost(recipe, arm)) for arm, seed in todo
    ]
    waves.append(("students", sorted(students, key=lambda job: -job.cost)))
    return waves


def _student_cost(recipe: Recipe, arm: str) -> float:
    made = arm_recipe(recipe, arm)
    terms = (1 + 0.25 * len(made.teachers)) if made.needs_kv or made.needs_logits else 1.0
    return recipe.train.steps * terms


# -- whose folder is this? ----------------------------------------------------------------------------


def study_hash(recipe: Recipe) -> str:
    return recipe_hash(recipe)


def arm_hash(recipe: Recipe, arm: str) -> str:
    """Hash of everything that one arm's model depends on."""
    tree = recipe.model_dump(mode="json", include=set(_BASE))
    return sha256_of({**tree, "arm": arm_recipe(recipe, arm).model_dump(mode="json")})


def claim_run_folder(recipe: Recipe, run: Path) -> None:
    """Write `recipe.json`, or refuse a folder whose models were made by another recipe. New arms and seeds are welcome."""
    path = run / "recipe.json"
    mine = recipe.model_dump(mode="json")
    if path.exists():
        theirs = read_json(path)
        differing = _first_difference(_base_of(theirs), _base_of(mine))
        for arm in recipe.arms:
            if differing is None and arm in theirs.get("arms", {}):
                old = Recipe.model_validate(theirs)
                if arm_recipe(old, arm) != arm_recipe(recipe, arm) and list((run / "arms" / arm).glob("seed-*")):
                    differing = f"arms.{arm}"
        if differing is not None:
            raise RunFolderError(
                f"this run folder was made with another recipe: {differing} differs",
                place=str(run),
                fix="give another folder (run_dir=…), or delete this one to start over",
            )
        if theirs == mine:
            return
    elif run.exists() and any(entry.name != ".lock" for entry in run.iterdir()):
        raise RunFolderError(
            "this folder holds files but no recipe.json",
            place=str(run),
            fix="give an empty or new folder with run_dir=…",
        )
    write_json(path, mine)


def _base_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    base = {key: tree.get(key) for key in _BASE}
    base["data"] = {k: v for k, v in (base["data"] or {}).items() if k != "root"}  # where a copy lies changes nothing
    return base


def _first_difference(old: Any, new: Any, where: str = "") -> str | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    if old == new:
        return None
    return f"{where} ({json.dumps(old, ensure_ascii=False)[:60]} there, {json.dumps(new, ensure_ascii=False)[:60]} now)"


def is_finished(recipe: Recipe, run: Path) -> bool:
    mark = run / "study.json"
    if not mark.exists() or not (run / "report.html").exists() or not (run / "summary.json").exists():
        return False
    if read_json(mark).get("recipe") != study_hash(recipe) or not (data_folder(run) / "manifest.json").exists():
        return False
    return all(evaluated_mark(arm_folder(run, arm, seed)).exists() for arm in recipe.arms for seed in recipe.seeds)


def result_of(run: Path) -> dict[str, Any]:
    """What a finished study shows: where the page is, and the summary."""
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    return {"run": str(run), "page": str(run / "report.html"), "summary": summary}


def add_provenance(run: Path, begun_wall: float, begun_cpu: float) -> None:
    """Versions, machine, command, and the seconds of all calls so far, added up over resumptions."""
    import resource

    path = run / "provenance.json"
    before = read_json(path) if path.exists() else {}
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() - begun_cpu + children.ru_utime + children.ru_stime
    recipe = read_json(run / "recipe.json")
    write_json(
        path,
        {
            "recipe_sha256": sha256_of(recipe),
            "versions": package_versions(),
            "machine": machine_facts(),
            "command": " ".join(["kvdistill", *sys.argv[1:]]),
            "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(begun_wall))),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": before.get("seconds", 0.0) + time.time() - begun_wall,
            "cpu_seconds": before.get("cpu_seconds", 0.0) + cpu,
        },
    )


# -- single runs ----------------------------------------------------------------------------------------


def train_runs(recipe: Recipe, progress: Progress, *, arm: str | None, seed: int | None) -> dict[str, Any]:
    """Train the students of all (or the chosen) arms and seeds. One run in this process when both are named."""
    return _chosen_runs(recipe, progress, "train_student", arm, seed)


def evaluate_runs(recipe: Recipe, progress: Progress, *, arm: str | None, seed: int | None) -> dict[str, Any]:
    return _chosen_runs(recipe, progress, "evaluate", arm, seed)


def _chosen_runs(recipe: Recipe, progress: Progress, verb: str, arm: str | None, seed: int | None) -> dict[str, Any]:
    run = run_folder(recipe)
    if arm is not None:
        arm_recipe(recipe, arm)  # names the nearest arm where there is no such
    if seed is not None and seed not in recipe.seeds:
        raise RecipeError(f"seed {seed} is not in the recipe", place="--seed", fix=f"one of {recipe.seeds}")
    claim_run_folder(recipe, run)
    chosen = [(a, s) for s in recipe.seeds for a in recipe.arms if arm in (None, a) and seed in (None, s)]
    if arm is not None and seed is not None:  # in this process: also one rank of a torchrun
        stage_function(verb)(recipe, run, arm, seed, progress=progress)
    else:
        with folder_lock(run, wait=False):
            jobs = [Job(f"{a} seed {s}", verb, (recipe, run, a, s), 1.0) for a, s in chosen]
            run_waves(recipe, [(verb.replace("_", " "), jobs)], progress)
    return {"run": str(run), "finished": [f"{a} seed {s}" for a, s in chosen]}
