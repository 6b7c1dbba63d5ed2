"""From the recipe's words (`align.projection`, `rank`, …) to a projector, and from one kind to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.elastic import ElasticProjector
from kvdistill.align.heads.flat import KVDimensionProjector, LowRankProjector
from kvdistill.align.heads.residual import ResidualProjector
from kvdistill.align.heads.structured import HeadwiseMapProjector
from kvdistill.core.errors import AlignmentError, RecipeError, require_known
from kvdistill.core.runtime import derive_seed

TOLERANCE = 1e-5
PROJECTORS: dict[str, type[Any]] = {
    "flat": KVDimensionProjector,
    "structured": HeadwiseMapProjector,
    "elastic": ElasticProjector,
}


def make_projector(
    projection: str,
    ends: tuple[int, int, int, int],
    num_layers: int = 1,
    *,
    per_head: bool = False,
    rank: int | None = None,
    hidden: int | None = None,
    residual: bool = False,
    share_layers: bool = False,
    init: str = "xavier",
    seed: int = 0,
    frozen: bool = False,
) -> AbstractHeadProjector:
    """projection: flat | structured | elastic. ends: in_heads, in_size, out_heads, out_size.

    per_head matters to structured alone. rank: flat as two thin matrices; hidden: width of elastic's MLP; each with
    another projection is a RecipeError.
    residual: a correction of this kind (init xavier) on a fixed first guess, which is the flat (structured, where
    that is asked for) map that `init` names; of ridge, whatever `set_flat` brings.
    """
    require_known(projection, PROJECTORS, "projection", "align.projection")
    if rank is not None and projection != "flat":
        raise RecipeError(
            f"rank {rank} with projection {projection}", place="align.rank", fix="rank is for projection: flat"
        )
    if hidden is not None and projection != "elastic":
        raise RecipeError(
            f"elastic_hidden {hidden} with projection {projection}",
            place="align.elastic_hidden",
            fix="elastic_hidden is for projection: elastic",
        )
    options: dict[str, Any] = {"share_layers": share_layers, "init": init, "seed": seed}
    if residual:
        guess = HeadwiseMapProjector if projection == "structured" else KVDimensionProjector
        guess_weight_PIO, _ = guess(*ends, num_layers, **options).to_flat()
        options |= {"init": "xavier", "seed": derive_seed(seed, "correction")}
    if projection == "structured":
        options["per_head"] = per_head
    elif projection == "elastic":
        options["hidden"] = hidden
    elif rank is not None:
        options["rank"] = rank
    kind = PROJECTORS[projection] if rank is None else LowRankProjector
    made: AbstractHeadProjector = kind(*ends, num_layers, **options)
    if residual:
        made = ResidualProjector(made, guess_weight_PIO)
    if frozen:
        made.freeze()
    return made


@torch.no_grad()
def convert(
    projector: AbstractHeadProjector,
    to: str,
    *,
    residual: bool = False,
    share_layers: bool | None = None,
    **options: Any,
) -> AbstractHeadProjector:
    """A new projector of kind `to` (flat | structured | elastic), the same function.

    options: per_head, rank, hidden as in `make_projector`.

    Exact: any linear one -> flat, -> any residual (as its first guess); one size for all heads -> one per head; low
    rank -> higher rank; shared layers -> one row per layer. Flat -> structured, a lower rank or shared layers only
    where the weights happen to be of that form. share_layers: unset keeps it as it is.
    Raises AlignmentError with the distance to the nearest where that is above 1e-5 of the weights (`set_flat` takes
    the nearest all the same), and for an elastic projector, which has no flat form.
    """
    share_layers = projector.share_layers if share_layers is None else share_layers
    weight, bias = projector.to_flat()
    for part in (weight, bias):
        distance = _relative_distance(part[:1].expand_as(part), part) if share_layers else 0.0
        if distance > TOLERANCE:
            raise AlignmentError(
                f"layers differ by {distance:.2g} of the weights: one shared row cannot equal them all",
                fix="keep one row per layer (share_layers: false)",
            )
    rows = 1 if share_layers else projector.num_layers
    weight, bias = (part[:rows].expand(rows, *part.shape[1:]) for part in (weight, bias))
    options |= {"residual": residual, "share_layers": share_layers}
    made = make_projector(to, projector.ends, projector.num_layers, **options).to(weight)
    if to == "elastic" and not residual:
        raise AlignmentError(
            "an elastic projector normalises each token: no linear map equals it",
            fix="convert with residual, so that the linear map is its first guess; or fit it on regressors(x)",
        )
    made.set_flat(weight, bias)
    distance = _relative_distance(made.taken_weight(), weight)
    if distance > TOLERANCE:
        raise AlignmentError(
            f"no {to} projector with these options equals this one: the nearest is {distance:.2g} of the weights away",
            fix="convert to flat, or take the nearest with set_flat(*projector.to_flat())",
        )
    return made


def _relative_distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().norm() / y.double().norm().clamp_min(1e-300))
