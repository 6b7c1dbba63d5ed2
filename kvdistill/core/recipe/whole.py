"""An arm, and a whole study: the sections put together."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kvdistill.core.recipe.base import UNTRAINED, AboveZero, Control, PathText, Section, Seed, Share
from kvdistill.core.recipe.data import DataRecipe
from kvdistill.core.recipe.matching import (
    AlignRecipe,
    CaptureRecipe,
    CompressRecipe,
    FuseRecipe,
    LatentRecipe,
    LossRecipe,
)
from kvdistill.core.recipe.models import StudentRecipe, TeacherRecipe
from kvdistill.core.recipe.report import MatchRecipe, ReportRecipe
from kvdistill.core.recipe.train import EvaluateRecipe, HardwareRecipe, TrainRecipe, TuneRecipe, WriteRecipe


class ArmRecipe(Section):
    """One arm of the study, complete: the recipe's sections with the arm's changes laid over them."""

    teachers: list[str] = Field(max_length=100, description="names of those it learns from; unset: all; []: none")
    control: Control | None = Field(
        None,
        description="an arm of the same cost that lacks one thing (docs/controls.md). placebo: targets of a mismatched "
        "example; untrained: of the same teachers with random weights; shuffled: of the right text, its tokens "
        "permuted within each segment; noise: Gaussian, of the same moments",
    )
    texts: Literal["own", "teachers", "written"] = Field(
        "own",
        description="what cross-entropy reads. own: the training problems; teachers: with the `teach` problems that "
        "scratch teachers studied; written: with right solutions that teachers write (section `write`). Arms without "
        "teachers only",
    )
    texts_from: list[str] = Field(
        default_factory=list,
        max_length=100,
        description="whose problems or solutions; unset: all scratch teachers', or (written) all teachers'",
    )
    reasoning: Literal["written", "latent", "none"] = Field(
        "written",
        description="what stands between question and answer: words; latents (section `latent`); or nothing, so that "
        "it learns and gives the answer directly",
    )
    align: AlignRecipe = Field(description="changes to `align`")
    compress: CompressRecipe = Field(description="changes to `compress`")
    fuse: FuseRecipe = Field(description="changes to `fuse`")
    loss: LossRecipe = Field(description="changes to `loss`")
    latent: LatentRecipe = Field(LatentRecipe(), description="changes to `latent`")
    train: TrainRecipe = Field(description="changes to `train`")
    match: MatchRecipe | None = Field(None, description="steps computed from another arm's budget; unset: train.steps")
    times: AboveZero = Field(1.0, description="its steps, that many times (what report.curves sets for its arms)")
    problems: Share = Field(
        1.0,
        description="it has this share of each task's training problems only, the first of them (a smaller share is "
        "part of a larger one)",
    )

    @property
    def reads(self) -> list[str]:
        """Whose captured targets it reads: its teachers', or theirs with random weights. Competence then still comes
        from the trained ones, so that the routing is the one of the arm that it stands beside."""
        if self.control != "untrained":
            return self.teachers
        return [name + UNTRAINED for name in self.teachers] + (self.teachers if self.needs_nll else [])

    @property
    def writers(self) -> list[str]:
        """The teachers whose solutions it reads."""
        return self.texts_from if self.texts == "written" else []

    @property
    def needs_kv(self) -> bool:
        return self.loss.kv_weight > 0 and bool(self.teachers)

    @property
    def thinks(self) -> bool:
        """Whether its student reasons in latents."""
        return self.reasoning == "latent"

    @property
    def learns_from_itself(self) -> bool:
        """Whether its latents learn from its own written reasoning."""
        return self.thinks and self.latent.self_weight > 0

    @property
    def needs_logits(self) -> bool:
        return self.loss.logit_weight > 0 and bool(self.teachers)

    @property
    def compares_attention(self) -> bool:
        return self.loss.compares_attention

    @property
    def needs_queries(self) -> bool:
        return self.needs_kv and (self.compares_attention or self.align.ridge_on == "attention")

    @property
    def needs_nll(self) -> bool:
        """How well each teacher explains the gold text: for weights by competence."""
        return bool(self.teachers) and self.fuse.fusion_strategy == "competence"

    @property
    def needs_scores(self) -> bool:
        """What the teacher's own attention says of each of its tokens: for r-kv, and for weighing tokens."""
        return self.needs_kv and (self.compress.kv_compression == "r-kv" or self.loss.attention_weighted)


class Recipe(Section):
    """A whole study."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="what the study and its folder are called"
    )
    title: str = Field("", max_length=1000, description="what stands above the page")
    run_dir: PathText | None = Field(None, description="the run folder; unset: runs/NAME")
    seeds: list[Seed] = Field(
        default_factory=lambda: [42, 43, 44], min_length=1, max_length=1000, description="every arm runs once with each"
    )
    replicate: Literal["student", "data", "teacher", "all"] = Field(
        "student",
        description="what varies with the seed: the student alone (weights, order); also its training problems; also "
        "the teachers trained on the spot; or all three",
    )
    data: DataRecipe = Field(description="problems, splits, tokenizer")
    teachers: list[TeacherRecipe] = Field(default_factory=list, max_length=100, description="models to learn from")
    student: StudentRecipe = Field(description="the model that learns")
    capture: CaptureRecipe = Field(CaptureRecipe(), description="how teacher targets reach the student")
    align: AlignRecipe = Field(AlignRecipe(), description="teacher KV to student slots, layers, heads and sizes")
    compress: CompressRecipe = Field(CompressRecipe(), description="which teacher tokens take part")
    fuse: FuseRecipe = Field(FuseRecipe(), description="how several teachers become one signal")
    loss: LossRecipe = Field(LossRecipe(), description="terms of the loss and their weights")
    latent: LatentRecipe = Field(LatentRecipe(), description="how arms with `reasoning: latent` think")
    train: TrainRecipe = Field(TrainRecipe(), description="training of the student")
    evaluate: EvaluateRecipe = Field(EvaluateRecipe(), description="what trained students are asked")
    write: WriteRecipe = Field(WriteRecipe(), description="what teachers write, for arms with `texts: written`")
    tune: TuneRecipe | None = Field(
        None, description="a search for each arm's own values before the study; unset: none"
    )
    report: ReportRecipe = Field(ReportRecipe(), description="comparisons and margins, declared beforehand")
    hardware: HardwareRecipe = Field(HardwareRecipe(), description="where runs happen; changes no result")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1,
        max_length=1000,
        description="arm -> {teachers, reasoning, control, texts, align, fuse, loss, latent, train, match, …}",
    )

    @property
    def varies_data(self) -> bool:
        """Whether each seed draws training problems of its own."""
        return self.replicate in ("data", "all")

    @property
    def varies_teachers(self) -> bool:
        """Whether each seed trains scratch teachers of its own."""
        return self.replicate in ("teacher", "all")

    @property
    def every_seed(self) -> list[int]:
        """The study's, and behind them those of tuning."""
        return [*self.seeds, *(self.tune.seeds if self.tune else ())]

    def tuned_as(self, arm: str) -> str | None:
        """The arm whose chosen values this one takes: itself, or the one of whose curve it is; None: it is not
        tuned."""
        curves = self.report.curves
        pairs = [(name, base) for base in curves.arms for name in curves.names(base).values()] if curves else []
        bases = dict(pairs)
        base = bases.get(arm, arm)
        chosen = self.tune is not None and (base in self.arms if self.tune.arms == "all" else base in self.tune.arms)
        return base if chosen else None

    @property
    def every_arm(self) -> dict[str, dict[str, Any]]:
        """The arms as written, and after them those that report.curves trains at other budgets."""
        found = {name: dict(spec or {}) for name, spec in self.arms.items()}
        curves = self.report.curves
        for arm in curves.arms if curves else ():
            assert curves is not None
            key = "times" if curves.of_steps else "problems"
            for budget, name in curves.names(arm).items() if arm in self.arms else ():
                found.setdefault(name, {**found[arm], key: budget * found[arm].get(key, 1.0)})
        return found
