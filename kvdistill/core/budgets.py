"""`training_budget_config.json`: what every arm will spend, written before the first training; and what was spent.

`arms/budget.py` computes it; here is what is asked of it without torch: the steps of arms that are matched, in what two
arms will have spent alike, and how far what was spent is from what was planned.
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


def planned_parities(
    arm: str, baseline: str, arms: Mapping[str, ArmRecipe], planned: Mapping[str, Any]
) -> list[ParityRecipe]:
    """In what two arms will have spent alike (to 1 %), from the plan; what comes first says least about teachers.

    steps (and tokens, where texts are the same); what one is matched to the other in; data; student FLOPs; all FLOPs,
    amortised. Without a plan from the recipe, which knows steps and problems of arms that are not matched; where it
    cannot tell, steps, and the ledgers decide. Arms that both end by validation have as many steps as each needs.
    """
    one, other = arms[arm], arms[baseline]
    matched = [
        ParityRecipe(parity=match.parity, amortised=match.amortised)
        for match, name in ((one.match, baseline), (other.match, arm))
        if match is not None and match.arm == name
    ]
    if one.train.patience is not None and other.train.patience is not None:
        return [ParityRecipe()]
    costs = [_known_costs(name, arms[name], planned) for name in (arm, baseline)]
    if not all(costs):
        return [*matched, ParityRecipe()]

    def alike(figure: str) -> bool:
        both = [cost[figure] for cost in costs if figure in cost]
        return len(both) == 2 and apart(*both) <= TOLERANCE

    same_texts = (one.texts, one.texts_from) == (other.texts, other.texts_from)
    unlike_tokens = same_texts and all("tokens" in cost for cost in costs) and not alike("tokens")
    found = [ParityRecipe()] if alike("steps") and not unlike_tokens else []
    others = [ParityRecipe(parity=parity) for parity in ("data", "student_flops", "total_flops")]
    return found + matched + [parity for parity in others if alike(figure_of(parity)) and parity not in matched]


def _known_costs(name: str, arm: ArmRecipe, planned: Mapping[str, Any]) -> dict[str, float]:
    """What is known of an arm's budget before it is trained; of texts that are still to be written only how many."""
    if name in planned:
        figures = ("steps", "data") if planned[name].get("estimated") else (*WORDS, "tokens")
        return {key: planned[name][key] for key in figures if planned[name].get(key) is not None}
    if arm.match is not None:
        return {}
    train = arm.train
    return {"steps": train.steps, "data": train.steps * train.batch_size * train.accumulation}


def not_comparable(arm: str, others: list[str], arms: Mapping[str, ArmRecipe], planned: Mapping[str, Any]) -> str:
    """Why an arm and others have nothing in common that they could be compared at, and what to declare."""
    baseline = others[0]
    rules = [(arms[name].train.select, arms[name].train.patience) for name in (arm, baseline)]
    if rules[0] != rules[1]:
        return (
            f"not comparable: {arm} and {baseline} differ in which weights are kept and when training ends; "
            "give both the same train.select and train.patience"
        )
    costs = [_known_costs(name, arms[name], planned) for name in (arm, baseline)]
    said = [f"{words} {costs[0][key]:.4g} against {costs[1][key]:.4g}" for key, words in WORDS.items()
            if key != "total_flops" and all(key in cost for cost in costs)]  # fmt: skip
    return (
        f"not comparable: {arm} and {' or '.join(others)} are trained with unlike budgets ({', '.join(said)}); "
        f"add an arm like {baseline} with match: {{arm: {arm}, parity: total_flops}} and list it in report.comparisons "
        f"as {{arm: {arm}, baseline: ITS NAME, parity: total_flops}}"
    )


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
        compares = arm.needs_kv or arm.learns_from_itself
        shares = compares and (0 < arm.loss.kv_warmup < 1 or arm.loss.kv_fade > 0)
        shares = shares or (arm.thinks and 0 < arm.latent.start_after < 1)
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
