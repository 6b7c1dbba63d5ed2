"""Which teacher layers stand behind each student layer, as a `SparseMap` shared by the whole batch.

M teacher layers, L student layers, both counted from 0 (shallowest). Knows numbers of layers and their similarity only.

  ratio        l·M/L with layers counted from 1 and rounded up, so that the top student layer reads the top teacher
               layer: counted from 0, ((l+1)·M − 1) // L. (The literal l·M // L would leave the deepest M/L teacher
               layers without a student.) M = L is the identity; M < L repeats layers evenly.
  interpolate  place l/(L−1)·(M−1), linear between its two neighbours; first on first, last on last; a student of
               one layer reads the last.
  terminal     from the last layer down: L−1−j <- M−1−j; students deeper than their teacher repeat layer 0.
  cka          the k most similar teacher layers, by the CKA of student layer l with teacher layer m (`core/cka.py`).
               Weights are proportional to similarity, negative ones count as 0; a row without a positive one reads
               its best layer alone. Not a softmax: CKA lies between 0 and 1 and differs by hundredths between
               neighbours, so that a softmax weighs all k alike unless somebody chooses a temperature.
               monotone: the k layers stand side by side, and the window never moves down from one student layer to
               the next: among all such paths the one with the largest total similarity (dynamic programming, exact,
               L·M steps). So the deepest and the shallowest layer read both rise with depth. Without it every row is
               for itself. Equal similarities: the shallower layer.
  explicit     as written: student layer -> teacher layers, equal weights, from a dict or a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.cka import CKAAccumulator
from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.maps import SparseMap

MODES = ("ratio", "interpolate", "terminal", "cka", "explicit")
SIMILARITY_FORMAT = 1  # of the file that `kvdistill map-layers` writes
_PLACE = "align.layer_map"
WEAK_SIMILARITY = 0.4  # untrained or unrelated layers reach .2 to .3
_MAKE = "run `kvdistill map-layers RECIPE`"


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
    M, L = num_teacher_layers, num_student_layers
    if mode == "ratio":
        return SparseMap.take(((torch.arange(L) + 1) * M - 1) // L, M)
    if mode == "interpolate":
        place = torch.full((1,), M - 1.0) if L == 1 else torch.arange(L, dtype=torch.float64) * (M - 1) / (L - 1)
        return SparseMap.interpolate(place, M)
    if mode == "terminal":
        return SparseMap.take((torch.arange(L) + M - L).clamp_min(0), M)
    if mode == "explicit":
        return _explicit_map(M, L, explicit)
    if mode == "cka":
        if similarity_LM is None:
            if not isinstance(explicit, str):
                raise RecipeError(
                    "layers: cka without similarities", place=_PLACE, fix="run `kvdistill map-layers RECIPE` first"
                )
            similarity_LM = read_layer_similarity(explicit, M, L, on=on, teacher=teacher, student=student)
        assert similarity_LM.shape == (L, M)
        return cka_map(similarity_LM, top_k, monotone)
    raise RecipeError(f"unknown layer mode {mode!r}", place="align.layers", fix=f"one of {', '.join(MODES)}")


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


# -- explicit and cka ------------------------------------------------------------------------------------------


def _explicit_map(M: int, L: int, explicit: Mapping[int, list[int]] | str | None) -> SparseMap:
    place = explicit if isinstance(explicit, str) else _PLACE
    wrong = partial(RecipeError, place=place)
    if explicit is None:
        raise wrong("layers: explicit without a map", fix="give student layer -> [teacher layers], or a JSON file")
    written: Any = explicit
    if isinstance(explicit, str):
        example = 'write {"0": [0, 1], "1": [2], …}'
        written = _read_json(explicit, "layer map", missing=f"correct {_PLACE}", torn=example)
        if not isinstance(written, dict):
            raise wrong("the layer map is not an object", fix=example)
    rows: dict[int, list[int]] = {}
    for key, sources in written.items():
        if not str(key).isdecimal() or int(str(key)) >= L:
            raise wrong(f"student layer {key!r} does not exist", fix=f"the student's layers are 0 to {L - 1}")
        rows[int(str(key))] = sources
    missing = [layer for layer in range(L) if layer not in rows]
    if missing:
        raise wrong(
            f"student layer {missing[0]} is missing",
            fix=f"map each of the student's {L} layers (0 to {L - 1})",
        )
    for layer, sources in rows.items():
        if not isinstance(sources, list | tuple) or not sources:
            raise wrong(f"student layer {layer} has no list of teacher layers", fix="name at least one, e.g. [3]")
        for source in sources:
            if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < M:
                raise wrong(
                    f"student layer {layer} reads teacher layer {source!r}",
                    fix=f"the teacher's layers are 0 to {M - 1}",
                )
    k = max(len(sources) for sources in rows.values())
    index, weight = torch.zeros(L, k, dtype=torch.int64), torch.zeros(L, k)
    for layer, sources in rows.items():
        index[layer, : len(sources)] = torch.tensor(sources)
        weight[layer, : len(sources)] = 1 / len(sources)
    return SparseMap(index, weight, M)


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
    undefined = ~similarity.isfinite()
    for side, rows in (("teacher", undefined.all(0)), ("student", undefined.all(1)), ("student", undefined.any(1))):
        if bool(rows.any()):
            raise AlignmentError(
                f"{side} layer {int(rows.nonzero()[0])} has no similarity: its features do not vary between tokens",
                place="align.layers: cka",
                fix="compare by something else (align.cka_on), give more texts, or use layers: ratio or explicit",
            )
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


def map_notes(similarity_LM: Float[Tensor, "L M"], mapping: SparseMap) -> list[str]:
    """What speaks against a map made from these similarities: layers that cross, and layers that are hardly alike."""
    sources = layer_sources(mapping, range(mapping.n_out))
    place_L = [sum(m * share for m, share in row) for row in sources]
    best_L = [max(float(similarity_LM[layer, m]) for m, _ in row) for layer, row in enumerate(sources)]
    crossing = [layer for layer in range(1, len(place_L)) if place_L[layer] < max(place_L[:layer]) - 1e-6]
    weak = [layer for layer, best in enumerate(best_L) if not best >= WEAK_SIMILARITY]
    notes = []
    if crossing:
        notes.append(
            f"the map crosses: student layer{'s' if len(crossing) > 1 else ''} {', '.join(map(str, crossing))} read "
            "lower teacher layers than a layer below does (align.cka_monotone: true, or layers: ratio)"
        )
    if weak:
        notes.append(
            f"weak: student layer{'s' if len(weak) > 1 else ''} {', '.join(map(str, weak))} and the teacher layers "
            f"chosen for them have a CKA below {WEAK_SIMILARITY} (layers: ratio asks for no similarity)"
        )
    return notes


def _best_first(similarity_LK: Tensor) -> Tensor:
    return torch.sort(similarity_LK, dim=1, descending=True, stable=True).indices


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
    wrong = partial(RecipeError, place=place)
    read = _read_json(place, "layer similarities", missing=_MAKE, torn=f"delete it and {_MAKE}")
    parts = ("similarity", "teacher", "student")
    if not isinstance(read, dict) or not all(isinstance(read.get(part), dict) for part in parts):
        raise wrong("not a file of layer similarities", fix=f"{_MAKE}; a map of your own is `layers: explicit`")
    if read.get("format") != SIMILARITY_FORMAT:
        raise wrong(f"written in format {read.get('format')}, read is {SIMILARITY_FORMAT}", fix=_MAKE)
    kinds = read["similarity"]
    if on not in kinds:
        raise wrong(f"measured on {', '.join(kinds) or 'nothing'}, {on} are wanted (align.cka_on)", fix=_MAKE)
    for side, layers, identity in (("teacher", num_teacher_layers, teacher), ("student", num_student_layers, student)):
        found = read[side]
        if found.get("num_layers") != layers:
            raise wrong(
                f"made with a {side} of {found.get('num_layers')} layers ({found.get('name')}), this one has {layers}",
                fix=f"{_MAKE} for these models, or name another file in align.layer_map",
            )
        if identity is not None and found.get("identity") != identity:
            raise wrong(
                f"made with another {side} ({found.get('name')}): its weights or settings differ",
                fix=f"{_MAKE} again, or name another file in align.layer_map",
            )
    rows = kinds[on]
    if not (
        isinstance(rows, list)
        and len(rows) == num_student_layers
        and all(isinstance(row, list) and len(row) == num_teacher_layers for row in rows)
        and all(x is None or type(x) in (int, float) for row in rows for x in row)
    ):
        raise wrong(
            f"similarity of {on} is not {num_student_layers} rows of {num_teacher_layers} numbers",
            fix=f"delete it and {_MAKE}",
        )
    return torch.tensor([[torch.nan if x is None else x for x in row] for row in rows], dtype=torch.float64)


def _read_json(file: str, what: str, *, missing: str, torn: str) -> Any:
    """What stands in the file; RecipeError naming it, with a fix for a missing and one for a torn file."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the {what}: {error.strerror}", place=file, fix=missing) from error
    except ValueError as error:
        raise RecipeError(f"not JSON: {error}", place=file, fix=torn) from error


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
