"""Initial weights of projectors, and the nearest weight of a restricted form. Knows no projector and no layers."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvdistill.core.errors import require_known
from kvdistill.core.runtime import derive_seed

INITS = ("xavier", "orthogonal", "identity", "uniform", "ridge")


def spread_heads(in_heads: int, out_heads: int) -> Float[Tensor, "H G"]:
    """Incoming heads spread evenly over outgoing heads [in, out]: columns sum to 1.

    Both sets of heads divide the unit interval; each outgoing head averages the incoming ones it overlaps,
    by the share of overlap. Multiples give plain means or plain copies; any two counts work (7 -> 4, 2 -> 3).
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
    require_known(init, INITS, "init", "align.init")
    if init == "uniform":
        init = "identity" if num_in == num_out else "orthogonal"
    if init == "orthogonal":
        return nn.init.orthogonal_(torch.empty(num_in, num_out), generator=random)
    if init == "identity":
        row, column = torch.arange(num_in)[:, None], torch.arange(num_out)[None]
        joined = ((row % num_out == column) if num_in >= num_out else (column % num_in == row)).float()
        return joined / joined.sum(0).sqrt()
    bound = math.sqrt(6 / (num_in + num_out))
    return torch.empty(num_in, num_out).uniform_(-bound, bound, generator=random)


def make_flat_matrix(
    init: str, in_heads: int, in_size: int, out_heads: int, out_size: int, random: torch.Generator
) -> Float[Tensor, "I O"]:
    """`make_matrix` over all heads at once; uniform spreads heads and then maps the size, flattened."""
    if init == "uniform":
        return torch.kron(spread_heads(in_heads, out_heads), make_matrix(init, in_size, out_size, random))
    return make_matrix(init, in_heads * in_size, out_heads * out_size, random)


def make_factors(
    init: str, in_heads: int, in_size: int, out_heads: int, out_size: int, rank: int, random: torch.Generator
) -> tuple[Float[Tensor, "I R"], Float[Tensor, "R O"]]:
    """Two thin matrices of that init, in -> rank -> out; uniform: the nearest product to the flat uniform."""
    if init == "uniform":
        return nearest_factors(make_flat_matrix(init, in_heads, in_size, out_heads, out_size, random), rank)
    down = make_matrix(init, in_heads * in_size, rank, random)
    return down, make_matrix(init, rank, out_heads * out_size, random)


def nearest_factors(
    weight: Float[Tensor, "*P I O"], rank: int
) -> tuple[Float[Tensor, "*P I R"], Float[Tensor, "*P R O"]]:
    """The product of rank `rank` nearest to the weight in the Frobenius norm (Eckart & Young 1936), in its dtype.

    From the SVD in fp64; the singular values are shared out evenly, so that both factors learn at one pace.
    """
    left, scale, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = scale[..., :rank].sqrt()
    down, up = left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]
    return down.to(weight.dtype), up.to(weight.dtype)


def nearest_outer(matrix: Float[Tensor, "*P R C"]) -> tuple[Float[Tensor, "*P R"], Float[Tensor, "*P C"]]:
    """u and v whose outer product is nearest to the matrix; their norms are equal."""
    left, right = nearest_factors(matrix, 1)
    return left[..., 0], right[..., 0, :]


def generator(seed: int, kind: str) -> torch.Generator:
    """The projector's own stream of numbers, whatever was drawn before."""
    return torch.Generator().manual_seed(derive_seed(seed, "projector", kind))
