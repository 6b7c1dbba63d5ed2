"""Tiny random models of every family, with pairwise distinct sizes, and the slow way to their keys and values.

Used by the test_models_* files. The slow way runs layer by layer from hidden states and writes the rotation out
with complex numbers, from angles written out of the papers' formulas; it shares nothing with kvdistill.models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    StableLmConfig,
    T5Config,
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
    "phi": PhiConfig,
    "stablelm": StableLmConfig,
}
BERT_HEADS, T5_HEADS, T5_HEAD, T5_DECODER_LAYERS = 4, 5, 7, 2
ENCODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # class of the config, auto class, sizes
    "bert": (BertConfig, AutoModelForMaskedLM, {"num_attention_heads": BERT_HEADS}),
    "roberta": (RobertaConfig, AutoModelForMaskedLM, {"num_attention_heads": BERT_HEADS, "pad_token_id": 0}),
    "modernbert": (
        ModernBertConfig,
        AutoModelForMaskedLM,
        {"num_attention_heads": BERT_HEADS, "pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 6}
        | {"cls_token_id": None, "sep_token_id": None},
    ),
    "t5": (
        T5Config,
        AutoModelForSeq2SeqLM,
        {"d_model": HIDDEN, "d_kv": T5_HEAD, "num_heads": T5_HEADS, "d_ff": INNER, "num_layers": LAYERS}
        | {"num_decoder_layers": T5_DECODER_LAYERS, "dropout_rate": 0.0, "relative_attention_num_buckets": 8},
    ),
    "bart": (
        BartConfig,
        AutoModelForSeq2SeqLM,
        {"d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": 2, "dropout": 0.0, "pad_token_id": 0}
        | {"encoder_attention_heads": 3, "decoder_attention_heads": 4, "max_position_embeddings": 64}
        | {"encoder_ffn_dim": INNER, "decoder_ffn_dim": 32, "forced_eos_token_id": None},
    ),
}


def counted_flops(counter: FlopCounterMode) -> int:
    """What the counter saw, but for rotary modules: transformers below 5.2x makes their angles by a matrix product."""
    of_rotary = [
        sum(found.values())
        for name, found in counter.get_flop_counts().items()
        if "rotary" in name.rsplit(".", 1)[-1].lower()
    ]
    return counter.get_total_flops() - sum(of_rotary)


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


def tiny_encoder(family: str = "bert", *, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A random fp32 encoder or encoder-decoder in eval mode."""
    kind, auto, own = ENCODERS[family]
    sizes: dict[str, Any] = {"vocab_size": VOCAB}
    if auto is AutoModelForMaskedLM:
        sizes |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
        sizes |= {"max_position_embeddings": 64}
    config = kind(**sizes | NONE | own | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
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


def checkpoint_layers(model: Any, *, reentrant: bool = False) -> None:
    """Gradient checkpointing on, under the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def inputs(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions, "use_cache": False}


def slow_projections(model: Any, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of each layer of a decoder before rotation, from the hidden states that enter it; [B, heads, T, D]."""
    outputs = model(**inputs(ids, mask), output_hidden_states=True)
    kind = model.config.model_type
    slow = {"gpt2": _gpt2_projections, "gpt_neox": _neox_projections, "phi3": _phi3_projections}
    project = slow.get(kind, _linear_projections)
    return [project(model, n, outputs.hidden_states[n]) for n in range(model.config.num_hidden_layers)]


def _gpt2_projections(model: Any, number: int, hidden: Tensor) -> tuple[Tensor, ...]:
    block = model.transformer.h[number]
    both = block.ln_1(hidden) @ block.attn.c_attn.weight + block.attn.c_attn.bias
    return tuple(x.unflatten(-1, (GPT2_HEADS, -1)).transpose(1, 2) for x in both.chunk(3, dim=-1))


def _neox_projections(model: Any, number: int, hidden: Tensor) -> tuple[Tensor, ...]:
    layer = model.gpt_neox.layers[number]
    both = layer.attention.query_key_value(layer.input_layernorm(hidden))  # q, k, v of head 0, then of head 1, …
    return tuple(x.transpose(1, 2) for x in both.unflatten(-1, (HEADS, 3, -1)).unbind(-2))


def _phi3_projections(model: Any, number: int, hidden: Tensor) -> tuple[Tensor, ...]:
    layer = model.model.layers[number]
    both = layer.self_attn.qkv_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, HEAD))
    return tuple(x.transpose(1, 2) for x in both.split([HEADS, KV_HEADS, KV_HEADS], dim=-2))


def _linear_projections(model: Any, number: int, hidden: Tensor) -> tuple[Tensor, ...]:
    layer = model.model.layers[number]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    size = attention.head_dim
    q, k, v = (p(normed).unflatten(-1, (-1, size)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "k_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return tuple(x.transpose(1, 2) for x in (q, k, v))


def slow_encoder_projections(model: Any, hidden_states: Any, stack: str = "encoder") -> list[tuple[Tensor, ...]]:
    """(q, k, v) of each layer of BERT, or of one stack of T5, from the hidden states that enter it."""
    found = []
    for number, hidden in enumerate(hidden_states[:-1]):
        if model.config.model_type == "t5":
            inner = getattr(model, stack).block[number].layer[0]
            linear, size = [getattr(inner.SelfAttention, n) for n in "qkv"], T5_HEAD
            hidden = inner.layer_norm(hidden)
        else:
            inner = model.base_model.encoder.layer[number].attention.self
            linear, size = [inner.query, inner.key, inner.value], HIDDEN // BERT_HEADS
        found.append(tuple(p(hidden).unflatten(-1, (-1, size)).transpose(1, 2) for p in linear))
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


def slow_inv_freq(rope: dict[str, Any], channels: int, length: int, max_positions: int) -> tuple[Tensor, float]:
    """Angle per position of each channel pair (float64) and the attention factor, written out of the papers.

    rope: as transformers' `rope_parameters`. channels: that are turned. length: of the longest text, for dynamic
    scaling and longrope. linear: Chen et al. 2023. dynamic: the NTK-aware base of bloc97 and emozilla (2023).
    yarn: Peng et al. 2023, eqs. 17-23. llama3: Llama 3.1 (Dubey et al. 2024). longrope: Ding et al. 2024.
    """
    d, kind, theta = channels, rope["rope_type"], rope["rope_theta"]
    base = torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    s, original = rope.get("factor", 1.0), rope.get("original_max_position_embeddings", max_positions)
    if kind == "linear":
        return base / s, 1.0
    if kind == "dynamic":
        stretch = s * max(length, max_positions) / max_positions - (s - 1)
        grown = theta * stretch ** (d / (d - 2))
        return torch.tensor([grown ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64), 1.0
    if kind == "yarn":

        def pair_of(turns: float) -> float:  # the pair that turns so often over the original length
            return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair_of(32)), 0), min(math.ceil(pair_of(1)), d - 1)
        ramp = torch.tensor([min(max((i - low) / (high - low), 0), 1) for i in range(d // 2)], dtype=torch.float64)
        return base * (1 - ramp) + base / s * ramp, yarn_factor(s)
    if kind == "llama3":
        few, many = rope["low_freq_factor"], rope["high_freq_factor"]
        out = []
        for angle in base.tolist():
            turns = original * angle / (2 * math.pi)
            smooth = min(max((turns - few) / (many - few), 0), 1)
            out.append((1 - smooth) * angle / s + smooth * angle)
        return torch.tensor(out, dtype=torch.float64), 1.0
    if kind == "longrope":
        per_pair = rope["long_factor"] if length > original else rope["short_factor"]
        factor = math.sqrt(1 + math.log(max_positions / original) / math.log(original))
        return base / torch.tensor(per_pair, dtype=torch.float64), factor
    assert kind == "default"
    return base, 1.0
