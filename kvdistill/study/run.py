"""The whole study, locally: every stage in the order of the data, skipping what is finished.

    prepare ─▶ teachers (those trained on the spot) ─▶ layers (where an arm maps them by similarity) ─▶ capture ─▶ fit
      ─▶ train + evaluate, arms × seeds ─▶ report

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
from kvdistill.core.errors import ModelError, RecipeError, RunFolderError
from kvdistill.core.files import read_json, sha256_of, write_json
from kvdistill.core.layout import (
    arm_folder,
    data_folder,
    evaluated_mark,
    folder_lock,
    layers_folder,
    profile_folder,
    teacher_folder,
    trained_mark,
)
from kvdistill.core.progress import Progress
from kvdistill.core.provenance import machine_facts, package_versions
from kvdistill.core.recipe import Recipe
from kvdistill.study.workers import Job, Workers, num_workers, prepare_process, stage_function

# sections a finished model depends on: a run folder made with others is refused
_BASE = ("data", "teachers", "student", "capture", "train", "evaluate")


def run_study(recipe: Recipe, progress: Progress, *, stages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run every stage (or the named ones) and return what the command prints: folder, seconds, files.

    Raises KVDistillError for whatever a user can mend; what is finished stays.
    """
    run = run_folder(recipe)
    begun_wall, begun_cpu = time.time(), time.process_time()
    check_run_folder(recipe, run)  # before the lock, which leaves a file behind
    with folder_lock(run, wait=False):
        claim_run_folder(recipe, run)
        if not stages and is_finished(recipe, run):
            return {**result_of(run), "already_finished": True}
        try:
            run_waves(recipe, _wanted(plan(recipe, run, stages), stages), progress)
        finally:  # a call that was interrupted counts too
            add_provenance(run, begun_wall, begun_cpu)
        if not stages or "report" in stages:
            from kvdistill.stages.report import report

            report(recipe, run, progress=progress)
        if not stages:
            write_json(run / "study.json", {"recipe": recipe_hash(recipe), "finished": True})
        if "layers" in stages:
            return {"run": str(run), "layers": layer_maps(recipe, run)}
        return result_of(run) | (data_table(run) if stages == ("prepare",) else {})


def validate_data(recipe: Recipe, progress: Progress, *, fix: bool = False) -> dict[str, Any]:
    """`kvdistill validate`: the leak report of the recipe's data, and the table of what is prepared."""
    from kvdistill.stages.prepare import REPORT, validate

    run = run_folder(recipe)
    check_run_folder(recipe, run)
    with folder_lock(run, wait=False):
        claim_run_folder(recipe, run)
        found = validate(recipe, run, progress, fix=fix)
    return {"run": str(run), **data_table(run), "leaks": found, "report": str(data_folder(run) / REPORT)}


def export_data(recipe: Recipe, progress: Progress, form: str) -> dict[str, Any]:
    """`kvdistill export`: the prepared splits as JSONL for other trainers."""
    from kvdistill.stages.prepare.export import export

    run = run_folder(recipe)
    if not (data_folder(run) / "manifest.json").exists():
        run_study(recipe, progress, stages=("prepare",))
    with folder_lock(run, wait=False):
        return {"run": str(run), "files": export(recipe, run, form, progress)}


def layer_maps(recipe: Recipe, run: Path) -> dict[str, Any]:
    """What `map-layers` left, by teacher: its file and figures, how many vectors were compared, and the map."""
    found: dict[str, Any] = {}
    for teacher in recipe.teachers:
        stem = layers_folder(run) / teacher.name
        file, *figures = (stem.with_name(stem.name + ending) for ending in (".json", ".png", ".svg"))
        measured = read_json(file)
        found[teacher.name] = {
            "file": str(file),
            "figures": [str(figure) for figure in figures],
            "compared": recipe.align.cka_on,
            "num_vectors": measured["num_vectors"],
            "layer_map": measured["layer_map"][recipe.align.cka_on],
            "similarity": measured["similarity"][recipe.align.cka_on],
        }
    return found


def map_layers(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """`kvdistill map-layers`: every teacher's layers beside the student's."""
    if not recipe.teachers:
        raise RecipeError("there is no teacher whose layers could be mapped", place="teachers", fix="name at least one")
    return run_study(recipe, progress, stages=("prepare", "teachers", "layers"))


def profile_alignment(recipe: Recipe, progress: Progress, *, arm: str | None) -> dict[str, Any]:
    """`kvdistill profile-alignment`: everything up to the fits, then the profile of all arms with KV (or of one).

    Arms without KV are skipped, and said. Only the first seed is looked at.
    """
    run = run_folder(recipe)
    if arm is not None:
        arm_recipe(recipe, arm)  # names the nearest arm where there is no such
    chosen = {name: arm_recipe(recipe, name) for name in recipe.arms if arm in (None, name)}
    profiled = [name for name, made in chosen.items() if made.needs_kv]
    skipped = {
        name: "it has no teachers" if not made.teachers else "loss.kv_weight is 0: nothing is aligned"
        for name, made in chosen.items()
        if not made.needs_kv
    }
    result: dict[str, Any] = {"run": str(run), "profiles": {}, "skipped": skipped}
    if not profiled:
        return result
    check_run_folder(recipe, run)
    with folder_lock(run, wait=False):
        claim_run_folder(recipe, run)
        waves = plan(recipe, run, wanted=[(name, recipe.seeds[0]) for name in profiled])
        run_waves(recipe, [(name, jobs) for name, jobs in waves if jobs and name not in ("fit", "students")], progress)
        prepare_process(recipe.hardware.threads)  # as a worker would be, for the same times
        from kvdistill.arms.experiment import Experiment
        from kvdistill.study.profile import profile_alignment as profile
        from kvdistill.study.profile import refuse_broken_targets

        try:
            run_waves(recipe, [(name, jobs) for name, jobs in waves if jobs and name == "fit"], progress)
        except RuntimeError:  # a fit of NaN fails in linear algebra: say where the NaN comes from
            refuse_broken_targets(Experiment(recipe, run), profiled)
            raise
        result["profiles"] = profile(Experiment(recipe, run), profiled, progress)
    return result | {"files": [str(profile_folder(run) / f"{name}.json") for name in profiled]}


def data_table(run: Path) -> dict[str, Any]:
    """Rows by task, style and split, and the fingerprint, of data that is prepared; else nothing."""
    path = data_folder(run) / "manifest.json"
    if not path.exists():
        return {}
    manifest = read_json(path)
    data = {"table": manifest["table"], "tasks": manifest["tasks"], "fingerprint": manifest["fingerprint"]}
    own = {file.parent.name: read_json(file) for file in sorted(path.parent.glob("teachers/*/manifest.json"))}
    data["teachers"] = {
        name: {"tokenizer": found["tokenizer"], "own_chains": not found["one_text"], "lost": found["lost"]}
        for name, found in own.items()
        if found["own_text"]
    }
    return {"data": data}


def _wanted(waves: list[tuple[str, list[Job]]], stages: tuple[str, ...]) -> list[tuple[str, list[Job]]]:
    """Waves with something to do, all or the named ones; whatever needs a model is preceded by the check."""
    named = {*stages, "check"} if {*stages} & {"teachers", "layers", "capture", "fit"} else {*stages}
    named |= {"layers"} if {"capture", "fit"} & named else set()  # which layers are captured depends on it
    return [(name, jobs) for name, jobs in waves if jobs and (not stages or name in named)]


def run_waves(recipe: Recipe, waves: list[tuple[str, list[Job]]], progress: Progress) -> None:
    """One wave after another on one pool of workers."""
    if not waves:
        return
    widest = max(len(jobs) for _, jobs in waves)
    workers = num_workers(recipe.hardware.workers, widest, recipe.hardware.device)
    with Workers(workers, recipe.hardware.threads) as pool:
        for name, jobs in waves:
            pool.run(jobs, progress, f"{recipe.name}: {name}")


def plan(
    recipe: Recipe, run: Path, stages: tuple[str, ...] = (), wanted: list[tuple[str, int]] | None = None
) -> list[tuple[str, list[Job]]]:
    """The waves of jobs that are not done yet, in order. Layers are mapped where an arm needs it, or when asked for.

    wanted: (arm, seed) runs to make targets and fits for; unset: those that are not finished.
    """
    waves: list[tuple[str, list[Job]]] = []
    waves.append(("prepare", [Job("prepare", "prepare", (recipe, run), 1.0)]))
    waves.append(("check", [Job("check", "check", (recipe, run), 1.0)]))
    teachers = [
        Job(f"teacher {t.name}", "train_teacher", (recipe, run, t.name), float(t.optimiser.steps))
        for t in recipe.teachers
        if t.scratch is not None and not trained_mark(teacher_folder(run, t.name)).exists()
    ]
    waves.append(("teachers", teachers))
    runs = [(arm, seed) for seed in recipe.seeds for arm in recipe.arms]
    todo = [pair for pair in runs if not evaluated_mark(arm_folder(run, *pair)).exists()] if wanted is None else wanted
    arms = [arm_recipe(recipe, arm) for arm in recipe.arms]
    maps_layers = any(a.needs_kv and a.align.layers == "cka" and a.align.layer_map is None for a in arms)
    mapped = [Job("map layers", "map_layers", (recipe, run), 1.0)] if maps_layers or "layers" in stages else []
    waves.append(("layers", mapped))
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


def claim_run_folder(recipe: Recipe, run: Path) -> None:
    """Write `recipe.json`, or refuse a folder whose models another recipe made. New arms and seeds are welcome."""
    check_run_folder(recipe, run)
    path, mine = run / "recipe.json", recipe.model_dump(mode="json")
    if not path.exists() or read_json(path) != mine:
        write_json(path, mine)


def check_run_folder(recipe: Recipe, run: Path) -> None:
    """Refuse, before anything is written, a folder that is not ours, and model folders that are not there."""
    _check_model_folders(recipe)
    path = run / "recipe.json"
    if path.exists():
        differing = _difference_from(read_json(path), recipe, run)
        if differing is not None:
            raise RunFolderError(
                f"this run folder was made with another recipe: {differing} differs",
                place=str(run),
                fix="give another folder (run_dir=…), or delete this one to start over",
            )
    elif run.exists() and (not run.is_dir() or any(entry.name != ".lock" for entry in run.iterdir())):
        what = "this folder holds files but no recipe.json" if run.is_dir() else "this is a file, not a folder"
        raise RunFolderError(what, place=str(run), fix="give an empty or new folder with run_dir=…")


def _check_model_folders(recipe: Recipe) -> None:
    """What can be seen without loading anything: folders given as paths exist. The rest is the `check` job's."""
    models = [("student", recipe.student.path)]
    models += [(f"teachers.{i} ({t.name})", t.path) for i, t in enumerate(recipe.teachers)]
    for place, given in models:
        if given is None or not (given.startswith((".", "/", "~")) or given.count("/") > 1):
            continue  # scratch, or what may be a hub id
        folder = Path(given).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{given} has no config.json" if folder.is_dir() else f"there is no folder {given}",
                place=f"{place}.path",
                fix="give a folder with config.json and *.safetensors, or a hub id like Qwen/Qwen2.5-0.5B",
            )


def _difference_from(theirs: Any, recipe: Recipe, run: Path) -> str | None:
    """The first key in which the folder's recipe differs where something that is there depends on it, or None.

    So a mistake that was found before the first model was trained can be mended in the recipe and run again.
    """
    sections = ["data"] if (data_folder(run) / "manifest.json").exists() else []
    if any((run / made).exists() for made in ("teachers", "store", "fit", "arms")):
        sections = list(_BASE)
    old_base, new_base = _base_of(theirs), _base_of(recipe.model_dump(mode="json"))
    differing = _first_difference({s: old_base[s] for s in sections}, {s: new_base[s] for s in sections})
    if differing is not None:
        return differing
    shared = [arm for arm in recipe.arms if arm in theirs.get("arms", {}) and list((run / "arms" / arm).glob("seed-*"))]
    if not shared:
        return None
    try:
        old = Recipe.model_validate(theirs)
    except ValueError:
        return "its form (it was written by another version of kvdistill)"
    for arm in shared:
        then, now = arm_recipe(old, arm).model_dump(mode="json"), arm_recipe(recipe, arm).model_dump(mode="json")
        if then != now:
            return _first_difference(then, now, f"arms.{arm}")
    return None


def _base_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    base = {key: tree.get(key) for key in _BASE}
    # where a copy lies changes nothing, and the manifest knows whether leaks are in the data
    base["data"] = {k: v for k, v in (base["data"] or {}).items() if k not in ("root", "leaks")}
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
    if read_json(mark).get("recipe") != recipe_hash(recipe) or not (data_folder(run) / "manifest.json").exists():
        return False
    return all(evaluated_mark(arm_folder(run, arm, seed)).exists() for arm in recipe.arms for seed in recipe.seeds)


def result_of(run: Path) -> dict[str, Any]:
    """What a finished study shows: where the page is, and the summary."""
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    page = {"page": str(run / "report.html")} if (run / "report.html").exists() else {}
    return {"run": str(run), **page, "summary": summary}


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
    check_run_folder(recipe, run)
    chosen = [(a, s) for s in recipe.seeds for a in recipe.arms if arm in (None, a) and seed in (None, s)]
    if arm is not None and seed is not None:  # in this process: also one rank of a torchrun
        claim_run_folder(recipe, run)
        prepare_process(recipe.hardware.threads)  # as a worker would be, for the same numbers
        stage_function("check")(recipe, run)
        stage_function(verb)(recipe, run, arm, seed, progress=progress)
    else:
        with folder_lock(run, wait=False):
            claim_run_folder(recipe, run)
            jobs = [Job(f"{a} seed {s}", verb, (recipe, run, a, s), 1.0) for a, s in chosen]
            check = Job("check", "check", (recipe, run), 1.0)
            run_waves(recipe, [("check", [check]), (verb.replace("_", " "), jobs)], progress)
    return {"run": str(run), "finished": [f"{a} seed {s}" for a, s in chosen]}
