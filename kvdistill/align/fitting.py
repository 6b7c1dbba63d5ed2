"""From streams of incoming and outgoing channels to the closed-form values of a pair of projectors, for K and for V.

Chooses between a fit of keys and values themselves (`ridge.py`) and of what attention reads of them (`attention.py`),
of all heads at once and of each head alone. Knows no models, layers' numbers or maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.attention import AttentionRidgeFit, head_shares
from kvdistill.align.heads import AbstractHeadProjector, spread_heads
from kvdistill.align.ridge import RidgeFit, read_heads
from kvdistill.core.recipe import AlignRecipe


@final
class ProjectorFit:
    """Fits (projector for K, projector for V), which have the same ends, by the recipe's ridge_on, ridge_l2, per_head.

    per_head: an outgoing head reads the incoming heads that `spread_heads` gives it, and no other.
    """

    def __init__(self, recipe: AlignRecipe, projectors: Sequence[AbstractHeadProjector], teacher_heads: int) -> None:
        """teacher_heads: KV heads of the teacher, on whichever side of the projectors it is."""
        self._recipe, self._projectors, self._teacher_heads = recipe, projectors, teacher_heads
        one = projectors[0]
        self.needs_attention = recipe.ridge_on == "attention"
        plain, reading = ([], ["keys", "values"]) if self.needs_attention else (["keys", "values"], [])
        self._plain = [RidgeFit(one.num_in, one.num_out, one.num_rows) for _ in plain]
        self._read = [AttentionRidgeFit(k, one.num_in, one.out_heads, one.out_size, one.num_rows) for k in reading]

    @torch.no_grad()
    def update(
        self,
        given: Sequence[Float[Tensor, "L B T I"]],
        wanted: Sequence[Float[Tensor, "L B T O"]],
        mask: Bool[Tensor, "B T"] | Bool[Tensor, "L B T"],
        attention: Iterable[Float[Tensor, "B Q T T"]] | None = None,
    ) -> None:
        """Add one batch. given, wanted: (K, V). attention: the teacher's, layer by layer, where `needs_attention`."""
        given = [projector.regressors(x) for projector, x in zip(self._projectors, given, strict=True)]
        shared = self._projectors[0].share_layers
        if not self.needs_attention:
            each = mask.expand(given[0].shape[:3])
            for fit, x, y in zip(self._plain, given, wanted, strict=True):
                fit.update(*((x[None], y[None], each[None]) if shared else (x, y, mask)))
            return
        assert attention is not None
        for layer, a_BQTT in enumerate(attention):  # made once, read by K and by V
            mask_BT = mask if mask.ndim == 2 else mask[layer]
            shares_QJ = head_shares(a_BQTT.shape[1], self._teacher_heads, self._projectors[0].out_heads)
            for reading, x, y in zip(self._read, given, wanted, strict=True):
                reading.update_layer(0 if shared else layer, x[layer], y[layer], mask_BT, a_BQTT, shares_QJ)

    def finish(self) -> None:
        """Solve, and hand the maps to the projectors (`hand_over`)."""
        one = self._projectors[0]
        heads = read_heads(spread_heads(one.in_heads, one.out_heads), one.in_size) if self._recipe.per_head else None
        fits: Sequence[RidgeFit | AttentionRidgeFit] = self._read if self.needs_attention else self._plain
        for fit, projector in zip(fits, self._projectors, strict=True):
            hand_over(fit, projector, self._recipe.ridge_l2, heads)


@torch.no_grad()
def hand_over(
    fit: RidgeFit | AttentionRidgeFit,
    projector: AbstractHeadProjector,
    l2: float,
    reads: Bool[Tensor, "1 J I"] | None = None,
) -> None:
    """Solve, and make the projector that map: exactly, or the nearest it can be (`set_flat`). l2, reads: of `solve`.

    A bias belongs to its weight: where the projector takes a nearest one, the bias is made anew, so that the mean
    still goes to the mean. Means lie far from 0 (keys' above all), and the old bias would cost more than the weight.
    """
    weight, bias = fit.solve(l2, reads)
    projector.set_flat(weight.float(), bias.float())
    missing_PIJE = (weight - projector.taken_weight().to(weight)).unflatten(2, (fit.mean_in.shape[1], -1))
    projector.taken_bias().copy_(bias + torch.einsum("pji,pije->pje", fit.mean_in, missing_PIJE).flatten(1))
