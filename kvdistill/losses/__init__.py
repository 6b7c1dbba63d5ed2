"""The terms of the loss: KV distances, cross entropy and logit distillation, each stating its reduction.

    tokens.py          two vectors per token: mse, smooth_l1, l1, mercator, hybrid, cosine
    attention.py       attention rows and what they read: structural, attention_output (`blocks.py`: a block at a time);
                       token weights from the attention the teacher's answer pays
    representation.py  whole layers: cka
    logits.py          cross entropy and logit distillation
    logits_across.py   logit distillation between tokenizers, on the chunks of text that both cut out (`chunks.py`)
    base.py            what a distance takes and gives; masks, weights and the division by a token count

A distance gives one number a token; the mask, the routing weights and the division by the number of tokens come
after it (`masked_token_mean`). Every term is divided by a token count *given from outside*: the count over the
whole optimiser step (all micro-batches, all ranks). The sum over micro-batches is then the same number however the
batch is split (all but `cka`, which is a statistic of the micro-batch).

    distance = build_distance(recipe.loss)             # `base.py`: which takes what
    loss = masked_token_mean(distance(source_LBTC, target_LBTC), mask_BT, weight_B, num_tokens)

What a padded slot holds must be finite; its value does not matter. A NaN there is a fault of the forward
pass and shows in the term instead of being hidden.

Does not know models, teachers, segments or recipes beyond `LossRecipe`. Nothing is detached here: teacher
targets arrive without a graph (capture runs under no_grad), and a target that does carry one (a trainable
projector in student space) gets its gradient.
"""

from __future__ import annotations

from kvdistill.core.errors import require_known
from kvdistill.core.recipe import LossRecipe
from kvdistill.losses.attention import (
    QKV,
    AbstractAttentionDistance,
    AttentionOutputKVLoss,
    StructuralKVLoss,
    answer_attention,
    normalise_token_weights,
)
from kvdistill.losses.base import AbstractDistance, kv_weight_at, masked_token_mean
from kvdistill.losses.chunks import TextChunks, chunks_within, common_chunks
from kvdistill.losses.logits import cross_entropy, logit_distillation, logit_divergence, prediction_mask
from kvdistill.losses.logits_across import chunk_divergence, each_token
from kvdistill.losses.representation import CKAKVLoss
from kvdistill.losses.tokens import (
    NORM_FLOOR_SQUARED,
    AbstractKVDistance,
    HybridKVLoss,
    L1KVLoss,
    MercatorKVLoss,
    MSEKVLoss,
    SmoothL1KVLoss,
    cosine_distance,
)

KV_DISTANCES: dict[str, type[AbstractKVDistance]] = {
    "mse": MSEKVLoss,
    "smooth_l1": SmoothL1KVLoss,
    "l1": L1KVLoss,
    "mercator": MercatorKVLoss,
    "hybrid": HybridKVLoss,
}
DISTANCES: dict[str, type[AbstractDistance]] = {
    **KV_DISTANCES,
    "structural": StructuralKVLoss,
    "attention_output": AttentionOutputKVLoss,
    "cka": CKAKVLoss,
}


def build_distance(recipe: LossRecipe) -> AbstractDistance:
    """The distance `loss.kind` names, with its settings from the recipe; `base.py` says what each kind takes."""
    require_known(recipe.kind, DISTANCES, "distance", "loss.kind")
    return DISTANCES[recipe.kind].from_recipe(recipe)
