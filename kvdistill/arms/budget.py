"""The budget of every arm before anything is trained: `TrainingBudgetController`.

Predicts what each arm will cost (`costs.py`: closed forms over the very texts it will read), computes the steps of arms
that are matched to another, refuses comparisons whose budgets will be apart, and writes all of it to
`training_budget_config.json`, which a report holds against the ledgers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from kvdistill.arms.arm import Arm
from kvdistill.arms.costs import all_sharers, reads_similarity, run_flops, shared_keys, trial_sharers
from kvdistill.arms.experiment import Experiment
from kvdistill.core.budgets import WORDS, budget_path, figure_of, read_budgets
from kvdistill.core.costs import TOLERANCE, apart, student_flops, total_flops, trial_flops
from kvdistill.core.errors import KVDistillError, RecipeError
from kvdistill.core.files import as_json, sha256_of, write_json
from kvdistill.core.layout import data_folder
from kvdistill.core.marks import read_mark, sealed
from kvdistill.core.recipe import MAX_EXAMPLES_SEEN, ParityRecipe

FLOPS = ("student_flops", "total_flops")  # parities that need the texts' lengths, not their number alone


class TrainingBudgetController:
    """Budgets of a study's arms. Needs prepared data; loads no weights.

    Raises RecipeError for a parity that cannot be computed, or cannot be reached with whole steps.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        # where each seed has data of its own, those whose data is there: one run may be asked for by itself
        there = [
            s for s in experiment.recipe.seeds if (data_folder(experiment.of(s).data_run) / "manifest.json").exists()
        ]
        self.seeds = there or list(experiment.recipe.seeds)
        self._sharers, self._trial_sharers = all_sharers(experiment), trial_sharers(experiment)
        self._arms: dict[tuple[str, int], Arm] = {}
        self._costs: dict[tuple[str, int, int], dict[str, Any]] = {}  # arm, seed, steps
        self._tunings: dict[tuple[str, int], float] = {}
        self._steps: dict[str, int] = {}
        self._known: dict[str, bool] = {}

    def get_unified_training_steps(self) -> int:
        """Steps of every arm that says nothing of its own."""
        return self.experiment.recipe.train.steps

    @staticmethod
    def steps_for_tokens(
        total_tokens: float, batch_size: int, seq_length: int, num_gpus: int = 1, accumulation: int = 1
    ) -> int:
        """Steps that read so many tokens at most, in texts of `seq_length`: for `train.steps`."""
        return int(total_tokens // (batch_size * seq_length * num_gpus * accumulation))

    def steps(self, name: str) -> int:
        """Steps of an arm: as given, or such that it spends what the arm spends that it is matched to."""
        arm = self.experiment.arms[name]
        if arm.match is None:
            return arm.train.steps
        if name not in self._steps:
            self._steps[name] = self._frozen(name) or self._matched(name)
        return self._steps[name]

    def budget(self, name: str) -> dict[str, Any]:
        """What an arm will spend, mean over seeds, and what of it nobody can count."""
        recipe, seeds = self.experiment.recipe, self.seeds
        arm = self.experiment.arms[name]
        each = [self._cost(name, seed, self.steps(name)) for seed in seeds]
        found = {key: sum(cost[key] for cost in each) / len(seeds) for key in each[0] if key != "flops"}
        return {
            **{key: round(value) for key, value in found.items()},
            "parts": {key: value for key, value in each[0]["flops"].items() if value},
            **({} if self.is_known(name) else {"estimated": True}),
            **({} if arm.train.patience is None else {"at_most": True}),
            "match": arm.match and arm.match.model_dump(mode="json"),
            "identity": self._identity(name),
            "not_counted": [
                f"the training of teacher {teacher.name}, which comes from elsewhere"
                for teacher in recipe.teachers
                if teacher.name in arm.teachers and teacher.scratch is None and (arm.needs_kv or arm.needs_logits)
            ],
        }

    def is_known(self, name: str) -> bool:
        """Whether the texts that an arm reads are there: what teachers are to write is not, the first time. What was
        written down as an estimate stays one, so that a study has the same file however often it was begun; but for
        an arm whose FLOPs are compared."""
        if name not in self._known:
            before = read_budgets(self.experiment.run).get(name) or {}
            stays = before.get("estimated") and before.get("identity") == self._identity(name)
            try:
                there = bool(self._arm(name, self.seeds[0]).lesson_lengths)
            except KVDistillError:
                there = False
            self._known[name] = there and not (stays and name not in self._asked_flops)
        return self._known[name]

    @cached_property
    def _asked(self) -> list[tuple[str, ParityRecipe, Sequence[str]]]:
        """What the recipe wants equal: its place, the parity, and the arms, matched or compared."""
        recipe = self.experiment.recipe
        asked: list[tuple[str, ParityRecipe, Sequence[str]]] = [
            (f"arms.{name}.match", arm.match, (name, arm.match.arm))
            for name, arm in self.experiment.arms.items()
            if arm.match is not None
        ]
        for pair in recipe.report.pairs:
            asked.append((f"report.comparisons: {' against '.join(pair)}", recipe.report.parity(*pair), pair))
        return asked

    @cached_property
    def _asked_flops(self) -> set[str]:
        """Arms that are matched or compared by FLOPs."""
        return {name for _, parity, names in self._asked if parity.parity in FLOPS for name in names}

    def write(self) -> dict[str, Any]:
        """Compute all of it, refuse what cannot hold, and write the file. Returns what it holds."""
        recipe = self.experiment.recipe
        self._check_computable()
        content = {
            "schema": 1,
            "unified_steps": self.get_unified_training_steps(),
            "seeds": self.seeds,
            "tolerance": TOLERANCE,
            "arms": {name: self.budget(name) for name in recipe.every_arm},
        }
        for name, arm in self.experiment.arms.items():
            if arm.match is not None and arm.times == 1:
                place = f"arms.{name}.match"
                self._refuse_apart(name, arm.match.arm, arm.match, place)
        content["comparisons"] = [
            self._compared(*pair) for pair in recipe.report.pairs if {*pair} <= self.experiment.arms.keys()
        ]
        path = budget_path(self.experiment.run)
        if as_json(content) != read_mark(path):
            write_json(path, sealed(content))
        return content

    # -- what a run costs ---------------------------------------------------------------------------------

    def _arm(self, name: str, seed: int) -> Arm:
        if (name, seed) not in self._arms:
            self._arms[name, seed] = self.experiment.arm(name, seed)
        return self._arms[name, seed]

    def _cost(self, name: str, seed: int, steps: int) -> dict[str, Any]:
        key = name, seed, steps
        if key not in self._costs:
            arm = self._arm(name, seed)
            known = self.is_known(name)
            lengths = arm.lesson_lengths if known else self.experiment.train_lengths
            order = arm.order_of(len(lengths), arm.num_batches(steps))
            flops = run_flops(arm, order, None if known else lengths, steps)
            flops["tuning"] = self._tuning(name, steps)
            shared = shared_keys(arm.recipe, seed, self.experiment.recipe, name)
            self._costs[key] = {
                "steps": steps,
                "data": len(order),
                "distinct": len({*order}),
                "tokens": sum(lengths[i] for i in order),
                "student_flops": student_flops(flops),
                "total_flops": total_flops(flops),
                "amortised_flops": total_flops(flops, shared, self._sharers),
                "flops": flops,
            }
        return self._costs[key]

    def _tuning(self, name: str, steps: int) -> dict[str, float]:
        """What all trials of a tuned arm will spend, where it is trained for so many steps; one costs what another
        does."""
        recipe, base = self.experiment.recipe, self.experiment.recipe.tuned_as(name)
        if base is None or recipe.tune is None:
            return {}
        key = base, steps if name == base else self.steps(base)
        if key not in self._tunings:
            names = [trial for trial, one in self.experiment.trials.items() if one.arm == base]
            total = 0.0
            for seed in recipe.tune.seeds:
                arm = self._arm(names[0], seed)
                known = self.is_known(base)
                lengths = arm.lesson_lengths if known else self.experiment.train_lengths
                order = arm.order_of(len(lengths), arm.num_batches(key[1]))
                flops = run_flops(arm, order, None if known else lengths, key[1])
                shared = shared_keys(arm.recipe, seed, recipe)
                total += len(names) * trial_flops(flops, shared, self._sharers, self._trial_sharers)
            self._tunings[key] = total
        return {base: self._tunings[key]}

    # -- arms that are matched ----------------------------------------------------------------------------

    def _matched(self, name: str) -> int:
        """The whole number of steps that comes nearest. What is spent grows with the steps, almost in proportion."""
        arm, seeds = self.experiment.arms[name], self.seeds
        assert arm.match is not None
        figure = figure_of(arm.match)
        wanted = arm.times * sum(cost[figure] for cost in self._costs_of(arm.match.arm)) / len(seeds)

        def mean(steps: int) -> float:
            return sum(self._cost(name, seed, steps)[figure] for seed in seeds) / len(seeds)

        least, steps = mean(1), self.steps(arm.match.arm)
        if wanted < least * (1 - TOLERANCE):
            raise RecipeError(
                f"one step already takes {least:.3g} {WORDS[figure]}, more than the {wanted:.3g} of {arm.match.arm!r}: "
                "so much is spent before training",
                place=f"arms.{name}.match",
                fix="match to a costlier arm, set amortised: true, or match another parity",
            )
        for _ in range(20):
            slope = (mean(steps) - least) / (steps - 1) if steps > 1 else mean(2) - least
            before, steps = steps, max(1, steps + round((wanted - mean(steps)) / slope))
            if steps > MAX_EXAMPLES_SEEN // self._arm(name, seeds[0]).num_batches(1):
                what = f"more than {steps:,} steps would reach {wanted:.3g} {WORDS[figure]}"
                raise RecipeError(what, place=f"arms.{name}.match", fix="match to a cheaper arm")
            if abs(steps - before) <= 1:
                break
        return min(range(max(1, steps - 2), steps + 3), key=lambda n: abs(mean(n) - wanted))

    def _costs_of(self, name: str) -> list[dict[str, Any]]:
        return [self._cost(name, seed, self.steps(name)) for seed in self.seeds]

    def _identity(self, name: str) -> str:
        """Of all that the steps of an arm depend on, but for how many others share what it shares."""
        arm, recipe = self.experiment.arms[name], self.experiment.recipe
        on = None if arm.match is None else self._identity(arm.match.arm)
        own = {key: recipe.model_dump(mode="json")[key] for key in ("student", "teachers", "capture")}
        return sha256_of([arm.model_dump(mode="json"), on, own, sha256_of(self.experiment.train_lengths)])

    def _frozen(self, name: str) -> int | None:
        """Steps that were computed before, where a student of the arm is there that was trained with them."""
        known = read_budgets(self.experiment.run).get(name)
        begun = any((self.experiment.run / "arms" / name).glob("seed-*"))
        return int(known["steps"]) if begun and known and known.get("identity") == self._identity(name) else None

    # -- what cannot hold ---------------------------------------------------------------------------------

    def _check_computable(self) -> None:
        """Teachers that stop at the highest layer needed, which only map-layers will know, have no cost yet."""
        recipe = self.experiment.recipe
        for place, parity, names in self._asked:
            arms = [self.experiment.arms[name] for name in names if name in self.experiment.arms]
            unwritten = [name for name in names if name in self.experiment.arms and not self.is_known(name)]
            if unwritten and parity.parity in FLOPS:
                raise RecipeError(
                    f"what {unwritten[0]!r} costs is not known before the teachers have written its texts",
                    place=place,
                    fix="run `kvdistill write RECIPE` first, or declare parity: data or steps",
                )
            unknown = [arm for arm in arms if reads_similarity(arm) and not (arm.needs_nll or arm.needs_logits)]
            if parity.parity == "total_flops" and unknown and recipe.capture.source == "online":
                raise RecipeError(
                    "teachers that run online stop at the highest layer that is matched, and with layers: cka that is "
                    "measured later: their cost is not known before",
                    place=place,
                    fix="set capture.source: store, give align.layer_map the file of map-layers, or another parity",
                )

    def _compared(self, arm: str, baseline: str) -> dict[str, Any]:
        parity = self.experiment.recipe.report.parity(arm, baseline)
        found = {"arm": arm, "baseline": baseline, **parity.model_dump(mode="json")}
        place = f"report.comparisons: {arm} against {baseline}"
        return found | {"apart": self._refuse_apart(arm, baseline, parity, place)}

    def _refuse_apart(self, arm: str, other: str, parity: ParityRecipe, place: str) -> float:
        """By what share they are apart in what is to be equal, in the worst seed. RecipeError above the tolerance."""
        arms = [self.experiment.arms[name] for name in (arm, other)]
        figures = [figure_of(parity)]
        if parity.parity == "steps":
            same_texts = arms[0].texts == arms[1].texts and arms[0].texts_from == arms[1].texts_from
            figures += ["tokens"] if same_texts else []
            if arms[0].train.patience is not None and arms[1].train.patience is not None:
                figures = []  # each as many as its validation needs
        seeds, worst = self.seeds, 0.0
        for seed, a, b in zip(seeds, self._costs_of(arm), self._costs_of(other), strict=True):
            for figure in figures:
                share = apart(a[figure], b[figure])
                worst = max(worst, share)
                if share > TOLERANCE:
                    raise RecipeError(
                        f"{arm!r} and {other!r} will be {share:.1%} apart in {WORDS.get(figure, figure)} (seed {seed}: "
                        f"{a[figure]:.4g} against {b[figure]:.4g}; at most {TOLERANCE:.0%})",
                        place=place,
                        fix=f"give one of them `match: {{arm: …, parity: {parity.parity}}}` (and the "
                        "study more steps: they come in whole numbers), or declare another parity; what is trained "
                        "already keeps its steps",
                    )
        return worst
