"""Everything about models that can be wrong and shows without weights: looked at before any training."""

from __future__ import annotations

from pathlib import Path

from kvdistill.core.config import arm_recipe
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, Recipe, TeacherRecipe
from kvdistill.core.runtime import AlignmentError, RecipeError
from kvdistill.teachers.pairing import check_pair, shape_of_student, shape_of_teacher
from kvdistill.teachers.sources import teacher_place, teacher_recipe
from kvdistill.teachers.texts import has_own_tokenizer, load_teacher_tokenizer, teacher_manifest
from kvdistill.teachers.tokenizers import check_same_tokenizer, check_saved_tokenizer


def check_models(recipe: Recipe, run: Path, progress: Progress = silent) -> None:
    """Raises ModelError (missing folders, weights, sizes), RecipeError (layers outside a model), AlignmentError
    (tokenizers that an arm cannot bring together). Data is prepared.
    """
    shape_of_student(recipe, run)
    if recipe.student.path is not None:
        check_same_tokenizer(run, recipe.student.path, "student")
    elif recipe.student.scratch is not None:
        check_saved_tokenizer(run, recipe.student.scratch, "student")
    for number, teacher in enumerate(recipe.teachers):
        shape_of_teacher(recipe, run, teacher.name)
        if teacher.scratch is not None:
            tokenizer = load_teacher_tokenizer(run, teacher)
            check_saved_tokenizer(run, teacher.scratch, teacher_place(recipe, teacher.name), tokenizer)
        progress("check", number + 1, len(recipe.teachers))
    for arm_name in recipe.arms:
        arm = arm_recipe(recipe, arm_name)
        for name in arm.teachers if arm.needs_kv or arm.needs_logits else ():
            _check_pair(recipe, run, arm_name, arm, teacher_recipe(recipe, name))


def _check_pair(recipe: Recipe, run: Path, arm_name: str, arm: ArmRecipe, teacher: TeacherRecipe) -> None:
    place = f"arms.{arm_name} with teacher {teacher.name!r}"
    manifest = teacher_manifest(run, teacher)
    if arm.needs_logits and manifest is not None and manifest["own_text"]:
        own = "its own tokenizer" if has_own_tokenizer(run, teacher) else "its own chains"
        raise AlignmentError(
            f"logits can be distilled from a teacher that reads the student's tokens; this one has {own}",
            place=f"{place}: loss.logit_weight",
            fix="set loss.logit_weight: 0 for this arm, or name other teachers",
        )
    if not arm.needs_kv:
        return
    if has_own_tokenizer(run, teacher) and arm.align.time == "pad" and arm.align.keys == "rotated":
        raise AlignmentError(
            "a token of the student reads several of this teacher's, and rotated keys cannot be averaged",
            place=f"{place}: align.keys",
            fix="set align.keys: unrotated",
        )
    if manifest is not None and manifest["own_text"] and not manifest["one_text"] and arm.align.time == "pad":
        raise AlignmentError(
            "align.time: pad is for one text, and this teacher has chains of its own (traces)",
            place=f"{place}: align.time",
            fix="set align.time: segment (or proportional)",
        )
    if (
        arm.fuse.fusion_strategy == "competence"
        and manifest is not None
        and manifest["own_text"]
        and not manifest["one_text"]
    ):
        raise AlignmentError(
            "competence compares how well teachers explain one text, and this teacher has chains of its own (traces)",
            place=f"{place}: fuse.fusion_strategy",
            fix="set fuse.fusion_strategy: fixed or similarity",
        )
    try:
        check_pair(recipe, run, arm, teacher.name)
    except RecipeError as error:
        raise RecipeError(error.what, place=f"{place}: {error.place}", fix=error.fix) from None
