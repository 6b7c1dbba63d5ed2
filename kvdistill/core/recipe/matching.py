"""What is matched and how: `capture`, `align`, `compress`, `fuse`, `loss`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from kvdistill.core.recipe.base import (
    RESAMPLING,
    TIME_ALIASES,
    AboveZero,
    Batch,
    NonNegative,
    PathText,
    Positive,
    Section,
    Segment,
    Share,
    Size,
    TimeMode,
)


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

    kv_compression: Literal["full", "right", "crop", "r-kv", "random", "uniform", "steps", "none"] = Field(
        "full",
        description="all; the last, first, most important, random or evenly spaced ones; ends of steps; or none",
    )
    keep: Positive | None = Field(
        None,
        description="reasoning tokens kept: the last, the first, the best, …; unset: as many as latent.tokens where "
        "the student thinks in latents, else, with steps, the end of every step",
    )
    step_mark: str | None = Field(
        None,
        min_length=1,
        max_length=40,
        description='steps: the text that stands between the steps of a reasoning: ",", "\\n", ">>", …',
    )
    importance_share: float = Field(
        0.1, ge=0, le=1, description="r-kv: weight of importance; the rest is redundancy (KaVa's lambda)"
    )

    @model_validator(mode="after")
    def _needs_mark(self) -> CompressRecipe:
        if self.kv_compression == "steps" and self.step_mark is None:
            raise ValueError("kv_compression steps needs `step_mark`: the text between the steps of a reasoning")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a mark as before there were marks: fits and budgets are known by what is written here."""
        return {key: value for key, value in handler(self).items() if key != "step_mark" or value is not None}


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


class LatentRecipe(Section):
    """How an arm with `reasoning: latent` thinks, and what its latents learn from (docs/latent.md)."""

    tokens: Annotated[int, Field(gt=0, le=4096)] = Field(4, description="latent slots between prompt and answer (M)")
    passes: Annotated[int, Field(ge=0, le=4096)] = Field(
        3, description="Jacobi passes over them (T); 0: pause tokens; as many as slots: one slot after the other"
    )
    projection_size: Size | None = Field(
        None, description="channels inside the map from hidden state to the next slot; unset: the model's width"
    )
    start_after: NonNegative = Field(
        0.25,
        description="below 1: share of the steps; else steps; before it the student learns written reasoning alone",
    )
    answer_weight: NonNegative = Field(1.0, description="of the cross-entropy of the answer behind the latents")
    self_weight: NonNegative = Field(
        0.0,
        description="of the distance of the latents' keys and values to those of its own written reasoning, in "
        "units of their deviation; rises and falls as loss.kv_weight does",
    )

    def start(self, steps: int) -> int:
        """The step (from 0) from which latents are trained too, of so many."""
        return round(self.start_after * steps) if self.start_after < 1 else min(steps, round(self.start_after))
