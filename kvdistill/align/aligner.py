"""Bring one teacher's KV and the student's KV to the same slots, layers and channels: `MapProjectionAligner`.

The order, written once. G teacher heads of size E, H student heads of size D, L' the student layers that take part:

    teacher   k_BMGSE →(time) k_BMGTE →(layers) k_L'BTGE →(standardise) k_L'BTC, C = G·E
    match_in: teacher    target = that;              source = projector(student k_L'BTHD)   : [L', B, T, G·E]
    match_in: student    target = projector(that);   source = the student's k_L'BTHD        : [L', B, T, H·D]
    match_in: shared     target = adapter_t(that);   source = adapter_s(student k_L'BTHD)   : [L', B, T, Z]

so that a loss is one call, distance(source, target), for all layers. Time comes before layers because it works on
each teacher layer once, however many student layers read it; both are linear, so the order does not change a number.
Keys come unrotated (`keys: rotated` is possible where no step mixes positions).

Losses that compare attention need queries too, and everything as attention multiplies it: see `sides.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvdistill.align.attention import teacher_attention
from kvdistill.align.channels import ChannelAccumulator, KVStatistics
from kvdistill.align.checks import check_heads, check_layers, check_time, find_layers, require_queries
from kvdistill.align.fitting import ProjectorFit, hand_over
from kvdistill.align.heads import AbstractHeadProjector, KVDimensionProjector, make_projector
from kvdistill.align.layers import layer_map as recipe_map
from kvdistill.align.layers import layer_sources, needed_teacher_layers, slots_with_all
from kvdistill.align.ridge import RidgeFit
from kvdistill.align.shared import SharedSpace
from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.kv import KV, require_frame
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import AlignRecipe
from kvdistill.core.runtime import derive_seed


class AlignedKV(NamedTuple):
    """Keys and values of the layers that take part, [L', B, T, C] each, heads side by side in C."""

    k: Tensor
    v: Tensor


@final
class MapProjectionAligner(nn.Module):
    """The composition for one teacher. Buffers and parameters have stable names, for safetensors:

    proj_k.*, proj_v.* (see `heads/`) and, with `standardise`, k_scale, k_shift, v_scale, v_shift [L', G·E]. A scale
    below 0 says that the channel is dead (`live`): nothing is divided by its deviation, and in the teacher's space both
    sides are 0 there, so that it is in no distance, no mean and no match figure.
    """

    k_scale: Tensor
    k_shift: Tensor
    v_scale: Tensor
    v_shift: Tensor
    proj_k: AbstractHeadProjector
    proj_v: AbstractHeadProjector

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
        query_heads: tuple[int, int] | None = None,
        shared_size: int | None = None,
    ) -> None:
        """teacher_shape (M, G, E) and student_shape (L, H, D): layers, KV heads, head size.

        student_layers: the ones that take part (all). layer_map: [L, k], by default the recipe's.
        statistics: of the mapped teacher, one row per entry of `student_layers` (see `fit_statistics`).
        query_heads: of teacher and student, where attention is compared. shared_size: Z, with match_in: shared; by
        default the narrower of the two sides.
        """
        super().__init__()
        (M, G, E), (L, H, D) = teacher_shape, student_shape
        self.recipe, self.teacher_heads, self.student_heads = recipe, (G, E), (H, D)
        self.student_layers = list(range(L)) if student_layers is None else list(student_layers)
        mapping = recipe_map(recipe.layers, M, L, recipe.layer_map) if layer_map is None else layer_map
        check_layers(mapping, M, L, self.student_layers)
        self.sources_by_layer = layer_sources(mapping, self.student_layers)  # (teacher layer, share) pairs
        self.teacher_layers = needed_teacher_layers(mapping, self.student_layers)
        for key, what, fix in recipe.time_mistakes():
            raise RecipeError(what, place=key, fix=fix)
        in_teacher, self.is_shared = recipe.match_in == "teacher", recipe.match_in == "shared"
        self.is_trained = in_teacher if recipe.train_projector is None else recipe.train_projector
        self.needs_fit = recipe.init == "ridge" or not self.is_trained
        if self.is_shared:
            Z, rows = min(G * E, H * D) if shared_size is None else shared_size, len(self.student_layers)
            self.proj_k, self.proj_v = (KVDimensionProjector(H, D, 1, Z, rows, frozen=True) for _ in "kv")
            self.adapter_k, self.adapter_v = (KVDimensionProjector(G, E, 1, Z, rows, frozen=True) for _ in "kv")
        else:
            ends = (H, D, G, E) if in_teacher else (G, E, H, D)
            self.proj_k, self.proj_v = (self._make_projector(ends, derive_seed(seed, kind)) for kind in "kv")
        self.query_heads, self.proj_q = query_heads, None
        if query_heads is not None:
            theirs, mine = query_heads
            ends = (mine, D, theirs, E) if in_teacher else (theirs, E, mine, D)
            self.proj_q = self._make_projector(ends, derive_seed(seed, "q"))
        self.is_fitted = False
        self.has_statistics = False
        self._has_dead: bool | None = None
        for name in ("k_scale", "k_shift", "v_scale", "v_shift"):
            fill = torch.zeros(len(self.student_layers), G * E) if recipe.standardise else None
            self.register_buffer(name, fill)
        if statistics is not None:
            self.set_statistics(statistics)
        self.register_load_state_dict_post_hook(_mark_loaded)

    def _make_projector(self, ends: tuple[int, int, int, int], seed: int) -> AbstractHeadProjector:
        recipe = self.recipe
        if recipe.per_head and recipe.projection != "structured" and not self.needs_fit:
            raise RecipeError(
                f"per_head with projection {recipe.projection} and init {recipe.init} means nothing",
                place="align.per_head",
                fix="use projection: structured, or init: ridge for a fit of each head alone",
            )
        return make_projector(
            recipe.projection,
            ends,
            len(self.student_layers),
            per_head=recipe.per_head,
            rank=recipe.rank,
            hidden=recipe.elastic_hidden,
            residual=recipe.residual,
            share_layers=recipe.share_layers,
            init=recipe.init,
            seed=seed,
            frozen=not self.is_trained,
        )

    @property
    def num_parameters(self) -> int:
        modules = [self.proj_k, self.proj_v, *([self.proj_q] if self.proj_q is not None else [])]
        if self.is_shared:
            modules += [self.adapter_k, self.adapter_v]
        return sum(module.num_parameters for module in modules)

    # -- what a training step calls ---------------------------------------------------------------------

    def targets(self, teacher_kv: KV, time_mapping: SparseMap | None = None) -> tuple[AlignedKV, Bool[Tensor, "..."]]:
        """What the student is to match, [L', B, T, C] in float32, and where there is something to match.

        teacher_kv: at least the layers in `teacher_layers`, found by their numbers; its `mask_BT` says which tokens
        take part (padding and compressed tokens do not). time_mapping: [B, T, k]; [M, B, T, k] with a row per layer
        of teacher_kv, where layers keep different tokens (r-kv), and the mask is [L', B, T] then; None where student
        tokens stand exactly where teacher tokens do (`TimeWarper.map`). Detached from the teacher; with a trained
        student-space projector the graph reaches that projector and nothing else.
        Values at masked slots mean nothing.
        """
        self.require_ready()
        flat, mask_BT = self.teacher_channels(teacher_kv, time_mapping)
        if self.recipe.match_in == "teacher":
            return self._live_only(flat), mask_BT
        of_k, of_v = (self.adapter_k, self.adapter_v) if self.is_shared else (self.proj_k, self.proj_v)
        with torch.set_grad_enabled(self.is_trained and not self.is_shared and torch.is_grad_enabled()):
            return AlignedKV(of_k(flat.k), of_v(flat.v)), mask_BT

    def sources(self, student_kv: KV) -> AlignedKV:
        """What the student offers, [L', B, T, C], with its graph; layers are found by their numbers."""
        return self.project(self.student_channels(student_kv))

    def project(self, student: AlignedKV) -> AlignedKV:
        """`sources` from `student_channels`: those are the same for every teacher of an arm, so gather them once."""
        if self.recipe.match_in == "student":
            return student
        self.require_ready()
        return self._live_only(AlignedKV(self.proj_k(student.k), self.proj_v(student.v)))

    def live(self) -> AlignedKV | None:
        """Which channels of the teacher's space vary, bool [L', G·E]; None where all do, or in another space."""
        if self._has_dead is None:
            known = self.recipe.standardise and self.recipe.match_in == "teacher"
            self._has_dead = known and bool((self.k_scale < 0).any() | (self.v_scale < 0).any())
        return AlignedKV(self.k_scale >= 0, self.v_scale >= 0) if self._has_dead else None

    def _live_only(self, aligned: AlignedKV) -> AlignedKV:
        live = self.live()
        if live is None:
            return aligned
        return AlignedKV(aligned.k * live.k[:, None, None], aligned.v * live.v[:, None, None])

    def num_dead(self) -> dict[str, int]:
        """Channels of the mapped teacher that never vary: {"keys", "values", "channels"}, the last of all of a side."""
        sides = (("keys", self.k_scale), ("values", self.v_scale)) if self.recipe.standardise else ()
        return {name: int((scale < 0).sum()) for name, scale in sides} | {
            "channels": len(self.student_layers) * self.teacher_heads[0] * self.teacher_heads[1]
        }

    @torch.no_grad()
    def teacher_channels(
        self, teacher_kv: KV, time_mapping: SparseMap | None = None, *, standardise: bool = True
    ) -> tuple[AlignedKV, Bool[Tensor, "..."]]:
        """The teacher time-mapped, layer-mapped and standardised: [L', B, T, G·E], and the mask. No projector."""
        require_frame(teacher_kv, frame=self.recipe.keys)
        places = find_layers(teacher_kv, self.teacher_layers, "teacher")
        check_heads(teacher_kv, places.values(), self.teacher_heads, "teacher")
        mask = teacher_kv.mask_BT
        if time_mapping is not None:
            check_time(time_mapping, mask, teacher_kv.num_layers)
            time_mapping = time_mapping.masked_source(mask)
            rows = [[(places[layer], share) for layer, share in row] for row in self.sources_by_layer]
            mask = slots_with_all(time_mapping.mask(), rows)
        on = standardise and self.recipe.standardise
        k = self._map_teacher(teacher_kv.keys, places, time_mapping, (self.k_scale, self.k_shift) if on else None)
        v = self._map_teacher(teacher_kv.values, places, time_mapping, (self.v_scale, self.v_shift) if on else None)
        return AlignedKV(k, v), mask

    def student_channels(self, student_kv: KV) -> AlignedKV:
        """The student's layers that take part, heads side by side: [L', B, T, H·D], with graph. No projector."""
        require_frame(student_kv, frame=self.recipe.keys)
        places = find_layers(student_kv, self.student_layers, "student")
        check_heads(student_kv, places.values(), self.student_heads, "student")
        return AlignedKV(*(self._side_by_side(x, places) for x in (student_kv.keys, student_kv.values)))

    def _side_by_side(self, tensors: Sequence[Tensor], places: dict[int, int]) -> Float[Tensor, "L B T C"]:
        return torch.stack([tensors[places[layer]].transpose(1, 2) for layer in self.student_layers]).flatten(3)

    # -- queries, for losses that compare attention (`sides.py`) and for ridge_on: attention ---------------

    def student_queries(self, student_kv: KV) -> Float[Tensor, "L B T C"]:
        """Queries of the student's layers that take part, heads side by side, with graph."""
        require_queries(student_kv, self.query_heads, 1, "student")
        return self._side_by_side(student_kv.queries, find_layers(student_kv, self.student_layers, "student"))

    @torch.no_grad()
    def teacher_queries(self, teacher_kv: KV, time_mapping: SparseMap | None = None) -> Float[Tensor, "L B T C"]:
        """The teacher's queries, time-mapped and layer-mapped as its keys are."""
        require_queries(teacher_kv, self.query_heads, 0, "teacher")
        assert self.query_heads is not None
        places = find_layers(teacher_kv, self.teacher_layers, "teacher")
        if time_mapping is not None:
            time_mapping = time_mapping.masked_source(teacher_kv.mask_BT)
        heads = self.query_heads[0], self.teacher_heads[1]
        return self._map_teacher(teacher_kv.queries, places, time_mapping, None, heads)

    def own_units(self, aligned: AlignedKV) -> AlignedKV:
        """Standardised channels of the teacher's space in its own units again."""
        if not self.recipe.standardise:
            return aligned
        pairs = ((aligned.k, self.k_scale, self.k_shift), (aligned.v, self.v_scale, self.v_shift))
        return AlignedKV(*((x - shift[:, None, None]) / scale[:, None, None] for x, scale, shift in pairs))

    def _map_teacher(
        self,
        tensors: Sequence[Tensor],
        places: dict[int, int],
        time_mapping: SparseMap | None,
        scale_shift: tuple[Tensor, Tensor] | None,
        heads: tuple[int, int] | None = None,
    ) -> Float[Tensor, "L B T C"]:
        # Each layer is read once and written once, standardised, to its place in the result: no stack, no second copy.
        G, E = self.teacher_heads if heads is None else heads
        here_BTGE = {layer: tensors[place].transpose(1, 2) for layer, place in places.items()}
        if time_mapping is not None:  # whole tokens (all heads) are copied at once
            here_BTGE = {m: time_mapping.of_layer(places[m]).apply(x, 1) for m, x in here_BTGE.items()}
        B, T = here_BTGE[self.teacher_layers[0]].shape[:2]
        out = torch.empty(len(self.sources_by_layer), B, T, G, E, device=tensors[0].device)
        for row, sources in enumerate(self.sources_by_layer):
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
        if self.recipe.match_in != "teacher":
            return aligned.k.detach()
        return self.own_units(AlignedKV(aligned.k.detach(), aligned.v.detach())).k

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
            if part.dead_LC is not None:
                inverse = torch.where(part.dead_LC.to(inverse.device), -1.0, inverse)
            scale.copy_(inverse)
            shift.copy_(-part.mean_LC.double() * inverse)
        self.has_statistics, self._has_dead = True, None

    @torch.no_grad()
    def fit_projector(
        self, batches: Iterable[tuple[KV, KV, SparseMap | None]], rotate: Callable[[KV], KV] | None = None
    ) -> None:
        """Ridge fit of both projectors on (teacher KV, student KV, time map) batches, taken over as their values.

        Input and output are those of training: student -> standardised teacher, or the reverse in student space.
        Projectors that are no full matrix take the nearest they can be (`set_flat`). With ridge_on: attention the
        teacher's KV needs queries, and unrotated ones need `rotate`, the teacher's own rotation (None: no rotary).
        """
        assert not self.is_shared, "a shared space is fitted to all its models at once: set_adapters"
        self._require_statistics()
        q = self.proj_q
        of_queries = None if q is None else RidgeFit(q.num_in, q.num_out, q.num_rows)
        fit = ProjectorFit(self.recipe, (self.proj_k, self.proj_v), self.teacher_heads[0])
        for teacher_kv, student_kv, time_mapping in batches:
            teacher, mask_BT = self.teacher_channels(teacher_kv, time_mapping)
            student = self.student_channels(student_kv)
            if of_queries is not None:
                sides = self.student_queries(student_kv), self.teacher_queries(teacher_kv, time_mapping)
                x, y = sides if self.recipe.match_in == "teacher" else sides[::-1]
                mask = mask_BT.expand(x.shape[:3])
                of_queries.update(*((t[None] for t in (x, y, mask)) if self.recipe.share_layers else (x, y, mask)))
            given, wanted = (student, teacher) if self.recipe.match_in == "teacher" else (teacher, student)
            attention = None
            if fit.needs_attention:
                attention = teacher_attention(teacher_kv, self.sources_by_layer, time_mapping, rotate)
            fit.update(given, wanted, mask_BT, attention)
        fit.finish()
        if of_queries is not None and q is not None:
            hand_over(of_queries, q, self.recipe.ridge_l2)
        self.is_fitted = True

    @torch.no_grad()
    def set_adapters(self, keys: SharedSpace, values: SharedSpace, teacher: str, student: str) -> None:
        """Take over this teacher's and the student's adapters of two shared spaces, one for keys and one for values."""
        for space, mine, theirs in ((keys, self.proj_k, self.adapter_k), (values, self.proj_v, self.adapter_v)):
            for projector, name in ((mine, student), (theirs, teacher)):
                adapter = space.adapter(name)
                projector.set_flat(adapter.weight, adapter.shift)
        self.is_fitted = True

    def _require_statistics(self) -> None:
        if self.recipe.standardise and not self.has_statistics:
            raise AlignmentError(
                "align.standardise without channel statistics", fix="fit_statistics or set_statistics first"
            )

    def require_ready(self) -> None:
        self._require_statistics()
        if self.needs_fit and not self.is_fitted:
            raise AlignmentError(
                "the projector is to be fitted (init ridge, or frozen) and was not", fix="fit_projector, or load one"
            )


def _mark_loaded(aligner: nn.Module, _: object) -> None:
    aligner.has_statistics = aligner.is_fitted = True  # type: ignore[assignment]
    aligner._has_dead = None  # type: ignore[assignment]
