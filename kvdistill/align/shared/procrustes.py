"""Generalised orthogonal Procrustes analysis (Gower 1975; ten Berge 1977), from covariances.

Every model is reduced to its `size` leading principal axes, then turned (and scaled) until the models lie on one
another: least Σ_n ||c_n X_n T_n − G||² over orthogonal T_n and scales c_n, G the mean of all. One step turns one model
onto the others: U V' of the SVD U D V' of Σ_j≠n c_j X_n'X_j T_j. The scales are the leading eigenvector of the models'
agreement (ten Berge 1977, section 3), with the total variance held. Both steps only ever need X_i'X_j.
No step can make the figure worse. Distances inside a model are kept, unlike in GCCA: small channels stay small until
the common space is standardised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MOST_SWEEPS = 100
TOLERANCE = 1e-8
TINY = 1e-300  # constant channels: no variance to divide by


def procrustes_weights(
    covariance_CC: Float[Tensor, "C C"], slices: Sequence[slice], size: int, *, scaling: bool = True
) -> tuple[list[Tensor], list[float]]:
    """Weights [C_n, size] per model, and the share of variance outside the mean after each sweep (it only falls).

    The columns are the principal axes of the mean, largest first. Models start with total variance 1 when `scaling`,
    else with their own.
    """
    axes_N_CZ = [_leading_axes(covariance_CC[part, part], size) for part in slices]
    every = torch.block_diag(*axes_N_CZ)
    N = len(slices)
    reduced = (every.T @ covariance_CC @ every).view(N, size, N, size).transpose(1, 2)  # [N, N, Z, Z]
    totals = torch.einsum("nnaa->n", reduced)
    scales = totals.clamp_min(TINY).rsqrt() if scaling else torch.ones_like(totals)
    turns = torch.eye(size, dtype=reduced.dtype).repeat(N, 1, 1)
    for n in range(1, N):  # onto the sum of the models before it: a far better start than no turn at all
        turns[n] = _nearest_turn(torch.einsum("j,jab,jbc->ac", scales[:n], reduced[n, :n], turns[:n]))
    history = [_outside_mean(reduced, turns, scales)]
    for _ in range(MOST_SWEEPS):
        for n in range(N):
            others = scales.clone()
            others[n] = 0
            turns[n] = _nearest_turn(torch.einsum("j,jab,jbc->ac", others, reduced[n], turns))
        if scaling:
            signs, scales = _best_scales(reduced, turns, totals)
            turns = turns * signs[:, None, None]
        history.append(_outside_mean(reduced, turns, scales))
        if history[-2] - history[-1] <= TOLERANCE:
            break
    common = _principal_turn(reduced, turns, scales)
    weights = [axes @ turn @ common * scale for axes, turn, scale in zip(axes_N_CZ, turns, scales, strict=True)]
    return weights, history


def _leading_axes(covariance_CC: Tensor, size: int) -> Tensor:
    return torch.linalg.eigh(covariance_CC).eigenvectors[:, -size:].flip(1)


def _nearest_turn(product_ZZ: Tensor) -> Tensor:
    """The orthogonal T with the largest tr(T' product): U V' (Schönemann 1966)."""
    left, _, right = torch.linalg.svd(product_ZZ)
    return left @ right


def _agreement(reduced: Tensor, turns: Tensor) -> Tensor:
    """tr(T_i' X_i'X_j T_j) of every pair [N, N]."""
    return torch.einsum("iac,ijab,jbc->ij", turns, reduced, turns)


def _best_scales(reduced: Tensor, turns: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (they belong to the turns) and positive scales; the total variance stays N, as at the start."""
    root = totals.clamp_min(TINY).sqrt()
    leading = torch.linalg.eigh(_agreement(reduced, turns) / torch.outer(root, root)).eigenvectors[:, -1]
    signs = torch.where(leading * leading.sum() < 0, -1.0, 1.0).to(leading.dtype)
    return signs, leading.abs() * len(totals) ** 0.5 / root


def _outside_mean(reduced: Tensor, turns: Tensor, scales: Tensor) -> float:
    scaled = _agreement(reduced, turns) * torch.outer(scales, scales)
    return float(1 - scaled.sum() / (len(scales) * scaled.trace()))


def _principal_turn(reduced: Tensor, turns: Tensor, scales: Tensor) -> Tensor:
    """One turn of all models together, which changes no distance: onto the principal axes of their mean."""
    scaled = turns * scales[:, None, None]
    mean_ZZ = torch.einsum("iac,ijab,jbd->cd", scaled, reduced, scaled)
    axes = _leading_axes((mean_ZZ + mean_ZZ.T) / 2, len(mean_ZZ))
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)
