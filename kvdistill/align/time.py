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
                A segment that one side lacks leaves the student's tokens of it empty (masked);
                `segment_report` counts them, for the log.

Two settings per segment change the interpolating modes; neither ever reads across the end of what is stretched:
  ratio r       only max(1, ceil(r·n)) of the teacher's n tokens of the segment are read, spread evenly, the first
                and the last among them; the student's tokens are spread over these. In `proportional` each segment
                of the teacher is thinned in the same way, and the whole text is spread over what is left.
  smoothness a  the weighted mean of the teacher's read tokens around each place u, by a triangle of half-width
                h = a times the distance of neighbouring places, in read tokens. h is at least 1, and the triangle of
                half-width 1 is linear interpolation: that is what a = 0 gives, and what any a <= 1 gives where the
                student has as many tokens as are read, or more. h is at most MAX_HALF_WIDTH (so k <= 2·MAX_HALF_WIDTH)
                and at most the distance to the nearer end: windows stay centred on u, the first stays on the first,
                the last on the last. a = 1 is the usual filter against aliasing. The student's segment decides a.

Compression removes source tokens: `time_map(...).masked_source(kept_BS)`, see `kvdistill.compress`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kvdistill.core.errors import AlignmentError, RecipeError, require_known
from kvdistill.core.maps import SparseMap, members_first, spread_members
from kvdistill.core.recipe import RESAMPLING, TIME_ALIASES, TimeMode
from kvdistill.core.segments import ANSWER, PADDING, PROMPT, REASONING, SEGMENT_NAMES

MODES = get_args(TimeMode)
MAX_HALF_WIDTH = 8
_SEGMENTS = (PROMPT, REASONING, ANSWER)


def time_map(
    mode: str,
    source_segments_BS: Int[Tensor, "B S"],
    target_segments_BT: Int[Tensor, "_ T"],
    *,
    ratio: Mapping[str, float] | None = None,
    smoothness: Mapping[str, float] | None = None,
) -> SparseMap:
    """The map [B, T, k] from teacher tokens to student tokens; rows of padding and of missing segments are empty.

    mode, ratio, smoothness (by segment name; unset: 1 and 0): see the module's docstring. Segment codes as in
    `core.targets` (0 is padding). k is 1 for index and pad, 2 for the interpolating modes, more with smoothness; no
    row reads a padding token. Raises RecipeError for an unknown mode, a wrong setting or one that the mode has
    no use for, AlignmentError for different batch sizes.
    """
    if source_segments_BS.shape[0] != target_segments_BT.shape[0]:
        raise AlignmentError(
            f"{source_segments_BS.shape[0]} teacher texts and {target_segments_BT.shape[0]} student texts",
            fix="both sides need the same examples in the same order",
        )
    name, shape = resolve_time_mode(mode), _Shape.of(mode, ratio, smoothness)
    num_S, target_real_BT = source_segments_BS.shape[1], target_segments_BT != PADDING
    if name not in RESAMPLING:
        source_real_BS = source_segments_BS != PADDING
        rank_BT = target_real_BT.long().cumsum(1) - 1
        live_BT = target_real_BT & (rank_BT < source_real_BS.sum(1, keepdim=True))
        return SparseMap.take(_place_of_rank(source_real_BS, rank_BT), num_S, live_BT)
    read_BS = _read_tokens(source_segments_BS, shape.ratio)
    wide_BT = _by_segment(shape.smoothness, target_segments_BT) if any(shape.smoothness) else None
    if name == "proportional":
        return _stretch(read_BS, target_real_BT, wide_BT)
    parts = [
        _stretch(read_BS & (source_segments_BS == code), target_segments_BT == code, wide_BT) for code in _SEGMENTS
    ]
    # The three fill disjoint rows, so their sum is their union. Entries that are added, to have k in every row, have
    # no weight and name a token that the row reads anyway.
    k = max(part.index.shape[-1] for part in parts)
    index, weight = torch.zeros_like(target_segments_BT)[..., None], torch.zeros((), device=read_BS.device)
    for part in parts:
        own, spare = part.index * part.mask()[..., None], k - part.index.shape[-1]
        index = index + torch.cat([own, own[..., -1:].expand(*own.shape[:-1], spare)], dim=-1)
        weight = weight + pad(part.weight, (0, spare))
    return SparseMap(index, weight, num_S)


def same_places(
    mode: str,
    source_segments_BS: Int[Tensor, "B S"],
    target_segments_BT: Int[Tensor, "B T"],
    *,
    ratio: Mapping[str, float] | None = None,
    smoothness: Mapping[str, float] | None = None,
) -> bool:
    """True where `time_map` would take every real token to itself: the hot path needs no map at all.

    One comparison of [B, T] integers. Same width and the same real places are enough, except in `segment` mode,
    where the codes must agree too; and no token may be left out by a ratio, nor smoothness exceed 1 (said of the
    segments that occur: a wider window over a very short segment changes nothing and is still answered False).
    """
    name, shape = resolve_time_mode(mode), _Shape.of(mode, ratio, smoothness)
    if source_segments_BS.shape != target_segments_BT.shape:
        return False
    real_BS = source_segments_BS != PADDING
    if name == "segment":
        if not torch.equal(source_segments_BS, target_segments_BT):
            return False
    elif not torch.equal(real_BS, target_segments_BT != PADDING):
        return False
    if not torch.equal(_read_tokens(source_segments_BS, shape.ratio), real_BS):
        return False
    return max(shape.smoothness) <= 1 or bool((_by_segment(shape.smoothness, target_segments_BT) <= 1).all())


def segment_report(source_segments_BS: Int[Tensor, "B S"], target_segments_BT: Int[Tensor, "B T"]) -> dict[str, int]:
    """How many examples have a segment on one side only, to be summed over batches and logged.

    `<segment>_missing_in_teacher`: the student's tokens of it have no target (masked in `segment` mode).
    `<segment>_missing_in_student`: the teacher's tokens of it reach nobody. Segments that both lack are not counted.
    """
    report: dict[str, int] = {}
    for name, code in SEGMENT_NAMES.items():
        theirs_B, mine_B = (source_segments_BS == code).any(1), (target_segments_BT == code).any(1)
        report[f"{name}_missing_in_teacher"] = int((mine_B & ~theirs_B).sum())
        report[f"{name}_missing_in_student"] = int((theirs_B & ~mine_B).sum())
    return report


def resolve_time_mode(mode: str) -> str:
    """The mode's own name for an alias; RecipeError for a word that is neither."""
    require_known(mode, [*MODES, *TIME_ALIASES], "time mode", "align.time")
    return TIME_ALIASES.get(mode, mode)


class _Shape(NamedTuple):
    """Ratio and smoothness of prompt, reasoning and answer, checked."""

    ratio: tuple[float, ...]
    smoothness: tuple[float, ...]

    @staticmethod
    def of(mode: str, ratio: Mapping[str, float] | None, smoothness: Mapping[str, float] | None) -> _Shape:
        for place, given in (("align.segment_ratio", ratio), ("align.smoothness", smoothness)):
            for name, value in (given or {}).items():
                if name not in SEGMENT_NAMES:
                    raise RecipeError(
                        f"unknown segment {name!r}", place=place, fix=f"segments are {', '.join(SEGMENT_NAMES)}"
                    )
                most = 1.0 if given is ratio else float("inf")
                if not (0 <= value <= most) or value == float("inf") or (given is ratio and value == 0):
                    bounds = "above 0 and at most 1" if given is ratio else "0 or a finite number above"
                    raise RecipeError(f"{name}: {value}", place=place, fix=f"a number {bounds}")
        ratios, widths = (
            tuple(float((given or {}).get(name, unset)) for name in SEGMENT_NAMES)
            for given, unset in ((ratio, 1.0), (smoothness, 0.0))
        )
        if resolve_time_mode(mode) not in RESAMPLING and (min(ratios) < 1 or max(widths) > 0):
            raise RecipeError(
                f"time mode {mode} takes whole tokens: ratio and smoothness have no meaning",
                place="align.segment_ratio" if min(ratios) < 1 else "align.smoothness",
                fix="leave it out, or time: segment or proportional",
            )
        return _Shape(ratios, widths)


# -- the modes ----------------------------------------------------------------------------------------


def _stretch(
    source_BS: Bool[Tensor, "B S"], target_BT: Bool[Tensor, "B T"], wide_BT: Float[Tensor, "B T"] | None
) -> SparseMap:
    """Members of the target, in order, spread evenly over the members of the source: first on first, last on last."""
    num_source = source_BS.sum(1, keepdim=True)
    last_source, last_target = num_source - 1, (target_BT.sum(1, keepdim=True) - 1).clamp_min(1)
    rank_BT = target_BT.long().cumsum(1) - 1
    # u = i * (S-1) / (T-1) in integers, so that equal lengths give the identity exactly, in any length.
    step_BT = rank_BT * last_source
    low_BT = step_BT.div(last_target, rounding_mode="floor")
    over_BT = step_BT - low_BT * last_target
    live_BT = target_BT & (num_source > 0)
    if wide_BT is None:
        share_BT = over_BT.float() / last_target
        rank_BTK = torch.stack([low_BT, torch.minimum(low_BT + 1, last_source)], dim=-1)
        weight = torch.stack([1 - share_BT, share_BT], dim=-1)
    else:
        half_BT = wide_BT * (last_source / last_target)
        rank_BTK, weight = _windows(low_BT, over_BT / last_target.double(), half_BT * live_BT, last_source)
    index = _place_of_rank(source_BS, rank_BTK.flatten(1)).view(rank_BTK.shape)
    return SparseMap(index, weight * live_BT[..., None], source_BS.shape[1])


def _windows(low_BT: Tensor, share_BT: Tensor, half_BT: Tensor, last_source: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks and weights [B, T, k] of the triangles around u = low + share; see `smoothness` above."""
    place_BT = low_BT + share_BT
    room_BT = torch.minimum(place_BT, last_source - place_BT)  # to the nearer end: windows stay centred on u
    half_BT = torch.minimum(half_BT.double().clamp(max=MAX_HALF_WIDTH), room_BT).clamp_min(1)
    reach = math.ceil(float(half_BT.max())) if half_BT.numel() else 1
    step_K = torch.arange(1 - reach, reach + 1, device=low_BT.device)
    rank_BTK = low_BT[..., None] + step_K
    weight = (1 - (step_K - share_BT[..., None]).abs() / half_BT[..., None]).clamp_min(0)
    inside = (rank_BTK >= 0) & (rank_BTK <= last_source[..., None])
    weight = torch.where(inside, weight, 0.0)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
    nearest = torch.minimum(rank_BTK.clamp_min(0), last_source[..., None].clamp_min(0))
    return nearest, weight.float()


def _read_tokens(segments_BS: Tensor, ratio: tuple[float, ...]) -> Bool[Tensor, "B S"]:
    """The teacher's real tokens, each segment thinned to its ratio."""
    read_BS = segments_BS != PADDING
    for code, share in zip(_SEGMENTS, ratio, strict=True):
        if share == 1:
            continue
        member_BS = segments_BS == code
        count_B = member_BS.sum(1)
        # 0.1 * 30 is a little more than 3 in binary
        taken_B = torch.minimum((count_B.double() * share - 1e-9).ceil().long().clamp_min(1), count_B.clamp_min(1))
        read_BS = read_BS & (spread_members(member_BS, taken_B) | ~member_BS)
    return read_BS


def _by_segment(values: tuple[float, ...], segments_BT: Tensor) -> Float[Tensor, "B T"]:
    return torch.tensor([0.0, *values], device=segments_BT.device)[segments_BT]


def _place_of_rank(member_BS: Bool[Tensor, "B S"], rank_BR: Int[Tensor, "B R"]) -> Int[Tensor, "B R"]:
    """Where the r-th member stands; out-of-range ranks give some valid place (their rows carry no weight)."""
    last = (member_BS.sum(1, keepdim=True) - 1).clamp_min(0)
    return members_first(member_BS).gather(1, torch.minimum(rank_BR.clamp_min(0), last))


# -- the public classes -------------------------------------------------------------------------------


@final
class TimeWarper:
    """`time_map` with its mode and settings fixed, and the shortcut for texts that need no map."""

    def __init__(
        self,
        mode: str = "segment",
        ratio: Mapping[str, float] | None = None,
        smoothness: Mapping[str, float] | None = None,
    ) -> None:
        _Shape.of(mode, ratio, smoothness)  # a wrong setting is told here, not at the first batch
        self.mode, self.ratio, self.smoothness = resolve_time_mode(mode), dict(ratio or {}), dict(smoothness or {})

    def map(self, source_segments_BS: Int[Tensor, "B S"], target_segments_BT: Int[Tensor, "B T"]) -> SparseMap | None:
        """The map, or None where it is the identity at every real token: leave the tensors alone then."""
        settings = {"ratio": self.ratio, "smoothness": self.smoothness}
        if same_places(self.mode, source_segments_BS, target_segments_BT, **settings):
            return None
        return time_map(self.mode, source_segments_BS, target_segments_BT, **settings)

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
