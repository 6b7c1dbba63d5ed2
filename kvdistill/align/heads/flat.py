"""Flat projectors: all heads side by side, one full matrix or two thin ones per layer."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.initial import make_factors, make_flat_matrix, nearest_factors
from kvdistill.core.errors import RecipeError


@final
class KVDimensionProjector(AbstractHeadProjector):
    """Flat: every outgoing channel may read every incoming channel. State: `weight` [P, I, O], `bias` [P, O]."""

    kind = "flat"

    def make_state(self, init: str, random: torch.Generator) -> None:
        """init: xavier | orthogonal | identity (see `make_matrix`) | uniform (the structured uniform, flattened)."""
        weights = [make_flat_matrix(init, *self.ends, random) for _ in range(self.num_rows)]
        self.weight = nn.Parameter(torch.stack(weights))
        self.bias = nn.Parameter(torch.zeros(self.num_rows, self.num_out))

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        return self.weight, self.bias

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        self._check_flat(weight_PIO, bias_PO)
        self.weight.copy_(weight_PIO)
        self.bias.copy_(bias_PO)


@final
class LowRankProjector(AbstractHeadProjector):
    """Flat through a bottleneck: x @ down @ up + bias. State: `down` [P, I, R], `up` [P, R, O], `bias` [P, O]."""

    kind = "low rank"

    def make_state(self, init: str, random: torch.Generator, *, rank: int) -> None:
        """rank: at most the narrower side, else RecipeError. init as in `make_factors`."""
        if not 0 < rank <= min(self.num_in, self.num_out):
            raise RecipeError(
                f"rank {rank} of a map from {self.num_in} to {self.num_out} channels",
                place="align.rank",
                fix=f"a rank from 1 to {min(self.num_in, self.num_out)}, or unset for one full matrix",
            )
        self.rank = rank
        factors = [make_factors(init, *self.ends, rank, random) for _ in range(self.num_rows)]
        self.down = nn.Parameter(torch.stack([down for down, _ in factors]))
        self.up = nn.Parameter(torch.stack([up for _, up in factors]))
        self.bias = nn.Parameter(torch.zeros(self.num_rows, self.num_out))

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        return self.down @ self.up, self.bias

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """The nearest weight of this rank in the Frobenius norm (Eckart & Young 1936), by SVD."""
        self._check_flat(weight_PIO, bias_PO)
        down, up = nearest_factors(weight_PIO, self.rank)
        self.down.copy_(down)
        self.up.copy_(up)
        self.bias.copy_(bias_PO)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.num_layers * self.rank * (self.num_in + self.num_out)

    def project_rows(self, rows_PNI: Float[Tensor, "P N I"]) -> Float[Tensor, "P N O"]:
        return torch.baddbmm(self.bias[:, None], rows_PNI @ self.down, self.up)
