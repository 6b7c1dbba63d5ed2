"""CKA of every student layer with every teacher layer: at the sizes of real models, and over a long stream.

The bound of kernel space is that of whole Gram matrices and of their products across models. Ours makes each pair of
vectors once and so comes in below it; against the half alone its ratio is about twice as large. In feature space it is
that of X'Y for every pair of layers and of X'X and Y'Y for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.alignment import Case
from kvdistill.core.cka import CKAAccumulator

LAYERS, VECTORS, STUDENT, TEACHER = 28, 1024, 896, 1536
LONG, BATCH, FEW, NARROW, WIDE = 50_000, 1000, 4, 256, 320
YARDSTICK_MS = 23_085
SHARED = 64  # directions that both models see


def cases() -> Iterator[Case]:
    yield _all_layers()
    yield _long_stream()


def _all_layers() -> Case:
    x, y = _related(LAYERS, VECTORS, TEACHER, STUDENT)
    expected: list[Tensor] = []

    def ours() -> Tensor:
        found = CKAAccumulator()
        found.update(x, y)
        assert found.space == "kernel"
        return found.matrix()

    def loops() -> Tensor:  # half a minute: compared with ours where it is timed, not twice
        found = plain_cka(x, y)
        torch.testing.assert_close(expected[0], found.double(), atol=1e-4, rtol=0)
        return found

    expected.append(ours())
    return Case(
        f"CKA {LAYERS} x {LAYERS} layers, d {STUDENT}/{TEACHER}, n {VECTORS:,}",
        ours,
        loops,
        flops=2 * VECTORS**2 * LAYERS * (STUDENT + TEACHER + LAYERS),
        most_bounds=1.5,
        yardstick_ms=YARDSTICK_MS,
        rounds=7,
    )


def _long_stream() -> Case:
    x, y = _related(FEW, BATCH, WIDE, NARROW)
    cuts = [slice(i, i + BATCH) for i in range(0, LONG, BATCH)]

    def batch(i: int) -> tuple[Tensor, Tensor]:
        return x.roll(i, 0), y.roll(i, 2)  # other vectors each time, made as they are needed

    def ours() -> Tensor:
        found = CKAAccumulator()
        for i in range(len(cuts)):
            found.update(*batch(i))
        assert found.space == "feature" and found.num_vectors == LONG
        return found.matrix()

    def loops() -> Tensor:
        # the formula itself needs 10 GB a matrix here: what can be written plainly is one feature product per pair
        x_, y_ = (torch.cat(part, 1) for part in zip(*(batch(i) for i in range(len(cuts))), strict=True))
        return torch.stack([torch.stack([_feature_cka(x, y) for x in x_]) for y in y_])

    torch.testing.assert_close(ours(), loops().double(), atol=1e-4, rtol=0)
    products = FEW * FEW * WIDE * NARROW + FEW * (WIDE**2 + NARROW**2)
    name = f"CKA streamed, {FEW} x {FEW} layers, d {NARROW}/{WIDE}, n {LONG:,}"
    return Case(name, ours, loops, flops=2 * LONG * products)


def _related(layers: int, n: int, d: int, e: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    common = torch.randn(n, SHARED, generator=g)
    x, y = (
        torch.randn(layers, n, size, generator=g).add_(common @ torch.randn(layers, SHARED, size, generator=g), alpha=a)
        for size, a in ((d, 0.2), (e, 0.1))
    )
    return x, y


def plain_cka(x_MNC: Tensor, y_LND: Tensor) -> Tensor:
    """Pair by pair, as it is published: a Gram matrix per layer, then for every pair of layers three HSIC."""
    k_, l_ = ([(z := z_NC - z_NC.mean(0)) @ z.T for z_NC in model] for model in (x_MNC, y_LND))
    for gram in (*k_, *l_):
        gram.fill_diagonal_(0)
    return torch.stack([torch.stack([_hsic(k, l) / (_hsic(k, k) * _hsic(l, l)).sqrt() for k in k_]) for l in l_])


def _hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    n = len(k_NN)
    both = (k_NN.sum(0) * l_NN.sum(0)).sum()
    sums = k_NN.sum() * l_NN.sum() / ((n - 1) * (n - 2))
    return ((k_NN * l_NN).sum() + sums - 2 / (n - 2) * both) / (n * (n - 3))


def _feature_cka(x_NC: Tensor, y_ND: Tensor) -> Tensor:
    x, y = x_NC - x_NC.mean(0), y_ND - y_ND.mean(0)
    n, a, b = len(x), x.square().sum(1), y.square().sum(1)

    def hsic(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:  # means are zero: K~1 = -a, L~1 = -b
        return (u.T @ v).square().sum() - n / (n - 2) * (p * q).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2))

    return hsic(x, y, a, b) / (hsic(x, x, a, a) * hsic(y, y, b, b)).sqrt()
