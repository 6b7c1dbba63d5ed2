"""What a teacher gives for a batch of texts: `TeacherTargets`. How it lies on disk: `store/packed.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvdistill.core.kv import KV

IMPORTANCE, REDUNDANCY, ATTENTION = 0, 1, 2  # rows of a token's scores


@dataclass(frozen=True)
class TeacherTargets:
    """One teacher's detached view of a batch: B examples, S teacher tokens.

    kv: unrotated keys and values (and queries, where asked for) of the captured layers, or None.
    segments_BS: segment codes, 0 at padding.
    nll_B: mean NLL of the gold completion (nats per token), or None (encoders predict no next token).
    topk_index_BSK, topk_logprob_BSK: the teacher's next-token log-probabilities at each position, or None.
    scores_BSMRG: float32 scores of each token in each captured layer and KV head (importance, redundancy, and what
    else the scorer gives on that axis), or None.
    """

    segments_BS: Tensor
    kv: KV | None = None
    nll_B: Tensor | None = None
    topk_index_BSK: Tensor | None = None
    topk_logprob_BSK: Tensor | None = None
    scores_BSMRG: Tensor | None = None

    def to(self, device: torch.device | str) -> TeacherTargets:
        moved: dict[str, Any] = {
            name: part.to(device, non_blocking=True) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, kv=None if self.kv is None else self.kv.to(device), **moved)


@dataclass(frozen=True)
class ChannelMeans:
    """A mean of every captured channel, float32, which narrow stores take out before they round: kv [M, 2, G, E],
    queries [M, H, E], or None.

    The keys of some layers (Qwen2.5's first) have channels whose mean is 500 times their deviation: bfloat16, with
    eight bits, keeps nothing of what such a channel says. Any number near the mean will do, so long as it is fixed.
    """

    kv_M2GE: Tensor
    queries_MHE: Tensor | None = None

    @staticmethod
    def of(targets: TeacherTargets) -> ChannelMeans:
        """Over the real tokens of one batch, of what is finite; 0 for a channel where nothing is."""
        assert targets.kv is not None
        real_BS = targets.segments_BS > 0

        def means(tensors: Sequence[Tensor]) -> Tensor:
            rows = [x.transpose(1, 2)[real_BS].double() for x in tensors]
            found = [torch.where(x.isfinite(), x, torch.nan).nanmean(0).nan_to_num(0.0) for x in rows]
            return torch.stack(found).float().cpu()

        kv = targets.kv
        both = torch.stack([means(kv.keys), means(kv.values)], dim=1)
        return ChannelMeans(both, means(kv.queries) if kv.queries else None)

    def rounded(self, kv: KV, dtype: torch.dtype) -> KV:
        """What a store of this dtype gives back: the mean in float32 and what was left in `dtype`."""

        def around(tensors: Sequence[Tensor], means: Tensor) -> tuple[Tensor, ...]:
            pairs = [(x.float(), mean_GE.to(x.device)[:, None]) for x, mean_GE in zip(tensors, means, strict=True)]
            return tuple((x - mean).to(dtype).float() + mean for x, mean in pairs)

        keys, values = (around(side, self.kv_M2GE[:, i]) for i, side in enumerate((kv.keys, kv.values)))
        queries = () if self.queries_MHE is None or not kv.queries else around(kv.queries, self.queries_MHE)
        return replace(kv, keys=keys, values=values, queries=queries)
