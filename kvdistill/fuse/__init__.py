"""Several teachers into one signal: weights per teacher, and N caches into one where they meet as KV.

`build_fusion(recipe, teacher_names, num_layers)` gives a `Fusion`; its one method `weights(...)` gives
[N, L or 1, B, T or 1] whatever the strategy, so that the trainer only broadcasts. `fuse_at: loss` hands
`weights[n]` to `masked_token_mean`; `fuse_at: kv` hands all of them to `fuse_caches`.

Weights never carry a gradient: a router trained on the KV loss itself falls onto the teacher that is easiest
to match, and these strategies are not to be that by accident. Knows no model, no file, no training loop.

Axes: N teachers, L layers, B batch, T tokens, C channels, P prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvdistill.core.errors import require_known
from kvdistill.core.recipe import FuseRecipe
from kvdistill.fuse.routing_record import RoutingRecord
from kvdistill.fuse.similarity import Grain, fit_prototypes, k_means, similarity_weights
from kvdistill.fuse.weights import (
    AbstractStrategy,
    CompetenceStrategy,
    FixedStrategy,
    Fusion,
    SimilarityStrategy,
    competence_weights,
    fixed_weights,
    fuse_caches,
)

FUSION_STRATEGIES: dict[str, type[AbstractStrategy]] = {
    "fixed": FixedStrategy,
    "competence": CompetenceStrategy,
    "similarity": SimilarityStrategy,
}


def build_fusion(
    recipe: FuseRecipe,
    teacher_names: Sequence[str],
    num_layers: int,
    prototypes: Sequence[Tensor] | None = None,
    grain: Grain = "example",
) -> Fusion:
    """The fusion `recipe` names, checked now: a wrong number of weights or prototypes is an error here.

    prototypes: for similarity, one [L, P, C_n] a teacher (`fit_prototypes`). grain: for similarity, one
    weight per example, per example and token, or per example and layer.
    """
    require_known(recipe.fusion_strategy, FUSION_STRATEGIES, "strategy", "fuse.fusion_strategy")
    kind = FUSION_STRATEGIES[recipe.fusion_strategy]
    return Fusion(tuple(teacher_names), kind.build(recipe, len(teacher_names), num_layers, prototypes, grain))
