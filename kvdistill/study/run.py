"""What the verbs of the command line do with a recipe: a study, or one of its stages, on this machine.

Which jobs there are and in what order is `plan`'s to say, doing them `local`'s, whose a run folder is `folder`'s.
Stages meet on disk only; nothing here touches a tensor (nor imports torch).
"""

from __future__ import annotations

import os
import time
from typing import Any

from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import recipe_hash, run_folder
from kvdistill.core.errors import JobsFailed, RecipeError, RunFolderError
from kvdistill.core.files import write_json
from kvdistill.core.layout import data_folder, file_lock, locks_folder, profile_folder, replicate_folder
from kvdistill.core.marks import sealed
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import Recipe
from kvdistill.core.tuning import tuned_path
from kvdistill.study.early import refuse_early
from kvdistill.study.folder import (
    add_provenance,
    claimed,
    data_table,
    is_finished,
    layer_maps,
    result_of,
    written_table,
)
from kvdistill.study.local import prepare_process, run_jobs
from kvdistill.study.plan import STUDY, plan


def run_study(recipe: Recipe, progress: Progress, *, verb: str | None = None, here: bool = False) -> dict[str, Any]:
    """Do all that is left of a study, or of one verb, and return what the command prints: folder, page, summary.

    here: in this process, in place of workers.

    Raises KVDistillError for whatever a user can mend; what is finished stays.
    """
    run = run_folder(recipe)
    begun_wall, begun_cpu = time.time(), time.process_time()
    if verb != "report" and not (verb is None and is_finished(recipe, run)):
        refuse_early(recipe)
    with claimed(recipe, run, begins=verb in (None, "prepare", "map-layers", "tune")):
        if verb is None and is_finished(recipe, run):
            return {**result_of(run), "already_finished": True}
        jobs = plan(recipe, run, STUDY if verb is None else (verb,), before=verb in (None, "map-layers", "tune"))
        try:
            what = recipe.name if verb is None else f"{recipe.name}: {verb}"
            run_jobs(recipe, [job for job in jobs if job.verb != "report"], progress, what=what, here=here)
        finally:  # a call that was interrupted counts too
            add_provenance(run, begun_wall, begun_cpu)
        reports = [job for job in jobs if job.verb == "report"]  # it shows the provenance, and needs no worker
        run_jobs(recipe, reports, progress, what=f"{recipe.name}: report", here=True)
        if verb is None:
            write_json(run / "study.json", sealed({"recipe": recipe_hash(recipe), "finished": True}))
        if verb == "map-layers":
            return {"run": str(run), "layers": layer_maps(recipe, run)}
        if verb == "tune":
            from kvdistill.stages.report.tuning import chosen_words, tuning_table

            return {"run": str(run), "file": str(tuned_path(run)), "chosen": chosen_words(tuning_table(recipe, run))}
        if verb == "write":
            return {"run": str(run), "written": written_table(run)}
        return result_of(run) | (data_table(run) if verb == "prepare" else {})


def map_layers(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """`kvdistill map-layers`: every teacher's layers beside the student's, after all that this needs."""
    if not recipe.teachers:
        raise RecipeError("there is no teacher whose layers could be mapped", place="teachers", fix="name at least one")
    return run_study(recipe, progress, verb="map-layers")


def write_solutions(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """`kvdistill write`: what teachers write for arms with `texts: written`, and what of it is kept."""
    if not any(arm_recipe(recipe, name).writers for name in recipe.arms):
        what, fix = "no arm reads what teachers write", "set texts: written (and teachers: []) for one"
        raise RecipeError(what, place="arms", fix=fix)
    return run_study(recipe, progress, verb="write")


def tune_arms(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """`kvdistill tune`: the search of every arm that is tuned, after all that this needs, and what it chose."""
    if recipe.tune is None:
        fix = "add a section `tune` with a grid and seeds (docs/statistics.md)"
        raise RecipeError("this recipe tunes nothing", place="tune", fix=fix)
    return run_study(recipe, progress, verb="tune")


def validate_data(recipe: Recipe, progress: Progress, *, fix: bool) -> dict[str, Any]:
    """`kvdistill validate`: the leak report of the recipe's data, and the table of what is prepared."""
    from kvdistill.stages.prepare import REPORT, validate

    run = run_folder(recipe)
    with claimed(recipe, run), file_lock(locks_folder(run) / "prepare", wait=True):
        found = validate(recipe, run, progress, fix=fix)
        for seed in (
            recipe.every_seed if recipe.varies_data else ()
        ):  # what each learns from, against the same held-out problems
            of_seed = validate(recipe, run, progress, fix=fix, seed=seed)
            found.setdefault("seeds", {})[str(seed)] = of_seed
            for count in ("num_leaks", "num_pairs_found"):
                found[count] += of_seed[count]
            found["leaks"] = [*found["leaks"], *({**leak, "seed": seed} for leak in of_seed["leaks"])]
    return {"run": str(run), **data_table(run), "leaks": found, "report": str(data_folder(run) / REPORT)}


def export_data(recipe: Recipe, progress: Progress, *, form: str) -> dict[str, Any]:
    """`kvdistill export`: the prepared splits as JSONL for other trainers."""
    from kvdistill.stages.prepare.export import export

    run = run_folder(recipe)
    folders = [run, *(replicate_folder(run, seed) for seed in (recipe.every_seed if recipe.varies_data else ()))]
    if not all((data_folder(folder) / "manifest.json").exists() for folder in folders):
        run_study(recipe, progress, verb="prepare")
    with file_lock(locks_folder(run) / "prepare", wait=True):
        files = [file for folder in folders for file in export(recipe, folder, form, progress)]
        return {"run": str(run), "files": files}


def run_arms(
    recipe: Recipe,
    progress: Progress,
    *,
    verb: str,
    arm: str | None,
    seed: int | None,
    before: bool = False,
    here: bool = False,
) -> dict[str, Any]:
    """`kvdistill train` and `evaluate`: all arms and seeds or the chosen ones. One run, when both are named, is done in
    this process, which may be one rank of a torchrun.

    before: with all that must be done before. here: in this process, in place of workers.
    """
    run = run_folder(recipe)
    if arm is not None:
        arm_recipe(recipe, arm)  # names the nearest arm where there is no such
    if seed is not None and seed not in recipe.seeds:
        raise RecipeError(f"seed {seed} is not in the recipe", place="--seed", fix=f"one of {recipe.seeds}")
    chosen = [(a, s) for s in recipe.seeds for a in recipe.every_arm if arm in (None, a) and seed in (None, s)]
    here = here or (arm is not None and seed is not None)
    refuse_early(recipe)
    with claimed(recipe, run, begins=before):
        jobs = plan(recipe, run, (verb,), before=before, runs=chosen)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(job.verb == "tune" for job in jobs):
            what = "values are still to be chosen, which the processes of a torchrun cannot do together"
            raise RunFolderError(what, place=str(run), fix="run `kvdistill tune RECIPE` first, without torchrun")
        if here:
            prepare_process(recipe.hardware.threads)  # as a worker would be, for the same numbers
        run_jobs(recipe, jobs, progress, what=f"{recipe.name}: {verb}", here=here)
    return {"run": str(run), "finished": [f"{a} seed {s}" for a, s in chosen]}


def profile_alignment(recipe: Recipe, progress: Progress, *, arm: str | None) -> dict[str, Any]:
    """`kvdistill profile-alignment`: everything up to the fits, then the profile of all arms with KV (or of one).

    Arms without KV and those that think in latents are skipped, and said. Only the first seed is looked at.
    """
    run = run_folder(recipe)
    if arm is not None:
        arm_recipe(recipe, arm)  # names the nearest arm where there is no such
    chosen = {name: arm_recipe(recipe, name) for name in recipe.arms if arm in (None, name)}
    profiled = [name for name, made in chosen.items() if made.needs_kv and not made.thinks]
    skipped = {
        name: "it has no teachers"
        if not made.teachers
        else "it thinks in latents: teachers are matched to its slots, and no tokens are aligned"
        if made.thinks
        else "loss.kv_weight is 0: nothing is aligned"
        for name, made in chosen.items()
        if name not in profiled
    }
    result: dict[str, Any] = {"run": str(run), "profiles": {}, "skipped": skipped}
    if not profiled:
        return result
    refuse_early(recipe)
    with claimed(recipe, run):
        jobs = plan(recipe, run, ("teach", "fit"), runs=[(name, recipe.seeds[0]) for name in profiled])
        run_jobs(recipe, [job for job in jobs if job.verb != "fit"], progress)
        prepare_process(recipe.hardware.threads)  # as a worker would be, for the same times
        from kvdistill.arms.experiment import Experiment
        from kvdistill.study.profile import profile_alignment as profile
        from kvdistill.study.profile import refuse_broken_targets

        try:
            run_jobs(recipe, [job for job in jobs if job.verb == "fit"], progress, what=f"{recipe.name}: fit")
        except (RuntimeError, JobsFailed):  # a fit of NaN fails in linear algebra: say where the NaN comes from
            refuse_broken_targets(Experiment(recipe, run).of(recipe.seeds[0]), profiled)
            raise
        with file_lock(locks_folder(run) / "profile", wait=True):
            result["profiles"] = profile(Experiment(recipe, run), profiled, progress)
    return result | {"files": [str(profile_folder(run) / f"{name}.json") for name in profiled]}
