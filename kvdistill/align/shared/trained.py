"""Adapters of a shared space learned by gradient: models near one another, and no collapse.

The nearest models are all zero, so distance alone collapses. As in VICReg (Bardes, Ponce & LeCun 2022), two terms
forbid it: every Z channel of every model keeps a standard deviation of at least 1 (hinge), and the Z channels of one
model stay uncorrelated. Of a linear adapter all three terms are functions of second moments alone, so that the fit
takes its steps on the streamed moments: the exact gradient over all calibration tokens, in constant memory.
`shared_loss` is the same loss on a batch, for adapters that are trained along with something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.align.shared.gcca import whiteners
from kvdistill.core.errors import AlignmentError
from kvdistill.core.runtime import derive_seed

STD_EPS = 1e-6
COLLAPSED_STD = 0.1


@dataclass(frozen=True)
class SharedLossWeights:
    """distance: of each model's Z to the mean of the other models'. variance: max(0, 1 − std) per channel.

    covariance: squared covariances between the channels of one model. With variance >= 4 · distance even channels that
    two models do not share keep a std of 1 (the hinge's slope is then steeper than the distance's).
    """

    distance: float = 1.0
    variance: float = 5.0
    covariance: float = 1.0


class TrainedWeights(NamedTuple):
    """Weights [C_n, Z] per model, the loss after every step, and the std of each model's Z channels as learned."""

    weights_N_CZ: list[Tensor]
    history: list[float]
    std_NZ: Tensor


def shared_loss(
    z_NLBTZ: Float[Tensor, "N L B T Z"], mask_BT: Bool[Tensor, "B T"], terms: SharedLossWeights | None = None
) -> Float[Tensor, ""]:
    """The loss of N models' Z on one batch, over real tokens: a mean over layers, models and Z channels, in fp32.

    Gradient to every model. Raises AlignmentError for fewer than two models or tokens.
    """
    rows_NLRZ = z_NLBTZ.float()[:, :, mask_BT]
    if rows_NLRZ.shape[0] < 2 or rows_NLRZ.shape[2] < 2:
        raise AlignmentError(
            f"shared loss of {rows_NLRZ.shape[0]} models on {rows_NLRZ.shape[2]} tokens", fix="give two or more of each"
        )
    mean_NL1Z = rows_NLRZ.mean(2, keepdim=True)
    centred = rows_NLRZ - mean_NL1Z
    within_NLZZ = centred.transpose(2, 3) @ centred / rows_NLRZ.shape[2]
    total_L = rows_NLRZ.sum(0).square().mean(1).sum(-1)
    own_NL = rows_NLRZ.square().mean(2).sum(-1)
    return _loss_of_moments(within_NLZZ, own_NL, total_L, terms or SharedLossWeights())


def _loss_of_moments(within_NLZZ: Tensor, own_NL: Tensor, total_L: Tensor, terms: SharedLossWeights) -> Tensor:
    """within: covariance of each model's Z. own: mean of ||z_n||². total: mean of ||Σ_n z_n||²."""
    N, Z = within_NLZZ.shape[0], within_NLZZ.shape[-1]
    variance_NLZ = within_NLZZ.diagonal(dim1=2, dim2=3)
    # z_n − mean of the others = N/(N−1) (z_n − mean of all)
    distance = (N / (N - 1)) ** 2 * (own_NL.sum(0) - total_L / N).mean() / (N * Z)
    hinge = (1 - (variance_NLZ + STD_EPS).sqrt()).relu().mean()
    others = within_NLZZ.square().sum((2, 3)) - variance_NLZ.square().sum(2)
    return terms.distance * distance + terms.variance * hinge + terms.covariance * others.mean() / Z


def trained_weights(
    covariance_CC: Float[Tensor, "C C"],
    slices: Sequence[slice],
    size: int,
    l2: float,
    *,
    steps: int = 400,
    learning_rate: float = 0.03,
    seed: int = 0,
    terms: SharedLossWeights | None = None,
) -> TrainedWeights:
    """Adam with a cosine schedule on whitened channels (see `gcca.whiteners`), from random directions.

    What is learned are weights V of W_n R_nn, not of the whitener W_n alone: directions in which a model never varied
    would keep the random weights they started with, 1/sqrt(l2) large, and shout when the model moves into them.
    Raises AlignmentError where the adapters collapse: some model's Z has a mean std below 0.1.
    """
    terms = terms or SharedLossWeights()
    whiten_N_CC, whitened_CC = whiteners(covariance_CC, slices, l2)
    own = torch.block_diag(*[whitened_CC[part, part] for part in slices])
    R = (own @ whitened_CC @ own).float()
    weights = []
    for n, part in enumerate(slices):
        random = torch.Generator().manual_seed(derive_seed(seed, "shared", n))
        start = torch.nn.init.orthogonal_(torch.empty(part.stop - part.start, size), generator=random)
        weights.append(start.requires_grad_())
    optimiser = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    history: list[float] = []
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            loss = _loss_on_whitened(weights, R, slices, terms)
            loss.backward()
            optimiser.step()
            schedule.step()
            history.append(loss.item())
    learned = [w.detach() for w in weights]
    std_NZ = torch.stack(
        [(w * (R[part, part] @ w)).sum(0).clamp_min(0).sqrt() for w, part in zip(learned, slices, strict=True)]
    )
    if not bool((std_NZ.mean(1) > COLLAPSED_STD).all()):  # a NaN is a collapse too
        raise AlignmentError(
            f"the trained shared space collapsed: std {std_NZ.mean(1).min():.2g} where 1 is wanted",
            fix="give the variance term a weight of at least 4 times the distance's, or use gcca",
        )
    read = [w @ whitened_CC[part, part] @ v.double() for w, v, part in zip(whiten_N_CC, learned, slices, strict=True)]
    return TrainedWeights(read, history, std_NZ)


def _loss_on_whitened(
    weights: Sequence[Tensor], whitened_CC: Tensor, slices: Sequence[slice], terms: SharedLossWeights
) -> Tensor:
    read_CZ = torch.cat(list(weights))
    total = (read_CZ * (whitened_CC @ read_CZ)).sum()
    within_NZZ = torch.stack([w.T @ whitened_CC[part, part] @ w for w, part in zip(weights, slices, strict=True)])
    own_N = within_NZZ.diagonal(dim1=1, dim2=2).sum(-1)
    return _loss_of_moments(within_NZZ[:, None], own_N[:, None], total[None], terms)
