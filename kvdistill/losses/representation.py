"""A distance between whole layers: how differently two models arrange the same tokens (CKA).

Not a distance per token: it is computed from all real tokens of the micro-batch it is given. Source and target may
have different numbers of channels, and neither rotation nor scale of either side changes it.

Axes: L layers, B batch, T tokens, C and D channels, N real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.cka import linear_cka
from kvdistill.core.errors import AlignmentError
from kvdistill.core.runtime import sum_dtype
from kvdistill.losses.base import AbstractDistance

LEAST_TOKENS = 4  # the unbiased estimator divides by n - 3


@dataclass(frozen=True)
class CKAKVLoss(AbstractDistance):
    """1 - CKA of each layer, with the unbiased estimator of HSIC (Song et al. 2012, as used by Nguyen et al. 2021).

    The same number at every real token of a layer, 0 elsewhere, so that `masked_token_mean` makes it the mean over
    layers. A statistic of the micro-batch: unlike every other distance it depends on how a batch is split. Fewer
    than 4 real tokens contribute 0.
    """

    needs_mask = True

    def __call__(
        self, source: Float[Tensor, "L B T C"], target: Float[Tensor, "L B T D"], mask_BT: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "L B T"]:
        if source.shape[:3] != target.shape[:3] or mask_BT.shape != source.shape[1:3]:
            raise AlignmentError(
                f"CKA: source {tuple(source.shape)}, target {tuple(target.shape)}, mask {tuple(mask_BT.shape)}",
                fix="align time and layers first: both are [layers, batch, tokens, channels], the mask [batch, tokens]",
            )
        if int(mask_BT.sum()) < LEAST_TOKENS:
            nothing = source[..., :0].sum(-1) + target[..., :0].sum(-1)  # 0, with a graph that backward can follow
            return nothing.to(sum_dtype(source, target))
        with torch.autocast(source.device.type, enabled=False):
            similarity_L = linear_cka(source.flatten(1, 2), target.flatten(1, 2), mask_BT.flatten())
        return (1 - similarity_L)[:, None, None] * mask_BT
