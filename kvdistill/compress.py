"""Which teacher tokens take part. Only reasoning tokens are ever dropped; prompt and answer stay.

modes (n = keep; of fewer reasoning tokens than n, all stay):
  full, none    every reasoning token, or no reasoning token at all
  right, crop   the last n; the first n (KaVa's baseline)
  uniform       n spread evenly, the first and the last among them
  random        n drawn without replacement, by a seed of the example's own: neither padding nor the order in the
                batch changes the draw
  steps         the token that ends each step of the reasoning, where its text marks steps; of more than n the last n
  r-kv          the n with the best score, see below

R-KV (Cai et al. 2025, as KaVa uses it), per layer and KV head, over the n reasoning tokens of an example alone:
  importance I = softmax over them of the answer's attention logits (max over the queries of a KV head), averaged over
                 the answer's tokens; 1/n each where there is no answer. In layers with a window, tokens outside of
                 it get nothing, and answer tokens that see no reasoning do not count (1/n each where none does); a
                 cap acts on the logits; a sink changes nothing, since it is no reasoning token
  redundancy R = softmax over them of minus the mean cosine of a key to the other keys. (Its name in the paper; a
                 high R is a key unlike the others.) sum_j cos(k_i, k_j) = u_i · sum_j u_j with unit keys u: no n x n
                 matrix is made. A single token has R = 1.
  score        = share · I + (1 - share) · R
Every softmax runs over packed reasoning tokens, so padding and prompt get no mass and change no choice.

Compression removes *source* tokens of an alignment, it makes no new slots: `time_map(...).masked_source(kept_BS)`
empties the rows that read a dropped token and renormalises the rest. (`MapProjectionAligner.targets` does that for
whatever its teacher's `mask_BT` leaves out, so masking the teacher's KV with `kept_BS` is enough.) Where the target
is a fixed number of slots instead (latent tokens), `selection_map` packs the kept tokens into them, spare slots
masked. Knows segment codes, keys and queries; no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvdistill.core.errors import AlignmentError, RecipeError, require_known
from kvdistill.core.kv import CAUSAL, AttentionRule, require_unbiased
from kvdistill.core.maps import SparseMap, members_first, spread_members
from kvdistill.core.segments import ANSWER, PADDING, REASONING

MODES = ("full", "right", "crop", "r-kv", "random", "uniform", "steps", "none")


def kept_tokens(
    mode: str,
    segments_BS: Int[Tensor, "B S"],
    keep: int | None = None,
    *,
    scores: Float[Tensor, "*M B 2 G S"] | None = None,
    keys_B: Int[Tensor, " B"] | Sequence[int] | None = None,
    ends_BS: Bool[Tensor, "B S"] | None = None,
    importance_share: float = 0.1,
) -> Bool[Tensor, "*M B S"]:
    """True at the teacher tokens that take part, never at padding: [B, S], or as many layers as `scores` has.

    mode: see the module's docstring. keep: how many reasoning tokens stay (all, where there are fewer; with steps it
    may be None: the end of every step). scores: of `rkv_scores` or `rkv_layer_scores`, for r-kv. keys_B: a seed per
    example, for random. ends_BS: of `kvdistill.data.steps`, for steps.
    Raises RecipeError for an unknown mode or a missing `keep`, AlignmentError for missing scores, keys or ends.
    """
    require_known(mode, MODES, "compression", "compress.kv_compression")
    optional = mode in ("full", "none") or (mode == "steps" and keep is None)
    if not optional and (keep is None or keep < 1):
        raise RecipeError(
            f"{mode} with keep = {keep}", place="compress.keep", fix="say how many reasoning tokens to keep"
        )
    reasoning_BS, num = segments_BS == REASONING, keep or 0
    if mode == "full":
        stays = reasoning_BS
    elif mode == "none":
        stays = torch.zeros_like(reasoning_BS)
    elif mode == "right":
        stays = reasoning_BS.long().flip(1).cumsum(1).flip(1) <= num
    elif mode == "crop":
        stays = reasoning_BS.long().cumsum(1) <= num
    elif mode == "uniform":
        stays = spread_members(reasoning_BS, reasoning_BS.sum(1).clamp(max=num))
    elif mode == "random":
        stays = _drawn(reasoning_BS, num, keys_B)
    elif mode == "steps":
        if ends_BS is None:
            raise AlignmentError(
                "steps without the tokens that end them", fix="give ends_BS: kvdistill.data.steps.StepMarks finds them"
            )
        stays = ends_BS & reasoning_BS
        if keep is not None:
            stays = stays & (stays.long().flip(1).cumsum(1).flip(1) <= num)
    else:
        if scores is None:
            raise AlignmentError(
                "r-kv without scores: it ranks tokens by the teacher's keys and the answer's queries",
                fix="capture the teacher with its queries and give `rkv_layer_scores`",
            )
        stays = kept_by_layer(scores, num, importance_share)
    return (segments_BS != PADDING) & (~reasoning_BS | stays)


def share_that_drops(kept: Bool[Tensor, "*M B S"], segments_BS: Int[Tensor, "B S"]) -> float:
    """Of the examples that have reasoning, the share of which some reasoning token is dropped, in any layer.

    0 where none has reasoning. Where it is 0, all selectors with this `keep` choose alike, and a comparison of them
    compares nothing.
    """
    reasoning_BS = segments_BS == REASONING
    drops_B = (reasoning_BS & ~kept).any(-1).reshape(-1, len(segments_BS)).any(0)
    return float(drops_B.sum()) / max(1, int(reasoning_BS.any(1).sum()))


# -- R-KV ----------------------------------------------------------------------------------------------------


def rkv_scores(
    query_BQSE: Float[Tensor, "B Q S E"],
    key_BGSE: Float[Tensor, "B G S E"],
    segments_BS: Int[Tensor, "B S"],
    *,
    scaling: float | None = None,
) -> Float[Tensor, "B 2 G S"]:
    """I and R of one layer, in fp32: each sums to 1 over an example's reasoning tokens and is 0 elsewhere.

    Queries and keys in the frame in which the model attends (rotated, where it has rotary positions); Q is a multiple
    of G. scaling: of the logits, by default 1/sqrt(E). Only queries of answer tokens are read.
    Raises AlignmentError where the heads do not go together. R of a reasoning token is never 0.
    """
    return rkv_layer_scores([query_BQSE], [key_BGSE], segments_BS, scaling=scaling)[0]


@torch.no_grad()
def rkv_layer_scores(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    segments_BS: Int[Tensor, "B S"],
    *,
    scaling: float | None = None,
    rules: Sequence[AttentionRule] = (),
) -> Float[Tensor, "M B 2 G S"]:
    """`rkv_scores` of M layers with equal heads, [B, Q, S, E] and [B, G, S, E] each: what is common is made once.

    rules: of each layer, what it does with q.k; unset: nothing. Raises AlignmentError for a rule with a bias.
    """
    if len(queries) != len(keys) or not keys:
        raise AlignmentError(f"r-kv: {len(queries)} layers of queries and {len(keys)} of keys", fix="capture both")
    for layer, (q, k) in enumerate(zip(queries, keys, strict=True)):
        alike = (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:]) and k.shape == keys[0].shape
        if q.shape[1] % k.shape[1] or not alike:
            raise AlignmentError(
                f"r-kv, layer {layer}: queries {tuple(q.shape)} and keys {tuple(k.shape)}",
                fix="[batch, heads, tokens, size] each, query heads a multiple of key heads, layers alike",
            )
    require_unbiased(rules)
    reasoning_BS, answer_BS = segments_BS == REASONING, segments_BS == ANSWER
    num_B, answers_B = reasoning_BS.sum(1), answer_BS.sum(1)
    to_reasoning = selection_map(reasoning_BS, max(1, int(num_B.max())))
    to_answer = selection_map(answer_BS, max(1, int(answers_B.max())))
    live_BN = to_reasoning.mask()
    share_BA = to_answer.mask() / answers_B.clamp_min(1)[:, None]
    has_answer_B = share_BA.sum(1) > 0
    even_BN = live_BN / live_BN.sum(1, keepdim=True).clamp_min(1)
    layers, room = [], _Room()
    asked, answered = _common_slice(reasoning_BS), _common_slice(answer_BS)
    apart_BAN = to_answer.index[:, :, 0, None] - to_reasoning.index[:, None, :, 0]
    for query_BQSE, key_BGSE, rule in zip(queries, keys, rules or (CAUSAL,) * len(keys), strict=True):
        # packed: padding, and what stands in it, is gone before anything is summed
        key, query = key_BGSE.detach(), query_BQSE.detach()
        key_BGNE = (room.packed(to_reasoning, key) if asked is None else key[:, :, asked]).float()
        query_BQAE = (to_answer.apply(query, 2) if answered is None else query[:, :, answered]).float()
        size = key_BGNE.shape[-1] ** -0.5 if scaling is None else scaling
        logits_BGAN, mean_BGN = _logits_and_cosines(query_BQAE * size, key_BGNE, num_B, room)
        if rule.cap is not None:
            logits_BGAN = rule.cap * torch.tanh(logits_BGAN / rule.cap)
        sees_BAN, weight_BA, counts_B = live_BN[:, None], share_BA, has_answer_B
        if rule.window is not None and rule.window < segments_BS.shape[1]:
            sees_BAN = sees_BAN & (apart_BAN.abs() < rule.window)
            sees_any_BA = to_answer.mask() & sees_BAN.any(2)
            weight_BA = sees_any_BA / sees_any_BA.sum(1, keepdim=True).clamp_min(1)
            counts_B = sees_any_BA.any(1)
        share_BGAN = _masked_softmax(logits_BGAN, sees_BAN[:, None])
        answered_BGN = (weight_BA[:, None, None] @ share_BGAN).squeeze(2)
        importance = torch.where(counts_B[:, None, None], answered_BGN, even_BN[:, None])
        layers.append(torch.stack([importance, _masked_softmax(-mean_BGN, live_BN[:, None])], dim=1))
    packed_MB2GN = torch.stack(layers)
    scores = packed_MB2GN.new_zeros(*packed_MB2GN.shape[:-1], segments_BS.shape[1])
    place = to_reasoning.index[:, None, None, :, 0].expand_as(packed_MB2GN)
    return scores.scatter_add_(-1, place, packed_MB2GN)  # adding: spare slots hold 0 and point anywhere


def _common_slice(member_BS: Bool[Tensor, "B S"]) -> slice | None:
    """Where the members stand, if they stand together and at the same places in every example: no packing then."""
    first = member_BS[0]
    if not bool(first.any()) or not torch.equal(member_BS, first.expand_as(member_BS)):
        return None
    start, count = int(first.to(torch.uint8).argmax()), int(first.sum())
    return slice(start, start + count) if bool(first[start : start + count].all()) else None


class _Room:
    """Memory that all layers use in turn: on a CPU, fresh memory for each costs more than the work done in it."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._product: Tensor | None = None

    def packed(self, mapping: SparseMap, x_BGSE: Tensor) -> Float[Tensor, "B G N E"]:
        if x_BGSE.dtype != torch.float32:
            return mapping.apply(x_BGSE, 2)
        if self._packed is None:
            B, G, _, E = x_BGSE.shape
            self._packed = x_BGSE.new_empty(B, G, mapping.n_out, E)
        return mapping.apply(x_BGSE, 2, out=self._packed)

    def product(self, a: Float[Tensor, "B G A E"], b: Float[Tensor, "B G N E"]) -> Float[Tensor, "B G A N"]:
        """a b'. As one batch: `matmul` of more axes would make its own memory first and copy."""
        (B, G, A, _), N = a.shape, b.shape[2]
        if self._product is None:
            self._product = a.new_empty(B * G, A, N)
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1).mT, out=self._product)
        return self._product.view(B, G, A, N)


def _logits_and_cosines(
    query_BQAE: Tensor, key_BGNE: Tensor, num_B: Tensor, room: _Room
) -> tuple[Float[Tensor, "B G A N"], Float[Tensor, "B G N"]]:
    """The largest logit of each KV head's queries, and each key's mean cosine to the other keys of its head.

    One matrix product: the sum of the unit keys is one query more.
    """
    (B, Q, A, E), G = query_BQAE.shape, key_BGNE.shape[1]
    length_BGN = torch.linalg.vector_norm(key_BGNE, dim=-1)
    shrink_BGN = torch.where(length_BGN > 0, 1 / length_BGN, 0.0)
    sum_BG1E = shrink_BGN[:, :, None] @ key_BGNE
    asked = room.product(torch.cat([query_BQAE.reshape(B, G, Q // G * A, E), sum_BG1E], dim=2), key_BGNE)
    own_BGN = (length_BGN > 0).float()  # cosine of a key to itself; 0 for a key of zeros
    mean_BGN = (asked[:, :, -1] * shrink_BGN - own_BGN) / (num_B - 1).clamp_min(1)[:, None, None]
    return asked[:, :, :-1].unflatten(2, (Q // G, A)).amax(2), mean_BGN


def _masked_softmax(logits: Tensor, live: Tensor) -> Tensor:
    """Over the last axis, where `live`; rows without any are 0. Overwrites the logits."""
    if bool(live.all()):
        return logits.softmax(-1)
    return logits.masked_fill_(~live, -torch.inf).softmax(-1).masked_fill_(~live, 0.0)


def rkv_select(
    scores: Float[Tensor, "*M B 2 G S"], keep: int, importance_share: float = 0.1
) -> Bool[Tensor, "*M B G S"]:
    """True at the `keep` best reasoning tokens of each layer, example and head; at all of them where there are fewer.

    importance_share: lambda, the weight of I. Equal scores: the earlier token.
    """
    return _best(_joined(scores, importance_share), scores[..., 1, :, :] > 0, keep)


def kept_by_layer(
    scores: Float[Tensor, "*M B 2 G S"], keep: int, importance_share: float = 0.1
) -> Bool[Tensor, "*M B S"]:
    """`rkv_select` with one choice for all heads of a layer, by the mean of their scores: for tokens without slots."""
    return _best(_joined(scores, importance_share).mean(-2), scores[..., 1, 0, :] > 0, keep)


def _joined(scores: Tensor, importance_share: float) -> Float[Tensor, "*M B G S"]:
    if not 0 <= importance_share <= 1:
        raise RecipeError(
            f"importance_share = {importance_share}", place="compress.importance_share", fix="a number from 0 to 1"
        )
    return torch.lerp(scores[..., 1, :, :], scores[..., 0, :, :], importance_share)


# Sums in fp32 end in noise, and equal keys must tie: scores nearer to the last one kept than this share of the mean
# score 1/n count as equal to it.
_TIE = 2.0**-18


def _best(score: Tensor, member: Tensor, keep: int) -> Tensor:
    score = (score * member.sum(-1, keepdim=True)).masked_fill(~member, -torch.inf)
    if keep >= score.shape[-1]:
        return member
    last = score.topk(keep, dim=-1).values[..., -1:]
    above, equal = score > last + _TIE, (score - last).abs() <= _TIE
    room = keep - above.sum(-1, keepdim=True)
    return member & (last.isneginf() | above | (equal & (equal.cumsum(-1) <= room)))


# -- slots ---------------------------------------------------------------------------------------------------


def selection_map(kept: Bool[Tensor, "*lead S"], num_slots: int) -> SparseMap:
    """The map [..., num_slots, 1]: slot i takes the i-th kept token, in time order; spare slots are empty (masked).

    Leading axes are the mask's: [B], [B, G], [M, B, G]. With as many slots as there are tokens, or more, every kept
    token has one. Raises AlignmentError where one keeps more tokens than there are slots.
    """
    most = int(kept.sum(-1).max()) if kept.numel() else 0
    if most > num_slots:
        raise AlignmentError(f"{most} kept tokens for {num_slots} slots", fix="keep fewer tokens, or make more slots")
    slot = torch.arange(num_slots, device=kept.device).expand(*kept.shape[:-1], num_slots)
    live = slot < kept.sum(-1, keepdim=True)
    index = members_first(kept).gather(-1, slot.clamp(max=kept.shape[-1] - 1))
    return SparseMap.take(index, kept.shape[-1], live)


# -- random ----------------------------------------------------------------


def _drawn(reasoning_BS: Tensor, keep: int, keys_B: Tensor | Sequence[int] | None) -> Tensor:
    seeds = keys_B.tolist() if isinstance(keys_B, Tensor) else keys_B
    if seeds is None or len(seeds) != len(reasoning_BS):
        raise AlignmentError(
            f"random compression of {len(reasoning_BS)} examples with {0 if seeds is None else len(seeds)} seeds",
            fix="give keys_B: one seed per example, the same wherever it is in a batch",
        )
    drawn_BS = torch.zeros_like(reasoning_BS, device="cpu")
    for b, (row, seed) in enumerate(zip(reasoning_BS.cpu(), seeds, strict=True)):
        places = row.nonzero().squeeze(1)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        drawn_BS[b, places[order[:keep]]] = True
    return drawn_BS.to(reasoning_BS.device)
