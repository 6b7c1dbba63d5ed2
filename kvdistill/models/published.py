"""Sizes of published models that recipes name, so that a rehearsal needs no hub.

Facts from the publishers' config.json files (Qwen2.5 technical report, arXiv 2412.15115, table 1). Used by
`kvdistill run --dry-run` only, and only where the model itself cannot be reached.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen2Config

_QWEN25 = {  # layers, hidden, heads, kv heads, MLP, vocabulary, tied embeddings
    "0.5B": (24, 896, 14, 2, 4864, 151936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False),
    "14B": (48, 5120, 40, 8, 13824, 152064, False),
}


def published_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a known hub model (base or -Instruct), or None."""
    base = name.removeprefix("Qwen/").removesuffix("-Instruct")
    if not base.startswith("Qwen2.5-") or base.removeprefix("Qwen2.5-") not in _QWEN25:
        return None
    layers, hidden, heads, kv_heads, mlp, vocabulary, tied = _QWEN25[base.removeprefix("Qwen2.5-")]
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        use_sliding_window=False,
    )
