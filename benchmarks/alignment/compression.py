"""R-KV of 28 layers: of 256 reasoning tokens the best 64, per layer and head, and the map into 64 slots.

The loop is the method as it is usually written: per layer and head, with the matrix of all cosines.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.alignment import Case
from kvdistill.compress import rkv_layer_scores, rkv_select, selection_map

LAYERS, BATCH, QUERY_HEADS, HEADS, SIZE = 28, 4, 8, 4, 128
PROMPT, REASONING, ANSWER, KEEP, SHARE = 40, 256, 16, 64, 0.1


def cases() -> Iterator[Case]:
    S = PROMPT + REASONING + ANSWER
    segments_BS = torch.tensor([[1] * PROMPT + [2] * REASONING + [3] * ANSWER] * BATCH)
    queries = [torch.randn(BATCH, QUERY_HEADS, S, SIZE) for _ in range(LAYERS)]
    keys = [torch.randn(BATCH, HEADS, S, SIZE) for _ in range(LAYERS)]

    def ours() -> Tensor:
        kept = rkv_select(rkv_layer_scores(queries, keys, segments_BS), KEEP, SHARE)
        return selection_map(kept, KEEP).index[..., 0]

    def loops() -> Tensor:
        return _loop_places(queries, keys)

    agree = _share_in_common(ours(), loops())
    if agree < 0.999:  # two scores may lie within rounding of each other
        raise AssertionError(f"R-KV: only {agree:.2%} of the loop's tokens are kept")
    # keys of the reasoning and queries of the answer are read; a product of each answer query with each key
    read = LAYERS * BATCH * SIZE * 4 * (HEADS * REASONING + QUERY_HEADS * ANSWER)
    flops = 2 * LAYERS * BATCH * QUERY_HEADS * ANSWER * REASONING * SIZE
    yield Case("R-KV 256->64", ours, loops, bytes_moved=read, flops=flops, most_ms=30.0, yardstick_ms=5284.0)


def _share_in_common(ours_MBGN: Tensor, loop_MBGN: Tensor) -> float:
    width = int(max(ours_MBGN.max(), loop_MBGN.max())) + 1
    kept = [torch.zeros(*x.shape[:-1], width).scatter_(-1, x, 1.0) for x in (ours_MBGN, loop_MBGN)]
    return float((kept[0] * kept[1]).sum() / kept[1].sum())


def _loop_places(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """The chosen tokens' places [M, B, G, 64], in time order."""
    places = torch.empty(LAYERS, BATCH, HEADS, KEEP, dtype=torch.int64)
    group = QUERY_HEADS // HEADS
    for m in range(LAYERS):
        for b in range(BATCH):
            for g in range(HEADS):
                key = keys[m][b, g, PROMPT : PROMPT + REASONING]
                query = queries[m][b, g * group : (g + 1) * group, PROMPT + REASONING :]
                logits = (query @ key.T / SIZE**0.5).amax(0)
                importance = logits.softmax(-1).mean(0)
                cosine = normalize(key, dim=-1) @ normalize(key, dim=-1).T
                mean = cosine.fill_diagonal_(0).sum(1) / (REASONING - 1)
                score = SHARE * importance + (1 - SHARE) * (-mean).softmax(0)
                places[m, b, g] = PROMPT + score.topk(KEEP).indices.sort().values
    return places
