"""The recipe's types: what a study is made of, key by key. Reading and merging is in `config.py`.

Every section is a frozen pydantic model that forbids unknown keys. Its docstrings and field descriptions
are the reference that `docs/recipe.md` and `kvdistill recipe` print. Knows no torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _usable_path(path: str) -> str:
    """A path that a file system can take: no NUL, and no name in it longer than 255 bytes."""
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character")
    whole = os.fsencode(path)
    if len(whole) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in whole.split(b"/")):
        raise ValueError(f"too long for a path ({MAX_PATH_BYTES} bytes, {MAX_NAME_BYTES} for each name in it)")
    return path


MAX_PATH_BYTES, MAX_NAME_BYTES = 4000, 255
MAX_EXAMPLES_SEEN = 10**9  # by one training, repetitions counted: their order is one list of numbers
# teachers and arms have folders of their names: no way out of the run folder, and room for what is put around a name
FOLDER_NAME = r"^\w[\w.+@-]{0,63}$"
# Bounds are far above what anybody trains, and far below what hangs a machine before it can say anything.
Count = Annotated[int, Field(ge=0, le=10**8)]  # of problems, texts, steps
Positive = Annotated[int, Field(gt=0, le=10**8)]
Size = Annotated[int, Field(gt=0, le=2**17)]  # of a model's parts, in channels
Batch = Annotated[int, Field(gt=0, le=2**16)]
Tokens = Annotated[int, Field(gt=0, le=2**20)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, le=1)]
Segment = Literal["prompt", "reasoning", "answer"]
Parity = Literal["steps", "student_flops", "total_flops", "data"]
NonNegative = Annotated[float, Field(ge=0, le=1e39)]
AboveZero = Annotated[float, Field(gt=0, le=1e39)]
PathText = Annotated[str, AfterValidator(_usable_path)]
AnswerRule = Literal["value", "number", "fraction", "latex", "yes-no", "letter", "exact-match"]
ANSWER_RULES = get_args(AnswerRule)
TimeMode = Literal["index", "pad", "proportional", "segment"]
Control = Literal["placebo", "untrained", "shuffled", "noise"]
UNTRAINED = "~untrained"  # behind a teacher's name, which cannot hold this sign: the same with random weights
RESAMPLING = ("proportional", "segment")  # the time modes that average neighbouring tokens
TIME_ALIASES = {"truncate": "index", "soft": "segment"}  # align.time, in the original's words


class TaskRecipe(Section):
    """One source of problems, and how many of them each split gets."""

    name: str = Field(
        description="chain, product, digits, quotient (built in); gsm8k, svamp, strategyqa, math23k, math, "
        "arc_challenge, hotpotqa; or jsonl, csv, parquet with `file`"
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


class ScratchRecipe(Section):
    """A model with random weights of a known family."""

    architecture: Literal["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "gpt_neox", "phi", "bert", "t5"] = (
        Field("qwen2", description="its family; what is trained on the spot has to be causal (not bert, t5)")
    )
    hidden_size: Size = Field(64, description="width of the model")
    num_layers: Annotated[int, Field(gt=0, le=1024)] = Field(2, description="layers, one on the other")
    num_heads: Annotated[int, Field(gt=0, le=4096)] = Field(4, description="attention heads of each layer")
    num_kv_heads: Annotated[int, Field(gt=0, le=4096)] | None = Field(None, description="unset: as many as num_heads")
    head_size: Size | None = Field(None, description="unset: hidden_size / num_heads")
    intermediate_size: Annotated[int, Field(gt=0, le=2**20)] | None = Field(
        None, description="width of the MLP; unset: 8/3 of hidden_size, rounded up to 8"
    )
    vocab_size: Annotated[int, Field(gt=0, le=2**24)] | None = Field(None, description="unset: the tokenizer's length")
    init_std: float = Field(0.02, gt=0, le=100, description="standard deviation of the random weights")
    rope_theta: float = Field(10000.0, gt=0, le=1e12, description="base of the rotary frequencies")
    tie_embeddings: bool = Field(True, description="the LM head shares the embeddings' weights")


class LoraRecipe(Section):
    """Low-rank adapters (peft); merged into the saved student."""

    r: Annotated[int, Field(gt=0, le=2**16)] = Field(16, description="rank of an adapter")
    alpha: Annotated[int, Field(gt=0, le=2**16)] = Field(32, description="an adapter's part is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that is dropped in training")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear layers that get one, e.g. [q_proj, v_proj]"
    )


class ModelRecipe(Section):
    """Where a model comes from: `path` (folder or hub id) or `scratch` (random weights). One of the two."""

    path: PathText | None = Field(
        None, description="a folder or hub id, or `A or B`: the first that is a folder here; $VARIABLES are filled in"
    )
    gguf_file: PathText | None = Field(None, description="name of a GGUF file in `path`, to take the weights from")
    keep_layers: Positive | None = Field(
        None, description="of a `path`: so many of its layers, evenly spread, first and last among them; unset: all"
    )
    scratch: ScratchRecipe | None = Field(None, description="sizes of a model with random weights")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what its weights are held in")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="transformers' implementation; flash_attention_2 needs its package and a GPU"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model: only if you read it")

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give exactly one of `path` (a folder or hub id) and `scratch` (random weights)")
        if self.path is None and (self.gguf_file or self.keep_layers):
            raise ValueError("gguf_file and keep_layers go with `path`")
        return self

    @field_validator("path")
    @classmethod
    def _first_there(cls, path: str | None) -> str | None:
        *local, last = (os.path.expandvars(choice.strip()) for choice in (path or "").split(" or "))
        return next((choice for choice in local if Path(choice).expanduser().is_dir()), last) or None


class OptimiserRecipe(Section):
    """AdamW, a schedule, and how many steps."""

    steps: Positive = Field(800, description="optimiser steps")
    batch_size: Batch = Field(32, description="examples per device and micro-batch")
    accumulation: Batch = Field(1, description="micro-batches per optimiser step; the loss does not depend on it")
    learning_rate: float = Field(2e-3, gt=0, le=1e30, description="AdamW's, at the peak of the schedule")
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.98), description="decay of AdamW's means of gradients and of their squares"
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW's, decoupled")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate over the steps")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")
    lr_warmup_steps: Count = Field(0, description="steps of linear rise before the schedule")
    max_grad_norm: NonNegative = Field(1.0, description="gradients are clipped to this norm; 0: not at all")

    @model_validator(mode="after")
    def _not_endless(self) -> OptimiserRecipe:
        seen = self.steps * self.batch_size * self.accumulation
        if seen > MAX_EXAMPLES_SEEN:
            raise ValueError(
                f"steps x batch_size x accumulation are {seen:,} examples, more than {MAX_EXAMPLES_SEEN:,}: "
                "their order would not fit into memory"
            )
        return self


class TeacherRecipe(ModelRecipe):
    """One teacher. A `scratch` teacher is trained on the spot, on `train_on`, with `optimiser`."""

    name: str = Field(pattern=FOLDER_NAME, description="what arms, folders and messages call it")
    tokenizer: PathText | None = Field(
        None, description="folder, `root:NAME` or hub id; unset: beside the weights of `path`, else data.tokenizer"
    )
    traces: PathText | None = Field(
        None, description="JSONL with question, reasoning: this teacher's own chains; unset: the data's"
    )
    train_on: list[str] = Field(default_factory=list, description="tasks a scratch teacher is trained on")
    optimiser: OptimiserRecipe = Field(OptimiserRecipe(), description="how a scratch teacher is trained")
    seed: Seed = Field(0, description="of a scratch teacher's weights and order")

    @model_validator(mode="after")
    def _trained(self) -> TeacherRecipe:
        if self.scratch is not None and not self.train_on:
            raise ValueError("a scratch teacher needs `train_on`: the tasks it is trained on")
        return self


class StudentRecipe(ModelRecipe):
    """The model that learns."""

    lora: LoraRecipe | None = Field(None, description="train adapters only; unset: all weights")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")


class CaptureRecipe(Section):
    """How teacher targets reach the student."""

    source: Literal["store", "online"] = Field(
        "store", description="paid once and read from disk, or run in every step"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what targets are stored in")
    logits_top_k: int = Field(
        32, ge=0, le=2**16, description="teacher logits kept per token for logit distillation; 0: none"
    )
    batch_size: Batch = Field(64, description="texts that a teacher reads at once")


class AlignRecipe(Section):
    """Teacher KV to student slots, layers, heads and sizes."""

    match_in: Literal["teacher", "student", "shared"] = Field(
        "teacher", description="which space the two meet in; shared: a common one, one frozen adapter per model"
    )
    time: TimeMode = Field(
        "pad", description="how positions correspond; pad: one text, by its characters where tokenizers differ"
    )
    segment_ratio: dict[Segment, Share] = Field(
        default_factory=dict,
        description="segment: share of the teacher's tokens of it that are read, e.g. {reasoning: 0.5}",
    )
    smoothness: dict[Segment, NonNegative] = Field(
        default_factory=dict, description="segment: width of the window around each place; 0: linear interpolation"
    )
    layers: Literal["ratio", "interpolate", "terminal", "cka", "explicit"] = Field(
        "ratio", description="which teacher layers stand behind each student layer; cka: those that are most alike"
    )
    layer_map: dict[int, list[int]] | PathText | None = Field(
        None,
        description="explicit: student layer -> teacher layers, or JSON with it; cka: the file of map-layers",
    )
    cka_on: Literal["keys", "values", "hidden"] = Field("keys", description="what layers are compared by")
    cka_top_k: int = Field(
        2, gt=0, le=1024, description="teacher layers behind each student layer, weighted by similarity"
    )
    cka_texts: Positive = Field(100, description="training texts that similarities are measured on")
    cka_monotone: bool = Field(False, description="deeper student layers never read shallower teacher layers")
    projection: Literal["flat", "structured", "elastic"] = Field(
        "flat", description="one linear over all heads; head mixer + size; or norm and a small MLP over all heads"
    )
    per_head: bool = Field(False, description="structured: a size map for each head; ridge: a fit for each head alone")
    rank: Size | None = Field(None, description="flat: two thin matrices of this rank; unset: one full matrix")
    elastic_hidden: Size | None = Field(None, description="elastic: width of its MLP; unset: the wider side")
    residual: bool = Field(False, description="a gated correction on top of a fixed first guess (gate starts at 0)")
    share_layers: bool = Field(False, description="one projector for all layers")
    init: Literal["xavier", "orthogonal", "identity", "uniform", "ridge"] = Field(
        "xavier", description="what a projector starts from; ridge: the closed form"
    )
    train_projector: bool | None = Field(None, description="unset: trained in teacher space, frozen in student space")
    ridge_l2: AboveZero = Field(1e-2, description="ridge penalty relative to the mean channel variance")
    ridge_on: Literal["kv", "attention"] = Field(
        "kv", description="error in keys and values, or in what attention reads of them (softmax(qk)v)"
    )
    shared_fit: Literal["gcca", "procrustes", "trained"] = Field("gcca", description="how shared adapters are made")
    shared_size: Size | None = Field(None, description="channels of the shared space; unset: the narrowest model's")
    standardise: bool = Field(True, description="teacher channels to mean 0, std 1 over the training tokens")
    keys: Literal["unrotated", "rotated"] = Field("unrotated", description="frame in which keys are compared")
    calibration_examples: Positive = Field(512, description="training texts that statistics and closed forms are of")

    @field_validator("time", mode="before")
    @classmethod
    def _own_word(cls, word: object) -> object:
        return TIME_ALIASES.get(word, word) if isinstance(word, str) else word

    def time_mistakes(self, *, own_tokenizer: bool = False, own_chains: bool = False) -> list[tuple[str, str, str]]:
        """What does not go with `time`, as (key, what is wrong, how to mend it): the one place where it is judged.

        own_tokenizer: the teacher cuts texts otherwise than the student. own_chains: it reads texts of its own.
        """
        resamples, mistakes = self.time in RESAMPLING, []
        if (self.segment_ratio or self.smoothness) and not resamples:
            what = (
                f"align.segment_ratio and align.smoothness shape a resampling, and time: {self.time} does not resample"
            )
            mistakes.append(("align.time", what, "set align.time: segment (or proportional), or leave them out"))
        if self.keys == "rotated" and resamples:
            what = f"rotated keys cannot be interpolated (align.time is {self.time}): neighbours differ in phase"
            mistakes.append(("align.keys", what, "use keys: unrotated, or time: pad or index"))
        if self.keys == "rotated" and self.time == "pad" and own_tokenizer:
            what = "a token of the student reads several of this teacher's, and rotated keys cannot be averaged"
            mistakes.append(("align.keys", what, "set align.keys: unrotated"))
        if self.time == "pad" and own_chains:
            what = "align.time: pad is for one text, and this teacher has chains of its own (traces)"
            mistakes.append(("align.time", what, "set align.time: segment (or proportional)"))
        return mistakes


class CompressRecipe(Section):
    """Which teacher tokens take part."""

    kv_compression: Literal["full", "right", "crop", "r-kv", "random", "uniform", "none"] = Field(
        "full", description="all; the last, first, most important, random or evenly spaced ones; or none"
    )
    keep: Positive | None = Field(None, description="reasoning tokens kept: the last, the first, the best, …")
    importance_share: float = Field(
        0.1, ge=0, le=1, description="r-kv: weight of importance; the rest is redundancy (KaVa's lambda)"
    )

    @model_validator(mode="after")
    def _needs_keep(self) -> CompressRecipe:
        if self.kv_compression not in ("full", "none") and self.keep is None:
            raise ValueError(f"kv_compression {self.kv_compression} needs `keep`: how many reasoning tokens to keep")
        return self


class FuseRecipe(Section):
    """How several teachers become one signal."""

    fusion_strategy: Literal["fixed", "competence", "similarity"] = Field(
        "fixed", description="weights per example: fixed; by how well each explains the gold text; by likeness of keys"
    )
    weights: list[float] | None = Field(None, description="fixed: one per teacher, normalised to sum 1; unset: equal")
    temperature: AboveZero = Field(1.0, description="softmax temperature of competence and similarity")
    fuse_at: Literal["loss", "kv"] = Field("loss", description="one loss term per teacher, or one averaged cache")
    metric: Literal["cosine", "dot", "euclidean"] = Field("cosine", description="similarity: to a teacher's prototype")
    prototype: Literal["mean", "first", "max", "k-means"] = Field(
        "mean", description="similarity: what stands for a teacher's keys"
    )
    num_prototypes: int = Field(4, gt=0, le=4096, description="centres for k-means")

    @field_validator("weights")
    @classmethod
    def _weights(cls, weights: list[float] | None) -> list[float] | None:
        if weights is not None:
            if any(not (w >= 0 and w < float("inf")) for w in weights):
                raise ValueError(f"weights must be finite and >= 0, got {weights}")
            if sum(weights) <= 0:
                raise ValueError(f"weights {weights} sum to 0 and cannot be normalised: make at least one positive")
        return weights


class LossRecipe(Section):
    """The terms of the loss and their weights."""

    kind: Literal["mse", "smooth_l1", "l1", "mercator", "hybrid", "structural", "attention_output", "cka"] = Field(
        "mse", description="distance of keys and values; structural, attention_output: of what attention does with them"
    )
    kv_weight: NonNegative = Field(20.0, description="0: no KV term")
    k_weight: NonNegative = Field(1.0, description="share of the keys in the KV term")
    v_weight: NonNegative = Field(1.0, description="share of the values in the KV term")
    kv_warmup: NonNegative = Field(
        0.1, description="below 1: share of the steps; else steps; the KV weight rises linearly"
    )
    kv_fade: NonNegative = Field(
        0.0, description="the last steps, counted alike, in which the KV weight falls to 0; 0: it stays"
    )
    distill_layers: str = Field("all", description="student layers, `0-12` (inclusive), `3,5`, or `all`")
    smooth_l1_beta: AboveZero = Field(1.0, description="smooth_l1: below it squares, above it absolute values")
    mercator_alpha: NonNegative = Field(1.0, description="mercator: weight of 1 - cos")
    mercator_beta: NonNegative = Field(
        0.1, description="mercator: weight of the squared difference of the lengths' logarithms"
    )
    hybrid_share: float = Field(0.5, ge=0, le=1, description="hybrid: share of mse, the rest mercator")
    structural_k: NonNegative = Field(1.0, description="structural: weight of 1 - cos of keys")
    structural_v: NonNegative = Field(1.0, description="structural: weight of 1 - cos of values")
    structural_attention: NonNegative = Field(1.0, description="structural: weight of KL of the attention rows")
    attention_weighted: bool = Field(
        False, description="tokens weigh by the attention the teacher's answer pays to them (mean 1)"
    )
    ce_weight: NonNegative = Field(1.0, description="of the cross-entropy of the text")
    ce_on: Literal["reasoning+answer", "answer"] = Field("reasoning+answer", description="tokens of the cross-entropy")
    logit_weight: NonNegative = Field(0.0, description="logit distillation (reference arm)")
    logit_temperature: AboveZero = Field(1.0, description="logit distillation: both sides' logits are divided by it")
    logit_match: Literal["auto", "same", "spans", "sorted", "hybrid"] = Field(
        "auto",
        description="logits of a teacher with another tokenizer: spans of text that both cut out, by chain rule and "
        "equal bytes; sorted: probabilities by size (ULD); hybrid: spans, and sorted for pieces without a counterpart; "
        "same: refuse it. auto: spans. With the student's tokenizer all but sorted are plain distillation",
    )
    kv_on: Literal["all", "reasoning", "answer", "reasoning+answer"] = Field("all", description="tokens of the KV term")

    @property
    def compares_attention(self) -> bool:
        """Keys, values and queries enter one distance together, in place of keys and values apart."""
        return self.kind in ("structural", "attention_output")


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


class TuneRecipe(Section):
    """A small search before the study, of as many trials for every arm: values chosen on validation problems."""

    arms: Literal["all"] | list[str] = Field("all", description="which arms are tuned")
    grid: dict[Literal["train", "loss", "fuse"], dict[str, list[NonNegative]]] = Field(
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
    align: AlignRecipe = Field(description="changes to `align`")
    compress: CompressRecipe = Field(description="changes to `compress`")
    fuse: FuseRecipe = Field(description="changes to `fuse`")
    loss: LossRecipe = Field(description="changes to `loss`")
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
        description="arm -> {teachers, control, texts, align, fuse, loss, train, match, …}",
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
