"""Least squares in closed form from a stream of batches: normal equations in constant memory.

Per layer: W = (Xc'Xc + λI)^-1 Xc'Yc, b = mean(y) − mean(x) W, with Xc and Yc centred and
λ = l2 · (sum of weights) · (mean variance of the input channels), so that l2 means the same for any scale and any
amount of data. All rows of a layer count alike, or by weights.

Speed and rounding: products are taken in the inputs' precision (fp32 at least) over a few thousand rows at a time,
around the layer's first mean, and added up in fp64. Centring keeps means that are large beside the spread out of the
products, short blocks keep their rounding near 1e-7 of the variances, and fp64 sums add none to it. A penalty below
that is raised to it: directions that weak would be read from rounding. fp64 inputs keep fp64 throughout.
Knows no models, heads or maps.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.runtime import sum_dtype

_BLOCK_ROWS = 4096


@final
class RidgeFit:
    """Streams pairs [L, ..., num_in] and [L, ..., num_out] into one affine map per layer.

    Memory: L · num_in · (num_in + num_out) numbers in fp64, and one block of rows. Sums stay where the first batch was.
    """

    def __init__(self, num_in: int, num_out: int, num_layers: int = 1) -> None:
        self.num_in, self.num_out, self.num_layers = num_in, num_out, num_layers
        self._count = torch.zeros(num_layers, dtype=torch.float64)
        self._sum = torch.zeros(num_layers, num_in + num_out, dtype=torch.float64)  # of [x, y] around `_around`
        self._products = torch.zeros(num_layers, num_in, num_in + num_out, dtype=torch.float64)  # x'[x, y], likewise
        self._around = torch.zeros(num_layers, num_in + num_out, dtype=torch.float64)
        self._started = [False] * num_layers
        self._block: Tensor | None = None
        self._rounding = 0.0  # of the products, relative

    def update(
        self,
        x: Float[Tensor, "L *N I"],
        y: Float[Tensor, "L *N O"],
        mask: Bool[Tensor, "..."],
        weight: Float[Tensor, "..."] | None = None,
    ) -> None:
        """Add one batch. mask: True at real tokens, [*N] for all layers or [L, *N]; masked values may be NaN.

        weight: how much each token counts (>= 0), shaped as a mask may be; unset: 1.
        Raises AlignmentError where shapes do not fit.
        """
        if (x.shape[0], x.shape[-1], y.shape[-1]) != (self.num_layers, self.num_in, self.num_out):
            raise AlignmentError(
                f"ridge fit of {self.num_layers} layers, {self.num_in} -> {self.num_out} channels, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}",
                fix="tensors are [layers, ..., channels]",
            )
        masks = _per_layer(mask, x)
        weights = [None] * self.num_layers if weight is None else _per_layer(weight, x)
        everything = bool(mask.all())
        for layer in range(self.num_layers):
            self.update_layer(
                layer,
                x[layer].reshape(-1, self.num_in),
                y[layer].reshape(-1, self.num_out),
                None if everything else masks[layer],
                weights[layer],
            )

    @torch.no_grad()
    def update_layer(
        self,
        layer: int,
        x_NI: Float[Tensor, "N I"],
        y_NO: Float[Tensor, "N O"],
        mask_N: Bool[Tensor, "N"] | None = None,
        weight_N: Float[Tensor, "N"] | None = None,
    ) -> None:
        """Add rows to one layer: what `update` does for each. mask_N unset: every row is real."""
        if mask_N is not None and weight_N is not None:
            mask_N = mask_N & (weight_N > 0)
        if self._sum.device != x_NI.device and not any(self._started):
            for name in ("_count", "_sum", "_products", "_around"):
                setattr(self, name, getattr(self, name).to(x_NI.device))
        chosen = None if mask_N is None else mask_N.nonzero()[:, 0]
        num_rows = x_NI.shape[0] if chosen is None else len(chosen)
        for start in range(0, num_rows, _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            rows = here if chosen is None else chosen[here]
            self._add_block(layer, x_NI[rows], y_NO[rows], None if weight_N is None else weight_N[rows])

    def _add_block(self, layer: int, x_NI: Tensor, y_NO: Tensor, weight_N: Tensor | None) -> None:
        I, dtype = self.num_in, sum_dtype(x_NI, y_NO)
        if self._block is None or self._block.dtype != dtype or self._block.device != x_NI.device:
            self._block = torch.empty(_BLOCK_ROWS, I + self.num_out, dtype=dtype, device=x_NI.device)
            self._rounding = max(self._rounding, torch.finfo(dtype).eps)
        xy_NC = self._block[: x_NI.shape[0]]
        if not self._started[layer]:
            self._started[layer] = True
            self._around[layer, :I] = x_NI.double().mean(0).to(dtype)  # as rounded: what is taken off is added again
            self._around[layer, I:] = y_NO.double().mean(0).to(dtype)
        around_C = self._around[layer].to(xy_NC.dtype)
        torch.sub(x_NI, around_C[:I], out=xy_NC[:, :I])
        torch.sub(y_NO, around_C[I:], out=xy_NC[:, I:])
        if weight_N is None:
            root_N = xy_NC.new_ones(xy_NC.shape[0])
            self._count[layer] += xy_NC.shape[0]
        else:
            root_N = weight_N.to(xy_NC.dtype).sqrt()
            xy_NC *= root_N[:, None]
            self._count[layer] += weight_N.double().sum()
        with torch.autocast(xy_NC.device.type, enabled=False):
            self._sum[layer] += torch.mv(xy_NC.T, root_N)
            # x'x is symmetric: of its two off-diagonal quarters only the upper is made
            half = I // 2
            self._products[layer, :half] += torch.mm(xy_NC[:, :half].T, xy_NC)
            self._products[layer, half:, half:] += torch.mm(xy_NC[:, half:I].T, xy_NC[:, half:])

    def solve(
        self, l2: float, reads: Bool[Tensor, "R J I"] | None = None
    ) -> tuple[Float[Tensor, "L I O"], Float[Tensor, "L O"]]:
        """Weight [L, num_in, num_out] and bias [L, num_out] in fp64, for y ≈ x @ weight + bias.

        l2 > 0, relative to the mean variance of the input channels (module docstring).
        reads: for each of J equal parts of the output channels (heads, say), the inputs it may read, one set for all
        layers (R = 1) or one for each; each part is a fit of its own, and its weights elsewhere are 0. Unset: all.
        Raises RecipeError for l2 <= 0 and AlignmentError where a layer saw no real token.
        """
        check_penalty(l2)
        if not bool((self._count > 0).all()):
            raise AlignmentError("ridge fit of no tokens", fix="calibrate on at least one example")
        # x'x and x'y of centred x and y, per unit of weight
        I, half = self.num_in, self.num_in // 2
        offset_LC = self._sum / self._count[:, None]
        products = self._products / self._count[:, None, None] - offset_LC[:, :I, None] * offset_LC[:, None]
        products[:, half:, :half] = products[:, :half, half:I].transpose(1, 2)
        xx, xy, mean_LC = products[..., :I], products[..., I:], self._around + offset_LC
        if reads is None:
            weight = _solve(xx, xy, l2, self._rounding)
        else:
            weight = torch.zeros_like(xy)
            part_size = self.num_out // reads.shape[1]
            for layer in range(self.num_layers):
                for j, reads_I in enumerate(reads.to(xx.device)[layer if len(reads) > 1 else 0]):
                    read, part = reads_I.nonzero()[:, 0], slice(j * part_size, (j + 1) * part_size)
                    own_xx, own_xy = xx[layer, read][:, read], xy[layer, read, part]
                    weight[layer, read, part] = _solve(own_xx[None], own_xy[None], l2, self._rounding)[0]
        return weight, mean_LC[:, I:] - torch.einsum("li,lio->lo", mean_LC[:, :I], weight)

    @property
    def mean_in(self) -> Float[Tensor, "L 1 I"]:
        """The mean of the input channels so far, fp64."""
        return (self._around + self._sum / self._count[:, None])[:, None, : self.num_in]


def check_penalty(l2: float) -> None:
    if not l2 > 0:
        raise RecipeError(f"l2 = {l2}", place="align.ridge_l2", fix="give a penalty above 0, e.g. 0.01")


def read_heads(heads_HG: Float[Tensor, "H G"], in_size: int) -> Bool[Tensor, "1 G I"]:
    """For `RidgeFit.solve`: outgoing head g reads the channels of the incoming heads h with heads[h, g] > 0."""
    return (heads_HG > 0).repeat_interleave(in_size, dim=0).T[None]


def _solve(xx: Tensor, xy: Tensor, l2: float, rounding: float) -> Tensor:
    """(xx + l2 · mean variance)^-1 xy, batched over layers; the penalty stays above what rounding does to xx."""
    variance = xx.diagonal(dim1=1, dim2=2).mean(1)
    penalty = torch.maximum(l2 * variance, 4 * rounding * torch.linalg.matrix_norm(xx))
    penalty = torch.where(variance > 0, penalty, torch.ones_like(variance))  # constant inputs explain nothing
    regular = xx + penalty[:, None, None] * torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
    return torch.cholesky_solve(xy, torch.linalg.cholesky(regular))


def _per_layer(x: Tensor, like: Tensor) -> list[Tensor]:
    """[*N] or [L, *N] as one flat [N] for each layer."""
    if tuple(x.shape) == tuple(like.shape[1:-1]):
        return [x.reshape(-1)] * like.shape[0]
    if tuple(x.shape) != tuple(like.shape[:-1]):
        raise AlignmentError(
            f"mask or weight {tuple(x.shape)} for a tensor {tuple(like.shape)}",
            fix="they are [batch, tokens] or [layers, batch, tokens]",
        )
    return [row.reshape(-1) for row in x]
