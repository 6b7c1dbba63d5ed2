"""What a mean hides: the questions that a run is worst at, and answers that are no answers. Knows no pages."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvdistill.core.records import Record
from kvdistill.stages.report.compare import SeedRun
from kvdistill.stats import NAN

WORST = 0.1  # of a task's questions, at least one
KINDS = ("empty", "unread", "repeated")  # of degenerate answers; 0 in a column: none of them
LONGEST_PIECE = 31


def degenerate_kind(record: Record) -> int:
    """1: nothing was written; 2: no answer could be read from it; 3: more than half is the same piece again and again
    (what is right is none of these); 0: none, or it is not known what was written."""
    if record.correct or record.mode != "generation":
        return 0
    written = (record.completion if record.completion is not None else record.prediction or "").strip()
    if _repeats(written):
        return 3
    if record.completion is not None and not written:
        return 1
    return 2 if record.prediction is None else 0


def _repeats(written: str) -> bool:
    """Whether it ends in one piece four times or more (one digit, as numbers may: eight), and that is most of it."""
    for size in range(1, min(LONGEST_PIECE, len(written) // 4) + 1):
        piece, times = written[-size:], 8 if written[-size:].isdigit() and size == 1 else 4
        if written.endswith(piece * times):
            while written.endswith(piece * (times + 1)):
                times += 1
            if size * times > len(written) / 2:
                return True
    return False


def tail_of(run: SeedRun) -> dict[str, Any]:
    """Means over tasks: `nll`, `worst` (the mean NLL of the tenth of each task's questions that it is most surprised
    by) and the share of degenerate answers, in all and by kind. NaN where it is not known."""
    tasks, kinds_Q = np.asarray(run.tasks_Q), run.degenerate_Q
    places = [np.flatnonzero(tasks == task) for task in sorted(set(run.tasks_Q))]
    sorted_nll = [np.sort(run.nll_Q[q])[::-1] for q in places]
    worst = [nll[: max(1, round(WORST * len(nll)))].mean() if np.isfinite(nll).all() else NAN for nll in sorted_nll]
    shares = {
        kind: float(np.mean([(kinds_Q[q] == code).mean() for q in places])) if kinds_Q is not None else NAN
        for code, kind in enumerate(KINDS, start=1)
    }
    return {"nll": run.macro("nll"), "worst": float(np.mean(worst)), "degenerate": sum(shares.values()), **shares}
