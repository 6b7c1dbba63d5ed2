"""The verbs as functions: `from kvdistill import load_recipe, prepare, train, evaluate, report`.

Each does what the command of its name does, in the run folder of its recipe, and returns what `--json` prints. What is
finished is not done again, and what was interrupted goes on, so that a cell may be run as often as one likes.
Everything happens in this process, one job after another, with `hardware.threads` threads, unless `workers` asks for
processes: `hardware.workers` of them (a script then needs `if __name__ == "__main__":`, a notebook does not).
docs/python.md shows them in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvdistill.core.config import load_recipe
from kvdistill.core.progress import Progress, TerminalProgress
from kvdistill.core.recipe import Recipe
from kvdistill.study import run as commands
from kvdistill.study.local import prepare_process

Source = Recipe | str | Path  # a recipe, or the path of one


def prepare(recipe: Source, *, progress: Progress | None = None) -> dict[str, Any]:
    """Problems into tokenised, leak-checked splits. Returns the run folder, and rows by task, style and split."""
    made = _made(recipe)
    return commands.run_study(made, _shown(progress), verb="prepare", here=True)


def train(
    recipe: Source,
    *,
    arm: str | None = None,
    seed: int | None = None,
    workers: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Students of all arms and seeds, or of those that are named, and all that comes before: data, teachers, targets,
    fits. Returns the run folder and what is finished."""
    return commands.run_arms(
        _made(recipe), _shown(progress), verb="train", arm=arm, seed=seed, before=True, here=not workers
    )


def evaluate(
    target: Source,
    *,
    tasks: str | Sequence[str] | None = None,
    arm: str | None = None,
    seed: int | None = None,
    workers: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trained students of a recipe on its test problems; or any model (a folder or hub id) on public evaluations.

    tasks: of a model: `"gsm8k,math500"` or a list. options: of a model: keys of the recipe's `evaluate` section, such
    as `limit=20`, and `out`, the folder of the answers.
    """
    shown = _shown(progress)
    if tasks is None:
        return commands.run_arms(_made(target), shown, verb="evaluate", arm=arm, seed=seed, here=not workers)
    from kvdistill.stages.evaluate.command import evaluate_model

    out = options.pop("out", None)
    named = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    return evaluate_model(str(target), (), flags={"tasks": named, **options}, out=out, progress=shown)


def report(recipe: Source, *, progress: Progress | None = None) -> dict[str, Any]:
    """Statistics, figures and the page, from the records. Returns the page's path and the summary."""
    return commands.run_study(_made(recipe), _shown(progress), verb="report", here=True)


def _made(recipe: Source) -> Recipe:
    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    prepare_process(made.hardware.threads)  # as a worker would be, for the same numbers
    return made


def _shown(progress: Progress | None) -> Progress:
    return TerminalProgress() if progress is None else progress
