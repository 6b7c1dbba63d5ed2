"""Both sides as attention multiplies them: queries, keys and values in the space they meet in, rotated there.

In the teacher's space the student's keys and values leave its projector standardised; here they are brought back to
the teacher's units, since q.k has a scale. Both sides stand at the student's positions, whichever model's rotation is
used, so that the same distance between tokens means the same phase. Knows aligners, no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvdistill.align.aligner import AlignedKV, MapProjectionAligner
from kvdistill.core.kv import KV, AttentionRule
from kvdistill.core.maps import SparseMap

Rotation = Callable[[KV], KV]


class AlignedQKV(NamedTuple):
    """Queries, keys and values, [L', B, T, heads, size] each."""

    q: Tensor
    k: Tensor
    v: Tensor


def attention_sources(aligner: MapProjectionAligner, student: KV, teacher: KV, rotate: Rotation) -> AlignedQKV:
    """The student's side, with its graph.

    rotate: how keys and queries turn in the space the two meet in (the teacher's way, or the student's own); called
    where the model whose space it is has rotary positions. teacher: its KV of the same batch, for frame and scaling.
    """
    flat, queries = aligner.student_channels(student), aligner.student_queries(student)
    if aligner.recipe.match_in == "teacher":
        aligner.require_ready()
        assert aligner.proj_q is not None
        flat = aligner.own_units(AlignedKV(aligner.proj_k(flat.k), aligner.proj_v(flat.v)))
        queries = aligner.proj_q(queries)
    return _as_attended(aligner, queries, flat, student, teacher, rotate)


def attention_targets(
    aligner: MapProjectionAligner, student: KV, teacher: KV, time_mapping: SparseMap | None, rotate: Rotation
) -> AlignedQKV:
    """The teacher's side, without the teacher's graph; `student`, of the same batch, gives the positions."""
    in_teacher = aligner.recipe.match_in == "teacher"
    queries = aligner.teacher_queries(teacher, time_mapping)
    flat, _ = aligner.teacher_channels(teacher, time_mapping, standardise=not in_teacher)
    if not in_teacher:
        aligner.require_ready()
        assert aligner.proj_q is not None
        with torch.set_grad_enabled(aligner.is_trained and torch.is_grad_enabled()):
            flat = AlignedKV(aligner.proj_k(flat.k), aligner.proj_v(flat.v))
            queries = aligner.proj_q(queries)
    return _as_attended(aligner, queries, flat, student, teacher, rotate)


def attention_rules(aligner: MapProjectionAligner, student: KV, teacher: KV) -> tuple[AttentionRule, ...]:
    """What each layer does with q.k in the space they meet in."""
    of, _, layers = _host(aligner, student, teacher)
    return tuple(of.rules[of.layers.index(layer)] for layer in layers)


def _host(aligner: MapProjectionAligner, student: KV, teacher: KV) -> tuple[KV, int, tuple[int, ...]]:
    """Whose space the two meet in, its head size, and which of its layers."""
    if aligner.recipe.match_in == "teacher":
        return teacher, aligner.teacher_heads[1], tuple(row[0][0] for row in aligner.sources_by_layer)
    return student, aligner.student_heads[1], tuple(aligner.student_layers)


def _as_attended(
    aligner: MapProjectionAligner, queries: Tensor, flat: AlignedKV, student: KV, teacher: KV, rotate: Rotation
) -> AlignedQKV:
    of, size, layers = _host(aligner, student, teacher)
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(2, 3) for x in (queries, *flat))  # [L', B, heads, T, size]
    kv = KV(tuple(k), tuple(v), student.mask_BT, student.positions_BT, of.rope, tuple(q), layers)
    kv = rotate(kv) if of.rope == "unrotated" else kv
    q, k, v = (torch.stack([x.transpose(1, 2) for x in side]) for side in (kv.queries, kv.keys, kv.values))
    if of.scaling is not None:  # losses divide by sqrt(size), as most models do
        place = {layer: i for i, layer in enumerate(of.layers)}
        factors = torch.tensor([of.scaling[place[layer]] * size**0.5 for layer in layers], device=q.device)
        q = q * factors.view(-1, 1, 1, 1, 1)
    return AlignedQKV(q, k, v)
