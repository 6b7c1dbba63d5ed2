"""Segment resampling with linear interpolation: 28 layers, K and V, four examples, 4 heads of size 128.

Ours is one `SparseMap` for all layers, applied to each tensor, into memory that is there before (as the copy that
the bound comes from). The loop interpolates each segment of each example of each layer with `F.interpolate`.
The teacher's tensors lie as a forward pass leaves them, heads before tokens; the second pair of cases reads one stored
batch, tokens first and all layers side by side, in one call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.alignment import Case
from kvdistill.align.time import time_map

LAYERS, BATCH, HEADS, SIZE = 28, 4, 4, 128
YARDSTICKS = {(256, 128): 47.0, (512, 256): 93.0}
PARTS = (0.25, 0.6, 0.15)  # prompt, reasoning, answer


def cases() -> Iterator[Case]:
    for S, T in YARDSTICKS:
        yield _layers_case(S, T)
        yield _block_case(S, T)


def _layers_case(S: int, T: int) -> Case:
    theirs, mine = _segments(S), _segments(T)
    mapping = time_map("segment", theirs, mine)
    tensors = [torch.randn(BATCH, HEADS, S, SIZE) for _ in range(2 * LAYERS)]
    outs = [torch.empty(BATCH, HEADS, T, SIZE) for _ in tensors]

    def ours() -> list[Tensor]:
        return [mapping.apply(x, 2, out=out) for x, out in zip(tensors, outs, strict=True)]

    def loops() -> list[Tensor]:
        return [_resampled(x, theirs, mine) for x in tensors]

    _check_equal(ours(), loops())
    return _case(f"resample {S}->{T}, layer by layer", S, T, ours, loops)


def _block_case(S: int, T: int) -> Case:
    theirs, mine = _segments(S), _segments(T)
    mapping = time_map("segment", theirs, mine)
    block = torch.randn(BATCH, S, LAYERS, 2, HEADS, SIZE)
    out = torch.empty(BATCH, T, LAYERS, 2, HEADS, SIZE)
    views = [block[:, :, m, side].transpose(1, 2) for m in range(LAYERS) for side in (0, 1)]
    made = [out[:, :, m, side].transpose(1, 2) for m in range(LAYERS) for side in (0, 1)]

    def ours() -> list[Tensor]:
        mapping.apply(block, 1, out=out)
        return made

    def loops() -> list[Tensor]:
        return [_resampled(x, theirs, mine) for x in views]

    _check_equal(ours(), loops())
    return _case(f"resample {S}->{T}, a stored batch", S, T, ours, loops)


def _case(name: str, S: int, T: int, ours, loops) -> Case:
    moved = LAYERS * 2 * BATCH * HEADS * SIZE * (S + T) * 4
    return Case(name, ours, loops, bytes_moved=moved, most_bounds=2.0, yardstick_ms=YARDSTICKS[S, T])


def _segments(num_tokens: int) -> Tensor:
    """Codes [B, S] with other borders in every example."""
    rows = []
    for b in range(BATCH):
        prompt, answer = int(num_tokens * PARTS[0]) - b, int(num_tokens * PARTS[2]) + 2 * b
        rows.append([1] * prompt + [2] * (num_tokens - prompt - answer) + [3] * answer)
    return torch.tensor(rows)


def _resampled(x_BHSD: Tensor, theirs_BS: Tensor, mine_BT: Tensor) -> Tensor:
    out = x_BHSD.new_zeros(*x_BHSD.shape[:2], mine_BT.shape[1], x_BHSD.shape[3])
    for b in range(x_BHSD.shape[0]):
        for code in (1, 2, 3):
            source, target = (theirs_BS[b] == code).nonzero()[:, 0], (mine_BT[b] == code).nonzero()[:, 0]
            piece = x_BHSD[b, :, source].transpose(1, 2)
            stretched = interpolate(piece, size=len(target), mode="linear", align_corners=True)
            out[b, :, target] = stretched.transpose(1, 2)
    return out


def _check_equal(ours: list[Tensor], loops: list[Tensor]) -> None:
    for a, b in zip(ours, loops, strict=True):
        if not torch.allclose(a, b, atol=2e-4, rtol=1e-4):  # the loop's places are fp32 products
            raise AssertionError(f"resampling differs by {(a - b).abs().max().item():.3g}")
