"""What every projector is: a map of heads and sizes for all layers in one call. Knows no layers' meaning, no masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvdistill.align.heads.initial import generator
from kvdistill.core.errors import AlignmentError


class AbstractHeadProjector(nn.Module, ABC):
    """[L, ..., in_heads·in_size] -> [L, ..., out_heads·out_size].

    Every tensor of its state has a leading layer axis P: one row per layer, or a single row that all layers share.
    """

    bias: Tensor
    kind: ClassVar[str]  # names its own stream of random numbers
    usual_init: ClassVar[str] = "xavier"

    def __init__(
        self,
        in_heads: int,
        in_size: int,
        out_heads: int,
        out_size: int,
        num_layers: int = 1,
        *,
        share_layers: bool = False,
        init: str | None = None,
        seed: int = 0,
        frozen: bool = False,
        **own: Any,
    ) -> None:
        """init: see `make_state` of each kind; unset: its usual one. own: what else `make_state` takes."""
        super().__init__()
        self.in_heads, self.in_size, self.out_heads, self.out_size = in_heads, in_size, out_heads, out_size
        self.num_layers, self.share_layers = num_layers, share_layers
        self.num_rows = 1 if share_layers else num_layers
        self.make_state(init or self.usual_init, generator(seed, self.kind), **own)
        if frozen:
            self.freeze()

    @abstractmethod
    def make_state(self, init: str, random: torch.Generator, *args: Any, **own: Any) -> None:
        """Parameters and buffers as they are before training or a fit, `num_rows` of each."""

    @property
    def ends(self) -> tuple[int, int, int, int]:
        """in_heads, in_size, out_heads, out_size."""
        return self.in_heads, self.in_size, self.out_heads, self.out_size

    @property
    def num_in(self) -> int:
        return self.in_heads * self.in_size

    @property
    def num_out(self) -> int:
        return self.out_heads * self.out_size

    @property
    def num_parameters(self) -> int:
        """Numbers that are, or could be, learned."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_fixed(self) -> int:
        """Numbers that are saved with the parameters and never learned."""
        return sum(b.numel() for b in self.buffers())

    @property
    def flops_per_token(self) -> int:
        """Of the matrix products of a forward pass, for one token in each layer; here through the flat weight."""
        return 2 * self.num_layers * self.num_in * self.num_out

    @property
    def learned_flops_per_token(self) -> int:
        """Of those, the products with what can be learned: where it is, their gradient costs as much again."""
        return self.flops_per_token

    def freeze(self) -> None:
        """No gradient for the parameters; gradients still pass through to the input."""
        self.requires_grad_(False)

    @abstractmethod
    def to_flat(self) -> tuple[Float[Tensor, "P I O"], Float[Tensor, "P O"]]:
        """The equal flat weight [P, in_heads·in_size, out_heads·out_size] and bias, with graph.

        Raises AlignmentError where the projector is not linear.
        """

    @abstractmethod
    def set_flat(self, weight_PIO: Float[Tensor, "P I O"], bias_PO: Float[Tensor, "P O"]) -> None:
        """Take over a flat map of `regressors` (from ridge, say): exactly, or the nearest this projector can be."""

    def taken_weight(self) -> Float[Tensor, "P I O"]:
        """What `set_flat` made of the weight it was given last: that weight, or the nearest this projector can be."""
        return self.to_flat()[0]

    def taken_bias(self) -> Float[Tensor, "P O"]:
        """The tensor of its state that holds the bias of `set_flat`."""
        return self.bias

    def regressors(self, x: Float[Tensor, "L *N I"]) -> Float[Tensor, "L *N I"]:
        """What `set_flat` is a linear map of: x itself, but for projectors that normalise first."""
        return x

    def forward(self, x: Float[Tensor, "L *N I"]) -> Float[Tensor, "L *N O"]:
        """Computed in the parameters' dtype. Raises AlignmentError for another number of layers or channels."""
        if x.shape[0] != self.num_layers or x.shape[-1] != self.num_in:
            raise AlignmentError(
                f"projector for {self.num_layers} layers of {self.in_heads} x {self.in_size} channels, "
                f"got {tuple(x.shape)}",
                fix="tensors are [layers, ..., heads * size]",
            )
        rows_PNI = x.to(next(self.parameters()).dtype).reshape(self.num_rows, -1, self.num_in)
        return self.project_rows(rows_PNI).view(*x.shape[:-1], self.num_out)

    def project_rows(self, rows_PNI: Float[Tensor, "P N I"]) -> Float[Tensor, "P N O"]:
        """`forward` without checks; all layers' tokens in one row where layers share. Through the flat weight here."""
        weight_PIO, bias_PO = self.to_flat()
        return torch.baddbmm(bias_PO[:, None], rows_PNI, weight_PIO)

    def _check_flat(self, weight: Tensor, bias: Tensor) -> None:
        expected = (self.num_rows, self.num_in, self.num_out)
        if tuple(weight.shape) != expected or tuple(bias.shape) != (self.num_rows, self.num_out):
            raise AlignmentError(
                f"projector needs a weight {expected}, got {tuple(weight.shape)} with bias {tuple(bias.shape)}",
                fix="fit with the same share_layers, heads and sizes",
            )
