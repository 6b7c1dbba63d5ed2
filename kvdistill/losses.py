"""The terms of the loss: KV distances, cross entropy and logit distillation, each stating its reduction.

A KV distance takes source and target of shape [..., tokens, channels] and gives one number a token; the
mask, the routing weights and the division by the number of tokens come after it (`masked_token_mean`), so
that a new distance is one small class. Every term is divided by a token count *given from outside*: the
count over the whole optimiser step (all micro-batches, all ranks). The sum over micro-batches is then the
same number however the batch is split.

    distance = build_distance(recipe.loss)
    loss = masked_token_mean(distance(source_LBTC, target_LBTC), mask_BT, weight_B, num_tokens)

What a padded slot holds must be finite; its value does not matter. A NaN there is a fault of the forward
pass and shows in the term instead of being hidden.

Does not know models, teachers, segments or recipes beyond `LossRecipe`. Nothing is detached here: teacher
targets arrive without a graph (capture runs under no_grad), and a target that does carry one (a trainable
projector in student space) gets its gradient.

Axes: L layers, B batch, T tokens, C channels (heads flattened), V vocabulary, K kept teacher logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvdistill.core.recipe import LossRecipe
from kvdistill.core.runtime import AlignmentError, RecipeError

# Added to the mean square of a vector before its norm is used: a norm never falls below 1e-4 a channel, so
# that direction and log-norm of a zero vector have a value and a gradient. Keys and values are 1e-2 and up.
NORM_FLOOR_SQUARED = 1e-8


class _MeanSquare(torch.autograd.Function):
    """mean over C of (source - target)^2, keeping only the difference for the backward pass.

    The norm kernel reads the difference once and writes no [..., C] square; backward is one product.
    Two to five times faster than `((s - t) ** 2).mean(-1)` on a CPU, forward and backward together.
    """

    @staticmethod
    def forward(ctx, source: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        dtype = _accumulation_dtype(source, target)
        difference = source.to(dtype) - target.to(dtype)
        ctx.save_for_backward(difference)
        ctx.dtypes = source.dtype, target.dtype
        return torch.linalg.vector_norm(difference, dim=-1).square_().div_(difference.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        slope = difference * (grad * (2 / difference.shape[-1])).unsqueeze(-1)
        source_dtype, target_dtype = ctx.dtypes
        to_source = slope.to(source_dtype) if ctx.needs_input_grad[0] else None
        return to_source, slope.neg().to(target_dtype) if ctx.needs_input_grad[1] else None


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 at least; float64 stays float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _channel_mean(per_channel: Tensor) -> Tensor:
    """mean(-1) as sum / C: backward of the sum is a view, backward of the mean writes a [..., C] tensor."""
    return per_channel.sum(-1) / per_channel.shape[-1]


# -- distances a token ------------------------------------------------------------------------


class AbstractKVDistance(ABC):
    """source, target [..., T, C] -> distance [..., T] in fp32 (fp64 for fp64 inputs).

    Finite, with a finite gradient, for zero vectors. Raises AlignmentError where the shapes differ.
    """

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: LossRecipe) -> AbstractKVDistance:
        """The distance with the settings of `recipe`."""

    @abstractmethod
    def _distance(self, source: Tensor, target: Tensor) -> Tensor: ...

    def __call__(
        self, source: Float[Tensor, "*lead T C"], target: Float[Tensor, "*lead T C"]
    ) -> Float[Tensor, "*lead T"]:
        if source.shape != target.shape:
            raise AlignmentError(
                f"KV distance: source {tuple(source.shape)} and target {tuple(target.shape)}",
                fix="align time, layers and channels first: both are [..., tokens, channels] of one shape",
            )
        return self._distance(source, target)


@dataclass(frozen=True)
class MSEKVLoss(AbstractKVDistance):
    """Squared difference, mean over channels."""

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> MSEKVLoss:
        return cls()

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        return _MeanSquare.apply(source, target)


@dataclass(frozen=True)
class SmoothL1KVLoss(AbstractKVDistance):
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2; mean over channels."""

    beta: float = 1.0

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> SmoothL1KVLoss:
        return cls(beta=recipe.smooth_l1_beta)

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        dtype = _accumulation_dtype(source, target)
        return _channel_mean(F.smooth_l1_loss(source.to(dtype), target.to(dtype), reduction="none", beta=self.beta))


@dataclass(frozen=True)
class L1KVLoss(AbstractKVDistance):
    """|d|, mean over channels; gradient 0 where d is 0."""

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> L1KVLoss:
        return cls()

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        dtype = _accumulation_dtype(source, target)
        return _channel_mean(F.l1_loss(source.to(dtype), target.to(dtype), reduction="none"))


@dataclass(frozen=True)
class MercatorKVLoss(AbstractKVDistance):
    """alpha (1 - cos(s, t)) + beta (log|s| - log|t|)^2 on each token's vector of C channels.

    Direction and size apart: cosine alone leaves the size free, MSE alone lets large vectors rule.
    |x| is sqrt(sum x^2 + 1e-8 C), so that a zero vector has cosine 0 and a finite log-norm.
    """

    alpha: float = 1.0
    beta: float = 0.1

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> MercatorKVLoss:
        return cls(alpha=recipe.mercator_alpha, beta=recipe.mercator_beta)

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        dtype = _accumulation_dtype(source, target)
        source, target = source.to(dtype), target.to(dtype)
        # Three products and their sums: a quarter of the time of F.cosine_similarity and two norms.
        source_square = _channel_mean(source * source) + NORM_FLOOR_SQUARED
        target_square = _channel_mean(target * target) + NORM_FLOOR_SQUARED
        # two roots, not the root of the product: 1e-16 is a subnormal away from what fp32 holds
        cosine = _channel_mean(source * target) * source_square.rsqrt() * target_square.rsqrt()
        log_ratio = 0.5 * (source_square.log() - target_square.log())
        return self.alpha * (1 - cosine) + self.beta * log_ratio * log_ratio


@dataclass(frozen=True)
class HybridKVLoss(AbstractKVDistance):
    """share * MSE + (1 - share) * Mercator."""

    share: float = 0.5
    mercator: MercatorKVLoss = MercatorKVLoss()

    @classmethod
    def from_recipe(cls, recipe: LossRecipe) -> HybridKVLoss:
        return cls(share=recipe.hybrid_share, mercator=MercatorKVLoss.from_recipe(recipe))

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        squared = _MeanSquare.apply(source, target)
        return self.share * squared + (1 - self.share) * self.mercator(source, target)


KV_DISTANCES: dict[str, type[AbstractKVDistance]] = {
    "mse": MSEKVLoss,
    "smooth_l1": SmoothL1KVLoss,
    "l1": L1KVLoss,
    "mercator": MercatorKVLoss,
    "hybrid": HybridKVLoss,
}


def build_distance(recipe: LossRecipe) -> AbstractKVDistance:
    """The distance `loss.kind` names, with its settings from the recipe."""
    if recipe.kind not in KV_DISTANCES:
        raise RecipeError(
            f"unknown distance {recipe.kind!r}", place="loss.kind", fix=f"one of {', '.join(KV_DISTANCES)}"
        )
    return KV_DISTANCES[recipe.kind].from_recipe(recipe)


# -- from tokens to one number ----------------------------------------------------------------


def _at_least_one(num_tokens: int | float | Tensor) -> int | float | Tensor:
    """A step without any token has loss 0, not 0 / 0."""
    return num_tokens.clamp_min(1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)


def _token_weight(weight: Tensor) -> Tensor:
    """[B] -> [B, 1]; the other shapes broadcast against [L, B, T] as they are."""
    return weight[:, None] if weight.ndim == 1 else weight


def masked_token_mean(
    distance_LBT: Float[Tensor, "L B T"],
    mask: Bool[Tensor, "B T"] | Bool[Tensor, "L B T"],
    weight: Float[Tensor, "B"] | Float[Tensor, "#B #T"] | Float[Tensor, "#L #B #T"] | None,
    num_tokens: int | float | Float[Tensor, ""] | Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """sum over real tokens of weight * distance, mean over layers, divided by `num_tokens`.

    mask: True at the tokens that take part. weight: per example, token or layer (`Fusion.weights(...)[n]`
    fits), None: 1. num_tokens: number of real tokens in the whole optimiser step, over accumulation and
    ranks; then the terms of all micro-batches add up to the mean over the step's tokens, however it is
    split. With a mask per layer it is the mean count over layers. Weights are not in the divisor: a teacher
    with weight .2 contributes .2 of its mean distance.
    """
    share = mask.to(distance_LBT.dtype)
    if weight is not None:
        share = share * _token_weight(weight)
    return (distance_LBT * share).sum() / distance_LBT.shape[0] / _at_least_one(num_tokens)


def prediction_mask(label_mask_BT: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at positions whose *next* token is a label: where logits are compared. The last is False."""
    return F.pad(label_mask_BT[:, 1:], (0, 1), value=False)


def cross_entropy(
    logits_BTV: Float[Tensor, "B T V"],
    input_ids_BT: Int[Tensor, "B T"],
    label_mask_BT: Bool[Tensor, "B T"],
    num_tokens: int | float | Float[Tensor, ""] | Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """-sum over labels of log p(token t | tokens before t), divided by `num_tokens`, in fp32.

    label_mask_BT: True at tokens that are to be predicted (reasoning and answer, say); the token itself is
    the label and position t - 1 predicts it, so column 0 is never one. Supervised positions are selected
    before the upcast: no [B, T, V] fp32 tensor is made. num_tokens: labels in the whole optimiser step.
    """
    positions = prediction_mask(label_mask_BT)
    labels = input_ids_BT.roll(-1, dims=1)[positions]
    # by number, not by mask: backward then makes one [B * T, V] gradient instead of two
    chosen = logits_BTV.flatten(0, 1).index_select(0, positions.flatten().nonzero().squeeze(1))
    total = F.cross_entropy(chosen.to(_accumulation_dtype(chosen)), labels.long(), reduction="sum")
    return total / _at_least_one(num_tokens)


def logit_distillation(
    student_logits_BTV: Float[Tensor, "B T V"],
    topk_index_BTK: Int[Tensor, "B T K"],
    topk_logprob_BTK: Float[Tensor, "B T K"],
    mask_BT: Bool[Tensor, "B T"],
    weight_B: Float[Tensor, "B"] | Float[Tensor, "#B #T"] | None,
    temperature: int | float,
    num_tokens: int | float | Float[Tensor, ""] | Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """temperature^2 * KL(teacher || student), summed over `mask_BT` with weights, divided by `num_tokens`.

    The teacher's distribution at a position is its K most probable tokens (index, log-probability at
    temperature 1) and one class for all the rest; the student's is summed up in the same way. With K = V
    there is no rest and this is Hinton, Vinyals & Dean 2015 (eq. 4 and the T^2 of section 2) exactly. With
    K < V the temperature is applied to the K + 1 classes of both sides, since the teacher's rest is known
    at temperature 1 only: at temperature 1 a lower bound of the full KL (data processing), at others a
    distillation of the summed-up distribution.

    mask_BT: positions where predictions are compared (`prediction_mask` of the labels). Gradient to the
    student only. fp32 on the selected positions.
    """
    divergence = logit_divergence(student_logits_BTV, topk_index_BTK, topk_logprob_BTK, mask_BT, temperature)
    if weight_B is not None:
        divergence = divergence * _token_weight(weight_B).expand(mask_BT.shape)[mask_BT]
    return divergence.sum() / _at_least_one(num_tokens)


def logit_divergence(
    student_logits_BTV: Float[Tensor, "B T V"],
    topk_index_BTK: Int[Tensor, "B T K"],
    topk_logprob_BTK: Float[Tensor, "B T K"],
    mask_BT: Bool[Tensor, "B T"],
    temperature: int | float,
) -> Float[Tensor, "N"]:
    """temperature^2 * KL(teacher || student) at each of the N positions of `mask_BT`, row by row.

    The classes are those of `logit_distillation`.
    """
    places_N = mask_BT.flatten().nonzero().squeeze(1)
    index_NK = topk_index_BTK.flatten(0, 1)[places_N].long()
    teacher = topk_logprob_BTK.detach().flatten(0, 1)[places_N]
    student_classes, rest_N1 = _TopAndRest.apply(student_logits_BTV.flatten(0, 1), places_N, index_NK)
    teacher_classes = teacher.to(student_classes.dtype)
    if index_NK.shape[-1] < student_logits_BTV.shape[-1]:
        student_classes = torch.cat([student_classes, rest_N1], dim=-1)
        teacher_classes = torch.cat([teacher_classes, _log_rest(teacher_classes)], dim=-1)
    log_q = (student_classes / temperature).log_softmax(-1)
    log_p = (teacher_classes / temperature).log_softmax(-1)
    p = log_p.exp()
    return temperature**2 * torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0, not NaN


def _log_rest(logprob_NK: Tensor) -> Tensor:
    """log(1 - sum of the K probabilities) [N, 1]; where rounding leaves nothing, a log of 1e-38, not NaN."""
    rest_N1 = 1 - logprob_NK.exp().sum(-1, keepdim=True)
    return rest_N1.clamp_min(torch.finfo(rest_N1.dtype).tiny).log()


class _TopAndRest(torch.autograd.Function):
    """Student logits of the teacher's K tokens [N, K], and logsumexp over all the others [N, 1].

    The others are summed up as they are, not as 1 - sum of the K: their mass may be 1e-8, which fp32 cannot
    see beside 1. One [N, V] tensor is kept for backward; autograd's own way keeps two and takes twice as long.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, places_N: Tensor, index_NK: Tensor):  # type: ignore[override]
        chosen_NV = logits.index_select(0, places_N).to(_accumulation_dtype(logits))
        top_NK = chosen_NV.gather(-1, index_NK)
        chosen_NV.scatter_(-1, index_NK, float("-inf"))
        rest_N1 = chosen_NV.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(chosen_NV, rest_N1, places_N, index_NK)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return top_NK, rest_N1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_top_NK: Tensor, grad_rest_N1: Tensor):  # type: ignore[override]
        chosen_NV, rest_N1, places_N, index_NK = ctx.saved_tensors
        # with K = V the rest is empty and its slope NaN, but every entry is then overwritten
        slope_NV = chosen_NV.sub(rest_N1).exp_().mul_(grad_rest_N1).scatter_(-1, index_NK, grad_top_NK)
        grad = slope_NV.new_zeros(ctx.shape, dtype=ctx.dtype)
        return grad.index_copy_(0, places_N, slope_NV.to(ctx.dtype)), None, None


def kv_weight_at(step: int, total_steps: int, kv_weight: int | float, kv_warmup: int | float) -> float:
    """Weight of the KV term in optimiser step `step` (from 0): a linear rise to `kv_weight`, then constant.

    kv_warmup: below 1 a share of `total_steps`, else a number of steps; 0: no rise. With w warm-up steps
    the weight is kv_weight * (step + 1) / w, full from step w - 1 on, and never 0 while kv_weight is not.
    """
    warm_steps = kv_warmup * total_steps if kv_warmup < 1 else kv_warmup
    return kv_weight * min(1.0, (step + 1) / warm_steps) if warm_steps > 0 else kv_weight
