"""Distances between two vectors per token: source and target [..., tokens, channels] in, one number a token out.

Mask, routing weights and the division by the number of tokens come afterwards (`base.masked_token_mean`), so
that a new distance is one small class. Nothing is detached here: both sides get their gradient.

Axes: L layers, B batch, T tokens, C channels (heads flattened), D size of one head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kvdistill.core.errors import AlignmentError
from kvdistill.core.recipe import LossRecipe
from kvdistill.core.runtime import sum_dtype
from kvdistill.losses.base import AbstractDistance

# Added to the mean square of a vector before its norm is used: a norm never falls below 1e-4 a channel, so
# that direction and log-norm of a zero vector have a value and a gradient. Keys and values are 1e-2 and up.
NORM_FLOOR_SQUARED = 1e-8
CACHED_NUMBERS = 1 << 18  # of one operand at a time, where one pass after another goes over the same rows


class _MeanSquare(torch.autograd.Function):
    """mean over C of (source - target)^2, keeping only the difference for the backward pass.

    The norm kernel reads the difference once and writes no [..., C] square; backward is one product.
    Two to five times faster than `((s - t) ** 2).mean(-1)` on a CPU, forward and backward together.
    """

    @staticmethod
    def forward(ctx, source: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        dtype = sum_dtype(source, target)
        difference = source.to(dtype) - target.to(dtype)
        ctx.save_for_backward(difference)
        ctx.dtypes = source.dtype, target.dtype
        return torch.linalg.vector_norm(difference, dim=-1).square_().div_(difference.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        slope = difference * (grad * (2 / difference.shape[-1])).unsqueeze(-1)
        source_dtype, target_dtype = ctx.dtypes
        to_source = slope.to(source_dtype) if ctx.needs_input_grad[0] else None
        return to_source, slope.neg().to(target_dtype) if ctx.needs_input_grad[1] else None


def _channel_mean(per_channel: Tensor) -> Tensor:
    """mean(-1) as sum / C: backward of the sum is a view, backward of the mean writes a [..., C] tensor."""
    return per_channel.sum(-1) / per_channel.shape[-1]


class _CosineDistance(torch.autograd.Function):
    """1 - cos over the last axis, a cache-full of rows at a time; only three numbers a row are kept for backward."""

    @staticmethod
    def forward(ctx, source: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        dtype = sum_dtype(source, target)
        rows = [x.reshape(-1, x.shape[-1]) for x in (source, target)]
        cosine, source_inverse, target_inverse = torch.empty(3, len(rows[0]), dtype=dtype, device=source.device)
        for part in _row_parts(rows[0]):
            s, t = (x[part].to(dtype) for x in rows)
            for inverse, x in ((source_inverse, s), (target_inverse, t)):
                square = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1])
                inverse[part] = square.add_(NORM_FLOOR_SQUARED).rsqrt_()
            cosine[part] = _channel_mean(s * t)
        cosine.mul_(source_inverse).mul_(target_inverse)
        ctx.save_for_backward(source, target, cosine, source_inverse, target_inverse)
        return (1 - cosine).view(source.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        source, target, cosine, source_inverse, target_inverse = ctx.saved_tensors
        slope = grad.flatten() / source.shape[-1]
        across = -slope * source_inverse * target_inverse
        grads: list[Tensor | None] = [None, None]
        sides = ((source, target, source_inverse), (target, source, target_inverse))
        for place, (own, other, inverse) in enumerate(sides):
            if ctx.needs_input_grad[place]:
                along = slope * cosine * inverse * inverse
                grads[place] = _weighted_sum(own, along, other, across)
        return tuple(grads)


def _row_parts(rows: Tensor) -> Iterator[slice]:
    step = max(1, CACHED_NUMBERS // rows.shape[-1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _weighted_sum(x: Tensor, x_weight: Tensor, y: Tensor, y_weight: Tensor) -> Tensor:
    """x_weight x + y_weight y for a weight a row, in x's dtype and shape."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, y_rows, out_rows = (z.reshape(-1, z.shape[-1]) for z in (x, y, out))
    for part in _row_parts(x_rows):
        total = y_rows[part] * y_weight[part, None]
        out_rows[part] = total.addcmul_(x_rows[part].to(total.dtype), x_weight[part, None])
    return out


def cosine_distance(source: Float[Tensor, "*lead D"], target: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead"]:
    """1 - cos(source, target) over the last axis, in fp32 at least, with the gradient of both.

    |x| is sqrt(sum x^2 + 1e-8 D), so that a zero vector has cosine 0 and a finite gradient.
    """
    return _CosineDistance.apply(source, target)


class AbstractKVDistance(AbstractDistance):
    """source, target [..., T, C] -> distance [..., T] in fp32 (fp64 for fp64 inputs).

    Finite, with a finite gradient, for zero vectors. Raises AlignmentError where the shapes differ.
    is_channel_mean: it is a mean over channels of something that is 0 where both sides are.
    """

    is_channel_mean: ClassVar[bool] = True

    @abstractmethod
    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        """`__call__` without its check."""

    def __call__(
        self, source: Float[Tensor, "*lead T C"], target: Float[Tensor, "*lead T C"]
    ) -> Float[Tensor, "*lead T"]:
        if source.shape != target.shape:
            raise AlignmentError(
                f"KV distance: source {tuple(source.shape)} and target {tuple(target.shape)}",
                fix="align time, layers and channels first: both are [..., tokens, channels] of one shape",
            )
        return self.distance(source, target)

    def over_live(self, source: Tensor, target: Tensor, live_share: Tensor) -> Tensor:
        """The distance over live channels alone. live_share: of the channels; the others are 0 on both sides."""
        found = self(source, target)
        return found / live_share if self.is_channel_mean else found


@dataclass(frozen=True)
class MSEKVLoss(AbstractKVDistance):
    """Squared difference, mean over channels."""

    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        return _MeanSquare.apply(source, target)


@dataclass(frozen=True)
class SmoothL1KVLoss(AbstractKVDistance):
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; mean over channels."""

    beta: float = 1.0

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> SmoothL1KVLoss:
        return cls(beta=recipe.smooth_l1_beta)

    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        dtype = sum_dtype(source, target)
        return _channel_mean(F.smooth_l1_loss(source.to(dtype), target.to(dtype), reduction="none", beta=self.beta))


@dataclass(frozen=True)
class L1KVLoss(AbstractKVDistance):
    """|d|, mean over channels; gradient 0 where d is 0."""

    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        dtype = sum_dtype(source, target)
        return _channel_mean(F.l1_loss(source.to(dtype), target.to(dtype), reduction="none"))


@dataclass(frozen=True)
class MercatorKVLoss(AbstractKVDistance):
    """alpha (1 - cos(s, t)) + beta (log|s| - log|t|)^2 on each token's vector of C channels.

    Direction and size apart: cosine alone leaves the size free, MSE alone lets large vectors rule.
    |x| is sqrt(sum x^2 + 1e-8 C), so that a zero vector has cosine 0 and a finite log-norm.
    """

    is_channel_mean = False
    alpha: float = 1.0
    beta: float = 0.1

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> MercatorKVLoss:
        return cls(alpha=recipe.mercator_alpha, beta=recipe.mercator_beta)

    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        dtype = sum_dtype(source, target)
        source, target = source.to(dtype), target.to(dtype)
        # Three products and their sums: a quarter of the time of F.cosine_similarity and two norms.
        source_square = _channel_mean(source * source) + NORM_FLOOR_SQUARED
        target_square = _channel_mean(target * target) + NORM_FLOOR_SQUARED
        # two roots, not the root of the product: 1e-16 is a subnormal away from what fp32 holds
        cosine = _channel_mean(source * target) * source_square.rsqrt() * target_square.rsqrt()
        log_ratio = 0.5 * (source_square.log() - target_square.log())
        return self.alpha * (1 - cosine) + self.beta * log_ratio * log_ratio


@dataclass(frozen=True)
class HybridKVLoss(AbstractKVDistance):
    """share * MSE + (1 - share) * Mercator."""

    share: float = 0.5
    mercator: MercatorKVLoss = MercatorKVLoss()

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> HybridKVLoss:
        return cls(share=recipe.hybrid_share, mercator=MercatorKVLoss.from_recipe(recipe))

    def distance(self, source: Tensor, target: Tensor) -> Tensor:
        squared = _MeanSquare.apply(source, target)
        return self.share * squared + (1 - self.share) * self.mercator(source, target)

    def over_live(self, source: Tensor, target: Tensor, live_share: Tensor) -> Tensor:
        squared = MSEKVLoss().over_live(source, target, live_share)
        return self.share * squared + (1 - self.share) * self.mercator(source, target)
