"""Mean and standard deviation of every channel over real tokens, in one pass over any number of batches.

Teacher channels differ in scale by orders of magnitude; a loss that averages over them sees only the large ones.
Standardised to mean 0 and std 1 they count alike. Batches are merged by Chan, Golub & LeVeque 1983 (pairwise
mean and sum of squares) in fp64, so that neither order nor number of batches matters. Knows no models or maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError

DEAD_CHANNEL_RATIO = 1e-5


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and std (population) of each channel C of each layer L, float32. std is never 0: see `floored_std`.

    dead_LC: channels that never vary, whose std was set to 1; None: not known, all count as live.
    """

    mean_LC: Float[Tensor, "L C"]
    std_LC: Float[Tensor, "L C"]
    dead_LC: Bool[Tensor, "L C"] | None = None

    def select(self, rows: Sequence[int]) -> ChannelStatistics:
        """Only these layers, in this order."""
        dead_LC = None if self.dead_LC is None else self.dead_LC[list(rows)]
        return ChannelStatistics(self.mean_LC[list(rows)], self.std_LC[list(rows)], dead_LC)

    def standardise(self, x: Float[Tensor, "L *N C"]) -> Float[Tensor, "L *N C"]:
        """(x − mean) / std. Slow and obvious: the aligner does the same in one fused pass."""
        shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
        return (x - self.mean_LC.view(shape)) / self.std_LC.view(shape)


@dataclass(frozen=True)
class KVStatistics:
    """Channel statistics of keys and of values."""

    keys: ChannelStatistics
    values: ChannelStatistics
    _NAMES: ClassVar = ("keys.mean", "keys.std", "values.mean", "values.std")

    def select(self, rows: Sequence[int]) -> KVStatistics:
        return KVStatistics(self.keys.select(rows), self.values.select(rows))

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors: keys.mean, keys.std, values.mean, values.std, each [L, C]."""
        parts = self.keys.mean_LC, self.keys.std_LC, self.values.mean_LC, self.values.std_LC
        return dict(zip(self._NAMES, parts, strict=True))

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> KVStatistics:
        """Back from `tensors()`; AlignmentError names what is missing."""
        missing = [name for name in KVStatistics._NAMES if name not in tensors]
        if missing:
            raise AlignmentError(f"channel statistics lack {', '.join(missing)}", fix="collect them again")
        k_mean, k_std, v_mean, v_std = (tensors[name] for name in KVStatistics._NAMES)
        return KVStatistics(ChannelStatistics(k_mean, k_std), ChannelStatistics(v_mean, v_std))


@final
class ChannelAccumulator:
    """Streams [L, ..., C] batches into `ChannelStatistics`."""

    def __init__(self, num_layers: int, num_channels: int) -> None:
        self._count_L1 = torch.zeros(num_layers, 1, dtype=torch.float64)
        self._mean_LC = torch.zeros(num_layers, num_channels, dtype=torch.float64)
        self._square_LC = torch.zeros(num_layers, num_channels, dtype=torch.float64)

    def update(self, x: Float[Tensor, "L *N C"], mask: Bool[Tensor, "..."]) -> None:
        """Add one batch. mask: True at real tokens, [*N] for all layers or [L, *N]. Masked values may be NaN."""
        rows_LNC, weight_LN1 = masked_rows(x, mask)
        count_L1 = weight_LN1.sum(1).expand_as(self._count_L1).to(self._count_L1.device)
        mean_LC = rows_LNC.sum(1) / weight_LN1.sum(1).clamp_min(1)
        square_LC = ((rows_LNC - mean_LC[:, None]) * weight_LN1).square_().sum(1)
        mean_LC, square_LC = mean_LC.to(self._mean_LC.device), square_LC.to(self._mean_LC.device)
        total_L1 = (self._count_L1 + count_L1).clamp_min(1)
        step_LC = mean_LC - self._mean_LC
        self._square_LC += square_LC + step_LC.square() * (self._count_L1 * count_L1 / total_L1)
        self._mean_LC += step_LC * (count_L1 / total_L1)
        self._count_L1 += count_L1

    def statistics(self) -> ChannelStatistics:
        """What the batches so far say. Raises AlignmentError where a layer saw no real token."""
        if not bool((self._count_L1 > 0).all()):
            raise AlignmentError("channel statistics of no tokens", fix="calibrate on at least one example")
        std_LC = (self._square_LC / self._count_L1).sqrt()
        dead_LC = dead_channels(self._mean_LC, std_LC)
        return ChannelStatistics(self._mean_LC.float(), floored_std(self._mean_LC, std_LC).float(), dead_LC)


def floored_std(mean_LC: Float[Tensor, "L C"], std_LC: Float[Tensor, "L C"]) -> Float[Tensor, "L C"]:
    """1 in place of the std of dead channels, so that their standardised target is 0 and not amplified rounding."""
    return torch.where(dead_channels(mean_LC, std_LC), torch.ones_like(std_LC), std_LC)


def dead_channels(mean_LC: Float[Tensor, "L C"], std_LC: Float[Tensor, "L C"]) -> Bool[Tensor, "L C"]:
    """Std at most 1e-5 of the channel's own mean or of the layer's root-mean-square std (0 counts in any case)."""
    layer_L1 = std_LC.square().mean(1, keepdim=True).sqrt()
    return std_LC <= DEAD_CHANNEL_RATIO * torch.maximum(mean_LC.abs(), layer_L1)


def masked_rows(x: Float[Tensor, "L *N C"], mask: Bool[Tensor, "..."]) -> tuple[Tensor, Tensor]:
    """x as fp64 rows [L, N, C], zero where masked, and the mask as weights [L or 1, N, 1].

    mask: [*N] for all layers or [L, *N]. Raises AlignmentError for any other shape.
    """
    if tuple(mask.shape) not in (tuple(x.shape[1:-1]), tuple(x.shape[:-1])):
        raise AlignmentError(
            f"mask {tuple(mask.shape)} for a tensor {tuple(x.shape)}",
            fix="masks are [batch, tokens] or [layers, batch, tokens]",
        )
    shared = mask.ndim == x.ndim - 2
    weight_LN1 = mask.reshape(1 if shared else x.shape[0], -1, 1)
    rows_LNC = x.detach().reshape(x.shape[0], -1, x.shape[-1]).double()
    return torch.where(weight_LN1, rows_LNC, 0.0), weight_LN1.double()
