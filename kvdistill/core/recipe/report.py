"""`report`: comparisons, parities, curves; and `match`, an arm's budget taken from another one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kvdistill.core.recipe.base import AboveZero, Parity, Section


class ParityRecipe(Section):
    """What two arms spend alike, to within 1 %."""

    parity: Parity = Field(
        "steps",
        description="steps and tokens; the student's FLOPs; all FLOPs, teachers and their training included; "
        "data: problems seen, repetitions counted",
    )
    amortised: bool = Field(
        True, description="total_flops: what several runs share is divided among them; false: each pays for all of it"
    )

    def __str__(self) -> str:
        """`total FLOPs, amortised`."""
        words = {"steps": "steps", "student_flops": "student FLOPs", "data": "problems seen"}
        return words.get(self.parity) or f"total FLOPs, {'amortised' if self.amortised else 'not amortised'}"


class ComparisonRecipe(ParityRecipe):
    """An arm against a baseline, and at which parity."""

    arm: str = Field(description="the arm that is asked about")
    baseline: str = Field(description="what it is held against")


class MatchRecipe(ParityRecipe):
    """Another arm, whose budget this one gets: its `train.steps` are computed before anything is trained."""

    arm: str = Field(description="whose budget")


class CurvesRecipe(Section):
    """Arms trained again at multiples of their steps, or on shares of their problems: how much longer must one train,
    or how many more problems must one have, to reach the other?"""

    arms: list[str] = Field(
        min_length=1, max_length=100, description="each at every budget; `ce` at twice its steps is the arm `ce@x2`"
    )
    points: list[str] = Field(
        [], max_length=100, description="arms at their own budget alone, held against the curves of the others"
    )
    budgets: list[Annotated[float, Field(gt=0, le=1000)]] = Field(
        min_length=2, max_length=20, description="multiples of an arm's steps (or problems), rising, 1 among them"
    )
    of: Literal["steps", "problems"] = Field(
        "steps", description="what is multiplied; problems: shares of each task's training problems, 1 the largest"
    )

    @field_validator("budgets")
    @classmethod
    def _rising(cls, budgets: list[float]) -> list[float]:
        if sorted(set(budgets)) != budgets or 1 not in budgets:
            raise ValueError(f"budgets rise, and 1 (the arm itself) is among them; these are {budgets}")
        return budgets

    @model_validator(mode="after")
    def _no_more_than_all(self) -> CurvesRecipe:
        if self.of == "problems" and self.budgets[-1] > 1:
            raise ValueError(f"budgets of problems are shares of them, 1 the largest; these are {self.budgets}")
        return self

    @model_validator(mode="after")
    def _two_arms_once(self) -> CurvesRecipe:
        named = [*self.arms, *self.points]
        if len(set(named)) < len(named):
            raise ValueError(f"an arm is named twice: {named}")
        if len(named) < 2:
            raise ValueError("a curve is held against another arm: name one more in arms, or in points")
        if self.points and self.of == "problems":
            raise ValueError("points are arms at their own steps; a curve of problems begins at the fewest: use arms")
        return self

    @property
    def of_steps(self) -> bool:
        return self.of == "steps"

    def names(self, arm: str) -> dict[float, str]:
        """Budget -> the arm that is trained with it, cheapest first; of a point itself alone."""
        if arm in self.points:
            return {1: arm}
        mark = "x" if self.of == "steps" else "p"
        return {budget: arm if budget == 1 else f"{arm}@{mark}{budget:g}" for budget in self.budgets}


class ReportRecipe(Section):
    """The comparisons that were declared beforehand, and the margin that counts as equal."""

    comparisons: list[tuple[str, str] | ComparisonRecipe] | None = Field(
        None,
        description="[arm, baseline], or {arm, baseline, parity}: the Holm family; a side may be `best-single`. Of an "
        "arm with several teachers `[arm, best-single]` and `[arm, ce]` are in it anyway; unset: only these; []: "
        "nothing is compared",
    )
    curves: CurvesRecipe | None = Field(None, description="arms at several budgets; unset: none")
    primary: Literal["accuracy", "nll"] = Field("accuracy", description="what the verdict is about")
    alpha: float = Field(0.05, gt=0, lt=1, description="family-wise error rate (Holm)")
    margin: AboveZero = Field(0.02, description="TOST equivalence margin, in units of the primary figure")
    language: Literal["en", "zh"] = Field(
        "en", description="of the page, its figures and the verdict: English, Chinese"
    )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons as (arm, baseline)."""
        return [one if isinstance(one, tuple) else (one.arm, one.baseline) for one in self.comparisons or ()]

    def parity(self, arm: str, baseline: str) -> ParityRecipe:
        """What this comparison holds equal: what is declared with it, else steps."""
        said = (
            one
            for one in self.comparisons or ()
            if not isinstance(one, tuple) and (one.arm, one.baseline) == (arm, baseline)
        )
        return next((ParityRecipe(parity=one.parity, amortised=one.amortised) for one in said), ParityRecipe())
