"""Which teacher layers stand behind each student layer, as a `SparseMap` shared by the whole batch.

M teacher layers, L student layers, both counted from 0 (shallowest). Knows numbers of layers only.

  ratio        l·M/L with layers counted from 1 and rounded up, so that the top student layer reads the top teacher
               layer: counted from 0, ((l+1)·M − 1) // L. (The literal l·M // L would leave the deepest M/L teacher
               layers without a student.) M = L is the identity; M < L repeats layers evenly.
  interpolate  place l/(L−1)·(M−1), linear between its two neighbours; first on first, last on last; a student of
               one layer reads the last.
  terminal     from the last layer down: L−1−j <- M−1−j; students deeper than their teacher repeat layer 0.
  cka          the most similar teacher layers, weighted by similarity: `cka_layers.py`.
  explicit     as written: student layer -> teacher layers, equal weights, from a dict or a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.cka_layers import CKALayerMapper, cka_map, read_layer_similarity
from kvdistill.core.errors import RecipeError
from kvdistill.core.maps import SparseMap

__all__ = [
    "CKALayerMapper",
    "cka_map",
    "layer_map",
    "layer_sources",
    "needed_teacher_layers",
    "parse_layer_range",
    "read_layer_similarity",
    "slots_with_all",
]

_PLACE = "align.layer_map"


def layer_map(
    mode: str,
    num_teacher_layers: int,
    num_student_layers: int,
    explicit: Mapping[int, list[int]] | str | None = None,
    *,
    similarity_LM: Float[Tensor, "L M"] | None = None,
    top_k: int = 2,
    monotone: bool = False,
    on: str = "keys",
    teacher: str | None = None,
    student: str | None = None,
) -> SparseMap:
    """The map [L, k] from teacher layers to student layers; every row sums to 1.

    explicit: for mode `explicit`, student layer -> teacher layers, or the path of a JSON file with that object
    (keys are then strings). For mode `cka`, the path of the file that `kvdistill map-layers` wrote, read for `on`
    and for these identities of teacher and student (`read_layer_similarity`); or give `similarity_LM` itself.
    Raises RecipeError naming the file (or recipe key) and the layer; and what `cka_map` raises.
    """
    if mode == "explicit":
        return _explicit_map(num_teacher_layers, num_student_layers, explicit)
    if mode == "cka":
        if similarity_LM is None:
            if not isinstance(explicit, str):
                raise RecipeError(
                    "layers: cka without similarities", place=_PLACE, fix="run `kvdistill map-layers RECIPE` first"
                )
            sizes = num_teacher_layers, num_student_layers
            similarity_LM = read_layer_similarity(explicit, *sizes, on=on, teacher=teacher, student=student)
        assert similarity_LM.shape == (num_student_layers, num_teacher_layers)
        return cka_map(similarity_LM, top_k, monotone)
    if mode not in _MODES:
        raise RecipeError(
            f"unknown layer mode {mode!r}", place="align.layers", fix=f"one of {', '.join(_MODES)}, cka, explicit"
        )
    return _MODES[mode](num_teacher_layers, num_student_layers)


def needed_teacher_layers(mapping: SparseMap, student_layers: Iterable[int]) -> list[int]:
    """Teacher layers with weight behind any of these student layers, ascending: what capture has to run and keep."""
    needed: set[int] = set()
    for sources in layer_sources(mapping, student_layers):
        needed.update(layer for layer, _ in sources)
    return sorted(needed)


def layer_sources(mapping: SparseMap, student_layers: Iterable[int]) -> list[list[tuple[int, float]]]:
    """For each of these student layers its (teacher layer, weight) pairs, zero weights left out."""
    index, weight = mapping.index.tolist(), mapping.weight.tolist()
    return [
        [(source, share) for source, share in zip(index[layer], weight[layer], strict=True) if share > 0]
        for layer in student_layers
    ]


def slots_with_all(
    mask: Bool[Tensor, "B T"] | Bool[Tensor, "M B T"], rows: Sequence[Sequence[tuple[int, float]]]
) -> Bool[Tensor, "B T"] | Bool[Tensor, "L B T"]:
    """Where a student layer has a target: [B, T] as it is; [M, B, T] where all teacher layers behind it have a token.

    rows: for each student layer its (place along M, share) pairs.
    """
    if mask.ndim == 2:
        return mask
    return torch.stack([torch.stack([mask[place] for place, _ in row]).all(0) for row in rows])


def parse_layer_range(text: str, num_layers: int, place: str = "loss.distill_layers") -> list[int]:
    """`0-12` (inclusive), `3,5`, `0-3,7` or `all` -> layers, ascending, each once.

    Raises RecipeError naming `place` for other words and for layers the model does not have.
    """
    if text.strip() == "all":
        return list(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RecipeError(
                f"{text!r} is not a list of layers", place=place, fix="write `0-12`, `3,5`, `0-3,7` or `all`"
            )
        low, high = int(first), int(last) if dash else int(first)
        if low > high:
            raise RecipeError(f"{part.strip()!r} runs backwards", place=place, fix=f"write `{high}-{low}`")
        if high >= num_layers:
            raise RecipeError(
                f"{text!r} asks for layer {high}, the student has layers 0 to {num_layers - 1}",
                place=place,
                fix="name layers that exist, or `all`",
            )
        chosen.update(range(low, high + 1))
    return sorted(chosen)


# -- the modes ----------------------------------------------------------------------------------------


def _ratio_map(M: int, L: int) -> SparseMap:
    return SparseMap.take(((torch.arange(L) + 1) * M - 1) // L, M)


def _interpolate_map(M: int, L: int) -> SparseMap:
    place = torch.full((1,), M - 1.0) if L == 1 else torch.arange(L, dtype=torch.float64) * (M - 1) / (L - 1)
    return SparseMap.interpolate(place, M)


def _terminal_map(M: int, L: int) -> SparseMap:
    return SparseMap.take((torch.arange(L) + M - L).clamp_min(0), M)


_MODES: dict[str, Callable[[int, int], SparseMap]] = {
    "ratio": _ratio_map,
    "interpolate": _interpolate_map,
    "terminal": _terminal_map,
}


def _explicit_map(M: int, L: int, explicit: Mapping[int, list[int]] | str | None) -> SparseMap:
    place = explicit if isinstance(explicit, str) else _PLACE
    if explicit is None:
        raise RecipeError(
            "layers: explicit without a map", place=_PLACE, fix="give student layer -> [teacher layers], or a JSON file"
        )
    written = _read_json(explicit) if isinstance(explicit, str) else dict(explicit)
    rows = {_layer_number(key, L, place): value for key, value in written.items()}
    missing = [layer for layer in range(L) if layer not in rows]
    if missing:
        raise RecipeError(
            f"student layer {missing[0]} is missing",
            place=place,
            fix=f"map each of the student's {L} layers (0 to {L - 1})",
        )
    checked = {layer: _checked_sources(layer, sources, M, place) for layer, sources in rows.items()}
    k = max(len(sources) for sources in checked.values())
    index, weight = torch.zeros(L, k, dtype=torch.int64), torch.zeros(L, k)
    for layer, sources in checked.items():
        index[layer, : len(sources)] = torch.tensor(sources)
        weight[layer, : len(sources)] = 1 / len(sources)
    return SparseMap(index, weight, M)


def _read_json(file: str) -> dict[object, object]:
    try:
        read = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"cannot read the layer map: {error.strerror}", place=file, fix=f"correct {_PLACE}"
        ) from error
    except ValueError as error:
        raise RecipeError(f"not JSON: {error}", place=file, fix='write {"0": [0, 1], "1": [2], …}') from error
    if not isinstance(read, dict):
        raise RecipeError("the layer map is not an object", place=file, fix='write {"0": [0, 1], "1": [2], …}')
    return read


def _layer_number(key: object, L: int, place: str) -> int:
    if not str(key).isdecimal() or int(str(key)) >= L:
        raise RecipeError(
            f"student layer {key!r} does not exist", place=place, fix=f"the student's layers are 0 to {L - 1}"
        )
    return int(str(key))


def _checked_sources(layer: int, sources: object, M: int, place: str) -> list[int]:
    if not isinstance(sources, list | tuple) or not sources:
        raise RecipeError(
            f"student layer {layer} has no list of teacher layers", place=place, fix="name at least one, e.g. [3]"
        )
    for source in sources:
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < M:
            raise RecipeError(
                f"student layer {layer} reads teacher layer {source!r}",
                place=place,
                fix=f"the teacher's layers are 0 to {M - 1}",
            )
    return list(sources)
