"""From similarities of layers to a layer map: the k most similar teacher layers behind each student layer.

M teacher layers, L student layers; `similarity_LM`: CKA of student layer l with teacher layer m (`core/cka.py`).

  weights    proportional to similarity, negative ones as 0; a row without a positive one reads its best layer alone.
             Not a softmax: CKA lies between 0 and 1 and differs by hundredths between neighbours, so that a softmax
             weighs all k alike unless somebody chooses a temperature.
  monotone   the k layers stand side by side, and the window never moves down from one student layer to the next:
             among all such paths the one with the largest total similarity (dynamic programming, exact, L·M steps).
             So the deepest and the shallowest layer read both rise with depth. Without it every row is for itself.

Equal similarities: the shallower layer. Also reads what `kvdistill map-layers` writes. Knows no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.cka import CKAAccumulator
from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.maps import SparseMap

FORMAT = 1
_MAKE = "run `kvdistill map-layers RECIPE`"


def cka_map(similarity_LM: Float[Tensor, "L M"], top_k: int = 2, monotone: bool = False) -> SparseMap:
    """The map [L, k], most similar layer first; every row sums to 1. See the module's docstring.

    Raises RecipeError for more layers than there are, AlignmentError naming a layer whose similarity is undefined.
    """
    similarity = similarity_LM.double().cpu()
    M = similarity.shape[1]
    if not 1 <= top_k <= M:
        raise RecipeError(
            f"{top_k} teacher layers for each student layer, the teacher has {M}",
            place="align.cka_top_k",
            fix=f"choose between 1 and {M}",
        )
    _check_defined(similarity)
    if monotone:
        windows = similarity.unfold(1, top_k, 1)  # [L, M - k + 1, k]
        start_L = torch.tensor(_best_path(windows.sum(-1)))
        allowed_Lk = start_L[:, None] + torch.arange(top_k)
        index = allowed_Lk.gather(1, _best_first(similarity.gather(1, allowed_Lk)))
    else:
        index = _best_first(similarity)[:, :top_k]
    weight = similarity.gather(1, index).clamp_min(0)
    weight[:, 0] = torch.where(weight.sum(1) > 0, weight[:, 0], 1)
    return SparseMap(index, (weight / weight.sum(1, keepdim=True)).float(), M)


def _best_first(similarity_LK: Tensor) -> Tensor:
    return torch.sort(similarity_LK, dim=1, descending=True, stable=True).indices


def _check_defined(similarity_LM: Tensor) -> None:
    undefined = ~similarity_LM.isfinite()
    if not bool(undefined.any()):
        return
    for side, rows in (("teacher", undefined.all(0)), ("student", undefined.all(1)), ("student", undefined.any(1))):
        if bool(rows.any()):
            raise AlignmentError(
                f"{side} layer {int(rows.nonzero()[0])} has no similarity: its features do not vary between tokens",
                place="align.layers: cka",
                fix="compare by something else (align.cka_on), give more texts, or use layers: ratio or explicit",
            )


def _best_path(score_LP: Tensor) -> list[int]:
    """A place per row, never decreasing, with the largest total score."""
    rows, num_places = score_LP.tolist(), score_LP.shape[1]
    total, came_from = rows[0], []
    for row in rows[1:]:
        best, before = 0, []
        for place in range(num_places):  # the best place up to here in the row above
            best = place if total[place] > total[best] else best
            before.append(best)
        came_from.append(before)
        total = [total[before[place]] + row[place] for place in range(num_places)]
    path = [max(range(num_places), key=total.__getitem__)]
    for before in reversed(came_from):
        path.append(before[path[-1]])
    return path[::-1]


def read_layer_similarity(
    file: str | Path,
    num_teacher_layers: int,
    num_student_layers: int,
    *,
    on: str = "keys",
    teacher: str | None = None,
    student: str | None = None,
) -> Float[Tensor, "L M"]:
    """The similarities `kvdistill map-layers` left in `file`, float64; an undefined one (null) is NaN.

    on: keys, values or hidden. teacher, student: what the models' identities in the file must be, where given.
    Raises RecipeError naming the file for JSON that is missing, torn, of another kind or of other models.
    """
    place = str(file)
    read = _read(place)
    kinds = read["similarity"]
    if on not in kinds:
        raise RecipeError(
            f"measured on {', '.join(kinds) or 'nothing'}, {on} are wanted (align.cka_on)", place=place, fix=_MAKE
        )
    for side, layers, identity in (("teacher", num_teacher_layers, teacher), ("student", num_student_layers, student)):
        found = read[side]
        if found.get("num_layers") != layers:
            raise RecipeError(
                f"made with a {side} of {found.get('num_layers')} layers ({found.get('name')}), this one has {layers}",
                place=place,
                fix=f"{_MAKE} for these models, or name another file in align.layer_map",
            )
        if identity is not None and found.get("identity") != identity:
            raise RecipeError(
                f"made with another {side} ({found.get('name')}): its weights or settings differ",
                place=place,
                fix=f"{_MAKE} again, or name another file in align.layer_map",
            )
    rows = kinds[on]
    good = isinstance(rows, list) and len(rows) == num_student_layers
    if not good or not all(_is_row(row, num_teacher_layers) for row in rows):
        raise RecipeError(
            f"similarity of {on} is not {num_student_layers} rows of {num_teacher_layers} numbers",
            place=place,
            fix=f"delete it and {_MAKE}",
        )
    return torch.tensor([[torch.nan if x is None else x for x in row] for row in rows], dtype=torch.float64)


def _read(place: str) -> dict[str, Any]:
    try:
        read = json.loads(Path(place).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the layer similarities: {error.strerror}", place=place, fix=_MAKE) from error
    except ValueError as error:
        raise RecipeError(f"not JSON: {error}", place=place, fix=f"delete it and {_MAKE}") from error
    parts = ("similarity", "teacher", "student")
    if not isinstance(read, dict) or not all(isinstance(read.get(part), dict) for part in parts):
        raise RecipeError(
            "not a file of layer similarities", place=place, fix=f"{_MAKE}; a map of your own is `layers: explicit`"
        )
    if read.get("format") != FORMAT:
        raise RecipeError(f"written in format {read.get('format')}, read is {FORMAT}", place=place, fix=_MAKE)
    return read


def _is_row(row: object, size: int) -> bool:
    return (
        isinstance(row, list)
        and len(row) == size
        and all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in row)
    )


@final
class CKALayerMapper:
    """Similarities over batches, then the map: `update` per batch, `similarity()`, `map()`."""

    def __init__(self, top_k: int = 2, monotone: bool = False) -> None:
        self.top_k, self.monotone = top_k, monotone
        self._found = CKAAccumulator(names=("the teacher", "the student"))

    def update(
        self,
        teacher_MNC: Float[Tensor, "M N C"],
        student_LND: Float[Tensor, "L N D"],
        mask_N: Bool[Tensor, " N"] | None = None,
    ) -> None:
        """N more pairs of vectors of every layer; see `CKAAccumulator.update`."""
        self._found.update(teacher_MNC, student_LND, mask_N)

    def similarity(self) -> Float[Tensor, "L M"]:
        return self._found.matrix()

    def map(self) -> SparseMap:
        return cka_map(self.similarity(), self.top_k, self.monotone)
