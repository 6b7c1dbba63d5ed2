"""`SparseMap`: "target slot i is a weighted mean of a few source slots".

Truncation, proportional and segment-wise resampling, layer ratio / interpolation / top-k, character
overlap between tokenizers, crop and compression are all of this one type. Compose the maps first
(they are tiny), then touch the big tensor once with `apply`.

A map is `index[..., n_out, k]` and `weight[..., n_out, k]`; leading axes broadcast, so that a map can
be shared, per sample, per layer or per head. Rows either sum to 1 or are all zero: an all-zero row is
a slot with nothing behind it, and `mask()` says which those are. This file knows no model and no text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.core.runtime import AlignmentError


@dataclass(frozen=True)
class SparseMap:
    """Row-stochastic map from `n_in` source slots to `n_out` target slots, k sources a row.

    index: int64 [..., n_out, k], each in [0, n_in). weight: float32 of the same shape, >= 0.
    """

    index: Tensor
    weight: Tensor
    n_in: int

    def __post_init__(self) -> None:
        if self.index.shape != self.weight.shape or self.index.ndim < 2:
            raise AlignmentError(
                f"SparseMap: index {tuple(self.index.shape)} and weight {tuple(self.weight.shape)}",
                fix="both are [..., n_out, k]",
            )

    # -- making one ---------------------------------------------------------------------------

    @staticmethod
    def identity(n: int, device: torch.device | str = "cpu") -> SparseMap:
        index = torch.arange(n, device=device)[:, None]
        return SparseMap(index, torch.ones(n, 1, device=device), n)

    @staticmethod
    def take(index: Tensor, n_in: int, mask: Tensor | None = None) -> SparseMap:
        """Hard choice: slot i is source `index[..., i]`; rows where `mask` is False are empty."""
        weight = torch.ones(index.shape, device=index.device) if mask is None else mask.float()
        return SparseMap(index.clamp(0, max(n_in - 1, 0))[..., None], weight[..., None], n_in)

    @staticmethod
    def interpolate(place: Tensor, n_in: int, mask: Tensor | None = None) -> SparseMap:
        """Linear interpolation at real-valued source places [..., n_out], clamped into the source."""
        place = place.clamp(0, max(n_in - 1, 0))
        low = place.floor().long()
        high = (low + 1).clamp(max=max(n_in - 1, 0))
        share = (place - low).float()
        weight = torch.stack([1 - share, share], dim=-1)
        if mask is not None:
            weight = weight * mask[..., None]
        return SparseMap(torch.stack([low, high], dim=-1), weight, n_in)

    @staticmethod
    def from_dense(dense: Tensor, k: int | None = None) -> SparseMap:
        """The k largest weights a row of [..., n_out, n_in], renormalised (all non-zero by default)."""
        k = k or max(1, int((dense > 0).sum(-1).max()))
        weight, index = dense.topk(min(k, dense.shape[-1]), dim=-1)
        return SparseMap(index, weight.float(), dense.shape[-1]).normalised()

    # -- using one ----------------------------------------------------------------------------

    @property
    def n_out(self) -> int:
        return self.index.shape[-2]

    def mask(self) -> Tensor:
        """True at target slots that have something behind them: [..., n_out]."""
        return self.weight.sum(-1) > 0

    def normalised(self) -> SparseMap:
        """Rows sum to 1; rows without weight stay empty."""
        total = self.weight.sum(-1, keepdim=True)
        return SparseMap(
            self.index, torch.where(total > 0, self.weight / total.clamp_min(1e-30), self.weight), self.n_in
        )

    def masked_source(self, mask: Tensor) -> SparseMap:
        """Source slots where `mask` [..., n_in] is False give nothing; the rest of each row is renormalised."""
        lead = torch.broadcast_shapes(self.index.shape[:-2], mask.shape[:-1])
        index = self.index.expand(*lead, *self.index.shape[-2:])
        keep = mask.expand(*lead, self.n_in).gather(-1, index.flatten(-2)).view(index.shape)
        return SparseMap(index, self.weight * keep, self.n_in).normalised()

    def is_identity(self) -> bool:
        """True where applying the map would change nothing: square, slot i takes source i with weight 1."""
        if self.n_out != self.n_in or self.index.shape[-1] != 1:
            return False
        here = torch.arange(self.n_in, device=self.index.device)[:, None]
        return bool((self.index == here).all() and (self.weight == 1).all())

    def to(self, device: torch.device | str) -> SparseMap:
        return SparseMap(self.index.to(device), self.weight.to(device), self.n_in)

    def to_dense(self) -> Tensor:
        """[..., n_out, n_in] in float32: for tests and pictures, not for work."""
        dense = torch.zeros(*self.index.shape[:-1], self.n_in, device=self.weight.device)
        return dense.scatter_add_(-1, self.index, self.weight.float())

    def compose(self, first: SparseMap) -> SparseMap:
        """The map that does `first` and then `self`: k is the product of both, exact."""
        if first.n_out != self.n_in:
            raise AlignmentError(
                f"SparseMap: the first map makes {first.n_out} slots, the second reads {self.n_in}",
                fix="compose maps in the order of the data",
            )
        lead = torch.broadcast_shapes(self.index.shape[:-2], first.index.shape[:-2])
        n_out, k = self.index.shape[-2:]
        outer = self.index.expand(*lead, n_out, k)
        place = outer.reshape(*lead, n_out * k)[..., None].expand(*lead, n_out * k, first.index.shape[-1])
        shape = (*lead, n_out, k * first.index.shape[-1])
        index = first.index.expand(*lead, *first.index.shape[-2:]).gather(-2, place).reshape(shape)
        inner = first.weight.expand(*lead, *first.weight.shape[-2:]).gather(-2, place)
        weight = inner.view(*lead, n_out, k, -1) * self.weight.expand(*lead, n_out, k)[..., None]
        return SparseMap(index, weight.reshape(shape), first.n_in)

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Apply along `axis` of x; leading axes of the map line up with x's axes from the left.

        x[..., n_in at axis, ...] -> x[..., n_out at axis, ...], in x's dtype, summed in fp32 (fp64 for an fp64 x).
        A shared map (no leading axes) fits any x; a map [B, n_out, k] fits an x whose axis 0 is B.
        """
        axis = axis % x.ndim
        if x.shape[axis] != self.n_in:
            raise AlignmentError(
                f"SparseMap reads {self.n_in} slots, axis {axis} has {x.shape[axis]}",
                fix="build the map for this tensor",
            )
        lead = self.index.ndim - 2
        if lead > axis:
            raise AlignmentError(
                f"SparseMap has {lead} leading axes, the tensor has {axis} before axis {axis}",
                fix="leading axes of a map line up with the tensor's from the left",
            )
        if lead == 0:
            return self._apply_shared(x, axis)
        return self._apply_rows(x, axis)

    def _apply_rows(self, x: Tensor, axis: int) -> Tensor:
        # Whole rows of the tensor seen as [slots of every leading place, what follows the axis] are copied:
        # three to ten times faster than gather, which reads an index for every element.
        before, tail, (n_out, k) = x.shape[:axis], x.shape[axis + 1 :], self.index.shape[-2:]
        places = math.prod(before)
        flat = x.reshape(places * self.n_in, math.prod(tail))
        lead, middle = self.index.shape[:-2], (1,) * (axis - self.index.ndim + 2)
        start = (torch.arange(places, device=x.device) * self.n_in).view(*before, 1)
        out: Tensor | None = None
        for j in range(k):  # k is small (1-4): a loop over it never builds a [.., n_out*k, ..] tensor
            row = self.index[..., j].view(*lead, *middle, n_out) + start
            weight = self.weight[..., j].view(*lead, *middle, n_out).expand(*before, n_out).reshape(-1, 1)
            part = flat.index_select(0, row.view(-1)).to(_sum_dtype(x))
            out = part * weight if out is None else torch.addcmul(out, part, weight.to(part.dtype))
        assert out is not None
        return out.view(*before, n_out, *tail).to(x.dtype)

    def _apply_shared(self, x: Tensor, axis: int) -> Tensor:
        shape = [1] * x.ndim
        shape[axis] = self.n_out
        out: Tensor | None = None
        for j in range(self.index.shape[-1]):
            part = x.index_select(axis, self.index[:, j]).to(_sum_dtype(x)) * self.weight[:, j].view(shape)
            out = part if out is None else out + part
        assert out is not None
        return out.to(x.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
