"""Everything about models that can be wrong and shows without weights: looked at before any training."""

from __future__ import annotations

from pathlib import Path

from kvdistill.arms.pairing import check_pair, shape_of_student, shape_of_teacher, shared_size
from kvdistill.arms.sources import teacher_place, teacher_recipe
from kvdistill.arms.texts import has_own_tokenizer, load_teacher_tokenizer, teacher_manifest
from kvdistill.arms.tokenizers import check_same_tokenizer, check_saved_tokenizer
from kvdistill.core.config import arm_recipe
from kvdistill.core.errors import AlignmentError, ModelError, RecipeError
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, Recipe, TeacherRecipe
from kvdistill.models import ModelShape


def check_models(recipe: Recipe, run: Path, progress: Progress = silent) -> None:
    """Raises ModelError (missing folders, weights, sizes, a scratch teacher that is not causal), RecipeError (layers
    outside a model), AlignmentError (what an arm cannot bring together). Data is prepared.
    """
    shape_of_student(recipe, run)
    if recipe.student.path is not None:
        check_same_tokenizer(run, recipe.student.path, "student")
    elif recipe.student.scratch is not None:
        check_saved_tokenizer(run, recipe.student.scratch, "student")
    for number, teacher in enumerate(recipe.teachers):
        shape = _described_teacher(recipe, run, teacher.name)
        if teacher.scratch is not None:
            _check_trainable(shape.kind, teacher.scratch.architecture, teacher_place(recipe, teacher.name))
            tokenizer = load_teacher_tokenizer(run, teacher)
            check_saved_tokenizer(run, teacher.scratch, teacher_place(recipe, teacher.name), tokenizer)
        progress("check", number + 1, len(recipe.teachers))
    for arm_name in recipe.arms:
        arm = arm_recipe(recipe, arm_name)
        for name in arm.teachers if arm.needs_kv or arm.needs_logits else ():
            _check_gives(recipe, run, arm_name, arm, name)
            _check_pair(recipe, run, arm_name, arm, teacher_recipe(recipe, name))
        if arm.needs_kv and arm.align.match_in == "shared":
            _check_shared_size(recipe, run, arm_name, arm)


def _described_teacher(recipe: Recipe, run: Path, name: str) -> ModelShape:
    place = teacher_place(recipe, name)
    try:
        return shape_of_teacher(recipe, run, name)
    except ModelError as error:  # what is wrong inside a model knows the model's name, not whose it is
        if error.place.startswith(place):
            raise
        raise ModelError(error.what, place=f"{place}: {error.place}", fix=error.fix) from None


def _check_trainable(kind: str, architecture: str, place: str) -> None:
    """A scratch teacher learns to continue texts, as its students do."""
    if kind != "decoder":
        raise ModelError(
            f"{architecture} is an {kind}: it cannot be trained on the spot to continue a text from left to right",
            place=f"{place}.scratch.architecture",
            fix="choose a causal architecture (qwen2, llama, gpt2, …), or give a pretrained one with `path`",
        )


def _check_gives(recipe: Recipe, run: Path, arm_name: str, arm: ArmRecipe, name: str) -> None:
    """An encoder gives keys and values. It predicts no next token: no logits, and no NLL to tell competence by. What
    computes attention in a way of its own gives logits, and no keys and values."""
    shape = shape_of_teacher(recipe, run, name)
    kind, place = shape.kind, f"arms.{arm_name} with teacher {name!r}"
    if arm.needs_kv and not shape.is_captured:
        raise ModelError(
            f"{shape.family}: its attention bypasses transformers' attention interface, so that its keys and values "
            "cannot be recorded",
            place=place,
            fix="use a family with ALL_ATTENTION_FUNCTIONS in its code (T5: a transformers newer than 5.13), or set "
            "loss.kv_weight: 0 and distil its logits",
        )
    if kind == "decoder":
        return
    if arm.needs_logits:
        raise AlignmentError(
            f"this teacher is an {kind} and predicts no next token: it has no logits to distil",
            place=f"{place}: loss.logit_weight",
            fix="set loss.logit_weight: 0 for this arm, or name causal teachers",
        )
    if arm.fuse.fusion_strategy == "competence":
        raise AlignmentError(
            f"competence asks how likely a teacher finds the gold text, and this one is an {kind}: it has no NLL",
            place=f"{place}: fuse.fusion_strategy",
            fix="set fuse.fusion_strategy: fixed or similarity",
        )


def _check_shared_size(recipe: Recipe, run: Path, arm_name: str, arm: ArmRecipe) -> None:
    try:
        shared_size(recipe, run, arm)
    except AlignmentError as error:
        raise AlignmentError(error.what, place=f"arms.{arm_name}: {error.place}", fix=error.fix) from None


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
    own_chains = manifest is not None and manifest["own_text"] and not manifest["one_text"]
    own_tokenizer = has_own_tokenizer(run, teacher)
    for key, what, fix in arm.align.time_mistakes(own_tokenizer=own_tokenizer, own_chains=own_chains):
        raise AlignmentError(what, place=f"{place}: {key}", fix=fix)
    if arm.fuse.fusion_strategy == "competence" and own_chains:
        raise AlignmentError(
            "competence compares how well teachers explain one text, and this teacher has chains of its own (traces)",
            place=f"{place}: fuse.fusion_strategy",
            fix="set fuse.fusion_strategy: fixed or similarity",
        )
    try:
        check_pair(recipe, run, arm, teacher.name)
    except RecipeError as error:
        raise RecipeError(error.what, place=f"{place}: {error.place}", fix=error.fix) from None
