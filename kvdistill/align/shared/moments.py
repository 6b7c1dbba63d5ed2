"""Means and covariances of several models' channels at the same tokens, in one pass and constant memory.

Everything that a linear shared space can be fitted from: for N models the N(N+1)/2 blocks of cross-products.
Products are fp32 matrix products of at most `ROWS_AT_ONCE` tokens around the first batch's mean (fp64 where the input
is), their sums are kept in fp64. Padding is left out before any arithmetic. Knows no methods and no adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, combinations_with_replacement
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.channels import DEAD_CHANNEL_RATIO
from kvdistill.core.errors import AlignmentError
from kvdistill.core.runtime import sum_dtype

ROWS_AT_ONCE = 8192
RANK_TOLERANCE = 1e-6


@final
class PairedMoments:
    """Streams [L, B, T, C_n] of N models. num_channels: C_n of each, in the order they will come."""

    def __init__(self, num_channels: Sequence[int], num_layers: int) -> None:
        self.slices = [slice(end - c, end) for c, end in zip(num_channels, accumulate(num_channels), strict=True)]
        self.num_channels, self.num_layers, self.num_tokens = tuple(num_channels), num_layers, 0
        self._around_N_LC: list[Tensor] = []
        zeros = partial(torch.zeros, num_layers, dtype=torch.float64)
        self._sum_N_LC = [zeros(c) for c in num_channels]
        pairs = combinations_with_replacement(enumerate(num_channels), 2)
        self._products = {(i, j): zeros(c, d) for (i, c), (j, d) in pairs}

    @torch.no_grad()
    def update(self, x_N_LBTC: Sequence[Float[Tensor, "L B T _"]], mask_BT: Bool[Tensor, "B T"]) -> None:
        """Add one batch; masked values may be NaN. Sums live on the first batch's device."""
        places = mask_BT.flatten().nonzero().squeeze(1).to(x_N_LBTC[0].device)
        if not len(places):
            return
        with torch.autocast(places.device.type, enabled=False):
            if not self._around_N_LC:
                dtype = sum_dtype(*x_N_LBTC)  # one for all models, for their products
                for x_LBTC in x_N_LBTC:
                    means = [x.flatten(0, 1).index_select(0, places).double().mean(0) for x in x_LBTC]
                    self._around_N_LC.append(torch.stack(means).to(dtype))
                self._sum_N_LC = [x.to(places.device) for x in self._sum_N_LC]
                self._products = {pair: x.to(places.device) for pair, x in self._products.items()}
            for layer in range(self.num_layers):
                for part in places.split(ROWS_AT_ONCE):
                    rows = [x[layer].flatten(0, 1).index_select(0, part) for x in x_N_LBTC]
                    centred = [x.to(a.dtype) - a[layer] for x, a in zip(rows, self._around_N_LC, strict=True)]
                    for total, x in zip(self._sum_N_LC, centred, strict=True):
                        total[layer] += x.sum(0, dtype=torch.float64)
                    for (i, j), products in self._products.items():
                        products[layer] += centred[i].T @ centred[j]
        self.num_tokens += len(places)

    def covariance(self, layer: int) -> tuple[Float[Tensor, "C"], Float[Tensor, "C C"]]:
        """Mean [ΣC_n] and covariance [ΣC_n, ΣC_n] of one layer slot, models side by side; fp64, on the CPU.

        Raises AlignmentError where there were no real tokens.
        """
        if not self.num_tokens:
            raise AlignmentError("a shared space of no tokens", fix="calibrate on at least one example")
        size = sum(self.num_channels)
        offset = torch.cat([total[layer] for total in self._sum_N_LC]).cpu() / self.num_tokens
        around = torch.cat([a[layer].double() for a in self._around_N_LC]).cpu()
        covariance = torch.empty(size, size, dtype=torch.float64)
        for (i, j), products in self._products.items():
            block = products[layer].cpu() / self.num_tokens
            covariance[self.slices[i], self.slices[j]] = block
            covariance[self.slices[j], self.slices[i]] = block.T
        return around + offset, covariance - torch.outer(offset, offset)


def numerical_rank(mean_C: Float[Tensor, "C"], covariance_CC: Float[Tensor, "C C"]) -> int:
    """Independent channels: eigenvalues above 1e-6 of the largest, once every channel has variance 1.

    The scaling makes the answer independent of units; 1e-6 is above what fp32 products leave of a zero. Dead channels
    (see `channels.floored_std`) count for nothing.
    """
    std = covariance_CC.diagonal().clamp_min(0).sqrt()
    alive = std > DEAD_CHANNEL_RATIO * torch.maximum(mean_C.abs(), std.square().mean().sqrt())
    if not bool(alive.any()):
        return 0
    scaled = covariance_CC[alive][:, alive] / torch.outer(std[alive], std[alive])
    found = torch.linalg.eigvalsh(scaled)
    return int((found > RANK_TOLERANCE * found[-1]).sum())


def require_same_tokens(
    channels: Mapping[str, Tensor], mask_BT: Tensor, num_channels: Mapping[str, int], num_layers: int
) -> None:
    """Every model of `num_channels` as [L, B, T, C_n], all with one B and T, and a bool mask [B, T] of theirs.

    Raises AlignmentError naming the model.
    """
    missing = [name for name in num_channels if name not in channels]
    unknown = [name for name in channels if name not in num_channels]
    if missing or unknown:
        what = f"no channels of model {missing[0]!r}" if missing else f"channels of an unknown model {unknown[0]!r}"
        raise AlignmentError(f"{what} in the batch", fix=f"give every batch the models {', '.join(num_channels)}")
    if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
        raise AlignmentError(
            f"mask {tuple(mask_BT.shape)} of {mask_BT.dtype}",
            fix="one bool mask [batch, tokens] for all models: the tokens that every model has",
        )
    for name, x in channels.items():
        expected = (num_layers, *mask_BT.shape, num_channels[name])
        if tuple(x.shape) != expected:
            raise AlignmentError(
                f"model {name!r} has {tuple(x.shape)}, the other models and the mask make it {expected}",
                fix="map time and layers first: [layer slots, batch, tokens, channels] at the same tokens",
            )
