"""Streaming the covariances that a shared space is fitted from: two layer slots, a student and two teachers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.alignment import Case
from kvdistill.align.shared.moments import PairedMoments

SLOTS, BATCH, TOKENS, CHANNELS = 2, 8, 256, (128, 384, 256)


def cases() -> Iterator[Case]:
    """No bar: a part of calibration, once per study."""
    x_N_LBTC = [torch.randn(SLOTS, BATCH, TOKENS, c) + 2 for c in CHANNELS]
    mask_BT = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    moments = PairedMoments(CHANNELS, SLOTS)
    moments.update(x_N_LBTC, mask_BT)
    loops = _loops(x_N_LBTC, mask_BT)
    for layer in range(SLOTS):
        if not torch.allclose(moments.covariance(layer)[1], loops[layer], atol=1e-4):
            raise AssertionError(f"covariance of slot {layer} differs from the loops'")
    products = sum(a * b for i, a in enumerate(CHANNELS) for b in CHANNELS[i:])
    yield Case(
        name="shared space, moments of 128 + 384 + 256 channels, 2 slots, 2,048 tokens",
        ours=lambda: moments.update(x_N_LBTC, mask_BT),
        loops=lambda: _loops(x_N_LBTC, mask_BT),
        flops=2 * SLOTS * BATCH * TOKENS * products,
    )


def _loops(x_N_LBTC: list[Tensor], mask_BT: Tensor) -> list[Tensor]:
    """One text after another, all models side by side in fp64, with a pass of its own for the means."""
    found = []
    for layer in range(SLOTS):
        every = torch.cat([x[layer] for x in x_N_LBTC], -1).double()
        mean = every[mask_BT].mean(0)
        total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for rows, mask_T in zip(every, mask_BT, strict=True):
            centred = rows[mask_T] - mean
            total += centred.T @ centred
        found.append(total / int(mask_BT.sum()))
    return found
