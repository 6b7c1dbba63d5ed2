"""Which teacher tokens take part: full, right (keep the last n), crop (keep the first n: KaVa's baseline).

Only reasoning tokens are ever dropped; prompt and answer stay. Compression removes *source* tokens of an
alignment, it makes no new slots: `time_map(...).masked_source(kept_BS)` empties the rows that read a dropped token
and renormalises the rest. (`MapProjectionAligner.targets` does that for whatever its teacher's `mask_BT` leaves
out, so masking the teacher's KV with `kept_BS` is enough.) Where the target is a fixed number of slots
instead (latent tokens), `selection_map` packs the kept tokens into them. Knows segment codes only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvdistill.core.maps import SparseMap
from kvdistill.core.runtime import AlignmentError, RecipeError
from kvdistill.core.targets import PADDING, REASONING


def kept_tokens(mode: str, segments_BS: Int[Tensor, "B S"], keep: int | None = None) -> Bool[Tensor, "B S"]:
    """True at the teacher tokens that take part; never at padding.

    mode: full | right | crop. keep: how many reasoning tokens right and crop leave (all, where there are fewer).
    Raises RecipeError for another mode or a missing `keep`.
    """
    if mode not in _MODES:
        raise RecipeError(
            f"unknown compression {mode!r}", place="compress.kv_compression", fix=f"one of {', '.join(_MODES)}"
        )
    if mode != "full" and (keep is None or keep < 1):
        raise RecipeError(
            f"{mode} with keep = {keep}", place="compress.keep", fix="say how many reasoning tokens to keep"
        )
    reasoning_BS = segments_BS == REASONING
    return (segments_BS != PADDING) & (~reasoning_BS | _MODES[mode](reasoning_BS, keep or 0))


def selection_map(kept_BS: Bool[Tensor, "B S"], num_slots: int) -> SparseMap:
    """The map [B, num_slots, 1]: slot i takes the i-th kept token, in time order; spare slots are empty (masked).

    Raises AlignmentError where a sample keeps more tokens than there are slots.
    """
    most = int(kept_BS.sum(1).max()) if kept_BS.numel() else 0
    if most > num_slots:
        raise AlignmentError(f"{most} kept tokens for {num_slots} slots", fix="keep fewer tokens, or make more slots")
    order_BS = torch.argsort(kept_BS.to(torch.uint8), dim=1, descending=True, stable=True)
    slot = torch.arange(num_slots, device=kept_BS.device).expand(kept_BS.shape[0], num_slots)
    live = slot < kept_BS.sum(1, keepdim=True)
    index = order_BS.gather(1, slot.clamp(max=kept_BS.shape[1] - 1))
    return SparseMap.take(index, kept_BS.shape[1], live)


def _all(reasoning_BS: Tensor, keep: int) -> Tensor:
    return reasoning_BS


def _last(reasoning_BS: Tensor, keep: int) -> Tensor:
    from_here_BS = reasoning_BS.long().flip(1).cumsum(1).flip(1)
    return reasoning_BS & (from_here_BS <= keep)


def _first(reasoning_BS: Tensor, keep: int) -> Tensor:
    return reasoning_BS & (reasoning_BS.long().cumsum(1) <= keep)


_MODES: dict[str, Callable[[Tensor, int], Tensor]] = {"full": _all, "right": _last, "crop": _first}
