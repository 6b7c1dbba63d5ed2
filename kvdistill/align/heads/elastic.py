"""Elastic projector: norm, then a small MLP over all heads. Not linear: it can bend where no matrix fits."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.initial import make_factors, make_matrix, nearest_factors
from kvdistill.core.errors import AlignmentError

_EPSILON = 1e-6


@final
class ElasticProjector(AbstractHeadProjector):
    """RMSNorm over all channels (Zhang & Sennrich 2019), then Linear - GELU - Linear.

    State: `gain` [P, I], `down` [P, I, K], `down_bias` [P, K], `up` [P, K, O], `bias` [P, O]; K hidden units.
    It starts as a linear map of the normalised input: GELU(z) − GELU(−z) = z, so a pair of units with opposite signs
    carries one direction unchanged, and K units the K/2 directions of any init. Training then bends it.
    """

    kind = "elastic"

    def make_state(self, init: str, random: torch.Generator, *, hidden: int | None = None) -> None:
        """hidden: width of the MLP (the wider side). init: of the linear map it starts as, see `make_factors`."""
        P, self.hidden = self.num_rows, hidden or max(self.num_in, self.num_out)
        self.num_pairs = min(self.hidden // 2, self.num_in, self.num_out)
        self.gain = nn.Parameter(torch.ones(P, self.num_in))
        self.down = nn.Parameter(torch.stack([make_matrix("xavier", self.num_in, self.hidden, random)] * P))
        self.down_bias = nn.Parameter(torch.zeros(P, self.hidden))
        self.up = nn.Parameter(torch.zeros(P, self.hidden, self.num_out))
        self.bias = nn.Parameter(torch.zeros(P, self.num_out))
        if self.num_pairs:
            factors = [make_factors(init, *self.ends, self.num_pairs, random) for _ in range(P)]
            self._set_pairs(torch.stack([a for a, _ in factors]), torch.stack([b for _, b in factors]))

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        raise AlignmentError(
            "an elastic projector is not linear: no flat weight equals it",
            fix="use projection: flat or structured where a matrix is needed",
        )

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """Become the linear map nearest to the weight, of the *normalised* input (fit it on `regressors`).

        Exact where hidden >= 2 · the narrower side, else its hidden // 2 strongest directions (Eckart & Young 1936).
        """
        self._check_flat(weight_PIO, bias_PO)
        self.gain.fill_(1.0)
        self.down_bias.zero_()
        self.up.zero_()
        if self.num_pairs:
            self._set_pairs(*nearest_factors(weight_PIO, self.num_pairs))
        self.bias.copy_(bias_PO)

    def taken_weight(self) -> Float[Tensor, "P I O"]:
        """Of the normalised input."""
        R = self.num_pairs
        return self.down[:, :, :R] @ self.up[:, :R]

    @torch.no_grad()
    def _set_pairs(self, down_PIR: Tensor, up_PRO: Tensor) -> None:
        # spare units keep their incoming weights and write nothing yet: they learn from the first step on
        R = self.num_pairs
        self.down[:, :, : 2 * R] = torch.cat([down_PIR, -down_PIR], 2)
        self.up[:, : 2 * R] = torch.cat([up_PRO, -up_PRO], 1)

    def regressors(self, x: Float[Tensor, "L *N I"]) -> Float[Tensor, "L *N I"]:
        """x divided by each token's root mean square."""
        return nn.functional.rms_norm(x, x.shape[-1:], eps=_EPSILON)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.num_layers * self.hidden * (self.num_in + self.num_out)

    def project_rows(self, rows_PNI: Float[Tensor, "P N I"]) -> Float[Tensor, "P N O"]:
        normed_PNI = self.regressors(rows_PNI) * self.gain[:, None]
        hidden_PNK = nn.functional.gelu(torch.baddbmm(self.down_bias[:, None], normed_PNI, self.down))
        return torch.baddbmm(self.bias[:, None], hidden_PNK, self.up)
