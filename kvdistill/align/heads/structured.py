"""Structured projector: a head mixer, then a map of the head size; its own product, which never leaves the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.initial import make_matrix, nearest_outer, spread_heads

_BLOCK_BYTES = 1 << 21  # of incoming rows at a time on a CPU: they and what is made of them stay in the inner caches


@final
class HeadwiseMapProjector(AbstractHeadProjector):
    """Structured: heads are mixed, then each outgoing head's size is mapped; no flattening.

    State: `mixer` [P, in_heads, out_heads], `size` [P, 1 or out_heads, in_size, out_size], `bias` [P, O].
    The flat weight it stands for is mixer[h, g] · size[g, d, e] (`to_flat`, exact).
    """

    kind, usual_init = "structured", "uniform"

    def make_state(self, init: str, random: torch.Generator, *, per_head: bool = False) -> None:
        """per_head: one size map for each outgoing head (else one for all). init as in `KVDimensionProjector`."""
        self.per_head = per_head
        (in_heads, in_size, out_heads, out_size), P = self.ends, self.num_rows
        num_sizes = out_heads if per_head else 1
        mixers = [
            spread_heads(in_heads, out_heads) if init == "uniform" else make_matrix(init, in_heads, out_heads, random)
            for _ in range(P)
        ]
        sizes = [make_matrix(init, in_size, out_size, random) for _ in range(P * num_sizes)]
        self.mixer = nn.Parameter(torch.stack(mixers))
        self.size = nn.Parameter(torch.stack(sizes).view(P, num_sizes, in_size, out_size))
        self.bias = nn.Parameter(torch.zeros(P, self.num_out))
        flat_cost = in_heads * in_size * out_heads * out_size
        self._direct_pays = flat_cost > 4 * (in_heads * out_heads * in_size + out_heads * in_size * out_size)

    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        size_PGDE = self.size.expand(-1, self.out_heads, -1, -1)
        weight_PHDGE = torch.einsum("phg,pgde->phdge", self.mixer, size_PGDE)
        return weight_PHDGE.reshape(self.num_rows, self.num_in, self.num_out), self.bias

    @torch.no_grad()
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """The Kronecker product nearest to the weight in the Frobenius norm (Van Loan & Pitsianis 1993): a rank-1
        SVD of the weight with (in head, out head) as rows and (in size, out size) as columns; per outgoing head
        where the sizes are per head."""
        self._check_flat(weight_PIO, bias_PO)
        P, H, D, G, E = self.num_rows, *self.ends
        weight_PHGDE = weight_PIO.view(P, H, D, G, E).permute(0, 1, 3, 2, 4).double()
        if self.per_head:
            heads, sizes = nearest_outer(weight_PHGDE.transpose(1, 2).reshape(P, G, H, D * E))
            self.mixer.copy_(heads.transpose(1, 2))
            self.size.copy_(sizes.view(P, G, D, E))
        else:
            heads, sizes = nearest_outer(weight_PHGDE.reshape(P, H * G, D * E))
            self.mixer.copy_(heads.view(P, H, G))
            self.size.copy_(sizes.view(P, 1, D, E))
        self.bias.copy_(bias_PO)

    @property
    def flops_per_token(self) -> int:
        if not self._direct_pays:
            return super().flops_per_token
        mixed = self.in_heads * self.out_heads * self.in_size
        return 2 * self.num_layers * (mixed + self.out_heads * self.in_size * self.out_size)

    def project_rows(self, rows_PNI: Float[Tensor, "P N I"]) -> Float[Tensor, "P N O"]:
        if not self._direct_pays:  # few heads: one big product of the flat weight is as fast or faster
            return super().project_rows(rows_PNI)
        rows_PNHD = rows_PNI.unflatten(2, (self.in_heads, self.in_size))
        with torch.autocast(rows_PNI.device.type, enabled=False):  # blocks are written in the parameters' own dtype
            out_PNO: Tensor = _MixThenSize.apply(rows_PNHD, self.mixer, self.size, self.bias)
        return out_PNO


class _MixThenSize(torch.autograd.Function):
    """out[n, g] = (sum_h mixer[h, g] · x[n, h]) @ size[g] + bias, in blocks of tokens.

    Autograd would keep the mixed heads of every layer and walk through them four times; here a block's mixed heads
    are made in the cache, used and made again for the gradient: mixing costs a tenth of the size map.
    """

    @staticmethod
    def forward(ctx: Any, x_PNHD: Tensor, mixer_PHG: Tensor, size_PSDE: Tensor, bias_PO: Tensor) -> Tensor:
        ctx.save_for_backward(x_PNHD, mixer_PHG, size_PSDE)
        (P, N, _, D), G = x_PNHD.shape, mixer_PHG.shape[2]
        out_PNGE = x_PNHD.new_empty(P, N, G, size_PSDE.shape[3])
        mixer_PGH = mixer_PHG.transpose(1, 2).contiguous()
        n = _block_length(x_PNHD)
        scratch = x_PNHD.new_empty(n, G, D)  # one for all blocks: memory fresh from the system costs more than the sums
        for p, here in _blocks(P, N, n):
            x_NHD, out_NGE = x_PNHD[p, here], out_PNGE[p, here]
            mixed_NGD = _mix(x_NHD, mixer_PGH[p], scratch)
            _size_product(mixed_NGD, size_PSDE[p], out_NGE)
            out_NGE += bias_PO[p].view(G, -1)
        return out_PNGE.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PNO: Tensor) -> tuple[Tensor | None, ...]:
        x_PNHD, mixer_PHG, size_PSDE = ctx.saved_tensors
        of_x, learns = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        (P, N, H, D), G = x_PNHD.shape, mixer_PHG.shape[2]
        grad_PNGE = grad_PNO.contiguous().view(P, N, G, -1)
        x_grad = torch.empty_like(x_PNHD, memory_format=torch.contiguous_format) if of_x else None
        mixer_grad, size_grad = torch.zeros_like(mixer_PHG), torch.zeros_like(size_PSDE)
        mixer_PGH = mixer_PHG.transpose(1, 2).contiguous()
        n = _block_length(x_PNHD)
        scratch, other, pairs = (x_PNHD.new_empty(n, *shape) for shape in ((G, D), (G, D), (H, G)))
        for p, here in _blocks(P, N, n):
            x_NHD, grad_NGE = x_PNHD[p, here], grad_PNGE[p, here]
            mixed_grad_NGD, pairs_NHG = other[: len(x_NHD)], pairs[: len(x_NHD)]
            _size_product(grad_NGE, size_PSDE[p].transpose(1, 2), mixed_grad_NGD)
            if learns:
                mixed_NGD = _mix(x_NHD, mixer_PGH[p], scratch)
                if size_grad.shape[1] == 1:
                    size_grad[p, 0].addmm_(mixed_NGD.flatten(0, 1).T, grad_NGE.flatten(0, 1))
                else:
                    size_grad[p].baddbmm_(mixed_NGD.permute(1, 2, 0), grad_NGE.transpose(0, 1))
                torch.bmm(x_NHD, mixed_grad_NGD.transpose(1, 2), out=pairs_NHG)
                mixer_grad[p] += pairs_NHG.sum(0)
            if x_grad is not None:
                torch.bmm(mixer_PHG[p].expand(len(x_NHD), H, G), mixed_grad_NGD, out=x_grad[p, here])
        return (x_grad, mixer_grad, size_grad, grad_PNO.sum(1)) if learns else (x_grad, None, None, None)


def _block_length(x_PNHD: Tensor) -> int:
    """Tokens at a time: on a CPU as many as the cache holds, elsewhere all of a layer."""
    _, N, H, D = x_PNHD.shape
    if x_PNHD.device.type != "cpu":
        return max(N, 1)
    return max(1, min(N, _BLOCK_BYTES // (H * D * x_PNHD.element_size())))


def _blocks(P: int, N: int, n: int) -> Iterator[tuple[int, slice]]:
    """(layer row, tokens), n at a time."""
    return ((p, slice(start, min(start + n, N))) for p in range(P) for start in range(0, N, n))


def _mix(x_NHD: Tensor, mixer_GH: Tensor, scratch: Tensor) -> Tensor:
    mixed_NGD = scratch[: len(x_NHD)]
    return torch.bmm(mixer_GH.expand(len(x_NHD), -1, -1), x_NHD, out=mixed_NGD)


def _size_product(x_NGD: Tensor, size_SDE: Tensor, out_NGE: Tensor) -> None:
    if size_SDE.shape[0] == 1:
        torch.mm(x_NGD.flatten(0, 1), size_SDE[0], out=out_NGE.flatten(0, 1))
    else:
        torch.bmm(x_NGD.transpose(0, 1), size_SDE, out=out_NGE.transpose(0, 1))
