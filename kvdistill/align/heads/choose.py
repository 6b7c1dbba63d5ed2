"""From the recipe's words (`align.projection`, `rank`, …) to a projector."""

from __future__ import annotations

from typing import Any

from kvdistill.align.heads.base import AbstractHeadProjector
from kvdistill.align.heads.elastic import ElasticProjector
from kvdistill.align.heads.flat import KVDimensionProjector, LowRankProjector
from kvdistill.align.heads.residual import ResidualProjector
from kvdistill.align.heads.structured import HeadwiseMapProjector
from kvdistill.core.errors import RecipeError
from kvdistill.core.runtime import derive_seed

PROJECTORS: dict[str, type[KVDimensionProjector] | type[HeadwiseMapProjector] | type[ElasticProjector]] = {
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
    if projection not in PROJECTORS:
        raise RecipeError(
            f"unknown projection {projection!r}", place="align.projection", fix=f"one of {', '.join(PROJECTORS)}"
        )
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
    made = _plain(projection, ends, num_layers, per_head, rank, hidden, options)
    if residual:
        made = ResidualProjector(made, guess_weight_PIO)
    if frozen:
        made.freeze()
    return made


def _plain(
    projection: str,
    ends: tuple[int, int, int, int],
    num_layers: int,
    per_head: bool,
    rank: int | None,
    hidden: int | None,
    options: dict[str, Any],
) -> AbstractHeadProjector:
    if projection == "structured":
        return HeadwiseMapProjector(*ends, num_layers, per_head=per_head, **options)
    if projection == "elastic":
        return ElasticProjector(*ends, num_layers, hidden=hidden, **options)
    if rank is not None:
        return LowRankProjector(*ends, num_layers, rank=rank, **options)
    return KVDimensionProjector(*ends, num_layers, **options)
