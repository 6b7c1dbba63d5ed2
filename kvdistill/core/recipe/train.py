"""What students go through: `train`, `tune` and `evaluate`, what teachers write for them, and the hardware."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kvdistill.core.recipe.base import AboveZero, Batch, Count, NonNegative, Positive, Section, Seed, Tokens
from kvdistill.core.recipe.models import OptimiserRecipe


class TrainRecipe(OptimiserRecipe):
    """Training of the student."""

    projector_lr_scale: AboveZero = Field(1.0, description="projectors learn at this multiple of the learning rate")
    bf16: bool = Field(False, description="autocast to bfloat16")
    log_every: Positive = Field(20, description="steps between lines of log.jsonl")
    eval_every: Count = Field(
        200, description="steps between validation points (KV loss and accuracy); 0: only the end"
    )
    eval_examples: Positive = Field(64, description="validation problems per point of the learning curve")
    select: Literal["last", "best"] = Field(
        "last",
        description="weights that are kept: of the last step, or of the validation point with the lowest NLL of its "
        "completions (ties: the earlier)",
    )
    patience: Positive | None = Field(
        None, description="validation points without a lower NLL after which training ends; unset: after `steps`"
    )
    save_every: Positive = Field(200, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, le=1000, description="the newest ones")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where the log goes too; each needs its package"
    )

    @model_validator(mode="after")
    def _has_points(self) -> TrainRecipe:
        if self.asks_validation and not 0 < self.eval_every < self.steps:
            which = "select: best" if self.select == "best" else f"patience: {self.patience}"
            raise ValueError(
                f"{which} looks at validation points, and there is one only, the end (eval_every is {self.eval_every}, "
                f"steps {self.steps}): give an eval_every between 1 and {self.steps - 1}"
            )
        return self

    @property
    def asks_validation(self) -> bool:
        """Whether validation decides which weights are kept, or when training ends."""
        return self.select == "best" or self.patience is not None

    def is_point(self, step: int) -> bool:
        """Whether the learning curve has a point at this step: every `eval_every`, and at the end."""
        return step == self.steps or (self.eval_every > 0 and step % self.eval_every == 0)


class EvaluateRecipe(Section):
    """Held-out problems of the training tasks, and public evaluations; one record per question."""

    tasks: list[str] = Field(
        default_factory=list, description="public evaluations beside the test split: gsm8k, math500, bbh, gpqa, …"
    )
    num_fewshot: int | None = Field(
        None, ge=0, le=1000, description="examples in the prompt; unset: each evaluation's usual"
    )
    choice: Literal["likelihood", "generation"] = Field(
        "likelihood", description="multiple choice: the likeliest choice, or the letter that is written"
    )
    chat: bool = Field(False, description="evaluations through the model's chat template")

    max_new_tokens: Tokens = Field(64, description="longest answer, greedily")
    batch_size: Batch = Field(64, description="questions at once")
    limit: Positive | None = Field(None, description="first n test problems of each task")
    match_examples: Positive = Field(128, description="held-out examples for R2, centred cosine and retrieval")


class WriteRecipe(Section):
    """What teachers write for arms with `texts: written`."""

    questions: Literal["teach", "train"] = Field(
        "teach", description="which problems they are asked: further ones, or those that students train on"
    )
    limit: Positive | None = Field(None, description="first n problems of each task; unset: all")
    per_question: Annotated[int, Field(gt=0, le=1000)] = Field(
        1, description="solutions that a teacher tries for each; those that are right and differ are kept"
    )
    temperature: float = Field(0.0, ge=0, le=100, description="0: greedily; else sampled, each from a seed of its own")
    max_new_tokens: Tokens | None = Field(None, description="longest solution; unset: evaluate.max_new_tokens")
    batch_size: Batch = Field(64, description="questions at once; a kill loses at most so many")
    seed: Seed = Field(0, description="of what is sampled")

    @model_validator(mode="after")
    def _differ(self) -> WriteRecipe:
        if self.per_question > 1 and not self.temperature:
            raise ValueError("greedy solutions of one question are all the same: set temperature, or per_question: 1")
        return self


class TuneRecipe(Section):
    """A small search before the study, of as many trials for every arm: values chosen on validation problems."""

    arms: Literal["all"] | list[str] = Field("all", description="which arms are tuned")
    grid: dict[Literal["train", "loss", "fuse", "latent"], dict[str, list[NonNegative]]] = Field(
        min_length=1,
        description="values to try, e.g. {train: {learning_rate: [1e-3, 4e-3]}, loss: {kv_weight: [5, 20]}}. "
        "A key that does nothing for an arm is left out for it, and its learning rates are spaced more densely: as "
        "many trials for each (docs/statistics.md)",
    )
    seeds: list[Seed] = Field(min_length=1, max_length=1000, description="of the trials; none of the study's")
    by: Literal["accuracy", "nll"] | None = Field(
        None, description="the validation figure that chooses; unset: report.primary"
    )
    examples: Positive | None = Field(
        None, description="validation problems that trials are judged on; unset: train.eval_examples"
    )

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is given twice: {seeds}")
        return seeds


class HardwareRecipe(Section):
    """Where runs happen. Changes no result."""

    device: str = Field("auto", description="auto: CUDA where there is one; cpu, cuda, cuda:1, mps")
    workers: int = Field(
        0, ge=0, le=4096, description="runs side by side on this machine; 0: one per core (CPU) or GPU"
    )
    threads: int = Field(1, ge=0, le=4096, description="threads per worker; 0: torch's choice")

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if not re.fullmatch(r"(auto|cpu|mps|(cuda|xpu)(:\d{1,3})?)", device):
            raise ValueError("no such kind of device: auto, cpu, cuda, cuda:N, mps and xpu are known")
        return device
