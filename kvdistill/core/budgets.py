"""`training_budget_config.json`: what every arm will spend, written before the first training; and what was spent.

`arms/budget.py` computes it; here is what is asked of it without torch: the steps of arms that are matched, and how far
what was spent is from what was planned.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvdistill.core.costs import TOLERANCE, apart
from kvdistill.core.marks import read_mark
from kvdistill.core.recipe import ArmRecipe, ParityRecipe, Recipe

FILE = "training_budget_config.json"
WORDS = {
    "steps": "steps",
    "data": "problems seen",
    "student_flops": "student FLOPs",
    "total_flops": "total FLOPs, not amortised",
    "amortised_flops": "total FLOPs, amortised",
}


def budget_path(run: Path) -> Path:
    return run / FILE


def read_budgets(run: Path) -> dict[str, Any]:
    """What is planned, by arm; nothing where there is no such file, or a damaged one: it is made anew then."""
    return (read_mark(budget_path(run)) or {}).get("arms", {})


def figure_of(parity: ParityRecipe) -> str:
    """The name of what is to be equal, in plans and in costs of runs."""
    return "amortised_flops" if parity.parity == "total_flops" and parity.amortised else parity.parity


def continued(recipe: Recipe, arms: Mapping[str, ArmRecipe]) -> dict[str, str]:
    """Arm -> the one that it goes on from, where `report.curves` trains the same at a smaller budget.

    Only where the end of the shorter training is a point on the way of the longer one: with a constant learning rate
    (after its warm-up), and nothing else that is a share of the steps or looks at what comes later (`train.select`,
    `train.patience`). Others are trained apart.
    """
    found: dict[str, str] = {}
    for base in recipe.report.curves.arms if recipe.report.curves else ():
        assert recipe.report.curves is not None
        arm = arms[base]
        shares = arm.needs_kv and (0 < arm.loss.kv_warmup < 1 or arm.loss.kv_fade > 0)
        same_problems = recipe.report.curves.of_steps
        goes_on = arm.train.schedule == "constant" and not shares and not arm.train.asks_validation and same_problems
        names = list(recipe.report.curves.names(base).values()) if goes_on else []
        found |= {longer: shorter for shorter, longer in itertools.pairwise(names)}
    return found


def differences(planned: Mapping[str, Any], spent: Mapping[str, float]) -> list[str]:
    """What an arm spent more or less of than planned, by more than the tolerance, in words.

    Nothing of one that ends when validation stops improving; of one whose texts were still to be written only steps.
    """
    found: list[str] = []
    figures = ("steps", "data") if planned.get("estimated") else () if planned.get("at_most") else tuple(WORDS)
    for figure, words in WORDS.items():
        if figure not in figures:
            continue
        plan, cost = planned.get(figure), spent.get(figure)
        if plan is not None and cost is not None and (share := apart(plan, cost)) > TOLERANCE:
            found.append(f"{words}: {cost:.4g} spent, {plan:.4g} planned ({share:.1%} apart)")
    return found
