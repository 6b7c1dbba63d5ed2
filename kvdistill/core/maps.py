"""`SparseMap`: "target slot i is a weighted mean of a few source slots".

Truncation, proportional and segment-wise resampling, layer ratio / interpolation / top-k, character
overlap between tokenizers, crop and compression are all of this one type. Compose the maps first
(they are tiny), then touch the big tensor once with `apply`.

A map is `index[..., n_out, k]` and `weight[..., n_out, k]`; leading axes broadcast, so that a map can
be shared, per sample, per layer or per head. Rows either sum to 1 or are all zero: an all-zero row is
a slot with nothing behind it, and `mask()` says which those are. Source slots of weight 0 are never read, so
whatever stands there (padding, NaN) reaches nothing. This file knows no model and no text.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from kvdistill.core.errors import AlignmentError
from kvdistill.core.runtime import sum_dtype

# Below this many numbers in a row, a row costs more to look up than to copy element by element.
LEAST_ROW = 16
# Sums on their way to the caller's memory are made in chunks of this size, which still lie in the cache when copied.
CHUNK_BYTES = 2 << 20


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

    def select(self, place: int) -> SparseMap:
        """The map at one place of the first leading axis: of one layer, say."""
        return SparseMap(self.index[place], self.weight[place], self.n_in)

    def of_layer(self, place: int) -> SparseMap:
        """The map of one layer: of a map [M, B, n_out, k] the one at `place`; any other is every layer's."""
        return self if self.index.ndim < 4 else self.select(place)

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

    def apply(self, x: Tensor, axis: int, *, out: Tensor | None = None) -> Tensor:
        """Apply along `axis` of x; leading axes of the map line up with x's axes from the left.

        x[..., n_in at axis, ...] -> x[..., n_out at axis, ...], in x's dtype, summed in fp32 (fp64 for an fp64 x).
        A shared map (no leading axes) fits any x; a map [B, n_out, k] fits an x whose axis 0 is B.
        Gradients reach x (and the weights, where they carry any). Empty rows give exactly 0, whatever x holds.
        out: where the result goes, any strides; returned. Memory that was written before is worth having for large
        results: the first touch of fresh memory costs more than the sum. Not for tensors that need a gradient.

        Views cost nothing: an x whose rows lie apart in memory (one layer of a stored block, heads before tokens or
        after them) is read where it lies, and the result is laid out in memory as x is.
        """
        axis = axis % x.ndim
        self._check_fit(x, axis)
        needs_graph = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not needs_graph and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
            # The last ones are kept: K and V of all layers of a batch are read through the same map in the same layout.
            key = (axis, x.shape, x.stride(), x.dtype)
            kept: tuple[object, _Bags | None] | None = self.__dict__.get("_last_bags")
            if kept is None or kept[0] != key:
                table = _Table.of(x, axis, self.index.ndim - 2)
                kept = (key, None if table is None else _Bags.of(self, x, axis, table))
                self.__dict__["_last_bags"] = kept
            if (bags := kept[1]) is not None:
                return bags.sum(x) if out is None else bags.sum_into(x, out)
        made = self._apply_shared(x, axis) if self.index.ndim == 2 else self._apply_rows(x, axis)
        return made if out is None else out.copy_(made)

    def _check_fit(self, x: Tensor, axis: int) -> None:
        if x.shape[axis] != self.n_in:
            raise AlignmentError(
                f"SparseMap reads {self.n_in} slots, axis {axis} has {x.shape[axis]}",
                fix="build the map for this tensor",
            )
        lead = self.index.shape[:-2]
        if len(lead) > axis:
            raise AlignmentError(
                f"SparseMap has {len(lead)} leading axes, the tensor has {axis} before axis {axis}",
                fix="leading axes of a map line up with the tensor's from the left",
            )
        if any(mine not in (1, theirs) for mine, theirs in zip(lead, x.shape, strict=False)):
            raise AlignmentError(
                f"SparseMap has leading axes {tuple(lead)}, the tensor {tuple(x.shape[: len(lead)])}",
                fix="each leading axis of a map is 1 or the tensor's own size",
            )

    # On any device, with a graph, in any dtype: the j-th source slots of all rows together, for each j.

    @functools.cached_property
    def _readable(self) -> tuple[Tensor, Tensor | None]:
        """The index with entries of weight 0 led to a slot their row does read, and the rows that read any.

        None for the rows where all do (asked on the CPU only: elsewhere the answer would have to be waited for).
        """
        heaviest = self.index.gather(-1, self.weight.detach().argmax(-1, keepdim=True))
        live = self.mask()
        everywhere = live.device.type == "cpu" and bool(live.all())
        return torch.where(self.weight > 0, self.index, heaviest), None if everywhere else live

    def _apply_rows(self, x: Tensor, axis: int) -> Tensor:
        # Whole rows of the tensor seen as [slots of every leading place, what follows the axis] are copied:
        # three to ten times faster than gather, which reads an index for every element.
        before, tail, (n_out, k) = x.shape[:axis], x.shape[axis + 1 :], self.index.shape[-2:]
        places = math.prod(before)
        flat = x.reshape(places * self.n_in, math.prod(tail))
        lead, middle = self.index.shape[:-2], (1,) * (axis - self.index.ndim + 2)
        start = (torch.arange(places, device=x.device) * self.n_in).view(*before, 1)
        index, live = self._readable
        out: Tensor | None = None
        for j in range(k):  # k is small: a loop over it never builds a [.., n_out*k, ..] tensor
            row = index[..., j].view(*lead, *middle, n_out) + start
            weight = self.weight[..., j].view(*lead, *middle, n_out).expand(*before, n_out).reshape(-1, 1)
            part = flat.index_select(0, row.view(-1)).to(sum_dtype(x))
            out = part * weight if out is None else torch.addcmul(out, part, weight.to(part.dtype))
        assert out is not None
        if live is not None:
            empty = ~live.view(*lead, *middle, n_out).expand(*before, n_out).reshape(-1, 1)
            out = out.masked_fill(empty, 0.0)
        return out.view(*before, n_out, *tail).to(x.dtype)

    def _apply_shared(self, x: Tensor, axis: int) -> Tensor:
        shape = [1] * x.ndim
        shape[axis] = self.n_out
        index, live = self._readable
        out: Tensor | None = None
        for j in range(index.shape[-1]):
            part = x.index_select(axis, index[:, j]).to(sum_dtype(x)) * self.weight[:, j].view(shape)
            out = part if out is None else out + part
        assert out is not None
        if live is not None:
            out = out.masked_fill(~live.view(shape), 0.0)
        return out.to(x.dtype)


class _Table(NamedTuple):
    """How a strided tensor is a table of equal rows: which axes lie inside a row, and how many rows each other steps.

    order: all axes as they lie in memory, those inside a row last. steps: rows per step along each outer axis.
    """

    width: int
    num_rows: int
    outer: tuple[int, ...]
    order: tuple[int, ...]
    steps: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, axis: int, lead: int) -> _Table | None:
        """None where x is no such table, or one of rows so short that looking them up does not pay."""
        sizes, strides = x.shape, x.stride()
        if 0 in sizes:
            return None
        by_stride = sorted(range(x.ndim), key=lambda a: (strides[a], -a))
        width, inner = 1, []
        for a in by_stride:
            if a < lead or a == axis:
                continue
            if sizes[a] > 1:
                if strides[a] != width:
                    break
                width *= sizes[a]
            inner.append(a)
        outer = tuple(a for a in reversed(by_stride) if a not in inner)
        if width < LEAST_ROW or any(strides[a] % width for a in outer if sizes[a] > 1):
            return None
        steps = tuple(strides[a] // width if a in outer and sizes[a] > 1 else 0 for a in range(x.ndim))
        num_rows = 1 + sum((sizes[a] - 1) * steps[a] for a in outer)
        return _Table(width, num_rows, outer, (*outer, *reversed(inner)), steps)


class _Bags(NamedTuple):
    """Every target row as one weighted bag of source rows: read once and written once, without a temporary.

    sources: source rows of all target rows one after another. offsets: where each target row's begin.
    made: the result's sizes as it lies in memory; `back` permutes those axes to the tensor's own.
    """

    sources: Tensor
    offsets: Tensor
    weight: Tensor
    table: _Table
    made: tuple[int, ...]
    back: tuple[int, ...]

    @staticmethod
    def of(mapping: SparseMap, x: Tensor, axis: int, table: _Table) -> _Bags:
        lead, (n_out, k) = mapping.index.shape[:-2], mapping.index.shape[-2:]
        sizes = [n_out if a == axis else x.shape[a] for a in range(x.ndim)]
        aligned = (*lead, *(1,) * (axis - len(lead)), n_out, *(1,) * (x.ndim - axis - 1), k)
        place = mapping.index.view(aligned) * table.steps[axis]
        for a in table.outer:
            if a != axis:
                along = [-1 if i == a else 1 for i in range(x.ndim + 1)]
                place = place + (torch.arange(x.shape[a]) * table.steps[a]).view(along)
        shape = [sizes[a] if a in table.outer else 1 for a in range(x.ndim)]
        order = [*table.order, x.ndim]
        place = place.expand(*shape, k).permute(order).reshape(-1, k)
        weight = mapping.weight.detach().view(aligned).expand(*shape, k).permute(order).reshape(-1, k)
        live = weight > 0
        count = live.sum(1)
        back = tuple(table.order.index(a) for a in range(x.ndim))
        made = tuple(sizes[a] for a in table.order)
        return _Bags(place[live], count.cumsum(0) - count, weight[live].to(x.dtype), table, made, back)

    def sum(self, x: Tensor) -> Tensor:
        return self._rows(x, slice(None), 0, len(self.sources)).view(self.made).permute(self.back)

    def sum_into(self, x: Tensor, out: Tensor) -> Tensor:
        target, width = out.permute(self.table.order), self.table.width
        step = max(1, CHUNK_BYTES // (width * x.element_size()))
        if not target.is_contiguous() or step >= len(self.offsets):
            target.copy_(self._rows(x, slice(None), 0, len(self.sources)).view(self.made))
            return out
        flat = target.view(len(self.offsets), width)
        starts = [*self.offsets[::step].tolist(), len(self.sources)]
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            here = slice(i * step, (i + 1) * step)
            flat[here] = self._rows(x, here, start, end)
        return out

    def _rows(self, x: Tensor, targets: slice, start: int, end: int) -> Tensor:
        """Target rows `targets`, whose source rows stand at [start, end) of `sources`."""
        offsets, width = self.offsets[targets] - start if start else self.offsets[targets], self.table.width
        if start == end:
            return x.new_zeros(len(offsets), width)
        rows = x.detach().as_strided((self.table.num_rows, width), (width, 1))
        weight = self.weight[start:end]
        return embedding_bag(self.sources[start:end], rows, offsets, mode="sum", per_sample_weights=weight)


# -- counting members --------------------------------------------------------------------------------------


def members_first(member: Bool[Tensor, "*lead S"]) -> Int[Tensor, "*lead S"]:
    """Places of the members in time order, then those of the others: entry r is where the r-th member stands."""
    return torch.argsort(member.to(torch.uint8), dim=-1, descending=True, stable=True)


def evenly_spread(count: Int[Tensor, "*lead"], taken: Int[Tensor, "*lead"], width: int) -> Int[Tensor, "*lead width"]:
    """Ranks of `taken` of `count` members, spread evenly: the first and the last among them where two are taken.

    One taken is the first. Entries from `taken` on mean nothing. 1 <= taken <= count makes the ranks distinct.
    Halves are rounded away from the middle, so that the reversed order takes the same members (but for one
    in the very middle of an even count, where there is no such choice).
    """
    i = torch.arange(width, device=count.device).expand(*count.shape, width)
    last, gaps = count[..., None] - 1, taken[..., None] - 1
    from_end = torch.minimum(i, (gaps - i).clamp_min(0))
    rank = (2 * from_end * last + gaps - 1).div((2 * gaps).clamp_min(1), rounding_mode="floor").clamp_min(0)
    return torch.where(i == from_end, rank, last - rank)


def spread_members(member: Bool[Tensor, "*lead S"], taken: Int[Tensor, "*lead"]) -> Bool[Tensor, "*lead S"]:
    """`taken` members of each row, spread as `evenly_spread` says; where there is no member, others may be taken."""
    width = member.shape[-1]
    live = torch.arange(width, device=member.device) < taken[..., None]
    rank = torch.where(live, evenly_spread(member.sum(-1), taken, width), 0)
    place = members_first(member).gather(-1, rank)
    return torch.zeros_like(member, dtype=torch.int64).scatter_add_(-1, place, live.long()) > 0
