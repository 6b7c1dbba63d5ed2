"""Tiny random models of every family, with pairwise distinct sizes, and the slow way to their keys and values.

Used by the test_models_* files. The slow way runs layer by layer from hidden states and writes the rotation out
with complex numbers; it shares nothing with kvdistill.models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, INNER = 37, 48, 3, 6, 2, 10, 28
GPT2_HEADS = 4
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2")
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS: dict[str, Any] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "neox": GPTNeoXConfig,
}


def tiny_model(family: str = "qwen2", *, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model in eval mode; weights large enough that keys differ visibly between tokens."""
    if family == "gpt2":
        config = GPT2Config(
            **{"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": GPT2_HEADS, "n_inner": INNER}
            | {"n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
            | NONE
            | changes
        )
    else:
        sizes = {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD,
            "max_position_embeddings": 64,
        }
        config = CONFIGS[family](**sizes | NONE | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Auto.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # biases and norms too: zeros would hide mistakes
            parameter.data.add_(torch.randn_like(parameter), alpha=0.08)
    return model.eval()


def padded_batch(lengths: tuple[int, ...] = (9, 5, 7), side: str = "left", seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and bool mask [B, max(lengths)]; padding is token 0."""
    g = torch.Generator().manual_seed(seed)
    T = max(lengths)
    ids, mask = torch.zeros(len(lengths), T, dtype=torch.long), torch.zeros(len(lengths), T, dtype=torch.bool)
    for b, n in enumerate(lengths):
        row = torch.randint(1, VOCAB, (n,), generator=g)
        where = slice(T - n, T) if side == "left" else slice(0, n)
        ids[b, where], mask[b, where] = row, True
    return ids, mask


def inputs(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions, "use_cache": False}


def slow_projections(model: Any, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of each layer before rotation, from the hidden states that enter it; [B, heads, T, D]."""
    outputs = model(**inputs(ids, mask), output_hidden_states=True)
    found = []
    for number in range(model.config.num_hidden_layers):
        hidden = outputs.hidden_states[number]
        if model.config.model_type == "gpt2":
            block = model.transformer.h[number]
            both = block.ln_1(hidden) @ block.attn.c_attn.weight + block.attn.c_attn.bias
            q, k, v = (x.unflatten(-1, (GPT2_HEADS, -1)).transpose(1, 2) for x in both.chunk(3, dim=-1))
        else:
            layer = model.model.layers[number]
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                p(normed).unflatten(-1, (-1, HEAD)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "k_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found.append((q, k, v))
    return found


def slow_rotation(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> Tensor:
    """Channel pairs (i, i + r) as complex numbers times factor * exp(i p theta), in float64; the rest untouched."""
    r = len(inv_freq)
    angle = positions.double()[:, None, :, None] * inv_freq.double()
    pair = torch.complex(x[..., :r].double(), x[..., r : 2 * r].double()) * torch.polar(
        torch.full_like(angle, factor), angle
    )
    return torch.cat([pair.real, pair.imag, x[..., 2 * r :].double()], dim=-1).to(x.dtype)


def yarn_factor(scale: float) -> float:
    """YaRN (Peng et al. 2023, eq. 22): 0.1 ln s + 1."""
    return 0.1 * math.log(scale) + 1.0
