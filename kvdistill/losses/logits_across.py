"""Logit distillation from a teacher with another tokenizer, on the chunks of their common text (`chunks.py`).

spans   At the beginning of a chunk both have read the same text, so the teacher's distribution there can be told in the
        student's pieces: every teacher piece is written as the student would, longest piece first (` the` as ` the`
        where the student has it, `35` as `3` and `5` where it does not), and every student piece that the teacher has
        not counts as the longest one of both that begins it.
        * A chunk that is one token of the teacher's: at each of the student's tokens in it, KL over what the teacher's
          pieces go on with, given those that begin with what is written already (at the first: over all of them, and
          the rest). With one tokenizer that is plain distillation (`logits.py`), number by number.
        * A chunk of several tokens of the teacher's: one KL, over the chunk itself (each side the product of its own
          tokens' probabilities, by the chain rule), over what else may come first, and the rest.
sorted  ULD (Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss"): sum of
        |p - q| over probabilities sorted by size, whatever the pieces say, at the beginning of each chunk (there: at
        equal numbers of tokens from the left).
hybrid  spans, and `sorted` over the pieces without a counterpart on either side (as TRL's GOLD adds it).

What is approximate: of the teacher K log-probabilities a position are known, so what they leave is one class, and is
left out within a chunk. A token of the text that is not among the K counts as the less likely of "all the rest" and
"the K-th", an upper bound. And each model may write one text in other pieces than its tokenizer does; these are taken
for what their first piece says.

Axes as in `logits.py`; S teacher tokens, C chunks, L student pieces of a teacher piece, N terms.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kvdistill.core.runtime import sum_dtype
from kvdistill.losses.chunks import TextChunks
from kvdistill.losses.logits import TopAndRest, class_divergence, log_left, predicting_rows

Form = Literal["spans", "sorted", "hybrid"]
_BLOCK_ELEMENTS = 1 << 22  # logits looked at together where pieces fold


class ChunkTerms(NamedTuple):
    """N divergences, and the student's token (example, place) that predicts what each is about."""

    divergence_N: Tensor
    row_N: Tensor
    place_N: Tensor


def chunk_divergence(
    student_logits: Float[Tensor, "_ _ V"],
    predicts_BT: Bool[Tensor, "B T"],
    input_ids_BT: Int[Tensor, "B T"],
    topk_index_BSK: Int[Tensor, "B S K"],
    topk_logprob_BSK: Float[Tensor, "B S K"],
    chunks: TextChunks,
    form: Form,
    temperature: int | float,
) -> ChunkTerms:
    """How far the student is from the teacher on these chunks; gradient to the student only.

    predicts_BT: where student logits are (`prediction_mask`); the chunks' own tokens are labels of such positions.
    Divided by the number of labels a sum over all terms is a mean per token, as with one tokenizer: the KL of a chunk
    is that of all its tokens. temperature: as in `logit_distillation`; the sorted part of `hybrid` knows none.
    """
    flat, row_C, first_C = student_logits.flatten(0, 1), chunks.row_C, chunks.mine_C2[:, 0]
    rows_BT = torch.full(predicts_BT.shape, -1, dtype=torch.int64, device=flat.device)
    rows_BT[predicts_BT] = predicting_rows(student_logits, predicts_BT)
    index_CK, logprob_CK = (x.detach()[row_C, chunks.theirs_C2[:, 0] - 1] for x in (topk_index_BSK, topk_logprob_BSK))
    index_CK, logprob_CK = index_CK.long(), logprob_CK.to(sum_dtype(flat))
    begin_C = rows_BT[row_C, first_C - 1]
    if form == "sorted":
        whole = logprob_CK.shape[1] >= len(chunks.written_VL)
        found = _sorted_distance(flat, begin_C, logprob_CK, whole, temperature)
        return ChunkTerms(found, row_C, first_C - 1)
    folds_V = torch.full((flat.shape[1],), -1, dtype=torch.int64, device=flat.device)
    folds_V[: len(chunks.folds_V)] = chunks.folds_V  # a head may have rows beyond its tokenizer
    step = _Step(flat, folds_V, temperature)
    one_C = chunks.theirs_C2[:, 0] == chunks.theirs_C2[:, 1]
    alone, merged = one_C.nonzero().squeeze(1), (~one_C).nonzero().squeeze(1)
    of_single = _single_terms(step, rows_BT, input_ids_BT, index_CK, logprob_CK, chunks, alone)
    of_merged = _merged_terms(
        step, rows_BT, input_ids_BT, topk_index_BSK, topk_logprob_BSK, index_CK, logprob_CK, chunks, merged
    )
    parts = [part for part in (of_single, of_merged) if part is not None]
    if form == "hybrid":
        known_CK = _pieces(chunks.written_VL, index_CK)[:, :, 0]
        own = _unmatched_distance(flat, begin_C, known_CK, logprob_CK, chunks)
        parts.append(ChunkTerms(own, row_C, first_C - 1))
    if not parts:
        return ChunkTerms(flat.new_zeros(0), row_C, first_C)
    return parts[0] if len(parts) == 1 else ChunkTerms(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def each_token(predicts_BT: Bool[Tensor, "B T"], input_ids_BT: Int[Tensor, "B T"], vocabulary: int) -> TextChunks:
    """The chunks of a teacher that reads the student's own tokens: every predicted token is one."""
    row_C, before_C = predicts_BT.nonzero(as_tuple=True)
    both_C2 = (before_C + 1)[:, None].expand(-1, 2)
    same_V = torch.arange(vocabulary, device=predicts_BT.device)
    return TextChunks(row_C, both_C2, both_C2, input_ids_BT, same_V[:, None], same_V)


# -- terms --------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """What every term needs: the student's logits by row, which of its pieces count as which, the temperature."""

    flat: Tensor
    folds_V: Tensor
    temperature: float

    def divergence(
        self, rows_N: Tensor, class_NK: Tensor, logprob_NK: Tensor, chunk: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """KL over the student's pieces `class_NK` (-1: none; a piece may stand in several columns) and the rest.

        chunk: of each row the piece that the student's chunk begins with, the log-probability of what of its chunk
        follows that, and the teacher's log-probability of the chunk: a class of its own.
        """
        class_NK, logprob_NK = _gathered(class_NK, logprob_NK)
        valid_NK = class_NK >= 0
        own_V = torch.arange(len(self.folds_V), device=self.folds_V.device)
        folds = bool(((self.folds_V >= 0) & (self.folds_V != own_V)).any())
        if chunk is None and not folds:
            return self._plain(rows_N, class_NK, logprob_NK, valid_NK)
        gold_N = class_NK.new_zeros(len(class_NK)) if chunk is None else chunk[0]
        # as a single piece it stands for what begins like the chunk and is another text
        stays_N = torch.ones_like(logprob_NK[:, 0]) if chunk is None else -chunk[1].expm1()
        log_NK, rest_N1, log_gold_N = _FoldedClasses.apply(
            self.flat, rows_N, class_NK, torch.where(self.folds_V < 0, own_V, self.folds_V), gold_N, stays_N
        )
        mine_NK = log_NK.masked_fill(~valid_NK, -torch.inf)
        if chunk is not None:
            mine_NK = torch.cat([mine_NK, (log_gold_N + chunk[1])[:, None]], dim=1)
            logprob_NK = torch.cat([logprob_NK, chunk[2][:, None]], dim=1)
        return class_divergence(mine_NK, logprob_NK, rest_N1, self.temperature)

    def _plain(self, rows_N: Tensor, class_NK: Tensor, logprob_NK: Tensor, valid_NK: Tensor) -> Tensor:
        """Where every piece of the student's is for itself: nothing is summed but the rest."""
        all_known, some_N1 = bool(valid_NK.all()), valid_NK.any(1, keepdim=True)
        # a column that is nobody's names a token that is a class anyway, so that nothing is taken from the rest
        spare_N1 = class_NK.gather(1, valid_NK.to(torch.uint8).argmax(1, keepdim=True)).clamp_min(0)
        top_NK, rest_N1 = TopAndRest.apply(self.flat, rows_N, torch.where(valid_NK, class_NK, spare_N1))
        has_rest = not (all_known and class_NK.shape[1] == self.flat.shape[1])
        top_NK = top_NK if all_known else top_NK.masked_fill(~valid_NK, -torch.inf)
        found_N = class_divergence(top_NK, logprob_NK, rest_N1 if has_rest else None, self.temperature)
        return found_N if all_known else torch.where(some_N1.squeeze(1), found_N, 0.0)


class _FoldedClasses(torch.autograd.Function):
    """log of the student's probability of each class [N, K], of the rest [N, 1], and of one piece `gold` [N].

    A piece counts as the class that it is itself, else as the one that it folds to, else as rest; `gold` with the part
    `stays` of its probability. A block of rows at a time, forward and backward: of what is as large as the vocabulary
    nothing is kept, and only the gradient is as large as the logits.
    """

    @staticmethod
    def forward(ctx, flat, rows_N, class_NK, folds_V, gold_N, stays_N):  # type: ignore[no-untyped-def, override]
        (N, K), kind = class_NK.shape, sum_dtype(flat)
        q_NK1, log_gold_N = (flat.new_empty(size, dtype=kind) for size in ((N, K + 1), (N,)))
        for part in _blocks(N, flat.shape[1]):
            log_q = flat.index_select(0, rows_N[part]).to(kind).log_softmax(-1)
            log_gold_N[part] = log_q.gather(1, gold_N[part, None]).squeeze(1)
            q = log_q.exp_()
            q.scatter_(1, gold_N[part, None], q.gather(1, gold_N[part, None]) * stays_N[part, None])
            q_NK1[part] = q.new_zeros(len(q), K + 1).scatter_add_(1, _columns(class_NK[part], folds_V), q)
        q_NK1.clamp_min_(torch.finfo(kind).tiny)
        ctx.save_for_backward(flat, rows_N, class_NK, folds_V, gold_N, stays_N, q_NK1)
        log_NK, rest_N1 = q_NK1.log().split([K, 1], dim=1)
        return log_NK, rest_N1, log_gold_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NK, grad_rest_N1, grad_gold_N):  # type: ignore[no-untyped-def, override]
        flat, rows_N, class_NK, folds_V, gold_N, stays_N, q_NK1 = ctx.saved_tensors
        grad_NK1 = torch.cat([grad_NK, grad_rest_N1], dim=1)
        per_q_NK1, total_N1 = grad_NK1 / q_NK1, grad_NK1.sum(1, keepdim=True) + grad_gold_N[:, None]
        grad, grad_stays_N = torch.zeros_like(flat), torch.empty_like(stays_N)
        for part in _blocks(len(class_NK), flat.shape[1]):
            q, gold = flat.index_select(0, rows_N[part]).to(q_NK1.dtype).softmax(-1), gold_N[part, None]
            slope = per_q_NK1[part].gather(1, _columns(class_NK[part], folds_V))
            grad_stays_N[part] = (q * slope).gather(1, gold).squeeze(1)
            slope.scatter_(1, gold, slope.gather(1, gold) * stays_N[part, None])
            slope = slope.sub_(total_N1[part]).mul_(q)
            slope.scatter_add_(1, gold, grad_gold_N[part, None])
            grad.index_add_(0, rows_N[part], slope.to(grad.dtype))
        return grad, None, None, None, None, grad_stays_N


def _blocks(num_rows: int, width: int) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // width)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _columns(class_NK: Tensor, folds_V: Tensor) -> Tensor:
    """For every piece of the vocabulary the column of its class [N, V]; K for the rest. folds_V: itself for none."""
    (N, K), V = class_NK.shape, len(folds_V)
    column_NV = class_NK.new_full((N, V + 1), K)  # and a place behind it, for columns that are nobody's
    places = torch.arange(K, device=class_NK.device).expand(N, K)
    column_NV.scatter_(1, torch.where(class_NK >= 0, class_NK, V), places)
    column_NV = column_NV[:, :V]
    return torch.where(column_NV < K, column_NV, column_NV[:, folds_V])


def _single_terms(
    step: _Step, rows_BT: Tensor, ids_BT: Tensor, index_CK: Tensor, logprob_CK: Tensor, chunks: TextChunks, here: Tensor
) -> ChunkTerms | None:
    """Chunks of one teacher token: a term for each of the student's tokens in them, of which anything is known."""
    if not len(here):
        return None
    row_C, mine_C2, index_CK, logprob_CK = chunks.row_C[here], chunks.mine_C2[here], index_CK[here], logprob_CK[here]
    owner_N, row_N, place_N = _tokens_of(row_C, mine_C2, 0)
    offset_N = place_N - mine_C2[owner_N, 0]
    written_CKL, mine_CL = _beside(chunks, index_CK, ids_BT, row_C, mine_C2)
    gold_CK = index_CK == chunks.ids_BS[row_C, chunks.theirs_C2[here, 0]][:, None]
    written_CKL = torch.where(gold_CK[:, :, None], mine_CL[:, None].clamp_min(-1), written_CKL)  # as it is written
    agrees_CKL = (written_CKL == mine_CL[:, None]).cumprod(-1).bool()
    agrees_CKL = torch.cat([torch.ones_like(agrees_CKL[:, :, :1]), agrees_CKL[:, :, :-1]], dim=-1)  # before, not with
    class_NK = written_CKL[owner_N, :, offset_N].masked_fill(~agrees_CKL[owner_N, :, offset_N], -1)
    logprob_NK = logprob_CK[owner_N]
    within_N1 = (offset_N > 0)[:, None]
    known_N1 = logprob_NK.masked_fill(class_NK < 0, -torch.inf).logsumexp(1, keepdim=True)
    logprob_NK = torch.where(
        within_N1 & known_N1.isfinite(), logprob_NK - known_N1, logprob_NK
    )  # given what is written
    found_N = step.divergence(rows_BT[row_N, place_N - 1], class_NK, logprob_NK)
    known_N = (class_NK >= 0).any(1)
    found_N = found_N if bool(known_N.all()) else torch.where(known_N, found_N, 0.0)
    return ChunkTerms(found_N, row_N, place_N - 1)


def _merged_terms(
    step: _Step, rows_BT: Tensor, ids_BT: Tensor, index_BSK: Tensor, logprob_BSK: Tensor,
    index_CK: Tensor, logprob_CK: Tensor, chunks: TextChunks, here: Tensor,
) -> ChunkTerms | None:  # fmt: skip
    """Chunks of several teacher tokens: the chunk by the chain rule, what else may come first, and the rest."""
    if not len(here):
        return None
    row_C, mine_C2, theirs_C2 = chunks.row_C[here], chunks.mine_C2[here], chunks.theirs_C2[here]
    index_CK, logprob_CK = index_CK[here], logprob_CK[here]
    owner_M, row_M, place_M = _tokens_of(row_C, theirs_C2, 0)
    index_MK, logprob_MK = index_BSK[row_M, place_M - 1], logprob_BSK.detach()[row_M, place_M - 1].to(logprob_CK)
    hit_MK = index_MK == chunks.ids_BS[row_M, place_M][:, None]
    known_M = torch.where(hit_MK, logprob_MK, -torch.inf).amax(1)
    bound_M = torch.minimum(log_left(logprob_MK).squeeze(1), logprob_MK.amin(1))
    gold_M = torch.where(hit_MK.any(1), known_M, bound_M)
    theirs_C = logprob_CK.new_zeros(len(here)).index_add_(0, owner_M, gold_M)
    is_first_M = place_M == theirs_C2[owner_M, 0]
    goes_on_C = theirs_C - gold_M[is_first_M]  # what follows the first of them
    # the piece that it begins with stands for what begins like the chunk and is another text
    least = torch.finfo(logprob_CK.dtype).tiny
    other_C1 = goes_on_C.expm1().neg().clamp_min(least).log()[:, None]
    first_CK = index_CK == chunks.ids_BS[row_C, theirs_C2[:, 0]][:, None]
    logprob_CK = torch.where(first_CK, logprob_CK + other_C1, logprob_CK)
    owner_M, row_M, place_M = _tokens_of(row_C, mine_C2, 1)
    chosen_MV = step.flat.index_select(0, rows_BT[row_M, place_M - 1]).to(sum_dtype(step.flat))
    nll_M = F.cross_entropy(chosen_MV, ids_BT[row_M, place_M], reduction="none")
    follows_C = nll_M.new_zeros(len(here)).index_add(0, owner_M, -nll_M)
    # what the student writes with all of its chunk, and more, is the chunk to it
    written_CKL, mine_CL = _beside(chunks, index_CK, ids_BT, row_C, mine_C2)
    is_chunk_CK = ((written_CKL == mine_CL[:, None]) | (mine_CL < 0)[:, None]).all(-1) & ~first_CK
    parts_CK = torch.cat([theirs_C[:, None], logprob_CK.masked_fill(~is_chunk_CK, -torch.inf)], dim=1)
    theirs_C = torch.where(is_chunk_CK.any(1), parts_CK.logsumexp(1), theirs_C)
    class_CK = written_CKL[:, :, 0].masked_fill(is_chunk_CK, -1)
    place_C = mine_C2[:, 0] - 1
    chunk = ids_BT[row_C, mine_C2[:, 0]], follows_C, theirs_C
    return ChunkTerms(step.divergence(rows_BT[row_C, place_C], class_CK, logprob_CK, chunk), row_C, place_C)


def _gathered(class_NK: Tensor, logprob_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of one class become one: the first of them, with the sum of their probabilities; the others -1."""
    same_NKK = (class_NK[:, :, None] == class_NK[:, None, :]) & (class_NK >= 0)[:, :, None]
    columns = torch.arange(class_NK.shape[1], device=class_NK.device)
    first_NK = same_NKK.to(torch.uint8).argmax(-1) == columns
    several_NK = same_NKK.sum(-1) > 1
    valid_NK = (class_NK >= 0) & first_NK
    if bool(several_NK.any()):
        summed_NK = logprob_NK[:, None, :].masked_fill(~same_NKK, -torch.inf).logsumexp(-1)
        logprob_NK = torch.where(several_NK, summed_NK, logprob_NK)
    if bool(valid_NK.all()):
        return class_NK, logprob_NK
    return class_NK.masked_fill(~valid_NK, -1), logprob_NK.masked_fill(~valid_NK, -torch.inf)


def _beside(
    chunks: TextChunks, index_CK: Tensor, ids_BT: Tensor, row_C: Tensor, mine_C2: Tensor
) -> tuple[Tensor, Tensor]:
    """The teacher's K pieces as the student would write them [C, K, L], -1 behind the last, and what it wrote in each
    chunk [C, L], -2 behind the last."""
    owner_N, row_N, place_N = _tokens_of(row_C, mine_C2, 0)
    offset_N = place_N - mine_C2[owner_N, 0]
    written_CKL = _pieces(chunks.written_VL, index_CK)
    length = max(written_CKL.shape[-1], int(offset_N.max()) + 1)
    mine_CL = torch.full((len(row_C), length), -2, device=row_C.device)
    mine_CL[owner_N, offset_N] = ids_BT[row_N, place_N]
    return F.pad(written_CKL, (0, length - written_CKL.shape[-1]), value=-1), mine_CL


def _pieces(table_VL: Tensor, index: Tensor) -> Tensor:
    """Rows of a table by their pieces; rows of a model's head beyond its tokenizer are no piece."""
    inside = (index < len(table_VL))[..., None]
    return torch.where(inside, table_VL[index.clamp_max(len(table_VL) - 1)], -1)


def _tokens_of(row_C: Tensor, places_C2: Tensor, skip: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every token of the chunks but for the first `skip`: whose chunk it is of, its example, its place."""
    count_C = places_C2[:, 1] - places_C2[:, 0] + 1 - skip
    owner_M = torch.arange(len(row_C), device=row_C.device).repeat_interleave(count_C)
    number_M = torch.arange(len(owner_M), device=row_C.device) - (count_C.cumsum(0) - count_C)[owner_M]
    return owner_M, row_C[owner_M], places_C2[owner_M, 0] + skip + number_M


# -- by size ------------------------------------------------------------------------------------------


def _sorted_distance(flat: Tensor, rows_C: Tensor, logprob_CK: Tensor, whole: bool, temperature: float) -> Tensor:
    """Sum over ranks of |p - q|, the K most probable of either side, and of what is left (whole: nothing of theirs)."""
    num_ranks = min(logprob_CK.shape[1], flat.shape[1])
    index_CK = flat.detach().index_select(0, rows_C).topk(num_ranks, dim=1).indices
    top_CK, rest_C1 = TopAndRest.apply(flat, rows_C, index_CK)
    left_C1 = torch.full_like(rest_C1, -torch.inf)
    p = (torch.cat([logprob_CK, left_C1 if whole else log_left(logprob_CK)], dim=1) / temperature).softmax(1)
    rest_C1 = rest_C1 if num_ranks < flat.shape[1] else left_C1
    q = (torch.cat([top_CK, rest_C1], dim=1) / temperature).softmax(1)
    missing = q.new_zeros(len(q), logprob_CK.shape[1] - num_ranks)  # ranks that the student has not
    return (p - torch.cat([q[:, :-1], missing, q[:, -1:]], dim=1)).abs().sum(1)


def _unmatched_distance(
    flat: Tensor, rows_C: Tensor, known_CK: Tensor, logprob_CK: Tensor, chunks: TextChunks
) -> Tensor:
    """The same over pieces that the other side cannot tell, at temperature 1, as far as the teacher's K go."""
    told_V = torch.zeros(flat.shape[1], dtype=torch.bool, device=flat.device)
    told_V[: len(chunks.folds_V)] = chunks.folds_V >= 0
    p_CK = logprob_CK.exp().masked_fill(known_CK >= 0, 0.0).sort(1, descending=True).values
    num_ranks = min(p_CK.shape[1], int((~told_V).sum()))
    chosen_CV = flat.index_select(0, rows_C).to(sum_dtype(flat))
    own_CR = chosen_CV.masked_fill(told_V, -torch.inf).topk(num_ranks, dim=1).values
    q_CR = (own_CR - chosen_CV.logsumexp(1, keepdim=True)).exp()
    q_CK = torch.cat([q_CR, q_CR.new_zeros(len(q_CR), p_CK.shape[1] - num_ranks)], dim=1)
    return (p_CK - q_CK).abs().sum(1)
