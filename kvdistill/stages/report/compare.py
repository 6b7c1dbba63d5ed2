"""Two arms side by side: may they be compared at all, and if so, what does the declared family of comparisons say?

Works on `SeedRun`s in memory. Knows nothing of files or pages; the arithmetic is `kvdistill.stats`.
A comparison that would not mean anything is not computed: its result carries `refused` with every reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kvdistill import stats
from kvdistill.core.budgets import figure_of
from kvdistill.core.costs import TOLERANCE, apart
from kvdistill.core.family import MIN_SEEDS
from kvdistill.core.recipe import ParityRecipe
from kvdistill.stats import NAN

STEPS = ParityRecipe()
LEDGER = (("tokens_nonpadding", "tokens"), ("optimiser_steps", "steps"))
FINGERPRINTS = {
    "data_fingerprint": "training data",
    "init_fingerprint": "initial weights",
    "order_fingerprint": "data order",
}
_NO_PAIREDT = stats.PairedT(NAN, NAN, NAN, 0, NAN, NAN, NAN, "refused")
_NO_EFFECT = stats.Effect(NAN, NAN, "refused")
_NO_TOST = stats.Tost(NAN, NAN, NAN, "refused")
_NO_INTERVAL = stats.Interval(NAN, NAN, NAN, NAN, "refused")
_NO_VERDICT = stats.Verdict("refused", "refused")


@dataclass(frozen=True)
class SeedRun:
    """One training run as evaluation saw it: one entry per question, in the order of `keys`, plus its budget.

    costs: what the ledger says it spent, all in all: steps, data (problems seen), tokens, student_flops, total_flops,
    amortised_flops; those that are known.
    keys: (task, id, style), unique. nll: mean per answer token; nll_reasoning: per token of the reasoning before it;
    NaN where unknown. degenerate: of each answer what it is in place of one (`tail.degenerate_kind`).
    """

    keys: tuple[tuple[str, str, str], ...]
    doc_hashes: tuple[str | None, ...]
    prompt_hashes: tuple[str | None, ...]
    correct_Q: np.ndarray
    nll_Q: np.ndarray
    tokens_out_Q: np.ndarray
    ledger: Mapping[str, Any] = field(default_factory=dict)
    nll_reasoning_Q: np.ndarray | None = None
    degenerate_Q: np.ndarray | None = None
    costs: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def tasks_Q(self) -> list[str]:
        return [task for task, _, _ in self.keys]

    @cached_property
    def _places(self) -> dict[str, np.ndarray]:
        """Task -> where its questions stand."""
        tasks = np.asarray(self.tasks_Q)
        return {task: np.flatnonzero(tasks == task) for task in sorted(set(self.tasks_Q))}

    def column(self, figure: str) -> np.ndarray:
        if figure == "nll_reasoning":
            return np.full(len(self.keys), NAN) if self.nll_reasoning_Q is None else self.nll_reasoning_Q
        return {"accuracy": self.correct_Q, "nll": self.nll_Q, "tokens_out": self.tokens_out_Q}[figure]

    def by_task(self, figure: str) -> dict[str, float]:
        """Mean of the figure over each task's questions."""
        values = self.column(figure)
        return {task: float(values[places].mean()) for task, places in self._places.items()}

    def macro(self, figure: str) -> float:
        """Mean over tasks: every task counts the same, however many questions it has."""
        means = list(self.by_task(figure).values())
        if figure == "nll_reasoning":  # tasks whose answers have none before them are no reason to show none
            means = [mean for mean in means if not np.isnan(mean)]
        return float(np.mean(means)) if means else NAN


Runs = Mapping[int, SeedRun]


def find_refusals(
    arm: Runs, baseline: Runs, seeds: Sequence[int], figure: str = "accuracy", parity: ParityRecipe = STEPS
) -> list[str]:
    """Every reason not to compare two arms; empty if they may be compared. `seeds`, `parity`: what was declared."""
    reasons = []
    for name, runs in (("arm", arm), ("baseline", baseline)):
        if missing := [s for s in seeds if s not in runs]:
            reasons.append(f"missing runs: the {name} has no records for seed {_words(missing)}")
    if set(arm) != set(baseline):
        reasons.append(f"unpaired seeds: {_words(sorted(arm)) or 'none'} against {_words(sorted(baseline)) or 'none'}")
    shared = sorted(set(arm) & set(baseline))
    if len(shared) < MIN_SEEDS:
        reasons.append(f"{len(shared)} seed(s) in common, at least {MIN_SEEDS} are needed")
    if not shared:
        return reasons
    reasons += _question_refusals(arm, baseline, shared)
    of_seeds: dict[str, list[int]] = {}
    for seed in shared:
        for why in _ledger_refusals(arm[seed], baseline[seed], parity):
            of_seeds.setdefault(why, []).append(seed)
    reasons += [f"seed {_words(seeds)}: {why}" for why, seeds in of_seeds.items()]
    if not any("question" in r for r in reasons):
        a, b = ([runs[s].macro(figure) for s in shared] for runs in (arm, baseline))
        if not np.isfinite(a + b).all():
            reasons.append(f"{figure} is missing for some questions")
        elif len(shared) >= MIN_SEEDS and (why := stats.paired_t(a, b).reason):
            reasons.append(why)
    return reasons


def _words(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _question_refusals(arm: Runs, baseline: Runs, shared: Sequence[int]) -> list[str]:
    reference = arm[shared[0]]
    for what, attribute in (("question (document)", "doc_hashes"), ("prompt", "prompt_hashes")):
        for name, runs in (("arm", arm), ("baseline", baseline)):
            for seed in shared:
                run, place = runs[seed], f"{name}, seed {seed}"
                if run.keys != reference.keys:
                    return [f"differing questions: {place} has other questions than the arm's seed {shared[0]}"]
                hashes = getattr(run, attribute)
                if not hashes or None in hashes:
                    return [f"{what} hashes of the questions are missing in the records of {place}"]
                if hashes != getattr(reference, attribute):
                    both = zip(hashes, getattr(reference, attribute), strict=True)
                    task, one, _ = next(key for key, (x, y) in zip(run.keys, both, strict=True) if x != y)
                    return [
                        f"differing {what} hashes: {place} was asked other questions than the arm's seed {shared[0]} "
                        f"(first: {task} {one}); evaluate both again from the same data and recipe"
                    ]
    return []


def _ledger_refusals(one: SeedRun, other: SeedRun, parity: ParityRecipe) -> list[str]:
    a, b = one.ledger, other.ledger
    if not a or not b:
        return ["no ledger, so equal budgets cannot be shown"]
    reasons = []
    rules = [tuple((ledger.get("selection") or {}).get(key) for key in ("select", "patience")) for ledger in (a, b)]
    if rules[0] != rules[1]:
        reasons.append(
            "differing rules of which weights are kept and when training ends (train.select, train.patience)"
        )
    other_texts = a.get("texts") != b.get("texts")  # by the recipe: as many steps of as many examples, of other texts
    spent = [(key, name, a.get(key), b.get(key)) for key, name in LEDGER if not (other_texts and name == "tokens")]
    if parity.parity != "steps":
        figure = figure_of(parity)
        spent = [(figure, str(parity), one.costs.get(figure), other.costs.get(figure))]
    elif rules[0][1] is not None:  # trained until validation stops improving, as many steps as that needs
        spent = []
    for key, name, x, y in spent:
        if x is None or y is None:
            reasons.append(f"the ledger lacks {key}")
        elif apart(x, y) > TOLERANCE:
            reasons.append(f"budgets apart by {apart(x, y):.1%} ({name}: {x:g} against {y:g}; at most 1 %)")
    if parity.parity != "steps" and a.get("order_fingerprint") and b.get("order_fingerprint"):
        # of unlike length: the same as far as both go
        both = [ledger.get("order_prefixes") or {} for ledger in (a, b)]
        last = max((n for n in both[0] if n in both[1]), key=int, default=None)
        same = last is not None and both[0][last] == both[1][last]
        a, b = ({**ledger, "order_fingerprint": str(same or key)} for key, ledger in enumerate((a, b)))
    for key, name in FINGERPRINTS.items():
        if other_texts and key == "order_fingerprint":
            continue
        if a.get(key) is None or b.get(key) is None:
            reasons.append(f"the ledger lacks {key}, so the same {name} cannot be shown")
        elif a[key] != b[key]:
            reasons.append(f"differing {name} ({key})")
    if "test" in (a.get("checkpoint_chosen_on"), b.get("checkpoint_chosen_on")):
        reasons.append("a checkpoint was chosen on the test set")
    return reasons


@dataclass
class Comparison:
    """One arm against its baseline, `difference` = arm - baseline in the figure's own unit. NaN has a reason.

    declared: the pair as the family has it, where a side is the word `best-single`.
    """

    arm: str
    baseline: str
    figure: str
    seeds: list[int]
    refused: list[str]
    parity: ParityRecipe = STEPS
    differences: list[float] = field(default_factory=list)
    t: stats.PairedT = _NO_PAIREDT
    p_holm: float = NAN
    effect: stats.Effect = _NO_EFFECT
    detectable_d: float = NAN
    detectable: float = NAN
    tost: stats.Tost = _NO_TOST
    tost_p_holm: float = NAN
    questions: stats.Interval = _NO_INTERVAL
    bootstrap: stats.Interval = _NO_INTERVAL
    mcnemar: list[dict[str, Any]] = field(default_factory=list)
    verdict: stats.Verdict = _NO_VERDICT
    seeds_needed: float = NAN
    seeds_needed_reason: str = ""
    declared: tuple[str, str] | None = None

    def refuse(self, reasons: list[str]) -> None:
        self.refused, self.verdict = reasons, stats.Verdict("refused", "refused: " + "; ".join(reasons))


def compare_family(
    runs: Mapping[str, Runs],
    pairs: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    *,
    figure: str = "accuracy",
    alpha: float = 0.05,
    margin: float = NAN,
    parities: Sequence[ParityRecipe | str] = (),
) -> list[Comparison]:
    """All declared comparisons of one figure, Holm-adjusted over the family (refused ones are counted in it).

    The difference tests and the equivalence tests are adjusted as one family each. The smallest detectable effect is
    and the seeds needed for the effect seen are for power .8 at alpha / family size, Holm's first step, so they are on
    the careful side. margin: NaN = not declared. parities: of each pair what it is to have spent alike
    (none: steps), or why there is nothing: it is refused then for that reason alone.
    """
    at = zip(pairs, parities or [STEPS] * len(pairs), strict=True)
    family = [_compare(runs, pair, seeds, figure, alpha, margin, len(pairs), parity) for pair, parity in at]
    p_holm = stats.adjust_holm([c.t.p for c in family])
    tost_holm = stats.adjust_holm([c.tost.p for c in family])
    for c, p, p_tost in zip(family, p_holm, tost_holm, strict=True):
        c.p_holm, c.tost_p_holm = p, p_tost
        if not c.refused:
            c.verdict = stats.give_verdict(
                c.t, p, p_tost, margin=margin, detectable=c.detectable, alpha=alpha,
                needed=c.seeds_needed,
                higher_is_better=figure == "accuracy",
                scale=100 if figure == "accuracy" else 1, unit="points" if figure == "accuracy" else "nats",
            )  # fmt: skip
    return family


def _compare(
    runs: Mapping[str, Runs], pair: tuple[str, str], seeds: Sequence[int],
    figure: str, alpha: float, margin: float, family_size: int, parity: ParityRecipe | str,
) -> Comparison:  # fmt: skip
    arm, baseline = runs.get(pair[0], {}), runs.get(pair[1], {})
    shared = sorted(set(arm) & set(baseline))
    if isinstance(parity, str):
        out = Comparison(*pair, figure, shared, [])
        out.refuse([parity])
        return out
    out = Comparison(*pair, figure, shared, find_refusals(arm, baseline, seeds, figure, parity), parity)
    if out.refused:
        out.refuse(out.refused)
        return out
    a, b = ([side[s].macro(figure) for s in shared] for side in (arm, baseline))
    out.differences = [x - y for x, y in zip(a, b, strict=True)]
    out.t, out.effect = stats.paired_t(a, b, alpha), stats.effect_size(a, b)
    out.detectable_d, _ = stats.smallest_detectable_d(len(shared), alpha / family_size)
    out.detectable = out.detectable_d * out.t.std
    needed, out.seeds_needed_reason = stats.seeds_needed(out.effect.d_z, alpha / family_size)
    out.seeds_needed = max(needed, MIN_SEEDS)  # in this order NaN stays
    out.tost = stats.tost(a, b, margin)
    tasks = arm[shared[0]].tasks_Q
    delta = np.stack([arm[s].column(figure) - baseline[s].column(figure) for s in shared])
    out.questions = stats.question_level(delta, tasks, alpha)
    out.bootstrap = stats.bootstrap_two_stage(delta, tasks, alpha)
    if figure == "accuracy":
        for seed in shared:
            right_a, right_b = arm[seed].correct_Q, baseline[seed].correct_Q
            only_a, only_b = int(((right_a > 0) & (right_b == 0)).sum()), int(((right_a == 0) & (right_b > 0)).sum())
            corrected, exact = stats.mcnemar(only_a, only_b), stats.mcnemar(only_a, only_b, exact=True)
            out.mcnemar.append({"seed": seed, "only_arm": only_a, "only_baseline": only_b, "p_corrected": corrected.p,
                                "p_exact": exact.p, "reason": corrected.reason})  # fmt: skip
    return out


def describe_comparison(c: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON (NaN stays NaN; `collect.write_json` makes it null)."""
    reasons = {"p": c.t.reason, "hedges_g": c.effect.reason, "tost_p": c.tost.reason,
               "questions": c.questions.reason, "bootstrap": c.bootstrap.reason,
               "seeds_needed": c.seeds_needed_reason}  # fmt: skip
    out = {
        "arm": c.arm, "baseline": c.baseline, "figure": c.figure, "seeds": c.seeds, "differences": c.differences,
        "difference": c.t.difference, "std": c.t.std, "t": c.t.t, "df": c.t.df, "p": c.t.p, "p_holm": c.p_holm,
        "ci": [c.t.low, c.t.high], "d_z": c.effect.d_z, "hedges_g": c.effect.hedges_g,
        "smallest_detectable_d_z": c.detectable_d, "smallest_detectable_effect": c.detectable,
        "seeds_needed_for_the_effect_seen": c.seeds_needed, "declared": list(c.declared or (c.arm, c.baseline)),
        "tost_p": c.tost.p, "tost_p_holm": c.tost_p_holm, "verdict": c.verdict.word, "sentence": c.verdict.sentence,
        "parity": c.parity.parity, "amortised": c.parity.amortised, "at_equal": str(c.parity),
        "refused": c.refused, "reasons": {k: v for k, v in reasons.items() if v},
        "conditional_on_these_checkpoints": {
            "question_difference": c.questions.difference, "question_se": c.questions.se,
            "question_ci": [c.questions.low, c.questions.high],
            "bootstrap_ci": [c.bootstrap.low, c.bootstrap.high], "mcnemar": c.mcnemar,
        },
    }  # fmt: skip
    if c.refused:
        out["reasons"] = {"all": "; ".join(c.refused)}
    return out
