"""Projectors between two models' heads and head sizes, for K or for V, all layers in one call.

Direction does not matter here: `in` may be the student's heads and `out` the teacher's, or the other way round.
Every parameter has a leading layer axis P: one row per layer, or a single row that all layers share. Tensors
come and go with heads side by side, [L, ..., heads·size], which is how both models store them per token.

  KVDimensionProjector   flat: one linear map over all heads at once.
  HeadwiseMapProjector   structured: a head mixer, then a map of the head size (shared or one per outgoing head);
                         the flat weight it stands for is mixer[h,g] · size[d,e] (`to_flat`, exact).

Knows no layers' meaning, no masks and no statistics.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvdistill.core.runtime import AlignmentError, RecipeError, derive_seed


class AbstractHeadProjector(nn.Module, ABC):
    """[L, ..., in_heads·in_size] -> [L, ..., out_heads·out_size], a linear map with a bias per layer."""

    def __init__(
        self, in_heads: int, in_size: int, out_heads: int, out_size: int, num_layers: int, share_layers: bool
    ) -> None:
        super().__init__()
        self.in_heads, self.in_size, self.out_heads, self.out_size = in_heads, in_size, out_heads, out_size
        self.num_layers, self.share_layers = num_layers, share_layers
        self.num_rows = 1 if share_layers else num_layers
        self.bias = nn.Parameter(torch.zeros(self.num_rows, out_heads * out_size))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def freeze(self) -> None:
        """No gradient for the parameters; gradients still pass through to the input."""
        self.requires_grad_(False)

    @abstractmethod
    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        """The equal flat weight [P, in_heads·in_size, out_heads·out_size] and bias, with graph."""

    @abstractmethod
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """Take over a flat weight (from ridge, say): exactly, or the nearest this projector can be."""

    def forward(self, x: Float[Tensor, "L *N I"]) -> Float[Tensor, "L *N O"]:
        """Computed in the parameters' dtype. Raises AlignmentError for another number of layers or channels."""
        if x.shape[0] != self.num_layers or x.shape[-1] != self.in_heads * self.in_size:
            raise AlignmentError(
                f"projector for {self.num_layers} layers of {self.in_heads} x {self.in_size} channels, "
                f"got {tuple(x.shape)}",
                fix="tensors are [layers, ..., heads * size]",
            )
        return self._project(x.to(self.bias.dtype))

    def _project(self, x: Tensor) -> Tensor:
        weight_PIO, bias_PO = self.to_flat()
        if self.share_layers:
            return nn.functional.linear(x, weight_PIO[0].T, bias_PO[0])
        return torch.baddbmm(bias_PO[:, None], x.flatten(1, -2), weight_PIO).view(*x.shape[:-1], -1)


@final
class KVDimensionProjector(AbstractHeadProjector):
    """Flat: every outgoing channel may read every incoming channel. State: `weight` [P, I, O], `bias` [P, O]."""

    def __init__(
        self,
        in_heads: int,
        in_size: int,
        out_heads: int,
        out_size: int,
        num_layers: int = 1,
        *,
        share_layers: bool = False,
        init: str = "xavier",
        seed: int = 0,
        frozen: bool = False,
    ) -> None:
        """init: xavier | orthogonal | identity (see `make_matrix`) | uniform (the structured uniform, flattened)."""
        super().__init__(in_heads, in_size, out_heads, out_size, num_layers, share_layers)
        random = _generator(seed, "flat")
        if init == "uniform":
            mixer = spread_heads(in_heads, out_heads)
            rows = [torch.kron(mixer, make_matrix(init, in_size, out_size, random)) for _ in range(self.num_rows)]
        else:
            rows = [make_matrix(init, in_heads * in_size, out_heads * out_size, random) for _ in range(self.num_rows)]
        self.weight = nn.Parameter(torch.stack(rows))
        if frozen:
            self.freeze()

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        return self.weight, self.bias

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        _check_flat(self, weight_PIO, bias_PO)
        self.weight.copy_(weight_PIO)
        self.bias.copy_(bias_PO)


@final
class HeadwiseMapProjector(AbstractHeadProjector):
    """Structured: heads are mixed, then each outgoing head's size is mapped.

    State: `mixer` [P, in_heads, out_heads], `size` [P, 1 or out_heads, in_size, out_size], `bias` [P, O].
    """

    def __init__(
        self,
        in_heads: int,
        in_size: int,
        out_heads: int,
        out_size: int,
        num_layers: int = 1,
        *,
        share_layers: bool = False,
        per_head: bool = False,
        init: str = "uniform",
        seed: int = 0,
        frozen: bool = False,
    ) -> None:
        """per_head: one size map for each outgoing head (else one for all). init as in `KVDimensionProjector`."""
        super().__init__(in_heads, in_size, out_heads, out_size, num_layers, share_layers)
        random = _generator(seed, "structured")
        P, num_sizes = self.num_rows, out_heads if per_head else 1
        mixers = [
            spread_heads(in_heads, out_heads) if init == "uniform" else make_matrix(init, in_heads, out_heads, random)
            for _ in range(P)
        ]
        sizes = [make_matrix(init, in_size, out_size, random) for _ in range(P * num_sizes)]
        self.mixer = nn.Parameter(torch.stack(mixers))
        self.size = nn.Parameter(torch.stack(sizes).view(P, num_sizes, in_size, out_size))
        flat_cost = in_heads * in_size * out_heads * out_size
        self._direct_pays = flat_cost > 4 * (in_heads * out_heads * in_size + out_heads * in_size * out_size)
        if frozen:
            self.freeze()

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        size_PGDE = self.size.expand(-1, self.out_heads, -1, -1)
        weight_PHDGE = torch.einsum("phg,pgde->phdge", self.mixer, size_PGDE)
        return weight_PHDGE.reshape(self.num_rows, self.in_heads * self.in_size, -1), self.bias

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """The Kronecker product nearest to the weight in the Frobenius norm (Van Loan & Pitsianis 1993): a rank-1
        SVD of the weight with (in head, out head) as rows and (in size, out size) as columns; per outgoing head
        where the sizes are per head."""
        _check_flat(self, weight_PIO, bias_PO)
        P, H, D, G, E = self.num_rows, self.in_heads, self.in_size, self.out_heads, self.out_size
        weight_PHGDE = weight_PIO.view(P, H, D, G, E).permute(0, 1, 3, 2, 4).double()
        if self.size.shape[1] == 1:
            heads, sizes = _nearest_outer(weight_PHGDE.reshape(P, H * G, D * E))
            self.mixer.copy_(heads.view(P, H, G))
            self.size.copy_(sizes.view(P, 1, D, E))
        else:
            heads, sizes = _nearest_outer(weight_PHGDE.transpose(1, 2).reshape(P, G, H, D * E))
            self.mixer.copy_(heads.transpose(1, 2))
            self.size.copy_(sizes.view(P, G, D, E))
        self.bias.copy_(bias_PO)

    def _project(self, x: Tensor) -> Tensor:
        if not self._direct_pays:  # few heads: one big product of the flat weight is as fast or faster
            return super()._project(x)
        rows = x.reshape(self.num_rows, -1, self.in_heads, self.in_size)
        mixed_PNGD = torch.einsum("phg,pnhd->pngd", self.mixer, rows)
        if self.size.shape[1] == 1:
            out = mixed_PNGD.flatten(1, 2) @ self.size[:, 0]
        else:
            out = torch.einsum("pngd,pgde->pnge", mixed_PNGD, self.size)
        out = out.reshape(self.num_rows, rows.shape[1], -1) + self.bias[:, None]
        return out.view(*x.shape[:-1], -1)


PROJECTORS: dict[str, type[KVDimensionProjector] | type[HeadwiseMapProjector]] = {
    "flat": KVDimensionProjector,
    "structured": HeadwiseMapProjector,
}


# -- initial values -----------------------------------------------------------------------------------


def spread_heads(in_heads: int, out_heads: int) -> Float[Tensor, "H G"]:
    """Incoming heads spread evenly over outgoing heads [in, out]: columns sum to 1.

    Both sets of heads divide the unit interval; each outgoing head averages the incoming ones it overlaps,
    by the share of overlap. Multiples give plain means or plain copies.
    """
    low = torch.arange(in_heads, dtype=torch.float64)[:, None] / in_heads
    start = torch.arange(out_heads, dtype=torch.float64)[None] / out_heads
    overlap = torch.minimum(low + 1 / in_heads, start + 1 / out_heads) - torch.maximum(low, start)
    overlap = torch.where(overlap > 1e-9, overlap, 0.0)
    return (overlap / overlap.sum(0)).float()


def make_matrix(init: str, num_in: int, num_out: int, random: torch.Generator) -> Float[Tensor, "I O"]:
    """One initial weight [in, out], for row vectors x @ W.

    xavier: Glorot & Bengio 2010, uniform. orthogonal: (semi-)orthogonal, Saxe et al. 2014.
    identity: channel j reads channel j; fewer inputs are repeated, surplus inputs folded onto outputs and scaled by
    1/sqrt(number folded), so that unit-variance inputs give unit-variance outputs.
    uniform (of the head size, beside `spread_heads`): identity where the sizes agree, else orthogonal.
    ridge starts as xavier until its fit is taken over. Raises RecipeError for another word.
    """
    if init not in _INITS:
        raise RecipeError(f"unknown init {init!r}", place="align.init", fix=f"one of {', '.join(_INITS)}")
    return _INITS[init](num_in, num_out, random)


def _xavier(num_in: int, num_out: int, random: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / (num_in + num_out))
    return torch.empty(num_in, num_out).uniform_(-bound, bound, generator=random)


def _orthogonal(num_in: int, num_out: int, random: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(num_in, num_out), generator=random)


def _identity(num_in: int, num_out: int, random: torch.Generator) -> Tensor:
    row, column = torch.arange(num_in)[:, None], torch.arange(num_out)[None]
    joined = ((row % num_out == column) if num_in >= num_out else (column % num_in == row)).float()
    return joined / joined.sum(0).sqrt()


def _uniform(num_in: int, num_out: int, random: torch.Generator) -> Tensor:
    return _identity(num_in, num_out, random) if num_in == num_out else _orthogonal(num_in, num_out, random)


_INITS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "xavier": _xavier,
    "orthogonal": _orthogonal,
    "identity": _identity,
    "uniform": _uniform,
    "ridge": _xavier,
}


def _generator(seed: int, kind: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "projector", kind))


def _check_flat(projector: AbstractHeadProjector, weight: Tensor, bias: Tensor) -> None:
    num_in, num_out = projector.in_heads * projector.in_size, projector.out_heads * projector.out_size
    expected = (projector.num_rows, num_in, num_out)
    if tuple(weight.shape) != expected or tuple(bias.shape) != (expected[0], num_out):
        raise AlignmentError(
            f"projector needs a weight {expected}, got {tuple(weight.shape)} with bias {tuple(bias.shape)}",
            fix="fit with the same share_layers, heads and sizes",
        )


def _nearest_outer(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """u [..., R] and v [..., C] whose outer product is nearest to matrix [..., R, C]; their norms are equal."""
    left, scale, right = torch.linalg.svd(matrix, full_matrices=False)
    root = scale[..., :1].sqrt()
    return left[..., 0] * root, right[..., 0, :] * root
