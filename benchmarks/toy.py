"""What the benchmarks are run on: models with random weights of the Qwen2 architecture, and random texts.

Rank 0-1 of kvdistill only (no trainer), so that the parts benchmark needs torch, transformers and safetensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from kvdistill.core.segments import ANSWER, PROMPT, REASONING

THREADS = 2


@dataclass(frozen=True)
class ToySize:
    """One model. The MLP is 8/3 of the hidden size (rounded up to 8), the smallest in use."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return self.layers, self.kv_heads, self.head_size

    def full_heads(self) -> ToySize:
        """The same without grouped queries: as many KV heads as heads."""
        return replace(self, kv_heads=self.heads)

    def __str__(self) -> str:
        return (
            f"{self.layers} layers x {self.hidden}, {self.heads}/{self.kv_heads} heads x {self.head_size} "
            f"(KV width {self.kv_width}), vocabulary {self.vocab}"
        )


@dataclass(frozen=True)
class ToySetup:
    """The yardstick of the field: student 4 x 128, teacher 8 x 256, batch 4 x 128 tokens."""

    student: ToySize = ToySize(layers=4, hidden=128, heads=4, kv_heads=2, vocab=2048)
    teacher: ToySize = ToySize(layers=8, hidden=256, heads=8, kv_heads=2, vocab=2048)
    batch: int = 4
    tokens: int = 128

    def full_heads(self) -> ToySetup:
        return replace(self, student=self.student.full_heads(), teacher=self.teacher.full_heads())


def toy_model(size: ToySize, seed: int, device: torch.device) -> PreTrainedModel:
    """Random weights; the same ones for the same seed."""
    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=-(-size.hidden * 8 // 3 // 8) * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)


def toy_teacher(size: ToySize, seed: int, device: torch.device) -> PreTrainedModel:
    return toy_model(size, seed, device).requires_grad_(False).eval()


def toy_segments(num_tokens: int) -> list[int]:
    """A quarter prompt, an eighth answer, reasoning between."""
    prompt, answer = num_tokens // 4, num_tokens // 8
    return [PROMPT] * prompt + [REASONING] * (num_tokens - prompt - answer) + [ANSWER] * answer


def toy_texts(num_texts: int, num_tokens: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (num_texts, num_tokens), generator=generator).tolist()


def segment_tensor(lengths: Sequence[int], width: int) -> Tensor:
    """Segment codes [B, width] of texts of these lengths, right-padded."""
    return torch.tensor([toy_segments(n) + [0] * (width - n) for n in lengths])
