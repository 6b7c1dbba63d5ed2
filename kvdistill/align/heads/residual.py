"""A fixed first guess plus a gated correction, around any projector."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.flat import KVDimensionProjector


@final
class ResidualProjector(AbstractHeadProjector):
    """out = x @ guess + gate · correction(x); the gate, one per layer, starts at 0 (ReZero, Bachlechner et al. 2021).

    Untrained it equals its first guess to the bit. State: `guess_weight` [P, I, O] and `guess_bias` [P, O] (buffers,
    never learned), `gate` [P], and the correction's own under `correction.`. `set_flat` sets the first guess.
    """

    kind = "residual"
    guess_weight: Tensor
    guess_bias: Tensor

    def __init__(self, correction: AbstractHeadProjector, guess_weight_PIO: Float[Tensor, "P I O"]) -> None:
        """correction: any projector that is not residual itself; its heads, sizes and layers are this one's."""
        assert not isinstance(correction, ResidualProjector), "one first guess is enough"
        own: dict[str, Any] = {"correction": correction, "guess_weight_PIO": guess_weight_PIO}
        super().__init__(*correction.ends, correction.num_layers, share_layers=correction.share_layers, **own)

    def make_state(
        self, init: str, random: torch.Generator, *, correction: AbstractHeadProjector, guess_weight_PIO: Tensor
    ) -> None:
        self.register_buffer("guess_weight", guess_weight_PIO.detach().clone())
        self.register_buffer("guess_bias", torch.zeros(self.num_rows, self.num_out))
        self._check_flat(self.guess_weight, self.guess_bias)
        self.gate = nn.Parameter(torch.zeros(self.num_rows))
        self.correction = correction

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        weight_PIO, bias_PO = self.correction.to_flat()
        return (
            self.guess_weight + self.gate[:, None, None] * weight_PIO,
            self.guess_bias + self.gate[:, None] * bias_PO,
        )

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """Exact: the first guess is this map, the gate is shut again."""
        self._check_flat(weight_PIO, bias_PO)
        self.guess_weight.copy_(weight_PIO)
        self.guess_bias.copy_(bias_PO)
        self.gate.zero_()

    def taken_weight(self) -> Float[Tensor, "P I O"]:
        return self.guess_weight

    def taken_bias(self) -> Float[Tensor, "P O"]:
        return self.guess_bias

    @property
    def flops_per_token(self) -> int:
        own = 0 if isinstance(self.correction, KVDimensionProjector) else self.correction.flops_per_token
        return super().flops_per_token + own

    @property
    def learned_flops_per_token(self) -> int:
        return self.correction.flops_per_token

    def project_rows(self, rows_PNI: Float[Tensor, "P N I"]) -> Float[Tensor, "P N O"]:
        if isinstance(self.correction, KVDimensionProjector):  # two full matrices: add them first, multiply once
            return super().project_rows(rows_PNI)
        guess_PNO = torch.baddbmm(self.guess_bias[:, None], rows_PNI, self.guess_weight)
        return torch.addcmul(guess_PNO, self.gate[:, None, None], self.correction.project_rows(rows_PNI))
