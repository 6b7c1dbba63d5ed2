"""Generalised canonical correlation analysis, MAXVAR form (Carroll 1968; Kettenring 1971), from covariances.

Wanted is the common variable g (one per Z channel, uncorrelated, unit variance) that the models' channels explain
best in sum: the leading eigenvectors of Σ_n P_n, P_n the projection onto model n's channels. They come from a matrix
as large as all channels together: with whiteners W_n, W_n'(S_nn + r_n I)W_n = I, and R_ij = W_i' S_ij W_j,
R v = λ v, model n's weights for g are W_n v_n. r_n = l2 · mean variance of model n's channels.
For two models and l2 -> 0 these are the classical canonical variates, λ = 1 + correlation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError


def whiteners(
    covariance_CC: Float[Tensor, "C C"], slices: Sequence[slice], l2: float
) -> tuple[list[Tensor], Float[Tensor, "C C"]]:
    """W_n [C_n, C_n] of every model, and R: the covariance of all whitened channels.

    Raises AlignmentError where l2 is too small for what fp32 products leave of a zero.
    """
    whiten_N_CC = []
    for part in slices:
        own = covariance_CC[part, part]
        scale = own.diagonal().mean()
        ridge = l2 * scale if scale > 0 else torch.ones_like(scale)  # constant channels explain nothing
        lower, failed = torch.linalg.cholesky_ex(own + ridge * torch.eye(len(own), dtype=own.dtype))
        if failed:
            raise AlignmentError(
                f"channels too alike to be whitened with a penalty of {l2:g}",
                place="align.ridge_l2",
                fix="give a larger one, e.g. 0.01",
            )
        whiten_N_CC.append(torch.linalg.solve_triangular(lower.T, torch.eye(len(own), dtype=own.dtype), upper=True))
    every = torch.block_diag(*whiten_N_CC)
    return whiten_N_CC, every.T @ covariance_CC @ every


def gcca_weights(covariance_CC: Float[Tensor, "C C"], slices: Sequence[slice], size: int, l2: float) -> list[Tensor]:
    """Weights [C_n, size] per model, best shared channel first; not yet of unit variance."""
    whiten_N_CC, whitened_CC = whiteners(covariance_CC, slices, l2)
    vectors = torch.linalg.eigh(whitened_CC).eigenvectors[:, -size:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    return [whiten @ vectors[part] for whiten, part in zip(whiten_N_CC, slices, strict=True)]
