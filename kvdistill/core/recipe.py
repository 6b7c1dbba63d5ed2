"""The recipe's types: what a study is made of, key by key. Reading and merging is in `config.py`.

Every section is a frozen pydantic model that forbids unknown keys. Its docstrings and field descriptions
are the reference that `docs/recipe.md` and `kvdistill recipe` print. Knows no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


FOLDER_NAME = r"^\w[\w.+@-]*$"  # teachers and arms have folders of their names: no way out of the run folder
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Segment = Literal["prompt", "reasoning", "answer"]
NonNegative = Annotated[float, Field(ge=0)]
AnswerRule = Literal["value", "number", "fraction", "latex", "yes-no", "letter", "exact-match"]
ANSWER_RULES = get_args(AnswerRule)
TimeMode = Literal["index", "pad", "proportional", "segment"]
RESAMPLING = ("proportional", "segment")  # the time modes that average neighbouring tokens
TIME_ALIASES = {"truncate": "index", "soft": "segment"}  # align.time, in the original's words


class TaskRecipe(Section):
    """One source of problems, and how many of them each split gets."""

    name: str = Field(
        description="chain, product (built in); gsm8k, svamp, strategyqa, math23k, math, arc_challenge, hotpotqa; "
        "or jsonl, csv, parquet with `file`"
    )
    file: str | None = Field(None, description="your own file with question, reasoning, answer (or `fields`)")
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
    train: int = Field(1000, ge=0, description="training problems; these four count where `data.total` is unset")
    val: int = Field(100, ge=0, description="validation problems")
    test: int = Field(100, ge=0, description="test problems, seen by evaluation only")
    teach: int = Field(0, ge=0, description="training problems that scratch teachers study beside `train`")
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

    tasks: list[TaskRecipe] = Field(min_length=1)
    root: str | None = Field(None, description="folder with local copies of the public data sets; unset: the hub")
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
    tokenizer: str = Field(
        "characters", description="characters (built in), a folder, `root:NAME`, a hub id, or `A or B`"
    )
    trim_vocabulary: bool = Field(False, description="keep only the pieces these texts need (tiny models)")
    max_length: Positive = Field(512, description="tokens; longer examples are left out and counted")
    seed: int = Field(0, description="which problems go where; the same for every arm and seed")
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
    def num_learned(self) -> int:
        """About how many problems are learned from; with `total`, that."""
        return self.total or sum(task.train for task in self.tasks)


class ScratchRecipe(Section):
    """A model with random weights of a known family."""

    architecture: Literal["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2", "gpt_neox", "phi", "bert", "t5"] = (
        "qwen2"
    )
    hidden_size: Positive = 64
    num_layers: Positive = 2
    num_heads: Positive = 4
    num_kv_heads: Positive | None = Field(None, description="unset: as many as num_heads")
    head_size: Positive | None = Field(None, description="unset: hidden_size / num_heads")
    intermediate_size: Positive | None = Field(None, description="unset: 8/3 of hidden_size, rounded up to 8")
    vocab_size: Positive | None = Field(None, description="unset: the tokenizer's length")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the random weights")
    rope_theta: float = 10000.0
    tie_embeddings: bool = True


class LoraRecipe(Section):
    """Low-rank adapters (peft); merged into the saved student."""

    r: Positive = 16
    alpha: Positive = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ModelRecipe(Section):
    """Where a model comes from: `path` (folder or hub id) or `scratch` (random weights). One of the two."""

    path: str | None = Field(
        None, description="a folder or hub id, or `A or B`: the first that is a folder here; $VARIABLES are filled in"
    )
    gguf_file: str | None = Field(None, description="name of a GGUF file in `path`, to take the weights from")
    keep_layers: Positive | None = Field(
        None, description="of a `path`: so many of its layers, evenly spread, first and last among them; unset: all"
    )
    scratch: ScratchRecipe | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
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

    steps: Positive = 800
    batch_size: Positive = Field(32, description="examples per device and micro-batch")
    accumulation: Positive = Field(1, description="micro-batches per optimiser step; the loss does not depend on it")
    learning_rate: float = Field(2e-3, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: NonNegative = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")
    lr_warmup_steps: int = Field(0, ge=0, description="steps of linear rise before the schedule")
    max_grad_norm: NonNegative = 1.0


class TeacherRecipe(ModelRecipe):
    """One teacher. A `scratch` teacher is trained on the spot, on `train_on`, with `optimiser`."""

    name: str = Field(pattern=FOLDER_NAME)
    tokenizer: str | None = Field(
        None, description="folder, `root:NAME` or hub id; unset: beside the weights of `path`, else data.tokenizer"
    )
    traces: str | None = Field(
        None, description="JSONL with question, reasoning: this teacher's own chains; unset: the data's"
    )
    train_on: list[str] = Field(default_factory=list, description="tasks a scratch teacher is trained on")
    optimiser: OptimiserRecipe = OptimiserRecipe()
    seed: int = 0

    @model_validator(mode="after")
    def _trained(self) -> TeacherRecipe:
        if self.scratch is not None and not self.train_on:
            raise ValueError("a scratch teacher needs `train_on`: the tasks it is trained on")
        return self


class StudentRecipe(ModelRecipe):
    """The model that learns."""

    lora: LoraRecipe | None = None
    gradient_checkpointing: bool = False


class CaptureRecipe(Section):
    """How teacher targets reach the student."""

    source: Literal["store", "online"] = Field(
        "store", description="paid once and read from disk, or run in every step"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    logits_top_k: int = Field(32, ge=0, description="teacher logits kept per token for logit distillation; 0: none")
    batch_size: Positive = 64


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
    layers: Literal["ratio", "interpolate", "terminal", "cka", "explicit"] = "ratio"
    layer_map: dict[int, list[int]] | str | None = Field(
        None,
        description="explicit: student layer -> teacher layers, or JSON with it; cka: the file of map-layers",
    )
    cka_on: Literal["keys", "values", "hidden"] = Field("keys", description="what layers are compared by")
    cka_top_k: Positive = Field(2, description="teacher layers behind each student layer, weighted by similarity")
    cka_texts: Positive = Field(100, description="training texts that similarities are measured on")
    cka_monotone: bool = Field(False, description="deeper student layers never read shallower teacher layers")
    projection: Literal["flat", "structured", "elastic"] = Field(
        "flat", description="one linear over all heads; head mixer + size; or norm and a small MLP over all heads"
    )
    per_head: bool = Field(False, description="structured: a size map for each head; ridge: a fit for each head alone")
    rank: Positive | None = Field(None, description="flat: two thin matrices of this rank; unset: one full matrix")
    elastic_hidden: Positive | None = Field(None, description="elastic: width of its MLP; unset: the wider side")
    residual: bool = Field(False, description="a gated correction on top of a fixed first guess (gate starts at 0)")
    share_layers: bool = Field(False, description="one projector for all layers")
    init: Literal["xavier", "orthogonal", "identity", "uniform", "ridge"] = "xavier"
    train_projector: bool | None = Field(None, description="unset: trained in teacher space, frozen in student space")
    ridge_l2: float = Field(1e-2, gt=0, description="ridge penalty relative to the mean channel variance")
    ridge_on: Literal["kv", "attention"] = Field(
        "kv", description="error in keys and values, or in what attention reads of them (softmax(qk)v)"
    )
    shared_fit: Literal["gcca", "procrustes", "trained"] = Field("gcca", description="how shared adapters are made")
    shared_size: Positive | None = Field(None, description="channels of the shared space; unset: the narrowest model's")
    standardise: bool = Field(True, description="teacher channels to mean 0, std 1 over the training tokens")
    keys: Literal["unrotated", "rotated"] = Field("unrotated", description="frame in which keys are compared")
    calibration_examples: Positive = 512

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

    kv_compression: Literal["full", "right", "crop", "r-kv", "random", "uniform", "none"] = "full"
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

    fusion_strategy: Literal["fixed", "competence", "similarity"] = "fixed"
    weights: list[float] | None = Field(None, description="fixed: one per teacher, normalised to sum 1; unset: equal")
    temperature: float = Field(1.0, gt=0, description="softmax temperature of competence and similarity")
    fuse_at: Literal["loss", "kv"] = Field("loss", description="one loss term per teacher, or one averaged cache")
    metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    prototype: Literal["mean", "first", "max", "k-means"] = "mean"
    num_prototypes: Positive = Field(4, description="centres for k-means")

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

    kind: Literal["mse", "smooth_l1", "l1", "mercator", "hybrid", "structural", "attention_output", "cka"] = "mse"
    kv_weight: NonNegative = Field(20.0, description="0: no KV term")
    k_weight: NonNegative = 1.0
    v_weight: NonNegative = 1.0
    kv_warmup: NonNegative = Field(
        0.1, description="below 1: share of the steps; else steps; the KV weight rises linearly"
    )
    distill_layers: str = Field("all", description="student layers, `0-12` (inclusive), `3,5`, or `all`")
    smooth_l1_beta: float = Field(1.0, gt=0)
    mercator_alpha: NonNegative = 1.0
    mercator_beta: NonNegative = 0.1
    hybrid_share: float = Field(0.5, ge=0, le=1, description="hybrid: share of mse, the rest mercator")
    structural_k: NonNegative = Field(1.0, description="structural: weight of 1 - cos of keys")
    structural_v: NonNegative = Field(1.0, description="structural: weight of 1 - cos of values")
    structural_attention: NonNegative = Field(1.0, description="structural: weight of KL of the attention rows")
    attention_weighted: bool = Field(
        False, description="tokens weigh by the attention the teacher's answer pays to them (mean 1)"
    )
    ce_weight: NonNegative = 1.0
    ce_on: Literal["reasoning+answer", "answer"] = "reasoning+answer"
    logit_weight: NonNegative = Field(0.0, description="logit distillation (reference arm)")
    logit_temperature: float = Field(1.0, gt=0)
    kv_on: Literal["all", "reasoning", "answer", "reasoning+answer"] = Field("all", description="tokens of the KV term")

    @property
    def compares_attention(self) -> bool:
        """Keys, values and queries enter one distance together, in place of keys and values apart."""
        return self.kind in ("structural", "attention_output")


class TrainRecipe(OptimiserRecipe):
    """Training of the student."""

    projector_lr_scale: float = Field(1.0, gt=0, description="projectors learn at this multiple of the learning rate")
    bf16: bool = Field(False, description="autocast to bfloat16")
    log_every: Positive = 20
    eval_every: int = Field(
        200, ge=0, description="steps between validation points (KV loss and accuracy); 0: only the end"
    )
    eval_examples: Positive = Field(64, description="validation problems per point of the learning curve")
    save_every: Positive = Field(200, description="steps between checkpoints")
    keep_checkpoints: Positive = 2
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)


class EvaluateRecipe(Section):
    """Held-out problems of the training tasks, and public evaluations; one record per question."""

    tasks: list[str] = Field(
        default_factory=list, description="public evaluations beside the test split: gsm8k, math500, bbh, gpqa, …"
    )
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; unset: each evaluation's usual")
    choice: Literal["likelihood", "generation"] = Field(
        "likelihood", description="multiple choice: the likeliest choice, or the letter that is written"
    )
    chat: bool = Field(False, description="evaluations through the model's chat template")

    max_new_tokens: Positive = 64
    batch_size: Positive = 64
    limit: int | None = Field(None, gt=0, description="first n test problems of each task")
    match_examples: Positive = Field(128, description="held-out examples for R2, centred cosine and retrieval")


class ReportRecipe(Section):
    """The comparisons that were declared beforehand, and the margin that counts as equal."""

    comparisons: list[tuple[str, str]] = Field(
        default_factory=list, description="[arm, baseline] pairs: the Holm family"
    )
    primary: Literal["accuracy", "nll"] = Field("accuracy", description="what the verdict is about")
    alpha: float = Field(0.05, gt=0, lt=1)
    margin: float = Field(0.02, gt=0, description="TOST equivalence margin, in units of the primary figure")


class HardwareRecipe(Section):
    """Where runs happen. Changes no result."""

    device: str = "auto"
    workers: int = Field(0, ge=0, description="runs side by side on this machine; 0: one per core (CPU) or GPU")
    threads: int = Field(1, ge=0, description="threads per worker; 0: torch's choice")


class ArmRecipe(Section):
    """One arm of the study, complete: the recipe's sections with the arm's changes laid over them."""

    teachers: list[str]
    placebo: bool = Field(False, description="teacher KV of a mismatched example: same cost, no information")
    align: AlignRecipe
    compress: CompressRecipe
    fuse: FuseRecipe
    loss: LossRecipe

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

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    run_dir: str | None = Field(None, description="unset: runs/NAME")
    seeds: list[int] = Field(default_factory=lambda: [42, 43, 44], min_length=1)
    data: DataRecipe
    teachers: list[TeacherRecipe] = Field(default_factory=list)
    student: StudentRecipe
    capture: CaptureRecipe = CaptureRecipe()
    align: AlignRecipe = AlignRecipe()
    compress: CompressRecipe = CompressRecipe()
    fuse: FuseRecipe = FuseRecipe()
    loss: LossRecipe = LossRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    report: ReportRecipe = ReportRecipe()
    hardware: HardwareRecipe = HardwareRecipe()
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="arm -> {teachers, placebo, align, fuse, loss, …}"
    )
