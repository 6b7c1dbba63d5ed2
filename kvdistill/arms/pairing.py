"""How an arm pairs the student with a teacher: sizes, the layers that take part, and the layer map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdistill.align import layer_map, needed_teacher_layers, parse_layer_range
from kvdistill.align.layers import layer_sources, read_layer_similarity
from kvdistill.core.errors import RecipeError
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe, ModelRecipe
from kvdistill.models import ModelShape, describe_config, model_config

if TYPE_CHECKING:
    from kvdistill.arms.teacher import Teacher


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

    @property
    def sources(self) -> list[list[tuple[int, float]]]:
        """For each student layer that takes part its (teacher layer, share) pairs."""
        return layer_sources(self.mapping, self.student_layers)


def pair(arm: ArmRecipe, teacher: Teacher) -> Pairing:
    """Sizes and layer map of one arm's student and teacher. Raises RecipeError for layers outside either model."""
    theirs, mine, align = teacher.shape, teacher.experiment.student_shape, arm.align
    layers = tuple(parse_layer_range(arm.loss.distill_layers, mine.num_layers))
    sizes = theirs.num_layers, mine.num_layers
    if align.layers != "cka":
        explicit = align.layer_map if align.layers == "explicit" else None
        return Pairing(theirs, mine, layers, layer_map(align.layers, *sizes, explicit))
    mapping = layer_map(
        "cka",
        *sizes,
        str(align.layer_map or teacher.similarity_path),
        top_k=align.cka_top_k,
        monotone=align.cka_monotone,
        on=align.cka_on,
        **teacher.identities,
    )
    return Pairing(theirs, mine, layers, mapping)


def check_pair(arm: ArmRecipe, teacher: Teacher) -> None:
    """What `pair` would say, as far as it can be said before the teacher is trained and its layers are compared."""
    if arm.align.layers != "cka":
        pair(arm, teacher)
        return
    num_layers, of_student = teacher.shape.num_layers, teacher.experiment.student_shape.num_layers
    parse_layer_range(arm.loss.distill_layers, of_student)
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
        who = {} if teacher.recipe.scratch is not None else teacher.identities
        read_layer_similarity(arm.align.layer_map, num_layers, of_student, on=arm.align.cka_on, **who)


_SHAPES: dict[object, ModelShape] = {}


def shape_of(model: ModelRecipe, vocab_size: int, place: str) -> ModelShape:
    """Sizes of a model from its recipe, without weights. Raises ModelError.

    Kept: a study asks for it hundreds of times, and a config takes milliseconds to make. A folder's is read anew.
    """
    key: object = (type(model), model.scratch, vocab_size)
    if model.scratch is not None and key in _SHAPES:
        return _SHAPES[key]
    config = model_config(model, vocab_size, place)
    if model.scratch is None:
        key = config.to_json_string()
    if key not in _SHAPES:
        _SHAPES[key] = describe_config(config)
    return _SHAPES[key]
