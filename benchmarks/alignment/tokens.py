"""Token map of a batch whose teacher and student cut the same text differently: 250 to 194 tokens, 32 texts.

The plain loop is the published way: for every student token all teacher tokens are looked at, one pair at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.alignment import Case
from kvdistill.align.tokens import token_map
from kvdistill.core.segments import TEXT

BATCH, TEACHER_TOKENS, STUDENT_TOKENS, CHARACTERS = 32, 250, 194, 900
YARDSTICK_MS = 39  # a pair


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    source_spans_BS2 = torch.stack([_segmentation(TEACHER_TOKENS, generator) for _ in range(BATCH)])
    target_spans_BT2 = torch.stack([_segmentation(STUDENT_TOKENS, generator) for _ in range(BATCH)])
    source_roles_BS = torch.full((BATCH, TEACHER_TOKENS), TEXT)
    target_roles_BT = torch.full((BATCH, STUDENT_TOKENS), TEXT)

    def ours() -> object:
        return token_map(source_spans_BS2, target_spans_BT2, source_roles_BS, target_roles_BT)

    pairs = list(zip(source_spans_BS2.tolist(), target_spans_BT2.tolist(), strict=True))
    found = token_map(source_spans_BS2, target_spans_BT2, source_roles_BS, target_roles_BT)
    expected_BTS = torch.tensor([overlap_loops(source, target) for source, target in pairs])
    if not torch.allclose(found.to_dense(), expected_BTS, atol=1e-6):
        raise AssertionError("the token map is not what the loop gives")
    read = [
        x.numel() * x.element_size() for x in (source_spans_BS2, target_spans_BT2, source_roles_BS, target_roles_BT)
    ]
    written = [x.numel() * x.element_size() for x in (found.index, found.weight)]
    yield Case(
        f"token map {TEACHER_TOKENS} x {STUDENT_TOKENS}, batch {BATCH}",
        ours,
        lambda: [overlap_loops(source, target) for source, target in pairs],
        bytes_moved=sum(read) + sum(written),
        most_ms=1.0 * BATCH,
        yardstick_ms=YARDSTICK_MS * BATCH,
    )


def overlap_loops(source: list[list[float]], target: list[list[float]]) -> list[list[float]]:
    """Rows of weights: intersection over union of every pair of spans, each row divided by its sum."""
    rows = []
    for target_start, target_end in target:
        row = []
        for source_start, source_end in source:
            shared = max(0.0, min(source_end, target_end) - max(source_start, target_start))
            union = (source_end - source_start) + (target_end - target_start) - shared
            row.append(shared / union)
        total = sum(row)
        rows.append([weight / total for weight in row] if total > 0 else row)
    return rows


def _segmentation(num_tokens: int, generator: torch.Generator) -> Tensor:
    """[num_tokens, 2]: a text of CHARACTERS in tokens of random widths, from half to one and a half times the mean."""
    edges = (torch.rand(num_tokens, generator=generator) + 0.5).cumsum(0)
    cuts = (edges[:-1] / edges[-1] * CHARACTERS).round()
    return torch.stack([torch.cat([torch.zeros(1), cuts]), torch.cat([cuts, torch.tensor([float(CHARACTERS)])])], dim=1)
