"""Least squares in closed form from a stream of batches: the normal equations, kept in fp64.

Per layer: W = (Xc'Xc + λI)^-1 Xc'Yc, b = mean(y) − mean(x) W, with Xc and Yc centred and
λ = l2 · (number of tokens) · (mean variance of the input channels), so that l2 means the same for any scale and any
amount of data. Sums are taken around the first batch's mean, which keeps the subtraction of means exact enough when
means are large beside the spread. Knows no models, heads or maps.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.channels import masked_rows
from kvdistill.core.runtime import AlignmentError, RecipeError


@final
class RidgeFit:
    """Streams pairs [L, ..., num_in] and [L, ..., num_out] into one affine map per layer."""

    def __init__(self, num_in: int, num_out: int, num_layers: int = 1) -> None:
        self.num_in, self.num_out, self.num_layers = num_in, num_out, num_layers
        self._count = torch.zeros(num_layers, 1, dtype=torch.float64)
        self._sum_x = torch.zeros(num_layers, num_in, dtype=torch.float64)
        self._sum_y = torch.zeros(num_layers, num_out, dtype=torch.float64)
        self._xx = torch.zeros(num_layers, num_in, num_in, dtype=torch.float64)
        self._xy = torch.zeros(num_layers, num_in, num_out, dtype=torch.float64)
        self._around: tuple[Tensor, Tensor] | None = None

    def update(self, x: Float[Tensor, "L *N I"], y: Float[Tensor, "L *N O"], mask: Bool[Tensor, "..."]) -> None:
        """Add one batch. mask: True at real tokens, [*N] for all layers or [L, *N]; masked values may be NaN."""
        if (x.shape[0], x.shape[-1], y.shape[-1]) != (self.num_layers, self.num_in, self.num_out):
            raise AlignmentError(
                f"ridge fit of {self.num_layers} layers, {self.num_in} -> {self.num_out} channels, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}",
                fix="tensors are [layers, ..., channels]",
            )
        x_LNI, weight_LN1 = masked_rows(x, mask)
        y_LNO, _ = masked_rows(y, mask)
        count = weight_LN1.sum(1)
        if self._around is None:
            self._around = (x_LNI.sum(1) / count.clamp_min(1), y_LNO.sum(1) / count.clamp_min(1))
        x_LNI = (x_LNI - self._around[0][:, None]) * weight_LN1
        y_LNO = (y_LNO - self._around[1][:, None]) * weight_LN1
        home = self._xx.device
        self._count += count.to(home)
        self._sum_x += x_LNI.sum(1).to(home)
        self._sum_y += y_LNO.sum(1).to(home)
        self._xx += torch.bmm(x_LNI.transpose(1, 2), x_LNI).to(home)
        self._xy += torch.bmm(x_LNI.transpose(1, 2), y_LNO).to(home)

    def solve(self, l2: float) -> tuple[Float[Tensor, "L I O"], Float[Tensor, "L O"]]:
        """Weight [L, num_in, num_out] and bias [L, num_out] in fp64, for y ≈ x @ weight + bias.

        l2 > 0, relative to the mean variance of the input channels (module docstring).
        Raises RecipeError for l2 <= 0 and AlignmentError where a layer saw no real token.
        """
        if not l2 > 0:
            raise RecipeError(f"l2 = {l2}", place="align.ridge_l2", fix="give a penalty above 0, e.g. 0.01")
        if self._around is None or not bool((self._count > 0).all()):
            raise AlignmentError("ridge fit of no tokens", fix="calibrate on at least one example")
        mean_x, mean_y = self._sum_x / self._count, self._sum_y / self._count
        xx = self._xx - self._count[..., None] * mean_x[:, :, None] * mean_x[:, None]
        xy = self._xy - self._count[..., None] * mean_x[:, :, None] * mean_y[:, None]
        scale = xx.diagonal(dim1=1, dim2=2).mean(1)
        penalty = torch.where(scale > 0, l2 * scale, torch.ones_like(scale))  # constant inputs explain nothing
        xx = xx + penalty[:, None, None] * torch.eye(self.num_in, dtype=xx.dtype)
        weight = torch.cholesky_solve(xy, torch.linalg.cholesky(xx))
        around_x, around_y = (part.to(weight.device) for part in self._around)
        bias = around_y + mean_y - torch.einsum("li,lio->lo", around_x + mean_x, weight)
        return weight, bias
