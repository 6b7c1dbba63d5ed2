"""Ridge fit of 28 layers, 512 -> 256 channels, 100,000 positions, K and V: update by update, and the solution.

The whole stream would be 17 GB. One block of 4,000 positions of all layers stands for all 25 of it, for K and for V:
neither side can tell, since normal equations only add. That memory does not grow with positions is the point.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.alignment import Case
from kvdistill.align.ridge import RidgeFit

LAYERS, NUM_IN, NUM_OUT = 28, 512, 256
BLOCK, UPDATES = 4000, 25
L2 = 1e-2


def fit(x: Tensor, y: Tensor, updates: int) -> list[Tensor]:
    mask = torch.ones(x.shape[1], dtype=torch.bool)
    solved: list[Tensor] = []
    for _kind in ("k", "v"):
        ridge = RidgeFit(NUM_IN, NUM_OUT, x.shape[0])
        for _ in range(updates):
            ridge.update(x, y, mask)
        solved += ridge.solve(L2)
    return solved


def fit_in_loops(x: Tensor, y: Tensor, updates: int) -> list[Tensor]:
    """Normal equations layer by layer in fp64, of rows with a column of ones; the mean is not penalised."""
    solved: list[Tensor] = []
    for _kind in ("k", "v"):
        weights, biases = [], []
        for layer in range(x.shape[0]):
            xx = torch.zeros(NUM_IN + 1, NUM_IN + 1, dtype=torch.float64)
            xy = torch.zeros(NUM_IN + 1, NUM_OUT, dtype=torch.float64)
            for _ in range(updates):
                rows = torch.cat([x[layer], torch.ones(x.shape[1], 1)], 1).double()
                xx += rows.T @ rows
                xy += rows.T @ y[layer].double()
            count = xx[-1, -1]
            variance = xx.diagonal()[:-1] / count - (xx[-1, :-1] / count).square()
            penalty = torch.full((NUM_IN + 1,), float(L2 * count * variance.mean()), dtype=torch.float64)
            penalty[-1] = 0
            solution = torch.linalg.solve(xx + penalty.diag(), xy)
            weights.append(solution[:-1])
            biases.append(solution[-1])
        solved += [torch.stack(weights), torch.stack(biases)]
    return solved


def cases() -> Iterator[Case]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(LAYERS, BLOCK, NUM_IN, generator=random).add_(1)
    y = torch.empty(LAYERS, BLOCK, NUM_OUT)
    for layer in range(LAYERS):
        y[layer] = x[layer] @ torch.randn(NUM_IN, NUM_OUT, generator=random) + 2
    few = slice(0, 2)
    for one, other in zip(fit(x[few], y[few], 2), fit_in_loops(x[few], y[few], 2), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    yield Case(
        name="ridge fit 512 -> 256, 28 layers, 100,000 positions, K and V",
        ours=lambda: fit(x, y, UPDATES),
        loops=lambda: fit_in_loops(x, y, UPDATES),
        flops=2 * LAYERS * 2 * UPDATES * BLOCK * NUM_IN * (NUM_IN + NUM_OUT),
        most_bounds=1.5,
        rounds=3,
    )
