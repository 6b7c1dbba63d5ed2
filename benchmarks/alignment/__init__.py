"""Every axis of alignment by itself, at the sizes of real models: milliseconds, the hardware's bound, a plain loop.

*Bound* is what the work cannot go below on this machine: the bytes it must read and write over the copy bandwidth,
or its multiply-adds over the matrix-product rate, both measured between the timed calls of the same run.
Each case comes with a plain loop that computes the same numbers; they are compared before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.report import Row, print_table, save
from benchmarks.timing import Ratio, interleave, paired_ratio
from benchmarks.toy import THREADS

COPY_MB = 256
GEMM_SIZE = 1536
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """One line of the table. `ours` and `loops` do the same work from the same inputs.

    bytes_moved: least bytes that must be read and written. flops: least multiply-adds times 2, in fp32. The bound is
    the larger of the two times. most_bounds: the bar as a multiple of the bound; most_ms: the bar in milliseconds.
    yardstick_ms: an existing implementation on a machine like this, for orientation only.
    """

    name: str
    ours: Callable[[], object]
    loops: Callable[[], object]
    bytes_moved: int = 0
    flops: int = 0
    most_bounds: float | None = None
    most_ms: float | None = None
    yardstick_ms: float | None = None
    rounds: int = ROUNDS
    loop_rounds: int = 1


def cases() -> Iterator[Case]:
    """One after another, so that each one's tensors are gone before the next one's are made."""
    from benchmarks.alignment import cka, compression, losses, projectors, resampling, ridge, tokens

    for part in (resampling, cka, tokens, compression, losses, projectors, ridge):
        yield from part.cases()


def run() -> bool:
    """The table and its JSON; True where every bar is met."""
    torch.set_num_threads(THREADS)
    device = torch.device("cpu")
    print(f"alignment: {THREADS} threads, fp32; bound = bytes / copy bandwidth or FLOPs / matrix-product rate")
    found = [_measure(case, device) for case in cases()]
    ratios = [row for one in found for row in one["rows"]]
    print_table("against the bar", [row for row in ratios if row.bar is not None])
    print_table("times as fast as the plain loop", [row for row in ratios if row.bar is None])
    tables = {"cases": [one | {"rows": [row.as_dict() for row in one["rows"]]} for one in found]}
    save("alignment", {"threads": THREADS, "device": device.type}, tables, device)
    return all(row.met is not False for row in ratios)


def _measure(case: Case, device: torch.device) -> dict[str, object]:
    source = torch.randn(COPY_MB << 18)
    target = torch.empty_like(source)
    left = torch.randn(GEMM_SIZE, GEMM_SIZE)
    product = torch.empty_like(left)
    calls: dict[str, Callable[[], object]] = {
        "ours": case.ours,
        "copy": lambda: target.copy_(source),
        "gemm": lambda: torch.mm(left, left, out=product),
    }
    taken = {
        n: [m.wall for m in ms] for n, ms in interleave(calls, warm_up=2, rounds=case.rounds, device=device).items()
    }
    loop = [m.wall for m in interleave({"l": case.loops}, warm_up=0, rounds=case.loop_rounds, device=device)["l"]]
    bandwidth = [2 * source.numel() * 4 / s for s in taken["copy"]]
    rate = [2 * GEMM_SIZE**3 / s for s in taken["gemm"]]
    bound = [max(case.bytes_moved / b, case.flops / r) for b, r in zip(bandwidth, rate, strict=True)]
    ours_ms = statistics.median(taken["ours"]) * 1e3
    rows = []
    if case.most_bounds is not None:
        rows.append(Row(f"{case.name}: times the bound", paired_ratio(taken["ours"], bound), bar=case.most_bounds))
    if case.most_ms is not None:
        spread = Ratio(ours_ms, min(taken["ours"]) * 1e3, max(taken["ours"]) * 1e3)
        rows.append(Row(f"{case.name}: ms", spread, bar=case.most_ms, note="[fastest, slowest]"))
    rows.append(Row(case.name, paired_ratio([statistics.median(loop)] * case.rounds, taken["ours"]), at_least=True))
    bound_ms = statistics.median(bound) * 1e3
    yardstick = "" if case.yardstick_ms is None else f", yardstick {case.yardstick_ms:g} ms"
    loop_ms = statistics.median(loop) * 1e3
    print(f"  {case.name}: ours {ours_ms:.2f} ms, bound {bound_ms:.2f} ms, loops {loop_ms:.0f} ms{yardstick}")
    return {
        "name": case.name,
        "ms": round(ours_ms, 3),
        "bound_ms": round(bound_ms, 3),
        "loop_ms": round(loop_ms, 3),
        "copy_gb_per_s": round(statistics.median(bandwidth) / 1e9, 2),
        "gemm_gflop_per_s": round(statistics.median(rate) / 1e9, 1),
        "yardstick_ms": case.yardstick_ms,
        "rows": rows,
    }
