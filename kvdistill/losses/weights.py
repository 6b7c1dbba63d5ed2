"""Token weights from attention: what the answer looks at counts more.

Axes: L layers, B batch, T tokens, H key/value heads, Q query heads, D head size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError
from kvdistill.losses.blocks import CHUNK_BYTES, ChunkSide, attention_blocks, full_precision


@torch.no_grad()
def answer_attention(
    query: Float[Tensor, "L B T Q D"],
    key: Float[Tensor, "L B T H D"],
    answer_BT: Bool[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    scaling: float | None = None,
    causal: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "L B T"]:
    """The attention that answer tokens pay to each token, mean over answer tokens and query heads, as weights.

    query, key: as attention sees them (rotated, for models with rotary positions). answer_BT: the tokens that look;
    those outside `mask_BT` do not count. Weights have mean 1 over the real tokens of each sample and layer, are 0
    elsewhere, and 1 throughout where a sample has no answer token. No gradient; float32 at least.
    """
    if answer_BT.shape != mask_BT.shape:
        raise AlignmentError(f"answer tokens {tuple(answer_BT.shape)}, mask {tuple(mask_BT.shape)}")
    blocks = attention_blocks(query, key, mask_BT, scaling, causal, chunk_bytes)
    looks_NT = (answer_BT & mask_BT).expand(key.shape[:3]).flatten(0, 1).to(blocks.dtype)
    has_answer = (answer_BT & mask_BT).any(0).tolist()
    paid_NT = torch.zeros_like(looks_NT)
    with full_precision(query):
        for chunk in blocks.chunks():
            side = ChunkSide(blocks, chunk, query, key)
            for rows, num_keys in blocks.rows():
                if any(has_answer[rows]):  # answers stand at the end: most blocks hold none
                    p = side.logits(rows, blocks.bias(chunk, rows, num_keys)).softmax(-1)
                    share = looks_NT[chunk, None, rows, None].expand(-1, blocks.num_heads, -1, blocks.group)
                    per_head = torch.bmm(share.reshape(len(p), 1, -1), p)
                    paid_NT[chunk, :num_keys] += per_head.view(-1, blocks.num_heads, num_keys).sum(1)
    return normalise_token_weights(paid_NT.view(key.shape[:3]), mask_BT)


def normalise_token_weights(weight_LBT: Float[Tensor, "L B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "L B T"]:
    """Scaled to mean 1 over the real tokens of each sample and layer; 0 elsewhere; 1 where all weights are 0.

    For weights that were brought to other tokens (a time map) after `answer_attention`.
    """
    weight_LBT = torch.where(mask_BT, weight_LBT, 0.0)
    total_LB1 = weight_LBT.sum(-1, keepdim=True)
    count_B1 = mask_BT.sum(-1, keepdim=True)
    scaled_LBT = weight_LBT * (count_B1 / total_LB1)
    return torch.where(total_LB1 > 0, scaled_LBT, mask_BT.to(weight_LBT.dtype))
