"""Several teachers into one signal: weights per teacher, and N caches into one where they meet as KV.

`build_fusion(recipe, teacher_names, num_layers)` gives a `Fusion`; its one method `weights(...)` gives
[N, L or 1, B, T or 1] whatever the strategy, so that the trainer only broadcasts. `fuse_at: loss` hands
`weights[n]` to `masked_token_mean`; `fuse_at: kv` hands all of them to `fuse_caches`.

Weights never carry a gradient: a router trained on the KV loss itself falls onto the teacher that is easiest
to match, and these strategies are not to be that by accident. Knows no model, no file, no training loop.

Axes: N teachers, L layers, B batch, T tokens, C channels, P prototypes.
"""

from __future__ import annotations

from kvdistill.fuse.routing_record import RoutingRecord
from kvdistill.fuse.similarity import fit_prototypes, k_means, similarity_weights
from kvdistill.fuse.weights import (
    Fusion,
    build_fusion,
    competence_weights,
    fixed_weights,
    fuse_caches,
)

__all__ = [
    "Fusion",
    "RoutingRecord",
    "build_fusion",
    "competence_weights",
    "fit_prototypes",
    "fixed_weights",
    "fuse_caches",
    "k_means",
    "similarity_weights",
]
