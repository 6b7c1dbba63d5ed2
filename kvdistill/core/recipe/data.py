"""`data`: problems, splits, tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kvdistill.core.recipe.base import AnswerRule, Count, NonNegative, PathText, Positive, Section, Seed, Tokens


class TaskRecipe(Section):
    """One source of problems, and how many of them each split gets."""

    name: str = Field(
        description="chain, product, digits, quotient, affine, permute (built in); gsm8k, svamp, strategyqa, math23k, "
        "math, arc_challenge, hotpotqa; or jsonl, csv, parquet with `file`"
    )
    file: PathText | None = Field(None, description="your own file with question, reasoning, answer (or `fields`)")
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="own file: our name (id, question, reasoning, answer, completion, language) -> column, or a "
        'template of columns, e.g. {question: "{body} {question}"}',
    )
    language: str | None = Field(None, description="own file: of rows that have none, en or zh; unset: en")
    answer: AnswerRule | None = Field(
        None, description="own file: how answers are read and compared; unset: value (numbers, else text)"
    )
    revision: str | None = Field(None, description="commit, tag or branch on the hub; unset: the newest")
    train: Count = Field(1000, description="training problems; these four count where `data.total` is unset")
    val: Count = Field(100, description="validation problems")
    test: Count = Field(100, description="test problems, seen by evaluation only")
    teach: Count = Field(0, description="training problems that scratch teachers study beside `train`")
    share: NonNegative | None = Field(
        None, description="part of `data.total`; unset: math23k 0.2, the others what is left, in equal parts"
    )
    cap: Positive | None = Field(None, description="at most so many problems of `data.total`")

    @property
    def key(self) -> str:
        """The name its records carry: the task, or the file's stem."""
        return self.name if not self.file else self.file.rsplit("/", 1)[-1].rsplit(".", 1)[0]


class DataRecipe(Section):
    """Problems, splits and the tokenizer."""

    tasks: list[TaskRecipe] = Field(min_length=1, max_length=1000, description="where problems come from, mixed")
    root: PathText | None = Field(None, description="folder with local copies of the public data sets; unset: the hub")
    total: Positive | None = Field(
        None, description="problems over all tasks, mixed by `share`; unset: each its counts"
    )
    ratios: tuple[NonNegative, NonNegative, NonNegative] = Field(
        (0.7, 0.15, 0.15), description="train, val, test parts of a task's share of `total`"
    )
    disjoint_teachers: bool = Field(
        False, description="scratch teachers study `teach` only (with `total`: half of train), students `train` only"
    )
    style: Literal["cot", "direct", "both"] = Field("cot", description="written reasoning before the answer, or not")
    template: Literal["plain", "chat"] = Field("plain", description="our own, or the tokenizer's chat template")
    system_prompt: str | None = Field(None, description="chat: system message; unset: the template's own default")
    tokenizer: PathText = Field(
        "characters", description="characters (built in), a folder, `root:NAME`, a hub id, or `A or B`"
    )
    trim_vocabulary: bool = Field(False, description="keep only the pieces these texts need (tiny models)")
    max_length: Tokens = Field(512, description="tokens; longer examples are left out and counted")
    seed: Seed = Field(0, description="which problems go where; the same for every arm and seed")
    train_seed: Seed | None = Field(
        None, description="which of the problems that are not held out are learned from (train, teach); unset: by seed"
    )
    leaks: Literal["refuse", "drop", "allow"] = Field(
        "refuse",
        description="a problem (or near duplicate) of test, val or an evaluation in training: stop; take it out of "
        "training; or go on (never for results)",
    )

    @field_validator("ratios")
    @classmethod
    def _ratios(cls, ratios: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(ratios) - 1) > 1e-6:
            raise ValueError(f"ratios {ratios} add up to {sum(ratios):g}, not 1")
        return ratios

    @property
    def has_val(self) -> bool:
        """Whether any validation problem is asked for."""
        return any(task.val for task in self.tasks) if self.total is None else self.ratios[1] > 0

    @property
    def num_learned(self) -> int:
        """About how many problems are learned from; with `total`, that."""
        return self.total or sum(task.train for task in self.tasks)
