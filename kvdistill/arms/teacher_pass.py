"""One pass of a teacher over a batch: its targets, rounded as the store would, and what its attention says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvdistill.compress import rkv_layer_scores
from kvdistill.core.kv import KV
from kvdistill.core.runtime import DTYPES
from kvdistill.core.segments import ANSWER
from kvdistill.core.targets import ChannelMeans, TeacherTargets
from kvdistill.losses import answer_attention
from kvdistill.models import teacher_forward


def run_teacher(
    model: PreTrainedModel,
    input_ids_BS: Tensor,
    segments_BS: Tensor,
    *,
    layers: Sequence[int],
    dtype: str,
    want_nll: bool = True,
    top_k: int = 0,
    queries: bool = False,
    scores: bool = False,
    means: ChannelMeans | None = None,
) -> TeacherTargets:
    """Targets of one batch straight from the model, rounded to `dtype` as the store would (around `means`).

    queries: with the KV. scores: what the teacher's attention says of each token (`token_scores`).
    """
    out = teacher_forward(
        model,
        input_ids_BS,
        segments_BS > 0,
        segments_BS,
        layers=list(layers) or None,
        want_kv=bool(layers),
        want_nll=want_nll,
        want_logits_top_k=top_k,
        want_queries=queries,
        scorer=token_scores if scores else None,
    )
    if out.kv is not None and means is not None:
        return replace(out, kv=means.rounded(out.kv, DTYPES[dtype]))
    if out.kv is not None and out.kv.keys[0].dtype != DTYPES[dtype]:
        return replace(out, kv=out.kv.map_layers(lambda x: x.to(DTYPES[dtype])))
    return out


def token_scores(kv: KV, segments_BS: Tensor) -> Tensor:
    """Of every token, in every layer and KV head [B, S, M, 3, G]: importance and redundancy (R-KV, over the reasoning
    tokens), and the attention that the answer pays to it (mean over query heads; over all tokens).

    kv: as attention sees it, with queries.
    """
    queries, rkv_MB2GS = _scaled_queries(kv), rkv_of(kv, segments_BS)
    q, k = (torch.stack([x.transpose(1, 2) for x in side]) for side in (queries, kv.keys))
    paid_MBS = answer_attention(q, k, segments_BS == ANSWER, kv.mask_BT, rules=kv.rules)
    paid_MB1GS = paid_MBS[:, :, None, None].expand(-1, -1, 1, kv.keys[0].shape[1], -1)
    return torch.cat([rkv_MB2GS, paid_MB1GS], dim=2).permute(1, 4, 0, 2, 3)


def rkv_of(kv: KV, segments_BS: Tensor) -> Tensor:
    """R-KV scores [M, B, 2, G, S] of keys and queries as attention sees them."""
    return rkv_layer_scores(_scaled_queries(kv), kv.keys, segments_BS, rules=kv.rules)


def _scaled_queries(kv: KV) -> list[Tensor]:
    """Such that a division by sqrt(size), as most models do it, gives what this one's attention takes."""
    if kv.scaling is None:
        return list(kv.queries)
    factors = [one * key.shape[-1] ** 0.5 for one, key in zip(kv.scaling, kv.keys, strict=True)]
    return [q * factor for q, factor in zip(kv.queries, factors, strict=True)]
