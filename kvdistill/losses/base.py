"""What every term of the loss has in common: what a distance is, and how its numbers become one.

    neither                   distance(source [.., T, C], target [.., T, C])              keys and values apart
    needs_mask                distance(source [L, B, T, C], target [L, B, T, C'], mask)   keys and values apart
    needs_queries, needs_mask distance(QKV, QKV, mask)                                    keys and values together

Each returns one number a token, [L, B, T], which `masked_token_mean` makes into a term of the loss, divided by a token
count given from outside: that of the whole optimiser step.

Axes: L layers, B batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvdistill.core.recipe import LossRecipe


class AbstractDistance(ABC):
    """needs_queries: takes queries, keys and values of both sides together. needs_mask: takes the tokens' mask."""

    needs_queries: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> AbstractDistance:
        """The distance with the settings of `recipe`; here one that has none."""
        return cls()

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """[L, B, T]; what it takes differs (above)."""


def at_least_one(num_tokens: int | float | Tensor) -> int | float | Tensor:
    """A step without any token has loss 0, not 0 / 0."""
    return num_tokens.clamp_min(1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)


def token_weight(weight: Tensor) -> Tensor:
    """[B] -> [B, 1]; the other shapes broadcast against [L, B, T] as they are."""
    return weight[:, None] if weight.ndim == 1 else weight


def masked_token_mean(
    distance_LBT: Float[Tensor, "L B T"],
    mask: Bool[Tensor, "B T"] | Bool[Tensor, "L B T"],
    weight: Float[Tensor, "B"] | Float[Tensor, "#B #T"] | Float[Tensor, "#L #B #T"] | None,
    num_tokens: int | float | Float[Tensor, ""] | Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """sum over real tokens of weight * distance, mean over layers, divided by `num_tokens`.

    mask: True at the tokens that take part. weight: per example, token or layer (`Fusion.weights(...)[n]`
    fits), None: 1. num_tokens: number of real tokens in the whole optimiser step, over accumulation and
    ranks; then the terms of all micro-batches add up to the mean over the step's tokens, however it is
    split. With a mask per layer it is the mean count over layers. Weights are not in the divisor: a teacher
    with weight .2 contributes .2 of its mean distance.
    """
    share = mask.to(distance_LBT.dtype)
    if weight is not None:
        share = share * token_weight(weight)
    return (distance_LBT * share).sum() / distance_LBT.shape[0] / at_least_one(num_tokens)


def kv_weight_at(
    step: int, total_steps: int, kv_weight: int | float, kv_warmup: int | float, kv_fade: int | float = 0
) -> float:
    """Weight of the KV term in optimiser step `step` (from 0): a linear rise to `kv_weight`, constant, a linear fall.

    kv_warmup, kv_fade: below 1 a share of `total_steps`, else a number of steps; 0: none. With w warm-up steps the
    weight is kv_weight * (step + 1) / w, full from step w - 1 on; the fall mirrors it: with f steps of fading,
    kv_weight * (total_steps - step) / f. Where the two meet the smaller holds. Never 0 while kv_weight is not.
    """
    share = 1.0
    for steps, done in ((kv_warmup, step + 1), (kv_fade, total_steps - step)):
        length = steps * total_steps if steps < 1 else steps
        share = min(share, done / length) if length > 0 else share
    return kv_weight * share
