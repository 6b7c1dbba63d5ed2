"""How an arm pairs the student with a teacher: sizes, the layers that take part, and the layer map."""

from __future__ import annotations

from dataclasses import dataclass

from kvdistill.align import needed_teacher_layers
from kvdistill.align.layers import layer_sources
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ModelRecipe
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

    @property
    def sources(self) -> list[list[tuple[int, float]]]:
        """For each student layer that takes part its (teacher layer, share) pairs."""
        return layer_sources(self.mapping, self.student_layers)


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
