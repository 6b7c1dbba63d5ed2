"""Which teacher a name means, what errors call it, and where its weights are."""

from __future__ import annotations

from pathlib import Path

from kvdistill.core.errors import RunFolderError
from kvdistill.core.layout import teacher_folder, trained_mark
from kvdistill.core.recipe import ModelRecipe, Recipe, TeacherRecipe


def teacher_recipe(recipe: Recipe, name: str) -> TeacherRecipe:
    return next(teacher for teacher in recipe.teachers if teacher.name == name)


def teacher_place(recipe: Recipe, name: str) -> str:
    return f"teachers.{[t.name for t in recipe.teachers].index(name)} ({name})"


def teacher_source(recipe: Recipe, run: Path, name: str) -> ModelRecipe:
    """Where this teacher's weights are: its own path, or the run folder when it was trained on the spot."""
    teacher = teacher_recipe(recipe, name)
    path = teacher.path
    if teacher.scratch is not None:
        folder = teacher_folder(run, name)
        if not trained_mark(folder).exists():
            raise RunFolderError(
                f"teacher {name!r} is not trained yet", place=str(folder), fix="run `kvdistill teach RECIPE` first"
            )
        path = str(folder / "model")
    return ModelRecipe(
        path=path, dtype=teacher.dtype, attention=teacher.attention, trust_remote_code=teacher.trust_remote_code
    )
