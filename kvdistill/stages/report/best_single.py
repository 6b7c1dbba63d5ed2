"""What `best-single` stands for in a finished study: chosen on validation problems, never on the test questions.

The rule is `core.family.best_single_rule`, frozen in `declared.json` before the first student is trained; the figures
are the last validation points that training logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvdistill.core.family import BEST_SINGLE, Pair
from kvdistill.stats import NAN

Logs = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]  # arm -> seed -> rows of log.jsonl


class Choice(NamedTuple):
    """arm: None where none could be chosen, for this `reason`. validation: per candidate its mean accuracy and NLL."""

    arm: str | None
    validation: dict[str, dict[str, float]]
    reason: str = ""

    def stands_in(self, pair: Pair) -> Pair:
        """The pair with the chosen arm in place of the word."""
        arm, baseline = (self.arm if name == BEST_SINGLE and self.arm else name for name in pair)
        return arm, baseline


def choose_best_single(candidates: Sequence[str], logs: Logs, seeds: Sequence[int], primary: str) -> Choice:
    """The best of the candidates by the mean over all seeds of the last validation point's `primary` figure.

    Of equal ones that with the better other figure, then the first. One candidate needs no figures.
    """
    found: dict[str, dict[str, float]] = {}
    missing = []
    for arm in candidates:
        points = {seed: [row["val"] for row in logs.get(arm, {}).get(seed, ()) if "val" in row] for seed in seeds}
        for figure in ("accuracy", "nll"):
            last = {seed: rows[-1].get(figure) for seed, rows in points.items() if rows}
            known = [value for value in last.values() if value is not None and math.isfinite(value)]
            gaps = [seed for seed in seeds if last.get(seed) not in known]
            found.setdefault(arm, {})[figure] = math.fsum(known) / len(known) if not gaps else NAN
            if gaps and figure == primary:
                missing.append(f"{arm} seed {', '.join(map(str, gaps))}")
    if len(candidates) == 1:
        return Choice(candidates[0], found)
    if missing or not candidates:
        what = f"no validation {primary} of {'; '.join(missing)}" if missing else "no arm has one teacher"
        return Choice(None, found, f"{BEST_SINGLE} cannot be chosen: {what}")

    def badness(arm: str) -> tuple[float, float]:
        of = {"accuracy": -found[arm]["accuracy"], "nll": found[arm]["nll"]}
        first, then = of.pop(primary), next(iter(of.values()))
        return first, math.inf if math.isnan(then) else then

    return Choice(min(candidates, key=badness), found)
