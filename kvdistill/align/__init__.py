"""Bring one teacher's KV and the student's KV to the same slots, layers and channels: `MapProjectionAligner`.

The order, written once. G teacher heads of size E, H student heads of size D, L' the student layers that take part:

    teacher   k_BMGSE →(time) k_BMGTE →(layers) k_L'BTGE →(standardise) k_L'BTC, C = G·E
    match_in: teacher    target = that;            source = projector(student k_L'BTHD) : [L', B, T, G·E]
    match_in: student    target = projector(that); source = the student's k_L'BTHD      : [L', B, T, H·D]

so that a loss is one call, distance(source, target), for all layers. Time comes before layers because it works on
each teacher layer once, however many student layers read it; both are linear, so the order does not change a number.
`time.py`, `layers.py`, `heads.py`, `channels.py` and `ridge.py` are the steps. None of them knows a model, a file
or a loss. Keys come unrotated (`keys: rotated` is possible where no step mixes positions).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvdistill.align.channels import ChannelAccumulator, ChannelStatistics, KVStatistics
from kvdistill.align.heads import PROJECTORS, HeadwiseMapProjector, KVDimensionProjector
from kvdistill.align.layers import layer_map, layer_sources, needed_teacher_layers, parse_layer_range
from kvdistill.align.ridge import RidgeFit
from kvdistill.align.time import SegmentIdentifier, TimeWarper, same_places, time_map
from kvdistill.core.kv import KV, require_frame
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import AlignRecipe
from kvdistill.core.runtime import AlignmentError, RecipeError, derive_seed

__all__ = [
    "AlignedKV",
    "ChannelAccumulator",
    "ChannelStatistics",
    "HeadwiseMapProjector",
    "KVDimensionProjector",
    "KVStatistics",
    "MapProjectionAligner",
    "RidgeFit",
    "SegmentIdentifier",
    "TimeWarper",
    "layer_map",
    "needed_teacher_layers",
    "parse_layer_range",
    "same_places",
    "time_map",
]


class AlignedKV(NamedTuple):
    """Keys and values of the layers that take part, [L', B, T, C] each, heads side by side in C."""

    k: Tensor
    v: Tensor


@final
class MapProjectionAligner(nn.Module):
    """The composition for one teacher. Buffers and parameters have stable names, for safetensors:

    proj_k.*, proj_v.* (see `heads.py`) and, with `standardise`, k_scale, k_shift, v_scale, v_shift [L', G·E].
    """

    k_scale: Tensor
    k_shift: Tensor
    v_scale: Tensor
    v_shift: Tensor

    def __init__(
        self,
        recipe: AlignRecipe,
        teacher_shape: tuple[int, int, int],
        student_shape: tuple[int, int, int],
        student_layers: Sequence[int] | None = None,
        *,
        seed: int = 0,
        statistics: KVStatistics | None = None,
        layer_map: SparseMap | None = None,
        per_head: bool = False,
    ) -> None:
        """teacher_shape (M, G, E) and student_shape (L, H, D): layers, KV heads, head size.

        student_layers: the ones that take part (all). layer_map: [L, k], by default the recipe's.
        statistics: of the mapped teacher, one row per entry of `student_layers` (see `fit_statistics`).
        """
        super().__init__()
        (M, G, E), (L, H, D) = teacher_shape, student_shape
        self.recipe, self.teacher_heads, self.student_heads = recipe, (G, E), (H, D)
        self.student_layers = list(range(L)) if student_layers is None else list(student_layers)
        mapping = _recipe_layer_map(recipe, M, L) if layer_map is None else layer_map
        _check_layers(mapping, M, L, self.student_layers)
        self._sources = layer_sources(mapping, self.student_layers)
        self.teacher_layers = needed_teacher_layers(mapping, self.student_layers)
        if recipe.keys == "rotated" and recipe.time in ("proportional", "segment"):
            raise RecipeError(
                f"rotated keys cannot be interpolated (align.time is {recipe.time}): neighbours differ in phase",
                place="align.keys",
                fix="use keys: unrotated, or time: pad or index",
            )
        in_teacher = recipe.match_in == "teacher"
        ends = (H, D, G, E) if in_teacher else (G, E, H, D)
        self.is_trained = in_teacher if recipe.train_projector is None else recipe.train_projector
        self.proj_k, self.proj_v = (self._make_projector(ends, derive_seed(seed, kind), per_head) for kind in "kv")
        self.needs_fit = recipe.init == "ridge" or not self.is_trained
        self.is_fitted = False
        self.has_statistics = False
        for name in ("k_scale", "k_shift", "v_scale", "v_shift"):
            fill = torch.zeros(len(self.student_layers), G * E) if recipe.standardise else None
            self.register_buffer(name, fill)
        if statistics is not None:
            self.set_statistics(statistics)
        self.register_load_state_dict_post_hook(_mark_loaded)

    def _make_projector(
        self, ends: tuple[int, int, int, int], seed: int, per_head: bool
    ) -> KVDimensionProjector | HeadwiseMapProjector:
        options = {"per_head": per_head} if self.recipe.projection == "structured" else {}
        return PROJECTORS[self.recipe.projection](
            *ends,
            len(self.student_layers),
            share_layers=self.recipe.share_layers,
            init=self.recipe.init,
            seed=seed,
            frozen=not self.is_trained,
            **options,
        )

    @property
    def num_parameters(self) -> int:
        return self.proj_k.num_parameters + self.proj_v.num_parameters

    # -- what a training step calls ---------------------------------------------------------------------

    def targets(self, teacher_kv: KV, time_mapping: SparseMap | None = None) -> tuple[AlignedKV, Bool[Tensor, "B T"]]:
        """What the student is to match, [L', B, T, C] in float32, and where there is something to match.

        teacher_kv: at least the layers in `teacher_layers`, found by their numbers; its `mask_BT` says which tokens
        take part (padding and compressed tokens do not). time_mapping: [B, T, k], or None where student
        tokens stand exactly where teacher tokens do (`TimeWarper.map`). Detached from the teacher; with a trained
        student-space projector the graph reaches that projector and nothing else.
        Values at masked slots mean nothing.
        """
        self._require_ready()
        flat, mask_BT = self.teacher_channels(teacher_kv, time_mapping)
        if self.recipe.match_in == "teacher":
            return flat, mask_BT
        with torch.set_grad_enabled(self.is_trained and torch.is_grad_enabled()):
            return AlignedKV(self.proj_k(flat.k), self.proj_v(flat.v)), mask_BT

    def sources(self, student_kv: KV) -> AlignedKV:
        """What the student offers, [L', B, T, C], with its graph; layers are found by their numbers."""
        return self.project(self.student_channels(student_kv))

    def project(self, student: AlignedKV) -> AlignedKV:
        """`sources` from `student_channels`: those are the same for every teacher of an arm, so gather them once."""
        if self.recipe.match_in == "student":
            return student
        self._require_ready()
        return AlignedKV(self.proj_k(student.k), self.proj_v(student.v))

    @torch.no_grad()
    def teacher_channels(
        self, teacher_kv: KV, time_mapping: SparseMap | None = None, *, standardise: bool = True
    ) -> tuple[AlignedKV, Bool[Tensor, "B T"]]:
        """The teacher time-mapped, layer-mapped and standardised: [L', B, T, G·E], and the mask. No projector."""
        require_frame(teacher_kv, frame=self.recipe.keys)
        places = _find_layers(teacher_kv, self.teacher_layers, "teacher")
        _check_heads(teacher_kv, places.values(), self.teacher_heads, "teacher")
        mask_BT = teacher_kv.mask_BT
        if time_mapping is not None:
            _check_time(time_mapping, mask_BT)
            time_mapping = time_mapping.masked_source(mask_BT)
            mask_BT = time_mapping.mask()
        on = standardise and self.recipe.standardise
        k = self._map_teacher(teacher_kv.keys, places, time_mapping, (self.k_scale, self.k_shift) if on else None)
        v = self._map_teacher(teacher_kv.values, places, time_mapping, (self.v_scale, self.v_shift) if on else None)
        return AlignedKV(k, v), mask_BT

    def student_channels(self, student_kv: KV) -> AlignedKV:
        """The student's layers that take part, heads side by side: [L', B, T, H·D], with graph. No projector."""
        require_frame(student_kv, frame=self.recipe.keys)
        places = _find_layers(student_kv, self.student_layers, "student")
        _check_heads(student_kv, places.values(), self.student_heads, "student")
        k, v = (
            torch.stack([x[places[layer]].transpose(1, 2) for layer in self.student_layers]).flatten(3)
            for x in (student_kv.keys, student_kv.values)
        )
        return AlignedKV(k, v)

    def _map_teacher(
        self,
        tensors: Sequence[Tensor],
        places: dict[int, int],
        time_mapping: SparseMap | None,
        scale_shift: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "L B T C"]:
        # Each layer is read once and written once, standardised, to its place in the result: no stack, no second copy.
        G, E = self.teacher_heads
        here_BTGE = {layer: _token_major(tensors[place], time_mapping) for layer, place in places.items()}
        B, T = here_BTGE[self.teacher_layers[0]].shape[:2]
        out = torch.empty(len(self._sources), B, T, G, E, device=tensors[0].device)
        for row, sources in enumerate(self._sources):
            layer, share = sources[0]
            x = here_BTGE[layer]
            if len(sources) > 1:
                x = sum((here_BTGE[m].float() * w for m, w in sources[1:]), start=x.float() * share)
            if scale_shift is None:
                out[row].copy_(x)
            else:
                scale, shift = (part[row].view(G, E) for part in scale_shift)
                torch.addcmul(shift, x, scale, out=out[row])
        return out.flatten(3)

    @torch.no_grad()
    def unstandardised_keys(self, aligned: AlignedKV) -> Float[Tensor, "L B T C"]:
        """Keys of the meeting space in the teacher's own units: what similarity to a teacher is measured on.

        Standardised keys of every teacher have mean 0, so their prototypes would tell teachers apart by noise only.
        """
        keys = aligned.k.detach()
        if self.recipe.match_in == "student" or not self.recipe.standardise:
            return keys
        return (keys - self.k_shift[:, None, None]) / self.k_scale[:, None, None]

    # -- calibration: statistics, then the closed-form projector -----------------------------------------

    def fit_statistics(self, batches: Iterable[tuple[KV, SparseMap | None]]) -> KVStatistics:
        """Channel statistics of (teacher KV, time map) batches as this aligner maps them, set and returned.

        They belong to this teacher, time mode and layer map: interpolated slots vary less than their sources.
        """
        L, C = len(self.student_layers), self.teacher_heads[0] * self.teacher_heads[1]
        of_k, of_v = ChannelAccumulator(L, C), ChannelAccumulator(L, C)
        for teacher_kv, time_mapping in batches:
            flat, mask_BT = self.teacher_channels(teacher_kv, time_mapping, standardise=False)
            of_k.update(flat.k, mask_BT)
            of_v.update(flat.v, mask_BT)
        statistics = KVStatistics(of_k.statistics(), of_v.statistics())
        if self.recipe.standardise:
            self.set_statistics(statistics)
        return statistics

    def set_statistics(self, statistics: KVStatistics) -> None:
        """Use these (rows as `student_layers`). Raises AlignmentError where they do not fit or are not wanted."""
        if not self.recipe.standardise:
            raise AlignmentError("statistics for an aligner that does not standardise", fix="set align.standardise")
        for name, part in (("k", statistics.keys), ("v", statistics.values)):
            scale, shift = getattr(self, f"{name}_scale"), getattr(self, f"{name}_shift")
            if part.mean_LC.shape != scale.shape or part.std_LC.shape != scale.shape:
                raise AlignmentError(
                    f"statistics {tuple(part.mean_LC.shape)}, needed {tuple(scale.shape)} (layers, channels)",
                    fix="collect them for this teacher and these student layers, or `select` the rows",
                )
            inverse = 1 / part.std_LC.double()
            scale.copy_(inverse)
            shift.copy_(-part.mean_LC.double() * inverse)
        self.has_statistics = True

    @torch.no_grad()
    def fit_projector(self, batches: Iterable[tuple[KV, KV, SparseMap | None]]) -> None:
        """Ridge fit of both projectors on (teacher KV, student KV, time map) batches, taken over as their values.

        Input and output are those of training: student -> standardised teacher, or the reverse in student space.
        Structured projectors take the nearest they can be (`HeadwiseMapProjector.set_flat`).
        """
        H, D, G, E = *self.student_heads, *self.teacher_heads
        in_teacher, shared = self.recipe.match_in == "teacher", self.recipe.share_layers
        num_in, num_out = (H * D, G * E) if in_teacher else (G * E, H * D)
        fits = [RidgeFit(num_in, num_out, 1 if shared else len(self.student_layers)) for _ in range(2)]
        self._require_statistics()
        for teacher_kv, student_kv, time_mapping in batches:
            teacher, mask_BT = self.teacher_channels(teacher_kv, time_mapping)
            student = self.student_channels(student_kv)
            mask = mask_BT.expand(len(self.student_layers), *mask_BT.shape)
            for fit, t, s in zip(fits, teacher, student, strict=True):
                x, y = (s, t) if in_teacher else (t, s)
                fit.update(*((x[None], y[None], mask[None]) if shared else (x, y, mask_BT)))
        for fit, projector in zip(fits, (self.proj_k, self.proj_v), strict=True):
            weight, bias = fit.solve(self.recipe.ridge_l2)
            projector.set_flat(weight.float(), bias.float())
        self.is_fitted = True

    def _require_statistics(self) -> None:
        if self.recipe.standardise and not self.has_statistics:
            raise AlignmentError(
                "align.standardise without channel statistics", fix="fit_statistics or set_statistics first"
            )

    def _require_ready(self) -> None:
        self._require_statistics()
        if self.needs_fit and not self.is_fitted:
            raise AlignmentError(
                "the projector is to be fitted (init ridge, or frozen) and was not", fix="fit_projector, or load one"
            )


def _recipe_layer_map(recipe: AlignRecipe, M: int, L: int) -> SparseMap:
    return layer_map(recipe.layers, M, L, recipe.layer_map)


def _mark_loaded(aligner: nn.Module, _: object) -> None:
    aligner.has_statistics = aligner.is_fitted = True  # type: ignore[assignment]


def _check_time(mapping: SparseMap, mask_BS: Tensor) -> None:
    if (
        mapping.index.ndim > 3
        or mapping.n_in != mask_BS.shape[1]
        or mapping.index.shape[:-2] not in ((), mask_BS.shape[:1])
    ):
        raise AlignmentError(
            f"time map {tuple(mapping.index.shape)} from {mapping.n_in} tokens, "
            f"the teacher's KV has {tuple(mask_BS.shape)}",
            fix="time maps are [batch, student tokens, k] over the teacher's tokens",
        )


def _token_major(x_BGSE: Tensor, time_mapping: SparseMap | None) -> Tensor:
    """[B, G, S, E] -> [B, T, G, E]: a view without a map; with one, whole tokens (all heads) are copied at once."""
    x_BSGE = x_BGSE.transpose(1, 2)
    return x_BSGE if time_mapping is None else time_mapping.apply(x_BSGE, 1)


def _find_layers(kv: KV, layers: Sequence[int], whose: str) -> dict[int, int]:
    place = {layer: i for i, layer in enumerate(kv.layers)}
    missing = [layer for layer in layers if layer not in place]
    if missing:
        raise AlignmentError(
            f"the {whose}'s KV holds layers {list(kv.layers)}, layer {missing[0]} is needed",
            fix=f"capture the {whose}'s layers {list(layers)}",
        )
    return {layer: place[layer] for layer in layers}


def _check_heads(kv: KV, places: Iterable[int], heads: tuple[int, int], whose: str) -> None:
    for i in places:
        for x in (kv.keys[i], kv.values[i]):
            if (x.shape[1], x.shape[3]) != heads:
                raise AlignmentError(
                    f"the {whose}'s layer {kv.layers[i]} has {x.shape[1]} heads of size {x.shape[3]}, "
                    f"the aligner was built for {heads[0]} of {heads[1]}",
                    fix="build the aligner from the model's own shape",
                )


def _check_layers(mapping: SparseMap, M: int, L: int, student_layers: Sequence[int]) -> None:
    if mapping.n_in != M or mapping.n_out != L or mapping.index.ndim != 2:
        raise AlignmentError(
            f"layer map {tuple(mapping.index.shape)} from {mapping.n_in} layers, the models have {M} and {L}",
            fix="build the layer map from these two models",
        )
    if not student_layers or not all(0 <= layer < L and bool(mapping.mask()[layer]) for layer in student_layers):
        raise AlignmentError(
            f"student layers {list(student_layers)} of {L}", fix="name layers that exist and have a teacher layer"
        )
