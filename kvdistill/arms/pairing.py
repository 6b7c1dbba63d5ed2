"""Which model is which, how an arm pairs the student with a teacher, and what the arms want of each teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvdistill.align import layer_map, needed_teacher_layers, parse_layer_range
from kvdistill.align.layers import layer_sources, read_layer_similarity
from kvdistill.arms.identity import model_identities, similarity_path
from kvdistill.arms.sources import teacher_place, teacher_recipe
from kvdistill.arms.texts import student_vocab_size, teacher_vocab_size
from kvdistill.core.config import arm_recipe
from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe, ModelRecipe, Recipe
from kvdistill.models import ModelShape, describe_config, model_config


@dataclass(frozen=True)
class Pairing:
    """How one arm pairs the student with one teacher: sizes, distilled layers, and the layer map."""

    teacher: ModelShape
    student: ModelShape
    student_layers: tuple[int, ...]
    mapping: SparseMap

    @property
    def teacher_layers(self) -> list[int]:
        return needed_teacher_layers(self.mapping, self.student_layers)


def pair(recipe: Recipe, run: Path, arm: ArmRecipe, name: str) -> Pairing:
    """Sizes and layer map of one arm's student and teacher. Raises RecipeError for layers outside either model."""
    teacher, student = shape_of_teacher(recipe, run, name), shape_of_student(recipe, run)
    layers = parse_layer_range(arm.loss.distill_layers, student.num_layers)
    align, sizes = arm.align, (teacher.num_layers, student.num_layers)
    if align.layers != "cka":
        explicit = align.layer_map if align.layers == "explicit" else None
        return Pairing(teacher, student, tuple(layers), layer_map(align.layers, *sizes, explicit))
    path = str(align.layer_map or similarity_path(run, name))
    who = model_identities(recipe, run, name)
    mapping = layer_map(
        "cka",
        *sizes,
        path,
        top_k=align.cka_top_k,
        monotone=align.cka_monotone,
        on=align.cka_on,
        teacher=who["teacher"],
        student=who["student"],
    )
    return Pairing(teacher, student, tuple(layers), mapping)


def check_pair(recipe: Recipe, run: Path, arm: ArmRecipe, name: str) -> None:
    """What `pair` would say, as far as it can be said before the teacher is trained and its layers are compared."""
    if arm.align.layers != "cka":
        pair(recipe, run, arm, name)
        return
    parse_layer_range(arm.loss.distill_layers, shape_of_student(recipe, run).num_layers)
    num_layers = shape_of_teacher(recipe, run, name).num_layers
    if arm.align.cka_top_k > num_layers:
        raise RecipeError(
            f"{arm.align.cka_top_k} teacher layers for each student layer, the teacher has {num_layers}",
            place="align.cka_top_k",
            fix=f"choose between 1 and {num_layers}",
        )
    if isinstance(arm.align.layer_map, dict):
        raise RecipeError(
            "layers: cka reads a file that map-layers wrote",
            place="align.layer_map",
            fix="leave it out, or name a file",
        )
    if isinstance(arm.align.layer_map, str):  # of models that are not trained yet: their numbers of layers at least
        sizes = num_layers, shape_of_student(recipe, run).num_layers
        trained_here = teacher_recipe(recipe, name).scratch is not None
        who = {} if trained_here else model_identities(recipe, run, name)
        read_layer_similarity(
            arm.align.layer_map,
            *sizes,
            on=arm.align.cka_on,
            teacher=who.get("teacher"),
            student=who.get("student"),
        )


def shared_size(recipe: Recipe, run: Path, arm: ArmRecipe) -> int:
    """Channels of an arm's shared space: as asked, else those of its narrowest model.

    Raises AlignmentError where a model is narrower than what is asked for.
    """
    shapes = {name: shape_of_teacher(recipe, run, name) for name in arm.teachers}
    shapes["the student"] = shape_of_student(recipe, run)  # no teacher can have this name
    widths = {name: shape.num_kv_heads * shape.head_size for name, shape in shapes.items()}
    narrowest = min(widths, key=widths.__getitem__)
    if (arm.align.shared_size or 0) > widths[narrowest]:
        raise AlignmentError(
            f"{arm.align.shared_size} shared channels, but {narrowest!r} has {widths[narrowest]}",
            place="align.shared_size",
            fix=f"1 to {widths[narrowest]}, or leave it out",
        )
    return arm.align.shared_size or widths[narrowest]


def shape_of_student(recipe: Recipe, run: Path) -> ModelShape:
    return _shape(recipe.student, student_vocab_size(run), "student")


def shape_of_teacher(recipe: Recipe, run: Path, name: str) -> ModelShape:
    teacher = teacher_recipe(recipe, name)
    return _shape(teacher, teacher_vocab_size(run, teacher), teacher_place(recipe, name))


_SHAPES: dict[object, ModelShape] = {}


def _shape(model: ModelRecipe, vocab_size: int, place: str) -> ModelShape:
    """Kept: a study asks for it hundreds of times, and a config takes milliseconds to make. A folder's is read anew."""
    key: object = (type(model), model.scratch, vocab_size)
    if model.scratch is not None and key in _SHAPES:
        return _SHAPES[key]
    config = model_config(model, vocab_size, place)
    if model.scratch is None:
        key = config.to_json_string()
    if key not in _SHAPES:
        _SHAPES[key] = describe_config(config)
    return _SHAPES[key]


def layer_sources_of(recipe: Recipe, run: Path, arm: ArmRecipe) -> dict[str, list[list[tuple[int, float]]]]:
    """By teacher, for each student layer that takes part its (teacher layer, share) pairs."""
    pairs = {name: pair(recipe, run, arm, name) for name in arm.teachers if arm.needs_kv}
    return {name: layer_sources(one.mapping, one.student_layers) for name, one in pairs.items()}


# -- what the arms want of a teacher ------------------------------------------------------------------


def needed_layers(recipe: Recipe, run: Path, name: str) -> list[int]:
    """Layers of this teacher that any arm matches, ascending; none where only its logits are used."""
    needed: set[int] = set()
    for arm in _arms_with(recipe, name):
        if arm.needs_kv:
            needed.update(pair(recipe, run, arm, name).teacher_layers)
    return sorted(needed)


def captured_top_k(recipe: Recipe, name: str) -> int:
    """Teacher logits per token that the store keeps: none where no arm distils this teacher's logits."""
    return recipe.capture.logits_top_k if any(arm.needs_logits for arm in _arms_with(recipe, name)) else 0


def captures_queries(recipe: Recipe, name: str) -> bool:
    """Whether an arm compares this teacher's attention: keys and values are not enough then."""
    return any(arm.needs_queries for arm in _arms_with(recipe, name))


def captures_scores(recipe: Recipe, name: str) -> bool:
    """Whether an arm asks which of its tokens this teacher finds important."""
    return any(arm.needs_scores for arm in _arms_with(recipe, name))


def _arms_with(recipe: Recipe, name: str) -> list[ArmRecipe]:
    arms = [arm_recipe(recipe, arm) for arm in recipe.arms]
    return [arm for arm in arms if name in arm.teachers]
