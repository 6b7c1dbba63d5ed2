"""Which teacher tokens stand behind each student token where the two have different tokenizers: `token_map`.

Both sides read the same text. A text token of the student reads the teacher's text tokens that have characters in
common with it, weighted by intersection over union of their spans (in characters) and normalised to sum 1, per sample.
Spans of one side are ordered and disjoint, as `kvdistill.data.spans` gives them; then equal spans on both sides give
the identity exactly. (Where the spans of one side do overlap, the weights are still those of the formula.)

Roles (`core/segments.py`) say what a token is. Special tokens have no characters and are matched by role, in order:
  START  beginning-of-text, head of a chat template   from the last one backwards
  TURN   between prompt and completion                from the last one backwards
  END    end-of-text, tail of a chat template         from the first one on
so that those next to the text belong together. Where the source has fewer of a role, the outermost one is read again;
where it has none, the row is empty (masked). UNKNOWN is text that a tokenizer cannot write: such tokens have spans,
but of the source only a token of the target that is UNKNOWN too reads them, since they do not tell the text. (Given as
TEXT they are read by whoever overlaps them.) A text token without characters (SentencePiece's mark in front of a text)
reads the source's at the same place, in order.

A row whose characters no source token covers is empty; `token_coverage` counts what is lost that way, and
`require_common_text` refuses an example in which everything is. Knows spans and roles, no tokenizer and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from kvdistill.core.errors import AlignmentError
from kvdistill.core.maps import SparseMap
from kvdistill.core.segments import END, PADDING_ROLE, START, TEXT, TURN, UNKNOWN

_LEAST = 1e-3  # characters in common; less is rounding of cut characters far into a text


def token_map(
    source_spans_BS2: Num[Tensor, "B S 2"],
    target_spans_BT2: Num[Tensor, "_ T 2"],
    source_roles_BS: Int[Tensor, "B S"],
    target_roles_BT: Int[Tensor, "_ T"],
) -> SparseMap:
    """The map [B, T, k] from teacher tokens to student tokens; k: the most sources any student token of the batch has.

    spans: [start, end) in characters of the text (of prompt and completion one after the other), looked at only where
    the role is TEXT or UNKNOWN. roles: of `core.segments`, 0 at padding, on either side. Rows sum to 1 or are empty;
    no row names a padding token, not even with weight 0 (unless a text has no other).
    Raises AlignmentError for different batch sizes.
    """
    if source_roles_BS.shape[0] != target_roles_BT.shape[0]:
        raise AlignmentError(
            f"{source_roles_BS.shape[0]} teacher texts and {target_roles_BT.shape[0]} student texts",
            fix="both sides need the same examples in the same order",
        )
    source = _Side.of(source_spans_BS2, source_roles_BS)
    target = _Side.of(target_spans_BT2, target_roles_BT)
    otherwise_BT = (source_roles_BS != PADDING_ROLE).to(torch.uint8).argmax(1, keepdim=True).expand_as(target_roles_BT)
    chosen_BT = torch.zeros_like(target_roles_BT, dtype=torch.bool)
    for place_BT, live_BT in (*_by_role(source, target), *_by_place(source, target)):  # tokens without characters
        otherwise_BT = torch.where(live_BT, place_BT, otherwise_BT)
        chosen_BT = chosen_BT | live_BT
    index_BTK, shared_BTK = _overlaps(source, target, otherwise_BT)
    union_BTK = _gather(source.width_BS, index_BTK).add_(target.width_BS[..., None]).sub_(shared_BTK)
    weight_BTK = shared_BTK.div_(union_BTK.clamp_min_(_LEAST))
    weight_BTK[..., 0].masked_fill_(chosen_BT, 1.0)
    index_BTK, weight_BTK = _without_spare_columns(index_BTK, weight_BTK)
    weight_BTK.div_(weight_BTK.sum(-1, keepdim=True).clamp_min_(_LEAST**3))  # far below any row with something in it
    return SparseMap(index_BTK, weight_BTK, source_roles_BS.shape[1])


def same_tokens(
    source_spans_BS2: Num[Tensor, "B S 2"],
    target_spans_BT2: Num[Tensor, "_ T 2"],
    source_roles_BS: Int[Tensor, "B S"],
    target_roles_BT: Int[Tensor, "_ T"],
) -> bool:
    """True where `token_map` would take every real token to itself: the hot path needs no map at all.

    Two comparisons; same width, same real places, same roles and same spans of text are enough.
    """
    if source_roles_BS.shape != target_roles_BT.shape or not torch.equal(source_roles_BS, target_roles_BT):
        return False
    is_text_BT1 = _is_text(target_roles_BT)[..., None]
    return bool(((source_spans_BS2 == target_spans_BT2) | ~is_text_BT1).all())


class TokenCoverage(NamedTuple):
    """What of each example's text has no counterpart, as counts, so that they can be summed over batches.

    Float32 [B]. target_characters, source_characters: in text tokens. lost_characters: of the target's, covered by no
    source token that tells them. unread_characters: of the source's, read by no target token. target_tokens: text
    tokens with characters; empty_tokens: those of them with nothing behind.
    """

    target_characters_B: Tensor
    lost_characters_B: Tensor
    source_characters_B: Tensor
    unread_characters_B: Tensor
    target_tokens_B: Tensor
    empty_tokens_B: Tensor

    @property
    def lost_share_B(self) -> Tensor:
        """Share of the student's characters that the teacher's tokens do not cover; NaN without any text."""
        return self.lost_characters_B / self.target_characters_B

    @property
    def unread_share_B(self) -> Tensor:
        """Share of the teacher's characters that no student token reads; NaN without any text."""
        return self.unread_characters_B / self.source_characters_B

    @property
    def empty_share_B(self) -> Tensor:
        """Share of the student's text tokens that are not taught; NaN without any text."""
        return self.empty_tokens_B / self.target_tokens_B


def token_coverage(
    source_spans_BS2: Num[Tensor, "B S 2"],
    target_spans_BT2: Num[Tensor, "_ T 2"],
    source_roles_BS: Int[Tensor, "B S"],
    target_roles_BT: Int[Tensor, "_ T"],
) -> TokenCoverage:
    """What `token_map` of the same arguments leaves out. Special tokens and tokens without characters do not count."""
    source = _Side.of(source_spans_BS2, source_roles_BS)
    target = _Side.of(target_spans_BT2, target_roles_BT)
    index_BTK, shared_BTK = _overlaps(source, target, torch.zeros_like(target_roles_BT, dtype=torch.int64))
    covered_BT = torch.minimum(shared_BTK.sum(-1), target.width_BS)
    read_BS = torch.zeros_like(source.width_BS).scatter_add_(1, index_BTK.flatten(1), shared_BTK.flatten(1))
    return TokenCoverage(
        target_characters_B=target.width_BS.sum(1),
        lost_characters_B=(target.width_BS - covered_BT).sum(1),
        source_characters_B=source.width_BS.sum(1),
        unread_characters_B=(source.width_BS - torch.minimum(read_BS, source.width_BS)).sum(1),
        target_tokens_B=target.has_text_BS.float().sum(1),
        empty_tokens_B=(target.has_text_BS & (covered_BT == 0)).float().sum(1),
    )


def require_common_text(
    mapping: SparseMap, target_roles_BT: Int[Tensor, "B T"], examples: Sequence[int] | None = None
) -> None:
    """Raise AlignmentError for the first example of which no text token of the student has anything behind it.

    mapping: of `token_map`. examples: their numbers for the message; unset: their places in the batch. A row that is
    padding only is left alone.
    """
    taught_B = (mapping.mask() & _is_text(target_roles_BT)).any(1)
    bad_B = ~taught_B & (target_roles_BT != PADDING_ROLE).any(1)
    if bad_B.any():
        row = int(bad_B.to(torch.uint8).argmax())
        raise AlignmentError(
            "no token of the teacher and no token of the student have a character in common",
            place=f"example {row if examples is None else examples[row]}",
            fix="pad (and index) need one text on both sides, and a teacher tokenizer that can write it; "
            "for different texts set align.time=segment",
        )


# -- text: overlap -------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """One side of the batch, S standing for T as well. start, end: of tokens with characters, else inf and -inf (they
    overlap nothing and do not disturb the order). width: 0 for those. empty: text tokens without characters, which
    stand at `place`."""

    roles_BS: Tensor
    start_BS: Tensor
    end_BS: Tensor
    width_BS: Tensor
    has_text_BS: Tensor
    is_empty_BS: Tensor
    place_BS: Tensor

    @classmethod
    def of(cls, spans_BS2: Tensor, roles_BS: Tensor) -> _Side:
        start_BS, end_BS = spans_BS2.to(torch.promote_types(spans_BS2.dtype, torch.float32)).unbind(-1)
        is_text_BS, width_BS = _is_text(roles_BS), end_BS - start_BS
        has_text_BS = is_text_BS & (width_BS > 0)
        return cls(
            roles_BS,
            torch.where(has_text_BS, start_BS, float("inf")),
            torch.where(has_text_BS, end_BS, -float("inf")),
            torch.where(has_text_BS, width_BS, 0.0).float(),
            has_text_BS,
            is_text_BS & ~has_text_BS,
            start_BS,
        )


def _is_text(roles_BS: Int[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    return (roles_BS == TEXT) | (roles_BS == UNKNOWN)


def _overlaps(
    source: _Side, target: _Side, otherwise_BT: Int[Tensor, "B T"]
) -> tuple[Int[Tensor, "B T K"], Float[Tensor, "B T K"]]:
    """Source tokens that may overlap each target token, and the characters in common (0: none, or not to be read).

    Candidates are the tokens from the first that ends behind the target's start to the last that starts before its
    end. Running maxima of ends and minima of starts find those two by bisection, in whatever order the spans are.
    Rows with fewer candidates than the fullest name their last one again, rows with none `otherwise_BT`: what padding
    holds is never read, not even with weight 0, since 0 times NaN is NaN.
    """
    first_BT = torch.searchsorted(source.end_BS.cummax(1).values, target.start_BS + _LEAST)
    least_start_BS = source.start_BS.flip(1).cummin(1).values.flip(1)
    behind_BT = torch.searchsorted(least_start_BS, target.end_BS - _LEAST)
    count_BT = behind_BT - first_BT  # not above 0 for a target token without characters
    column_K = torch.arange(max(1, int(count_BT.max())), device=count_BT.device)
    base_BT = torch.where(count_BT > 0, first_BT, otherwise_BT)
    index_BTK = torch.minimum(column_K, (count_BT - 1).clamp_min_(0)[..., None]).add_(base_BT[..., None])
    end_BTK = torch.minimum(_gather(source.end_BS, index_BTK), target.end_BS[..., None])
    shared_BTK = end_BTK.sub_(torch.maximum(_gather(source.start_BS, index_BTK), target.start_BS[..., None])).float()
    live_BTK = (column_K < count_BT[..., None]) & (shared_BTK > _LEAST)
    unknown_BS = source.roles_BS == UNKNOWN
    if unknown_BS.any():
        live_BTK &= ~_gather(unknown_BS, index_BTK) | (target.roles_BS == UNKNOWN)[..., None]
    return index_BTK, shared_BTK.masked_fill_(~live_BTK, 0.0)


def _gather(x_BS: Tensor, index_BTK: Tensor) -> Tensor:
    return x_BS.gather(1, index_BTK.flatten(1)).view(index_BTK.shape)


# -- tokens without characters: by role and by place ---------------------------------------------------

_Choice = tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]  # a source token for each target token, and where it counts


def _by_role(source: _Side, target: _Side) -> list[_Choice]:
    """Special tokens: see the module's docstring."""
    chosen: list[_Choice] = []
    for role in (START, TURN, END):
        is_source_BS, is_target_BT = source.roles_BS == role, target.roles_BS == role
        count_BS, count_BT = is_source_BS.cumsum(1), is_target_BT.cumsum(1)
        num_source_B1, num_target_B1 = count_BS[:, -1:], count_BT[:, -1:]
        if role == END:
            rank_BT = torch.minimum(count_BT, num_source_B1) - 1
        else:
            rank_BT = (num_source_B1 - num_target_B1 + count_BT - 1).clamp_min(0)
        chosen.append((_place_of_rank(count_BS, rank_BT), is_target_BT & (num_source_B1 > 0)))
    return chosen


def _by_place(source: _Side, target: _Side) -> list[_Choice]:
    """Text tokens without characters: the r-th of the target's at a place reads the r-th of the source's there."""
    if not (source.is_empty_BS.any() and target.is_empty_BS.any()):
        return []
    count_BS, count_BT = source.is_empty_BS.cumsum(1), target.is_empty_BS.cumsum(1)
    places = []  # of either side's: where they stand, one after the other, and inf after the last
    for side, count in ((source, count_BS), (target, count_BT)):
        rank = torch.arange(count.shape[1], device=count.device).expand_as(count)
        there = side.place_BS.gather(1, _place_of_rank(count, rank))
        places.append(torch.where(rank < count[:, -1:], there, float("inf")))
    places_BS, places_BT = places
    here_BT = target.place_BS.contiguous()
    rank_there_BT = count_BT - 1 - torch.searchsorted(places_BT, here_BT)
    rank_BT = (torch.searchsorted(places_BS, here_BT) + rank_there_BT).clamp(0, places_BS.shape[1] - 1)
    return [(_place_of_rank(count_BS, rank_BT), target.is_empty_BS & (places_BS.gather(1, rank_BT) == here_BT))]


def _place_of_rank(count_BS: Int[Tensor, "B S"], rank_BT: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Where the r-th member stands, from the running count of members; some valid place where there is none."""
    return torch.searchsorted(count_BS, rank_BT + 1).clamp_(max=count_BS.shape[1] - 1)


# -- tidying -------------------------------------------------------------------------------------------


def _without_spare_columns(index_BTK: Tensor, weight_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """As many columns as the fullest row has sources: every column is a pass over the big tensor later."""
    live_BTK = weight_BTK > 0
    if live_BTK.shape[-1] == 1 or live_BTK.all(-1).any():
        return index_BTK, weight_BTK
    k = max(1, int(live_BTK.sum(-1).max()))
    order_BTk = live_BTK.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return index_BTK.gather(-1, order_BTk), weight_BTK.gather(-1, order_BTk)
