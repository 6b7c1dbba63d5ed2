"""`teachers` and `student`: a model from scratch or from a folder, and how a teacher is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kvdistill.core.recipe.base import (
    FOLDER_NAME,
    MAX_EXAMPLES_SEEN,
    Batch,
    Count,
    NonNegative,
    PathText,
    Positive,
    Section,
    Seed,
    Size,
)


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
