"""What a run costs, added up: the parts of a ledger's `flops`, whole or divided among the runs that share them.

One convention for all of it. FLOPs are those of matrix products, a multiply-add as two, over tokens that are no
padding; attention counts every pair of tokens of a text, also those that a causal mask hides. Sums, norms, softmax and
the optimiser's own arithmetic are not counted. A part is a number, or numbers by teacher where teachers have a share:

    student_forward, student_backward    of the student, as it was trained; its head on all tokens
    aligner                              projections of both sides, and attention where that is compared
    teachers                             one pass over the stored texts; online: over every text of every step
    fit, layer_maps                      what is computed once before training, of both models
    teacher_training                     of teachers that are trained on the spot; of others nobody knows it here
    generation                           texts that teachers write for an arm
    tuning                               trainings that were spent on choosing the arm's own values, all of them
    measuring                            learning curves: apart, in no total

Knows no models and no torch: `arms/costs.py` finds the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

STUDENT = ("student_forward", "student_backward")
OWN = (*STUDENT, "aligner")
SHARED = ("teachers", "fit", "layer_maps", "teacher_training", "generation", "tuning")
TOLERANCE = 0.01  # how far two budgets that are called equal may be apart
Flops = Mapping[str, Any]
Keys = Mapping[str, Mapping[str, str]]  # part -> teacher -> what runs that share it have alike (a ledger's `shared`)
Sharers = Counter[tuple[str, str]]  # (part, key) -> runs


def count_sharers(runs: Iterable[Keys]) -> Sharers:
    """Over all runs of a study (arms with seeds)."""
    return Counter((part, key) for run in runs for part, keys in run.items() for key in keys.values())


def student_flops(flops: Flops) -> float:
    return float(sum(flops.get(part) or 0 for part in STUDENT))


def amortised(part: str, flops: Flops, shared: Keys, sharers: Sharers) -> dict[str, float]:
    """A part's numbers by teacher, each divided among the runs that share it."""
    keys = shared.get(part, {})
    return {
        name: amount / max(1, sharers[part, keys[name]] if name in keys else 1)
        for name, amount in (flops.get(part) or {}).items()
    }


def total_flops(flops: Flops, shared: Keys | None = None, sharers: Sharers | None = None) -> float:
    """All but measuring. With `shared` and `sharers` what several runs share is divided among them."""
    own = float(sum(flops.get(part) or 0 for part in OWN))
    parts = [amortised(part, flops, shared or {}, sharers if sharers is not None else Counter()) for part in SHARED]
    return own + sum(amount for part in parts for amount in part.values())


def trial_flops(flops: Flops, shared: Keys, study: Sharers, trials: Sharers) -> float:
    """What a trial of tuning adds to the study: its own parts, and of the shared ones those that no run of the study
    has alike (of the tuning seed), divided among the trials that do."""
    added = float(sum(flops.get(part) or 0 for part in OWN))
    for part in SHARED:
        for name, amount in amortised(part, flops, shared, trials).items():
            key = shared.get(part, {}).get(name)
            added += 0.0 if key is not None and study[part, key] else amount
    return added


def apart(x: float, y: float) -> float:
    """By what share of the larger one two budgets differ."""
    return abs(x - y) / max(x, y) if max(x, y) > 0 else 0.0
