"""A tiny model of the same make: every layer of a configuration, all that is odd about it, and few numbers.

What a model does with keys and positions is decided by its configuration and its file, not by its size. So it is
tried on a copy that keeps each layer and its kind, the size of a head, the rotary settings, biases and norms, while
words, channels, heads, feed-forward sizes and windows are cut down. Weights are random, norms and biases too: a norm
whose weights are all 1 would hide that it stands after the rotation.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvdistill.core.errors import ModelError
from kvdistill.models.structure import auto_class

WORDS, WINDOW, HIDDEN, INNER, MOST_HEADS = 64, 5, 64, 32, 2
_WORDS = re.compile(r"vocab_size|n_words|n_vocab|num_embeddings")  # of one word list or several
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embedding_size", "dim", "hidden_dim", "model_dim", "n_embed")
_INNER = re.compile(
    r"(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|ffn_size|dim_ff|intermediate_dim|moe_.*)$"
)
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "chunk_size",
    "mamba_chunk_size",
)


def small_config(config: PreTrainedConfig, *, keep_head_size: bool = True) -> PreTrainedConfig:
    """A copy of `config` with few numbers and all layers.

    keep_head_size: heads stay as wide as they are where the configuration says so in a key of its own; else all
    sizes follow from the number of channels.
    """
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shrink(part, keep_head_size)
    return small


def small_model(config: PreTrainedConfig, attention: str = "eager", *, keep_head_size: bool = True) -> PreTrainedModel:
    """A model of `small_config` with random float32 weights, in eval mode. Raises ModelError where there is none."""
    try:
        small = small_config(config, keep_head_size=keep_head_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = auto_class(small).from_config(small, attn_implementation=attention, dtype=torch.float32)
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.08)
        return model.eval()  # type: ignore[no-any-return]
    except Exception as error:  # whatever a family's own code says to these sizes
        raise ModelError(
            f"no small model of this family can be made to try it on ({first_line(error)})",
            place=config.model_type,
            fix="use another family",
        ) from error


def first_line(error: Exception) -> str:
    """An error in one line, for a reason."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration and those inside of it."""
    inner = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    return [config, *(deeper for part in inner for deeper in _parts(part))]


def _value(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (ValueError, RuntimeError):  # differs from layer to layer
        return None


def _has_factors(config: PreTrainedConfig) -> bool:
    """Whether rotary frequencies are scaled one by one (longrope)."""
    rope = _value(config, "rope_parameters")
    return isinstance(rope, dict) and any(isinstance(value, list) for value in rope.values())


def _shrink(config: PreTrainedConfig, keep_head_size: bool) -> None:
    own = {**config.__dict__}
    names = {config.attribute_map.get(name, name) for name in (*_HEADS, *_HIDDEN, *_WINDOWS)} | own.keys()
    heads = _value(config, "num_attention_heads")
    kv_heads = _value(config, "num_key_value_heads") or heads
    size = _value(config, "head_dim") or _value(config, "d_kv")
    new: dict[str, Any] = {}
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads:
        fewer = min(kv_heads, MOST_HEADS)
        group = heads // kv_heads if heads % kv_heads == 0 else 1
        more = fewer * min(group, 3) if kv_heads < heads else fewer
        new |= {"num_attention_heads": more}
        if _value(config, "num_key_value_heads"):
            new["num_key_value_heads"] = fewer
        own_size = isinstance(size, int) and isinstance(own.get("head_dim", own.get("d_kv")), int)
        width = _value(config, "hidden_size")
        if not own_size and _has_factors(config) and isinstance(width, int):
            hidden = more * (width // heads)  # one factor per pair of a head's channels: the head stays as wide
        else:
            hidden = HIDDEN if own_size and keep_head_size else more * 16
        if own_size and not keep_head_size:
            new |= {n: 16 for n in ("head_dim", "d_kv") if isinstance(own.get(n), int)}
    else:
        hidden = HIDDEN
    for name in sorted(names):
        value = _value(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if _WORDS.search(name):
            new[name] = min(value, WORDS)
        elif name in _HIDDEN:
            new[name] = hidden
        elif name.endswith("attention_heads") and name not in new:
            new[name] = new.get("num_attention_heads", value)
        elif _INNER.search(name) and value > INNER:
            new[name] = INNER
        elif name in _WINDOWS and value > WINDOW:
            new[name] = WINDOW
        elif name.endswith("_token_id") and value >= WORDS:
            new[name] = 1
    for name, value in new.items():
        try:
            setattr(config, name, value)
        except (AttributeError, NotImplementedError, ValueError, TypeError):
            continue
