"""Distances that look at attention: are the same tokens attended to, and is the same read from them?

Both take queries, keys and values of both sides (`QKV`) in the one space they meet in, heads not flattened, and a
mask of the tokens that take part. A token outside the mask is no key for anyone, on either side, and its own row
gives 0. Keys come as attention sees them: for a model's own attention rows queries and keys are both rotated (or
both unrotated, which compares attention without its positions). `answer_attention` makes token weights of the same
rows: what the answer looks at counts more.

Forward keeps nothing of the size T x T; backward makes each block's rows again. What a slot outside the mask holds
must be finite; its value does not matter.

Axes: L layers, B batch, T tokens, H key/value heads, Q query heads (a multiple of H), D head size; N = L x B samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import AttentionRule
from kvdistill.core.recipe import LossRecipe
from kvdistill.losses.base import AbstractDistance
from kvdistill.losses.blocks import (
    CHUNK_BYTES,
    AttentionBlocks,
    ChunkSide,
    add_to_keys,
    attention_blocks,
    full_precision,
)
from kvdistill.losses.tokens import cosine_distance


class QKV(NamedTuple):
    """Queries [L, B, T, Q, D], keys [L, B, T, H, D] and values [L, B, T, H, D'] of one side, token-major.

    `AlignedKV.k.unflatten(-1, (H, D))` is such a tensor, without a copy. Query head i reads key head i // (Q / H).
    """

    q: Tensor
    k: Tensor
    v: Tensor


class _RowDivergence(torch.autograd.Function):
    """KL(target's attention row || source's) of each token, mean over query heads: [L, B, T].

    With p = softmax(target's logits), q = softmax(source's) and g the gradient of a row's divergence:
    d/d source logits = g (q - p);  d/d target logits = g p (log p - log q - KL).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, source_q: Tensor, source_k: Tensor, target_q: Tensor, target_k: Tensor, blocks: AttentionBlocks
    ) -> Tensor:
        ctx.save_for_backward(source_q, source_k, target_q, target_k)
        ctx.blocks = blocks
        out_NT = torch.zeros(blocks.mask_NT.shape, dtype=blocks.dtype, device=source_q.device)
        with full_precision(source_q):
            for chunk in blocks.chunks():
                source = ChunkSide(blocks, chunk, source_q, source_k)
                target = ChunkSide(blocks, chunk, target_q, target_k)
                for rows, num_keys in blocks.rows():
                    bias = blocks.bias(chunk, rows, num_keys)
                    log_q = source.logits(rows, bias).log_softmax(-1)
                    target_logits = target.logits(rows, bias)
                    log_ratio = target_logits.log_softmax(-1).sub_(log_q)
                    divergence = log_ratio.mul_(target_logits.softmax(-1)).sum(-1)  # cheaper than exp of the log
                    out_NT[chunk, rows] = blocks.by_row(divergence).mean((1, 3))
        return out_NT.mul_(blocks.mask_NT).view(source_q.shape[:3])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        blocks: AttentionBlocks = ctx.blocks
        source_q, source_k, target_q, target_k = ctx.saved_tensors
        weight_NT = grad.flatten(0, 1) * blocks.mask_NT / (blocks.num_heads * blocks.group)
        wants = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:4])
        grads = [_empty_like(x) if wants[i // 2] else None for i, x in enumerate(ctx.saved_tensors)]
        with full_precision(grad):
            for chunk in blocks.chunks():
                source = ChunkSide(blocks, chunk, source_q, source_k)
                target = ChunkSide(blocks, chunk, target_q, target_k)
                for rows, num_keys in blocks.rows():
                    bias = blocks.bias(chunk, rows, num_keys)
                    slopes = _divergence_slopes(source.logits(rows, bias), target.logits(rows, bias), wants[1])
                    weight = blocks.row_weight(weight_NT, chunk, rows)
                    for side, slope, grad_q in zip((source, target), slopes, grads[::2], strict=True):
                        if grad_q is not None and slope is not None:
                            blocks.by_row(slope).mul_(weight)
                            side.add_gradient(slope, grad_q)
                for side, grad_k in zip((source, target), grads[1::2], strict=True):
                    if grad_k is not None:
                        side.finish(grad_k)
        return *grads, None


def _divergence_slopes(source_logits: Tensor, target_logits: Tensor, of_target: bool) -> tuple[Tensor, Tensor | None]:
    """d KL / d logits of source and target, each [N * H, R * G, S]; the target's only where it is asked for."""
    if not of_target:
        q, p = source_logits.softmax(-1), target_logits.softmax(-1)
        return q.sub_(p), None
    log_q, log_p = source_logits.log_softmax(-1), target_logits.log_softmax(-1)
    p, log_ratio = log_p.exp(), log_p - log_q
    divergence = (p * log_ratio).sum(-1, keepdim=True)
    return log_q.exp_().sub_(p), log_ratio.sub_(divergence).mul_(p)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _OutputDifference(torch.autograd.Function):
    """Mean over query heads and channels of (softmax(qk)v of the source - that of the target)^2: [L, B, T].

    The difference [L, B, T, Q, D] is kept for backward, as large as the queries; attention rows are made again.
    """

    @staticmethod
    def forward(ctx, blocks: AttentionBlocks, *sides: Tensor) -> Tensor:  # type: ignore[override]
        """sides: q, k, v of the source, q, k, v of the target."""
        q, v = sides[0], sides[2]
        difference = torch.zeros((*q.shape[:4], v.shape[4]), dtype=blocks.dtype, device=q.device)
        with full_precision(q):
            for chunk in blocks.chunks():
                pairs = [
                    (ChunkSide(blocks, chunk, q, k), blocks.head_major(v.flatten(0, 1)[chunk]))
                    for q, k, v in (sides[:3], sides[3:])
                ]
                for rows, num_keys in blocks.rows():
                    bias = blocks.bias(chunk, rows, num_keys)
                    shares = [(s.logits(rows, bias).softmax(-1)[..., :num_keys], v) for s, v in pairs]
                    read = [torch.bmm(p, v[:, :num_keys]) for p, v in shares]
                    blocks.put_rows(difference.flatten(0, 1)[chunk], rows, read[0].sub_(read[1]))
        ctx.save_for_backward(difference, *sides)
        ctx.blocks = blocks
        squared = torch.linalg.vector_norm(difference.flatten(3), dim=-1).square_()
        return squared.div_(q.shape[3] * v.shape[4]).mul_(blocks.mask_NT.view(squared.shape))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        blocks: AttentionBlocks = ctx.blocks
        difference, *sides = ctx.saved_tensors
        weight_NT = grad.flatten(0, 1) * blocks.mask_NT * (2 / difference.shape[3:].numel())
        grads: list[Tensor | None] = [None]
        for sign, first in ((1, 0), (-1, 3)):
            wants = any(ctx.needs_input_grad[1 + first : 4 + first])
            one = QKV(*sides[first : first + 3])
            grads += _output_gradients(blocks, one, difference, sign * weight_NT) if wants else [None] * 3
        return tuple(grads)


def _output_gradients(blocks: AttentionBlocks, side: QKV, difference: Tensor, weight_NT: Tensor) -> list[Tensor]:
    """Gradient of q, k and v, where that of softmax(qk)v is weight x difference."""
    q, k, v = side
    grad_q, grad_k, grad_v = (_empty_like(x) for x in (q, k, v))
    with full_precision(difference):
        for chunk in blocks.chunks():
            here, values = ChunkSide(blocks, chunk, q, k), blocks.head_major(v.flatten(0, 1)[chunk])
            grad_values = torch.empty(0)
            for rows, num_keys in blocks.rows():
                p = here.logits(rows, blocks.bias(chunk, rows, num_keys)).softmax(-1)[..., :num_keys]
                to_output = blocks.query_rows(difference.flatten(0, 1)[chunk], rows)
                weighted = (blocks.by_row(to_output) * blocks.row_weight(weight_NT, chunk, rows)).view_as(to_output)
                grad_values = add_to_keys(grad_values, torch.bmm(p.mT, weighted), values)
                to_p = torch.bmm(weighted, values[:, :num_keys].mT).mul_(p)  # d/d p, times p
                here.add_gradient(to_p.sub_(p.mul_(to_p.sum(-1, keepdim=True))), grad_q)
            here.finish(grad_k)
            blocks.put_heads(grad_v.flatten(0, 1)[chunk], grad_values)
    return [grad_q, grad_k, grad_v]


@dataclass(frozen=True, kw_only=True)
class AbstractAttentionDistance(AbstractDistance):
    """source, target `QKV` of equal shapes, mask [B, T] (or [L, B, T]) -> distance [L, B, T] in fp32 (fp64 for fp64).

    rules: of each layer, what it does with q.k; unset: what `causal` says. 0 at tokens outside the mask; finite, with
    a finite gradient, for zero vectors. Raises AlignmentError where shapes differ or do not fit. Both sides get their
    gradient. scaling: of q.k, 1 / sqrt(D) by default. causal: keys up to the token itself; False for encoders.
    """

    scaling: float | None = None
    causal: bool = True
    chunk_bytes: int = CHUNK_BYTES
    needs_queries = True
    needs_mask = True

    @abstractmethod
    def distance(self, source: QKV, target: QKV, mask: Tensor, rules: Sequence[AttentionRule] = ()) -> Tensor:
        """`__call__` without checks; what it gives outside the mask does not matter."""

    def __call__(
        self,
        source: QKV,
        target: QKV,
        mask: Bool[Tensor, "B T"] | Bool[Tensor, "L B T"],
        rules: Sequence[AttentionRule] = (),
    ) -> Float[Tensor, "L B T"]:
        for name, s, t in zip(("queries", "keys", "values"), source, target, strict=True):
            if s.shape != t.shape or s.shape[:3] != source.k.shape[:3]:
                raise AlignmentError(
                    f"attention: {name} of the source {tuple(s.shape)}, of the target {tuple(t.shape)}",
                    fix="align time, layers, heads and size of both sides first (query heads too: a row is compared "
                    "head by head)",
                )
        return torch.where(mask, self.distance(source, target, mask, rules), 0.0)


@dataclass(frozen=True)
class StructuralKVLoss(AbstractAttentionDistance):
    """k_weight (1 - cos K) + v_weight (1 - cos V) + attention_weight KL(target's attention row || source's).

    Cosines are per head, then the mean over heads; the divergence is in nats, mean over query heads.
    """

    k_weight: float = 1.0
    v_weight: float = 1.0
    attention_weight: float = 1.0

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> StructuralKVLoss:
        return cls(recipe.structural_k, recipe.structural_v, recipe.structural_attention)

    def distance(self, source: QKV, target: QKV, mask: Tensor, rules: Sequence[AttentionRule] = ()) -> Tensor:
        blocks = attention_blocks(source.q, source.k, mask, self.scaling, self.causal, self.chunk_bytes, rules)
        total = torch.zeros((), dtype=blocks.dtype, device=mask.device)
        if self.k_weight:
            total = total + self.k_weight * cosine_distance(source.k, target.k).mean(-1)
        if self.v_weight:
            total = total + self.v_weight * cosine_distance(source.v, target.v).mean(-1)
        if self.attention_weight:
            rows = _RowDivergence.apply(source.q, source.k, target.q, target.k, blocks)
            total = total + self.attention_weight * rows
        return total.expand(source.k.shape[:3])


@dataclass(frozen=True)
class AttentionOutputKVLoss(AbstractAttentionDistance):
    """Squared difference of softmax(qk)v, each side with its own q, k and v; mean over query heads and channels."""

    def distance(self, source: QKV, target: QKV, mask: Tensor, rules: Sequence[AttentionRule] = ()) -> Tensor:
        blocks = attention_blocks(source.q, source.k, mask, self.scaling, self.causal, self.chunk_bytes, rules)
        return _OutputDifference.apply(blocks, *source, *target)


@torch.no_grad()
def answer_attention(
    query: Float[Tensor, "L B T Q D"],
    key: Float[Tensor, "L B T H D"],
    answer_BT: Bool[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    scaling: float | None = None,
    causal: bool = True,
    rules: Sequence[AttentionRule] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "L B T"]:
    """The attention that answer tokens pay to each token, mean over answer tokens and query heads, as weights.

    query, key: as attention sees them (rotated, for models with rotary positions). rules: of each layer, where
    `causal` does not say all. answer_BT: the tokens that look;
    those outside `mask_BT` do not count. Weights have mean 1 over the real tokens of each sample and layer, are 0
    elsewhere, and 1 throughout where a sample has no answer token. No gradient; float32 at least.
    """
    if answer_BT.shape != mask_BT.shape:
        raise AlignmentError(f"answer tokens {tuple(answer_BT.shape)}, mask {tuple(mask_BT.shape)}")
    blocks = attention_blocks(query, key, mask_BT, scaling, causal, chunk_bytes, rules)
    looks_NT = (answer_BT & mask_BT).expand(key.shape[:3]).flatten(0, 1).to(blocks.dtype)
    has_answer = (answer_BT & mask_BT).any(0).tolist()
    paid_NT = torch.zeros_like(looks_NT)
    with full_precision(query):
        for chunk in blocks.chunks():
            side = ChunkSide(blocks, chunk, query, key)
            for rows, num_keys in blocks.rows():
                if any(has_answer[rows]):  # answers stand at the end: most blocks hold none
                    p = side.logits(rows, blocks.bias(chunk, rows, num_keys)).softmax(-1)[..., :num_keys]
                    share = looks_NT[chunk, None, rows, None].expand(-1, blocks.num_heads, -1, blocks.group)
                    per_head = torch.bmm(share.reshape(len(p), 1, -1), p)
                    paid_NT[chunk, :num_keys] += per_head.view(-1, blocks.num_heads, num_keys).sum(1)
    return normalise_token_weights(paid_NT.view(key.shape[:3]), mask_BT)


def normalise_token_weights(
    weight_LBT: Float[Tensor, "L B T"], mask: Bool[Tensor, "B T"] | Bool[Tensor, "L B T"]
) -> Float[Tensor, "L B T"]:
    """Scaled to mean 1 over the real tokens of each sample and layer; 0 elsewhere; 1 where all weights are 0.

    For weights that were brought to other tokens (a time map) after `answer_attention`. mask: True at the tokens that
    take part, [B, T], or [L, B, T] where layers keep different tokens (r-kv).
    """
    weight_LBT = torch.where(mask, weight_LBT, 0.0)
    total_LB1 = weight_LBT.sum(-1, keepdim=True)
    count = mask.sum(-1, keepdim=True)
    scaled_LBT = weight_LBT * (count / total_LB1)
    return torch.where(total_LB1 > 0, scaled_LBT, mask.to(weight_LBT.dtype))
