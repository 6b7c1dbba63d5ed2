"""What a teacher gives for a batch of texts: `TeacherTargets`. How it lies on disk: `store/packed.py`."""

from __future__ import annotations

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
