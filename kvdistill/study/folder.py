"""A run folder: whether a recipe may work in it, what differs, and what is in it. Imports no torch."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import recipe_hash
from kvdistill.core.declared import family_of
from kvdistill.core.errors import RecipeError, RunFolderError
from kvdistill.core.files import read_json, sha256_of, write_json
from kvdistill.core.layout import (
    data_folder,
    file_lock,
    folder_lock,
    layers_folder,
    locks_folder,
    refuse_foreign,
    replicate_folder,
)
from kvdistill.core.leftovers import sweep_run
from kvdistill.core.marks import read_mark, sealed
from kvdistill.core.provenance import machine_facts, package_versions
from kvdistill.core.quoting import first_difference
from kvdistill.core.recipe import Recipe
from kvdistill.core.tuning import trials_of
from kvdistill.study.plan import is_evaluated

# sections a finished model depends on: a run folder made with others is refused
_BASE = ("replicate", "data", "teachers", "student", "capture", "train", "evaluate")


def claimed(recipe: Recipe, run: Path, *, begins: bool = True) -> ExitStack:
    """Work in this run folder with this recipe: `recipe.json` is written, or the folder refused that another one made.

    Others may work in it at the same time, if they want the same but for arms and seeds: each job has a lock of its
    own (`stages.table.perform`), the folder's is held only while it is claimed. New arms and seeds are welcome.

    begins: whether this may be the first command in the folder.
    """
    check_run_folder(run, begins=begins)  # before the first lock, which leaves a file behind
    working = locks_folder(run) / "working"
    path, mine = run / "recipe.json", recipe.model_dump(mode="json")
    with ExitStack() as at_work:
        with folder_lock(run, wait=True):
            sweep_run(run, keeps_answers=bool(recipe.evaluate.tasks))
            theirs = read_json(path) if path.exists() else None
            if path.exists() and not isinstance(theirs, dict):
                fix = "put it back, or give another folder (run_dir=…)"
                raise RunFolderError("this is not a recipe: it was altered", place=str(path), fix=fix)
            if theirs is not None and theirs != mine:
                if differing := difference(theirs, recipe, run):
                    what = f"this run folder was made with another recipe: {differing} differs"
                    fix = "give another folder (run_dir=…), or delete this one to start over"
                    raise RunFolderError(what, place=str(run), fix=fix)
                if differing := difference(theirs, recipe, run, planned=True):
                    try:  # what it asks for may be changed as long as nobody is making it
                        with file_lock(working, wait=False):
                            pass
                    except RunFolderError as error:
                        what = f"{error.what} with another recipe: {differing} differs"
                        raise RunFolderError(what, place=str(run), fix=error.fix) from None
            if theirs != mine:
                write_json(path, mine)
            at_work.callback(_tidy_up, recipe, run)  # by the last to leave
            at_work.enter_context(file_lock(working, wait=True, shared=True))
        return at_work.pop_all()


def _tidy_up(recipe: Recipe, run: Path) -> None:
    if run.exists():
        with folder_lock(run, wait=True):
            sweep_run(run, keeps_answers=bool(recipe.evaluate.tasks))


def check_run_folder(run: Path, *, begins: bool) -> None:
    """Refuse, before anything is written, a folder that is no run folder; and, unless the command begins one, none.

    begins: whether the command may be the first in a folder. Else a run_dir that is not there is a slip of the pen,
    and is named with the nearest one there is.
    """
    refuse_foreign(run, "recipe.json", fix="give an empty or new folder with run_dir=…")
    if begins or (run / "recipe.json").is_file():
        return
    folder = run.parent
    there = [path.parent.name for path in folder.glob("*/recipe.json")] if folder.is_dir() else []
    near = difflib.get_close_matches(run.name, there, n=1, cutoff=0.6)
    fix = f"did you mean {folder / near[0]}? Otherwise" if near else "mend run_dir, or"
    raise RunFolderError(
        "there is no run folder here", place=str(run), fix=f"{fix} run `kvdistill prepare RECIPE` first"
    )


def difference(theirs: Any, recipe: Recipe, run: Path, *, planned: bool = False) -> str | None:
    """The first key in which the folder's recipe differs where something that is there depends on it, or None.

    So a mistake that was found before the first model was trained can be mended in the recipe and run again.
    planned: as if everything that the folder's recipe asks for were there.
    """
    sections = ["replicate", "data"] if (data_folder(run) / "manifest.json").exists() else []
    with suppress(ValueError):  # keys that came into being since are at their defaults
        theirs = Recipe.model_validate(theirs).model_dump(mode="json")
    made = [place for name in ("teachers", "store", "fit", "arms", "written") for place in _places(run, name)]
    if planned or made:
        sections = list(_BASE)
    mine = recipe.model_dump(mode="json")
    if (planned or _places(run, "written")) and all(_has_writers(tree) for tree in (theirs, mine)):
        sections = [*sections, "write"]
    old_base, new_base = _base_of(theirs, planned), _base_of(mine, planned)
    differing = first_difference({s: old_base[s] for s in sections}, {s: new_base[s] for s in sections})
    if differing is not None:
        return differing
    if not planned and not list(run.glob("arms/*/seed-*")):
        return None
    try:
        old = Recipe.model_validate(theirs)
        before = trials_of(old)
    except (ValueError, RecipeError):
        return "its form (it was written by another version of kvdistill)"
    searches = (one.tune and one.tune.model_dump(mode="json", exclude={"arms", "by"}) for one in (old, recipe))
    differing = first_difference(next(searches), next(searches), "tune")
    if differing is not None:
        return differing
    trials = trials_of(recipe)
    for arm in (*recipe.every_arm, *trials):
        there = planned or list((run / "arms" / arm).glob("seed-*"))
        if not there or arm not in (*old.every_arm, *before):
            continue
        if old.tuned_as(arm) != recipe.tuned_as(arm):
            return f"whether {arm!r} is tuned (tune.arms)"
        try:
            was = before[arm].recipe if arm in before else arm_recipe(old, arm)
        except RecipeError:
            return f"arms.{arm} (it was written by another version of kvdistill)"
        then = was.model_dump(mode="json")
        now = (trials[arm].recipe if arm in trials else arm_recipe(recipe, arm)).model_dump(mode="json")
        if then != now:
            return first_difference(then, now, f"arms.{arm}")
    return None


def _places(run: Path, name: str) -> list[Path]:
    """The folders of this name that are there: of all seeds, and of each."""
    return [*run.glob(name), *run.glob(f"replicates/*/{name}")]


def _has_writers(tree: Mapping[str, Any]) -> bool:
    """Whether an arm of this recipe reads what teachers write: then it matters what they are asked."""
    return any(isinstance(arm, dict) and arm.get("texts") == "written" for arm in (tree.get("arms") or {}).values())


def _base_of(tree: Mapping[str, Any], planned: bool) -> dict[str, Any]:
    base = {key: tree.get(key) for key in (*_BASE, "write")}
    if not planned:  # students are asked anew where that changes; how much is captured for match figures stays
        base["evaluate"] = {"match_examples": (base["evaluate"] or {}).get("match_examples")}
    base["replicate"] = base["replicate"] or "student"  # of a folder from before there was the key
    # where a copy lies changes nothing, and the manifest knows whether leaks are in the data
    base["data"] = {k: v for k, v in (base["data"] or {}).items() if k not in ("root", "leaks")}
    return base


def is_finished(recipe: Recipe, run: Path) -> bool:
    mark = run / "study.json"
    if not mark.exists() or not (run / "report.html").exists() or not (run / "summary.json").exists():
        return False
    if (read_mark(mark) or {}).get("recipe") != recipe_hash(recipe) or not (
        data_folder(run) / "manifest.json"
    ).exists():
        return False
    try:  # `report` may have shown something else since, or be of an older version
        shown, told = read_json(run / "statistical_results.json"), "told" in read_json(run / "summary.json")
    except RunFolderError:
        return False
    asked = recipe.report.model_dump(mode="json") | {"seeds": recipe.seeds}
    asked["family"] = [list(pair) for pair in family_of(recipe).pairs]
    rules = ("family", "seeds", "primary", "alpha", "margin", "language")
    if not told or any(shown.get(key) != asked[key] for key in rules):
        return False
    return all(is_evaluated(recipe, run, arm, seed) for arm in recipe.every_arm for seed in recipe.seeds)


def result_of(run: Path) -> dict[str, Any]:
    """What a finished study shows: where the page is, and the summary."""
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    page = {"page": str(run / "report.html")} if (run / "report.html").exists() else {}
    return {"run": str(run), **page, "summary": summary}


def layer_maps(recipe: Recipe, run: Path) -> dict[str, Any]:
    """What `map-layers` left, by teacher: its file and figures, how many vectors were compared, and the map."""
    found: dict[str, Any] = {}
    for teacher in recipe.teachers:
        varies = recipe.varies_data or recipe.varies_teachers  # then those of the first seed
        stem = layers_folder(replicate_folder(run, recipe.seeds[0]) if varies else run) / teacher.name
        file, *figures = (stem.with_name(stem.name + ending) for ending in (".json", ".png", ".svg"))
        measured = read_json(file)
        found[teacher.name] = {
            "file": str(file),
            "figures": [str(figure) for figure in figures],
            "compared": recipe.align.cka_on,
            "num_vectors": measured["num_vectors"],
            "layer_map": measured["layer_map"][recipe.align.cka_on],
            "notes": (measured.get("notes") or {}).get(recipe.align.cka_on, []),
            "similarity": measured["similarity"][recipe.align.cka_on],
        }
    return found


def data_table(run: Path) -> dict[str, Any]:
    """Rows by task, style and split, and the fingerprint, of data that is prepared; else nothing."""
    path = data_folder(run) / "manifest.json"
    if not path.exists():
        return {}
    manifest = read_json(path)
    data = {key: manifest[key] for key in ("table", "tasks", "fingerprint")}
    data |= {key: manifest[key] for key in ("examples", "noticed") if manifest.get(key)}
    own = {file.parent.name: read_json(file) for file in sorted(path.parent.glob("teachers/*/manifest.json"))}
    data["teachers"] = {
        name: {"tokenizer": found["tokenizer"], "own_chains": not found["one_text"], "lost": found["lost"]}
        for name, found in own.items()
        if found["own_text"]
    }
    seeds = {
        path.parent.parent.name.removeprefix("seed-"): path for path in run.glob("replicates/*/data/manifest.json")
    }
    if seeds:  # each draws training problems of its own
        data["seeds"] = {seed: read_json(seeds[seed])["fingerprint"]["train"] for seed in sorted(seeds, key=int)}
    return {"data": data}


def written_table(run: Path) -> dict[str, str]:
    """By teacher, what it wrote and what of it is kept."""
    found: dict[str, str] = {}
    for mark in sorted(mark for place in _places(run, "written") for mark in place.glob("*/written.json")):
        if (said := read_mark(mark)) is not None:
            seed = mark.parent.parent.parent.name.removeprefix("seed-") if mark.parent.parent.parent != run else ""
            found[mark.parent.name + (f", seed {seed}" if seed else "")] = (
                f"{said['answers']} solutions of {said['questions']} questions, {said['right']} right, {said['kept']} "
                f"kept; {said['tokens']:,} tokens generated"
            )
    return found


def add_provenance(run: Path, begun_wall: float, begun_cpu: float) -> None:
    """Versions, machine, command, and the seconds of all calls so far, added up over resumptions."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() - begun_cpu + children.ru_utime + children.ru_stime
    with folder_lock(run, wait=True):  # others may be adding theirs
        path = run / "provenance.json"
        before = read_mark(path) or {}  # a damaged one says nothing
        made = {
            "recipe_sha256": sha256_of(read_json(run / "recipe.json")),
            "versions": package_versions(),
            "machine": machine_facts(),
            "command": " ".join(["kvdistill", *sys.argv[1:]]),
            "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(begun_wall))),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": before.get("seconds", 0.0) + time.time() - begun_wall,
            "cpu_seconds": before.get("cpu_seconds", 0.0) + cpu,
        }
        write_json(path, sealed(made))
