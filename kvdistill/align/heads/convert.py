"""One kind of projector into another where both can be the same function; a clear refusal where they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.choose import make_projector
from kvdistill.align.heads.residual import ResidualProjector
from kvdistill.core.errors import AlignmentError

TOLERANCE = 1e-5


@torch.no_grad()
def convert(
    projector: AbstractHeadProjector,
    to: str,
    *,
    per_head: bool = False,
    rank: int | None = None,
    hidden: int | None = None,
    residual: bool = False,
    share_layers: bool | None = None,
) -> AbstractHeadProjector:
    """A new projector of kind `to` (flat | structured | elastic, options as in `make_projector`), the same function.

    Exact: any linear one -> flat, -> any residual (as its first guess); one size for all heads -> one per head; low
    rank -> higher rank; shared layers -> one row per layer. Flat -> structured, a lower rank or shared layers only
    where the weights happen to be of that form. share_layers: unset keeps it as it is.
    Raises AlignmentError with the distance to the nearest where that is above 1e-5 of the weights (`set_flat` takes
    the nearest all the same), and for an elastic projector, which has no flat form.
    """
    share_layers = projector.share_layers if share_layers is None else share_layers
    weight, bias = projector.to_flat()
    weight, bias = (_with_rows(part, projector.num_layers, share_layers) for part in (weight, bias))
    made = make_projector(
        to,
        projector.ends,
        projector.num_layers,
        per_head=per_head,
        rank=rank,
        hidden=hidden,
        residual=residual,
        share_layers=share_layers,
    ).to(weight)
    if to == "elastic" and not residual:
        raise AlignmentError(
            "an elastic projector normalises each token: no linear map equals it",
            fix="convert with residual, so that the linear map is its first guess; or fit it on regressors(x)",
        )
    made.set_flat(weight, bias)
    nearest = made.guess_weight if isinstance(made, ResidualProjector) else made.to_flat()[0]
    distance = _relative_distance(nearest, weight)
    if distance > TOLERANCE:
        raise AlignmentError(
            f"no {to} projector with these options equals this one: the nearest is {distance:.2g} of the weights away",
            fix="convert to flat, or take the nearest with set_flat(*projector.to_flat())",
        )
    return made


def _with_rows(x_P: Tensor, num_layers: int, share_layers: bool) -> Tensor:
    if not share_layers:
        return x_P.expand(num_layers, *x_P.shape[1:])
    distance = _relative_distance(x_P[:1].expand_as(x_P), x_P)
    if distance > TOLERANCE:
        raise AlignmentError(
            f"layers differ by {distance:.2g} of the weights: one shared row cannot equal them all",
            fix="keep one row per layer (share_layers: false)",
        )
    return x_P[:1]


def _relative_distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().norm() / y.double().norm().clamp_min(1e-300))
