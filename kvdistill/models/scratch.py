"""Configurations of models with random weights: the sizes of a recipe, as each family spells them.

Only what a recipe says differs between families; everything else is transformers' default, without dropout and
without special tokens. Builds no model: `load.py` does.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from kvdistill.core.errors import ModelError
from kvdistill.core.recipe import ScratchRecipe

ROTARY_FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (Qwen3Config, {"use_sliding_window": False}),
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "gemma": (GemmaConfig, {}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "phi": (PhiConfig, {}),
}
ROTARY_SHARE = {"gpt_neox": 0.25, "phi": 0.5}  # of a head's channels, as published: Pythia and Phi-1/1.5
MAX_POSITIONS = 4096  # free with rotary positions
LEARNED_MAX_POSITIONS = 1024  # GPT-2 and BERT have a row of weights for each, hence fewer
_NAMES = {"gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "bert": "BERT"}
OTHER_FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (
        GPT2Config,
        {"max_position_embeddings": LEARNED_MAX_POSITIONS, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "bert": (
        BertConfig,
        {
            "max_position_embeddings": LEARNED_MAX_POSITIONS,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "t5": (T5Config, {"dropout_rate": 0.0}),
}


def scratch_config(scratch: ScratchRecipe, vocab_size: int, place: str) -> PreTrainedConfig:
    """The transformers config of a model of these sizes.

    vocab_size: unless the recipe has its own. place: the recipe key, for errors. T5 draws its weights by its own
    rule, whatever `init_std`. Raises ModelError for sizes that do not go together.
    """
    num_kv_heads = scratch.num_kv_heads or scratch.num_heads
    if scratch.num_heads % num_kv_heads:
        raise ModelError(
            f"{scratch.num_heads} heads cannot share {num_kv_heads} key/value heads evenly",
            place=f"{place}.num_kv_heads",
            fix="choose a divisor of num_heads",
        )
    if scratch.head_size is None and scratch.hidden_size % scratch.num_heads:
        raise ModelError(
            f"hidden_size {scratch.hidden_size} is no multiple of num_heads {scratch.num_heads}",
            place=f"{place}.hidden_size",
            fix="choose a multiple, or give head_size",
        )
    vocab = scratch.vocab_size or vocab_size
    head_size = scratch.head_size or scratch.hidden_size // scratch.num_heads
    inner = scratch.intermediate_size or -(-scratch.hidden_size * 8 // 3 // 8) * 8
    if scratch.architecture == "t5" and num_kv_heads != scratch.num_heads:
        raise ModelError("T5 has as many key/value heads as heads", place=place, fix="leave num_kv_heads unset for t5")
    name = _NAMES.get(scratch.architecture)
    if name and (num_kv_heads != scratch.num_heads or head_size * scratch.num_heads != scratch.hidden_size):
        raise ModelError(
            f"{name} has as many key/value heads as heads, of size hidden_size / num_heads",
            place=place,
            fix=f"leave num_kv_heads and head_size unset for {scratch.architecture}",
        )
    kind, own = (ROTARY_FAMILIES | OTHER_FAMILIES)[scratch.architecture]
    settings: dict[str, Any] = dict(
        vocab_size=vocab,
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own,
    )
    if scratch.architecture == "t5":
        settings |= {"d_kv": head_size, "d_ff": inner, "num_decoder_layers": scratch.num_layers}
    else:
        settings |= {"initializer_range": scratch.init_std, "tie_word_embeddings": scratch.tie_embeddings}
        settings["n_inner" if scratch.architecture == "gpt2" else "intermediate_size"] = inner
    if scratch.architecture in ROTARY_FAMILIES:
        settings |= {"num_key_value_heads": num_kv_heads, "head_dim": head_size}
        settings |= {"max_position_embeddings": MAX_POSITIONS, "rope_parameters": _rotation(scratch, head_size, place)}
    try:
        return kind(**settings)
    except StrictDataclassError as error:  # Llama, for one, wants hidden_size % num_heads == 0 whatever the head size
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{scratch.architecture} does not take these sizes: {reason}", place=place, fix="change the sizes it names"
        ) from error


def _rotation(scratch: ScratchRecipe, head_size: int, place: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": scratch.rope_theta}
    turned = head_size
    if scratch.architecture in ROTARY_SHARE:
        rope["partial_rotary_factor"] = ROTARY_SHARE[scratch.architecture]
        turned = int(head_size * ROTARY_SHARE[scratch.architecture])
    if turned % 2 or not turned:
        what = f"head size {head_size} is odd" if turned == head_size else f"{turned} channels of a head are turned"
        raise ModelError(
            f"{what}: rotary positions turn channels in pairs",
            place=f"{place}.head_size",
            fix="choose an even head size" if turned == head_size else "choose heads of a multiple of 8 channels",
        )
    return rope
