"""What does not fit an aligner, said with the fix: layers, heads, time maps and queries of the KV it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV
from kvdistill.core.maps import SparseMap


def check_time(mapping: SparseMap, mask_BS: Tensor, num_layers: int) -> None:
    lead, B = tuple(mapping.index.shape[:-2]), mask_BS.shape[0]
    if mapping.n_in != mask_BS.shape[1] or lead not in ((), (B,), (num_layers, B)):
        raise AlignmentError(
            f"time map {tuple(mapping.index.shape)} from {mapping.n_in} tokens, "
            f"the teacher's KV has {tuple(mask_BS.shape)} in {num_layers} layers",
            fix="time maps are [batch, student tokens, k] over the teacher's tokens, with a leading axis of layers "
            "where they differ",
        )


def find_layers(kv: KV, layers: Sequence[int], whose: str) -> dict[int, int]:
    place = {layer: i for i, layer in enumerate(kv.layers)}
    missing = [layer for layer in layers if layer not in place]
    if missing:
        raise AlignmentError(
            f"the {whose}'s KV holds layers {list(kv.layers)}, layer {missing[0]} is needed",
            fix=f"capture the {whose}'s layers {list(layers)}",
        )
    return {layer: place[layer] for layer in layers}


def check_heads(kv: KV, places: Iterable[int], heads: tuple[int, int], whose: str) -> None:
    for i in places:
        for x in (kv.keys[i], kv.values[i]):
            if (x.shape[1], x.shape[3]) != heads:
                raise AlignmentError(
                    f"the {whose}'s layer {kv.layers[i]} has {x.shape[1]} heads of size {x.shape[3]}, "
                    f"the aligner was built for {heads[0]} of {heads[1]}",
                    fix="build the aligner from the model's own shape",
                )


def check_layers(mapping: SparseMap, M: int, L: int, student_layers: Sequence[int]) -> None:
    if mapping.n_in != M or mapping.n_out != L or mapping.index.ndim != 2:
        raise AlignmentError(
            f"layer map {tuple(mapping.index.shape)} from {mapping.n_in} layers, the models have {M} and {L}",
            fix="build the layer map from these two models",
        )
    if not student_layers or not all(0 <= layer < L and bool(mapping.mask()[layer]) for layer in student_layers):
        raise AlignmentError(
            f"student layers {list(student_layers)} of {L}", fix="name layers that exist and have a teacher layer"
        )


def require_queries(kv: KV, query_heads: tuple[int, int] | None, side: int, whose: str) -> None:
    if query_heads is None or not kv.queries:
        raise AlignmentError(
            f"attention is compared, and the {whose}'s KV has no queries" if query_heads else "no queries are aligned",
            fix="capture with queries, and give the aligner query_heads",
        )
    if kv.queries[0].shape[1] != query_heads[side]:
        raise AlignmentError(
            f"the {whose} has {kv.queries[0].shape[1]} query heads, the aligner was built for {query_heads[side]}",
            fix="build the aligner from the model's own shape",
        )
