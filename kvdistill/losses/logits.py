"""Terms on the student's predictions: cross entropy, and distillation of a teacher's most probable tokens.

Supervised positions are selected before anything is made of them: no [B, T, V] float32 tensor is written. Where the
head ran on them alone, logits come as [1, N, V], row by row (`predicting_rows`). Does not know models; what a teacher
gives arrives as indices and log-probabilities.

Axes: B batch, T tokens, V vocabulary, K kept teacher logits, N selected positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvdistill.core.runtime import sum_dtype
from kvdistill.losses.base import at_least_one, token_weight


def prediction_mask(label_mask_BT: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at positions whose *next* token is a label: where logits are compared. The last is False."""
    return F.pad(label_mask_BT[:, 1:], (0, 1), value=False)


def predicting_rows(logits: Float[Tensor, "_ _ V"], positions_BT: Bool[Tensor, "B T"]) -> Int[Tensor, " N"]:
    """Where the logits of the N True positions stand among all rows of [B, T, V], or of [1, N, V] of these alone."""
    if logits.shape[:2] == positions_BT.shape:
        return positions_BT.flatten().nonzero().squeeze(1)
    return torch.arange(logits.shape[1], device=logits.device)  # the last position predicts nothing: N < T where B is 1


def cross_entropy(
    logits: Float[Tensor, "_ _ V"],
    input_ids_BT: Int[Tensor, "B T"],
    label_mask_BT: Bool[Tensor, "B T"],
    num_tokens: int | float | Float[Tensor, ""] | Int[Tensor, ""],
) -> Float[Tensor, ""]:
    """-sum over labels of log p(token t | tokens before t), divided by `num_tokens`, in fp32.

    label_mask_BT: True at tokens that are to be predicted (reasoning and answer, say); the token itself is
    the label and position t - 1 predicts it, so column 0 is never one. Supervised positions are selected
    before the upcast: no [B, T, V] fp32 tensor is made. logits: [B, T, V], or [1, N, V] of the positions that predict
    a label. num_tokens: labels in the whole optimiser step.
    """
    positions = prediction_mask(label_mask_BT)
    labels = input_ids_BT.roll(-1, dims=1)[positions]
    # by number, not by mask: backward then makes one [B * T, V] gradient instead of two
    chosen = logits.flatten(0, 1).index_select(0, predicting_rows(logits, positions))
    total = F.cross_entropy(chosen.to(sum_dtype(chosen)), labels.long(), reduction="sum")
    return total / at_least_one(num_tokens)


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
        divergence = divergence * token_weight(weight_B).expand(mask_BT.shape)[mask_BT]
    return divergence.sum() / at_least_one(num_tokens)


def logit_divergence(
    student_logits: Float[Tensor, "_ _ V"],
    topk_index_BTK: Int[Tensor, "B T K"],
    topk_logprob_BTK: Float[Tensor, "B T K"],
    mask_BT: Bool[Tensor, "B T"],
    temperature: int | float,
) -> Float[Tensor, "N"]:
    """temperature^2 * KL(teacher || student) at each of the N positions of `mask_BT`, row by row.

    The classes are those of `logit_distillation`. student_logits: [B, T, V], or [1, N, V] of these positions alone.
    """
    places_N = mask_BT.flatten().nonzero().squeeze(1)
    index_NK = topk_index_BTK.flatten(0, 1)[places_N].long()
    teacher = topk_logprob_BTK.detach().flatten(0, 1)[places_N]
    rows_N = predicting_rows(student_logits, mask_BT)
    student_classes, rest_N1 = TopAndRest.apply(student_logits.flatten(0, 1), rows_N, index_NK)
    has_rest = index_NK.shape[-1] < student_logits.shape[-1]
    teacher_classes = teacher.to(student_classes.dtype)
    return class_divergence(student_classes, teacher_classes, rest_N1 if has_rest else None, temperature)


def class_divergence(
    student_NK: Float[Tensor, "N K"],
    teacher_NK: Float[Tensor, "N K"],
    rest_N1: Float[Tensor, "N 1"] | None,
    temperature: int | float,
) -> Float[Tensor, " N"]:
    """temperature^2 * KL(teacher || student) over K classes and, with the student's `rest_N1`, one of all the rest.

    student: logits or log-probabilities. teacher: log-probabilities, at temperature 1; its rest is what they leave.
    A class at -inf on both sides is none.
    """
    if rest_N1 is not None:
        student_NK = torch.cat([student_NK, rest_N1], dim=-1)
        teacher_NK = torch.cat([teacher_NK, log_left(teacher_NK)], dim=-1)
    log_q = (student_NK / temperature).log_softmax(-1)
    log_p = (teacher_NK / temperature).log_softmax(-1)
    p = log_p.exp()
    return temperature**2 * torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0, not NaN


def log_left(logprob_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N 1"]:
    """Logarithm of the probability that K classes leave; rounding may leave nothing: no NaN."""
    left_N1 = 1 - logprob_NK.exp().sum(-1, keepdim=True)
    return left_N1.clamp_min(torch.finfo(left_N1.dtype).tiny).log()


class TopAndRest(torch.autograd.Function):
    """Student logits of the teacher's K tokens [N, K], and logsumexp over all the others [N, 1].

    The others are summed up as they are, not as 1 - sum of the K: their mass may be 1e-8, which fp32 cannot
    see beside 1. A token may be named in several columns, if all but one of them get no gradient. One [N, V] tensor
    is kept for backward; autograd's own way keeps two and takes twice as long.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, places_N: Tensor, index_NK: Tensor):  # type: ignore[override]
        chosen_NV = logits.index_select(0, places_N).to(sum_dtype(logits))
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
        slope_NV = chosen_NV.sub(rest_N1).exp_().mul_(grad_rest_N1).scatter_(-1, index_NK, 0.0)
        slope_NV = slope_NV.scatter_add_(-1, index_NK, grad_top_NK)
        grad = slope_NV.new_zeros(ctx.shape, dtype=ctx.dtype)
        return grad.index_copy_(0, places_N, slope_NV.to(ctx.dtype)), None, None
