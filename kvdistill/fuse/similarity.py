"""Weights from how near the student's vectors are to each teacher's prototypes, and the prototypes.

Teachers may have different channel counts (`match_in: teacher`), so vectors and prototypes are lists with
one tensor a teacher. Similarities are made comparable across sizes by dividing by the channel count's root.
Similarity weights were measured to prefer the *wrong* teacher (SPEC section 13): a negative arm, kept.

Axes: N teachers, L layers, B batch, T tokens, C channels (of teacher n), P prototypes, n calibration rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from kvdistill.core.errors import AlignmentError, DataError

Metric = Literal["cosine", "dot", "euclidean"]
Grain = Literal["example", "token", "layer"]
Prototype = Literal["mean", "first", "max", "k-means"]

K_MEANS_ROUNDS = 50


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of queries [.., n, C] and prototypes [.., P, C]
    "cosine": lambda q, p: normalize(q, dim=-1) @ normalize(p, dim=-1).mT,
    "dot": lambda q, p: q @ p.mT / q.shape[-1] ** 0.5,
    "euclidean": lambda q, p: -torch.cdist(q, p, compute_mode="donot_use_mm_for_euclid_dist") / q.shape[-1] ** 0.5,
}


def _pool_tokens(x_LBTC: Tensor, mask_BT: Tensor, how: str) -> Tensor:
    """[L, B, C]: mean, first or maximum over the real tokens; 0 where an example has none."""
    x_LBTC = x_LBTC.float()
    has_token_B1 = mask_BT.any(1)[:, None]
    if how == "first":
        first_B = mask_BT.int().argmax(dim=1)
        pooled = x_LBTC[:, torch.arange(len(first_B), device=first_B.device), first_B]
    elif how == "max":
        pooled = x_LBTC.masked_fill(~mask_BT[..., None], float("-inf")).amax(dim=2)
    else:
        clean = x_LBTC.masked_fill(~mask_BT[..., None], 0)
        pooled = clean.sum(2) / mask_BT.sum(1).clamp_min(1)[:, None]
    return torch.where(has_token_B1, pooled, 0.0)


@torch.no_grad()
def similarity_weights(
    query_N_LBTC: Sequence[Float[Tensor, "L B T _"]],
    mask_BT: Bool[Tensor, "B T"],
    prototypes_N_LPC: Sequence[Float[Tensor, "L _ _"]],
    metric: Metric = "cosine",
    temperature: int | float = 1.0,
    grain: Grain = "example",
) -> Float[Tensor, "N #L B #T"]:
    """softmax over teachers of sim(student query, teacher prototype) / temperature, without gradient.

    query_N_LBTC: the student's vectors in each teacher's space. A teacher's similarity is the largest over
    its P prototypes. Metrics: cosine; dot / sqrt(C); -euclidean / sqrt(C).
    grain: `example` pools tokens (mean over real ones) and averages similarity over layers -> [N, 1, B, 1];
    `layer` pools tokens -> [N, L, B, 1]; `token` averages over layers -> [N, 1, B, T].
    """
    if len(query_N_LBTC) != len(prototypes_N_LPC):
        raise AlignmentError(
            f"{len(query_N_LBTC)} student queries and prototypes of {len(prototypes_N_LPC)} teachers",
            place="fuse.fusion_strategy: similarity",
            fix="one query tensor per teacher, in the teacher's space",
        )
    similarity = []
    for query_LBTC, prototypes_LPC in zip(query_N_LBTC, prototypes_N_LPC, strict=True):
        if query_LBTC.shape[-1] != prototypes_LPC.shape[-1]:
            raise AlignmentError(
                f"student query of {query_LBTC.shape[-1]} channels, prototypes of {prototypes_LPC.shape[-1]}",
                place="fuse.fusion_strategy: similarity",
                fix="fit the prototypes in the space the student is projected to (match_in)",
            )
        if grain == "token":
            clean_LNC = query_LBTC.float().masked_fill(~mask_BT[..., None], 0).flatten(1, 2)
            nearest = METRICS[metric](clean_LNC, prototypes_LPC.float()).amax(-1).view(query_LBTC.shape[:3])
        else:
            pooled_LBC = _pool_tokens(query_LBTC, mask_BT, "mean")
            nearest = METRICS[metric](pooled_LBC, prototypes_LPC.float()).amax(-1, keepdim=True)
        similarity.append(nearest if grain == "layer" else nearest.mean(0, keepdim=True))
    return (torch.stack(similarity) / temperature).softmax(dim=0)


# -- prototypes -------------------------------------------------------------------------------


@torch.no_grad()
def fit_prototypes(
    batches: Iterable[tuple[Float[Tensor, "L _ _ C"], Bool[Tensor, "_ _"]]],
    prototype: Prototype = "mean",
    num_prototypes: int = 4,
    seed: int = 0,
) -> Float[Tensor, "L P C"]:
    """Prototypes of one teacher from its calibration targets, batches of ([L, B, T, C], [B, T]).

    Each example gives one vector a layer. `mean`: mean over tokens, then over examples. `first`: the first
    real token, mean over examples. `max`: channel-wise maximum over tokens, mean over examples. `k-means`:
    centres of the examples' token means, at most as many as there are examples. Streams: keeps [L, n, C].
    Raises DataError on an empty calibration set.
    """
    how = prototype if prototype in ("first", "max") else "mean"
    rows = [_pool_tokens(x_LBTC, mask_BT, how)[:, mask_BT.any(1)] for x_LBTC, mask_BT in batches]
    if not rows or sum(r.shape[1] for r in rows) == 0:
        raise DataError(
            "no calibration example with a real token", place="fuse.prototype", fix="give at least one example"
        )
    rows_LnC = torch.cat(rows, dim=1)
    if prototype != "k-means":
        return rows_LnC.mean(1, keepdim=True)
    return torch.stack([k_means(rows_nC, num_prototypes, seed) for rows_nC in rows_LnC])


@torch.no_grad()
def k_means(rows_nC: Float[Tensor, "n C"], num_centres: int, seed: int = 0) -> Float[Tensor, "P C"]:
    """Centres by Lloyd's rounds from seeded k-means++ starts (Arthur & Vassilvitskii 2007); deterministic.

    Returns min(num_centres, n) centres. A centre left without rows moves to the row furthest from its own.
    """
    num_centres = min(num_centres, len(rows_nC))
    centres_PC = _spread_starts(rows_nC, num_centres, seed)
    owner_n: Tensor | None = None
    for _ in range(K_MEANS_ROUNDS):
        distance_nP = torch.cdist(rows_nC, centres_PC, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_n, new_owner_n = distance_nP.min(dim=1)
        if owner_n is not None and torch.equal(new_owner_n, owner_n):
            break
        owner_n = new_owner_n
        count_P = torch.bincount(owner_n, minlength=num_centres)
        sums_PC = torch.zeros_like(centres_PC).index_add_(0, owner_n, rows_nC)
        centres_PC = sums_PC / count_P.clamp_min(1)[:, None]
        empty = (count_P == 0).nonzero().squeeze(1)
        centres_PC[empty] = rows_nC[nearest_n.argsort(descending=True, stable=True)[: len(empty)]]
    return centres_PC


def _spread_starts(rows_nC: Tensor, num_centres: int, seed: int) -> Tensor:
    """k-means++: each next start is drawn with probability ~ squared distance to the nearest start so far."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows_nC), (1,), generator=generator))]
    square_n = (rows_nC - rows_nC[chosen[0]]).square().sum(-1)
    while len(chosen) < num_centres:
        odds_n = square_n.double().cpu()
        if odds_n.sum() <= 0:  # fewer distinct rows than centres: any row does, the centre is a duplicate
            odds_n = torch.ones_like(odds_n)
        chosen.append(int(torch.multinomial(odds_n, 1, generator=generator)))
        square_n = torch.minimum(square_n, (rows_nC - rows_nC[chosen[-1]]).square().sum(-1))
    return rows_nC[chosen].clone()
