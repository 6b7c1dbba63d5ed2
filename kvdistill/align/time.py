"""Which teacher tokens stand behind each student token, as a `SparseMap` per sample.

Everything is counted over real tokens (segment code > 0), so the side on which either model pads, and how
much, changes nothing. Knows segment codes, not text, tokenizers or models: `SegmentIdentifier` turns
character offsets into codes, and whoever has a tokenizer supplies those.

modes (source = teacher tokens S, target = student tokens T, both sides per sample):
  index         i-th real student token <- i-th real teacher token; nothing beyond the shorter text.
                (`truncate` is the same mode by its old name.)
  pad           teacher forcing on one text: the same arithmetic as `index`. The name is a claim of the recipe,
                that both sides read the same tokens, so that nothing is cut off.
  proportional  u_i = i / (T-1) * (S-1) over real tokens, linear interpolation; one student token reads u = 0.
  segment       `proportional` inside each of prompt, reasoning and answer. (`soft` is its old name.)
                A segment that one side lacks leaves the student's tokens of it empty (masked).

Compression removes source tokens: `time_map(...).masked_source(kept_BS)`, see `kvdistill.compress`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvdistill.core.maps import SparseMap
from kvdistill.core.runtime import AlignmentError, RecipeError
from kvdistill.core.targets import ANSWER, PADDING, PROMPT, REASONING, SEGMENT_NAMES

MODE_ALIASES = {"truncate": "index", "soft": "segment"}


def time_map(mode: str, source_segments_BS: Int[Tensor, "B S"], target_segments_BT: Int[Tensor, "_ T"]) -> SparseMap:
    """The map [B, T, k] from teacher tokens to student tokens; rows of padding and of missing segments are empty.

    mode: see the module's docstring. Segment codes as in `core.targets` (0 is padding).
    k is 1 for index and pad, 2 for the interpolating modes; no row reads a padding token.
    Raises RecipeError for an unknown mode, AlignmentError for different batch sizes.
    """
    if source_segments_BS.shape[0] != target_segments_BT.shape[0]:
        raise AlignmentError(
            f"{source_segments_BS.shape[0]} teacher texts and {target_segments_BT.shape[0]} student texts",
            fix="both sides need the same examples in the same order",
        )
    return _MODES[resolve_time_mode(mode)](source_segments_BS, target_segments_BT)


def same_places(mode: str, source_segments_BS: Int[Tensor, "B S"], target_segments_BT: Int[Tensor, "B T"]) -> bool:
    """True where `time_map` would take every real token to itself: the hot path needs no map at all.

    One comparison of [B, T] integers. Same width and the same real places are enough, except in `segment` mode,
    where the codes must agree too.
    """
    if source_segments_BS.shape != target_segments_BT.shape:
        return False
    if resolve_time_mode(mode) == "segment":
        return torch.equal(source_segments_BS, target_segments_BT)
    return torch.equal(source_segments_BS != PADDING, target_segments_BT != PADDING)


def resolve_time_mode(mode: str) -> str:
    """The mode's own name for an alias; RecipeError for a word that is neither."""
    name = MODE_ALIASES.get(mode, mode)
    if name not in _MODES:
        raise RecipeError(
            f"unknown time mode {mode!r}", place="align.time", fix=f"one of {', '.join([*_MODES, *MODE_ALIASES])}"
        )
    return name


# -- the modes ----------------------------------------------------------------------------------------


def _hard_map(source_BS: Tensor, target_BT: Tensor) -> SparseMap:
    source_real_BS, target_real_BT = source_BS != PADDING, target_BT != PADDING
    rank_BT = target_real_BT.long().cumsum(1) - 1
    live_BT = target_real_BT & (rank_BT < source_real_BS.sum(1, keepdim=True))
    return SparseMap.take(_place_of_rank(source_real_BS, rank_BT), source_BS.shape[1], live_BT)


def _proportional_map(source_BS: Tensor, target_BT: Tensor) -> SparseMap:
    return _stretch(source_BS != PADDING, target_BT != PADDING)


def _segment_map(source_BS: Tensor, target_BT: Tensor) -> SparseMap:
    parts = [_stretch(source_BS == code, target_BT == code) for code in (PROMPT, REASONING, ANSWER)]
    # The three fill disjoint rows, so their sum is their union.
    index = torch.stack([part.index * part.mask()[..., None] for part in parts]).sum(0)
    weight = torch.stack([part.weight for part in parts]).sum(0)
    return SparseMap(index, weight, source_BS.shape[1])


def _stretch(source_BS: Bool[Tensor, "B S"], target_BT: Bool[Tensor, "B T"]) -> SparseMap:
    """Members of the target, in order, spread evenly over the members of the source: first on first, last on last."""
    num_source = source_BS.sum(1, keepdim=True)
    last_source, last_target = num_source - 1, (target_BT.sum(1, keepdim=True) - 1).clamp_min(1)
    rank_BT = target_BT.long().cumsum(1) - 1
    # u = i * (S-1) / (T-1) in integers, so that equal lengths give the identity exactly, in any length.
    step_BT = rank_BT * last_source
    low_BT = step_BT.div(last_target, rounding_mode="floor")
    share_BT = (step_BT - low_BT * last_target).float() / last_target
    high_BT = torch.minimum(low_BT + 1, last_source)
    live_BT = target_BT & (num_source > 0)
    index = torch.stack([_place_of_rank(source_BS, low_BT), _place_of_rank(source_BS, high_BT)], dim=-1)
    weight = torch.stack([1 - share_BT, share_BT], dim=-1) * live_BT[..., None]
    return SparseMap(index, weight, source_BS.shape[1])


def _place_of_rank(member_BS: Bool[Tensor, "B S"], rank_BT: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Where the r-th member stands; out-of-range ranks give some valid place (their rows carry no weight)."""
    order_BS = torch.argsort(member_BS.to(torch.uint8), dim=1, descending=True, stable=True)
    last = (member_BS.sum(1, keepdim=True) - 1).clamp_min(0)
    return order_BS.gather(1, torch.minimum(rank_BT.clamp_min(0), last))


_MODES: dict[str, Callable[[Tensor, Tensor], SparseMap]] = {
    "index": _hard_map,
    "pad": _hard_map,
    "proportional": _proportional_map,
    "segment": _segment_map,
}


# -- the public classes -------------------------------------------------------------------------------


@final
class TimeWarper:
    """`time_map` with its mode fixed, and the shortcut for texts that need no map."""

    def __init__(self, mode: str = "segment") -> None:
        self.mode = resolve_time_mode(mode)

    def map(self, source_segments_BS: Int[Tensor, "B S"], target_segments_BT: Int[Tensor, "B T"]) -> SparseMap | None:
        """The map, or None where it is the identity at every real token: leave the tensors alone then."""
        if same_places(self.mode, source_segments_BS, target_segments_BT):
            return None
        return time_map(self.mode, source_segments_BS, target_segments_BT)

    def __call__(
        self,
        x: Tensor,
        source_segments_BS: Int[Tensor, "B S"],
        target_segments_BT: Int[Tensor, "B T"],
        axis: int = -2,
    ) -> tuple[Tensor, Bool[Tensor, "B T"]]:
        """x [B, ..., S at axis, ...] -> ([B, ..., T, ...], mask [B, T]): x itself where no map is needed."""
        chosen = self.map(source_segments_BS, target_segments_BT)
        if chosen is None:
            return x, target_segments_BT != PADDING
        return chosen.apply(x, axis), chosen.mask()


@final
class SegmentIdentifier:
    """Token -> prompt, reasoning or answer, from character offsets known when the text was formatted.

    A token belongs to the segment in which it starts; characters between two segments belong to the one before,
    characters before the first to the first. Tokens without characters (offset start == end) are special:
    before the first piece of text they are prompt (bos), after the last they are answer (eos), in between they
    belong with the token before them.
    """

    def identify(
        self,
        offsets: Sequence[tuple[int, int]],
        spans: Mapping[str, tuple[int, int]],
        attention_mask: Sequence[int] | None = None,
    ) -> list[int]:
        """One segment code per token of one text; 0 where `attention_mask` is 0.

        offsets: character range of each token. spans: segment name -> character range, in text order;
        an empty range is a segment that is not there. Raises AlignmentError for unknown or disordered spans.
        """
        starts = _ordered_starts(spans)
        real = [True] * len(offsets) if attention_mask is None else [bool(m) for m in attention_mask]
        if len(real) != len(offsets):
            raise AlignmentError(f"{len(offsets)} offsets and {len(real)} mask entries", fix="one of each per token")
        text = [i for i, (start, end) in enumerate(offsets) if real[i] and end > start]
        first, last = (text[0], text[-1]) if text else (len(offsets), len(offsets))
        codes: list[int] = []
        here = PROMPT
        for i, (start, end) in enumerate(offsets):
            if end > start:
                here = next((code for at, code in reversed(starts) if at <= start), starts[0][1])
            elif i < first or i > last:
                here = PROMPT if i < first else ANSWER
            codes.append(here if real[i] else PADDING)
        return codes

    __call__ = identify


def _ordered_starts(spans: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    starts: list[tuple[int, int]] = []
    reached = 0
    for name, (start, end) in spans.items():
        if name not in SEGMENT_NAMES:
            raise AlignmentError(f"unknown segment {name!r}", fix=f"segments are {', '.join(SEGMENT_NAMES)}")
        if start == end:
            continue
        if not reached <= start < end:
            raise AlignmentError(
                f"segment {name!r} covers characters {start}-{end}, the one before ends at {reached}",
                fix="spans are [start, end) in text order and do not overlap",
            )
        starts.append((start, SEGMENT_NAMES[name]))
        reached = end
    if not starts:
        raise AlignmentError("a text without any segment", fix="give at least the prompt's character range")
    return starts
