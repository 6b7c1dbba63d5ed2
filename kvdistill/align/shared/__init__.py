"""A shared space for models of any architecture: one linear adapter per model, fitted on paired texts.

    student   x_LBTC ─ adapter ┐
    teacher 1 x_LBTC ─ adapter ┼─► z_LBTZ, where the models lie as near to one another as a linear map can bring them
    teacher 2 x_LBTC ─ adapter ┘

N models cost N adapters, where projecting each onto each costs N². Decoders, encoders and encoder-decoders alike: what
comes in is channels at tokens, from wherever a model keeps its keys or values.

  gcca        `gcca.py`        directions that the models explain best in common; any widths, any scales. The default
  procrustes  `procrustes.py`  principal axes turned onto one another; keeps the distances inside a model
  trained     `trained.py`     learned by gradient with terms against collapse

All three are fitted from the same streamed covariances (`moments.py`), so memory does not grow with the text.

The caller aligns time and layers first: L is the number of layer *slots* (the student layers that take part), and
every model comes as [L, B, T, C_n] at the same tokens, whatever its own number of layers. Keys and values have a space
each: make one `SharedSpaceFit` for K and one for V. Keys come unrotated. What a frozen space does to a student that
trains away from it is said at `SharedSpace`. Knows no models, files, maps or losses of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.ridge import check_penalty
from kvdistill.align.shared.gcca import gcca_weights
from kvdistill.align.shared.moments import PairedMoments, numerical_rank, require_same_tokens
from kvdistill.align.shared.procrustes import procrustes_weights
from kvdistill.align.shared.space import (
    SharedAgreement,
    SharedSpace,
    layer_fits,
    require_enough_tokens,
    require_finite,
)
from kvdistill.align.shared.trained import SharedLossWeights, shared_loss, trained_weights
from kvdistill.core.errors import AlignmentError, require_known
from kvdistill.core.runtime import derive_seed

METHODS = ("gcca", "procrustes", "trained")
TOKENS_PER_CHANNEL = 10


@final
class SharedSpaceFit:
    """Streams paired batches of two or more models into a `SharedSpace`.

    State: the means and covariances of all models' channels, L · (ΣC_n)² / 2 numbers in fp64, whatever the text.
    """

    def __init__(
        self,
        num_channels: Mapping[str, int],
        num_layers: int,
        size: int,
        method: str = "gcca",
        *,
        scaling: bool = True,
        steps: int = 400,
        seed: int = 0,
        terms: SharedLossWeights | None = None,
    ) -> None:
        """num_channels: C_n by model name. size: Z channels per layer slot, at most the narrowest model's.

        scaling (procrustes): models may be scaled as a whole. steps, seed, terms (trained): of the descent.
        Raises AlignmentError for one model or a Z that is too large, RecipeError for an unknown method.
        """
        require_known(method, METHODS, "shared fit", "align.shared_fit")
        if len(num_channels) < 2:
            raise AlignmentError(
                f"a shared space of {len(num_channels)} model ({', '.join(num_channels)})",
                fix="give at least two models, the student and a teacher say",
            )
        narrowest = min(num_channels, key=num_channels.__getitem__)
        if not 0 < size <= num_channels[narrowest]:
            raise AlignmentError(
                f"{size} shared channels, but {narrowest!r} has {num_channels[narrowest]}",
                place="align.shared_size",
                fix=f"1 to {num_channels[narrowest]}",
            )
        self.num_channels, self.num_layers, self.size, self.method = dict(num_channels), num_layers, size, method
        self._scaling, self._steps, self._seed, self._terms = scaling, steps, seed, terms
        self._moments = PairedMoments(list(num_channels.values()), num_layers)
        # per layer slot, after `solve`: procrustes, the variance outside the mean per sweep; trained, the loss per step
        self.history: list[list[float]] = []

    def update(self, channels: Mapping[str, Float[Tensor, "..."]], mask_BT: Bool[Tensor, "..."]) -> None:
        """Add one batch: each model's [L, B, T, C_n] at the same tokens, and the tokens that all of them have.

        Masked values may be NaN. Where teachers cover different tokens, give the intersection of their masks.
        Raises AlignmentError for a missing model or different shapes.
        """
        require_same_tokens(channels, mask_BT, self.num_channels, self.num_layers)
        self._moments.update([channels[name].detach() for name in self.num_channels], mask_BT)

    @property
    def num_tokens(self) -> int:
        return self._moments.num_tokens

    @torch.no_grad()
    def solve(self, l2: float, *, drop_spare: bool = False) -> SharedSpace:
        """The space that the batches so far give, on the CPU. More may be added afterwards.

        l2 > 0: penalty relative to the mean variance of a model's channels (of Z on the way back). drop_spare: in a
        layer slot where some model has fewer independent channels than Z, the surplus Z channels are 0 for every model
        (said in `reason`); without it that is an error. It happens in the first layer of a model with few words.
        Raises RecipeError for l2 <= 0, AlignmentError for too few tokens, too few independent channels, or NaN.
        """
        check_penalty(l2)
        require_enough_tokens(self.num_tokens, self.num_channels)
        space = SharedSpace(self.num_channels, self.num_layers, self.size)
        self.history, spare = [], []
        for layer in range(self.num_layers):
            mean_C, covariance_CC = self._moments.covariance(layer)
            rank = self._rank(layer, mean_C, covariance_CC, drop_spare)
            if rank < self.size:
                spare.append(f"slot {layer} has {rank}")
            weights = self._weights(layer, covariance_CC, min(rank, self.size), l2)
            weights = [torch.nn.functional.pad(w, (0, self.size - w.shape[1])) for w in weights]
            fits, space.correlation[layer] = layer_fits(mean_C, covariance_CC, self._moments.slices, weights, l2)
            for name, fit in zip(self.num_channels, fits, strict=True):
                space.adapter(name).set_layer(layer, fit)
        space.is_fitted, said = True, []
        if self.num_tokens < TOKENS_PER_CHANNEL * sum(self.num_channels.values()):
            said.append(
                f"fitted on {self.num_tokens} tokens, fewer than {TOKENS_PER_CHANNEL} per channel: part of the "
                "agreement on them is chance"
            )
        if spare:
            said.append(f"fewer independent channels than {self.size} ({', '.join(spare)}): the rest of Z is 0 there")
        space.reason = "; ".join(said)
        return space

    def _rank(self, layer: int, mean_C: Tensor, covariance_CC: Tensor, drop_spare: bool) -> int:
        places = dict(zip(self.num_channels, self._moments.slices, strict=True))
        require_finite(mean_C, covariance_CC, places)
        ranks = {name: numerical_rank(mean_C[part], covariance_CC[part, part]) for name, part in places.items()}
        poorest = min(ranks, key=ranks.__getitem__)
        least = ranks[poorest]
        if least == 0 or (least < self.size and not drop_spare):
            raise AlignmentError(
                f"{self.size} shared channels, but {poorest!r} has {least} independent ones in layer slot {layer}",
                place="align.shared_size",
                fix=f"at most {least}, or drop_spare" if least else "leave out a layer whose keys or values never vary",
            )
        return least

    def _weights(self, layer: int, covariance_CC: Tensor, size: int, l2: float) -> list[Tensor]:
        slices = self._moments.slices
        if self.method == "gcca":
            return gcca_weights(covariance_CC, slices, size, l2)
        if self.method == "procrustes":
            weights, history = procrustes_weights(covariance_CC, slices, size, scaling=self._scaling)
        else:
            seed = derive_seed(self._seed, "shared", layer)
            weights, history, _ = trained_weights(
                covariance_CC, slices, size, l2, steps=self._steps, seed=seed, terms=self._terms
            )
        self.history.append(history)
        return weights


def fit_trained(
    batches: Iterable[tuple[Mapping[str, Tensor], Tensor]],
    size: int,
    *,
    steps: int = 400,
    seed: int = 0,
    l2: float = 1e-2,
    terms: SharedLossWeights | None = None,
) -> SharedSpace:
    """Adapters learned by gradient on (channels by model name, mask [B, T]) batches; each batch is read once.

    The loss depends on the data through second moments only, so a step on the moments of all batches is a step on all
    their tokens. Raises as `SharedSpaceFit` does, and AlignmentError where the adapters collapse.
    """
    fit: SharedSpaceFit | None = None
    for channels, mask_BT in batches:
        if fit is None:
            num_layers = next(iter(channels.values())).shape[0]
            sizes = {name: x.shape[-1] for name, x in channels.items()}
            fit = SharedSpaceFit(sizes, num_layers, size, "trained", steps=steps, seed=seed, terms=terms)
        fit.update(channels, mask_BT)
    if fit is None:
        raise AlignmentError("no batches to fit a shared space on", fix="calibrate on at least one example")
    return fit.solve(l2)
