"""What a model is, in numbers, and how many FLOPs a forward pass of it takes.

The FLOPs are closed forms of matrix products (2 per multiply-add), the convention of torch.utils.flop_counter and
of the PaLM paper's appendix B; norms, activations and softmax are not counted, and causal attention counts as full,
as the counter does. Of an encoder or encoder-decoder, one stack is described and counted: the encoder, unless
another is named; its head is never run here, so it is not counted. Does not know what a training step is made of:
the ledger adds forwards and backwards up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from kvdistill.core.errors import ModelError
from kvdistill.models.positions import most_positions
from kvdistill.models.structure import (
    ModelKind,
    Stack,
    auto_class,
    find_backbone,
    find_rotary,
    model_kind,
    model_name,
    numbered_attention,
    speaks_interface,
    text_config,
    unwrap_model,
)

_EXPERT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim")  # as decoders, BERT and T5 say it


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one stack of a dense model. mlp_matrices: 3 with a gated MLP, 2 without.

    num_parameters, tied: of the whole model. kind: what the model is.
    most_positions: the longest text it can read, in its tokens; None: as long as one likes.
    is_captured: its attention goes through transformers' attention interface, so that keys and values can be recorded.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    has_rope: bool
    num_parameters: int
    tied: bool
    mlp_matrices: int
    kind: ModelKind = "decoder"
    is_captured: bool = True
    most_positions: int | None = None


def describe_model(model: nn.Module, stack: Stack | None = None) -> ModelShape:
    """Sizes of a loaded model (plain or wrapped; a meta-device model will do), of `stack` as in `capture_kv`.

    Raises ModelError where sizes differ between layers (names model and layer or key), for mixtures of experts and for
    models without attention.
    """
    inner, config = unwrap_model(model), text_config(model, stack)
    name = model_name(model)
    refuse_mixture(config, name)
    num_heads = _size(config, "num_attention_heads", name)
    if not num_heads:
        raise ModelError(
            "it has no attention heads, and so no keys and values",
            place=name,
            fix="use a transformer: a decoder, an encoder or an encoder-decoder",
        )
    hidden, num_layers, vocab = (
        _needed(config, key, name) for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    size = _size(config, "head_dim", name) or _size(config, "d_kv", name) or hidden // num_heads
    numbered = numbered_attention(model, stack)
    for layer, module in numbered:
        own = next((module.__dict__[n] for n in _HEAD_SIZE_NAMES if n in module.__dict__), size)
        if own != size:
            raise ModelError(
                f"layer {layer} has head size {own}, the config says {size}: mixed head sizes",
                place=name,
                fix="use a model with one head size",
            )
    inner_sizes = [_size(config, key, name) for key in ("intermediate_size", "n_inner", "ffn_dim", "d_ff")]
    heads, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, _ in find_backbone(model, stack).named_modules()}
    return ModelShape(
        family=config.model_type,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_size(config, "num_key_value_heads", name) or num_heads,
        head_size=size,
        hidden_size=hidden,
        intermediate_size=next(filter(None, inner_sizes), 4 * hidden),
        vocab_size=vocab,
        has_rope=find_rotary(model, stack) is not None,
        num_parameters=sum(p.numel() for p in inner.parameters()),
        tied=heads is not None and heads.weight is embeddings.weight,
        mlp_matrices=3 if names & {"gate_proj", "gate_up_proj", "wi_1", "Wi"} else 2,  # T5, ModernBERT
        kind=model_kind(inner.config),
        is_captured=speaks_interface(numbered),
        most_positions=most_positions(inner),
    )


def refuse_mixture(config: PreTrainedConfig, place: str) -> None:
    """Raise ModelError for a mixture of experts, which the closed forms below do not count."""
    for part in (config, getattr(config, "ffn_config", None)):
        for key in _EXPERT_NAMES:
            if getattr(part, key, None):
                raise ModelError(
                    "mixture of experts: sizes and FLOPs are of dense models only",
                    place=place,
                    fix="use a dense model of the family",
                )


def _size(config: PreTrainedConfig, key: str, place: str) -> int | None:
    """A size of every layer, or None where the configuration has none. Raises ModelError where layers differ in it."""
    try:
        value = getattr(config, key, None)
    except RuntimeError:  # transformers' own word for a size of each layer's own
        value = ["a size of each layer's own"]
    if value is None or isinstance(value, int):
        return value
    each = list(value) if isinstance(value, list | tuple) else [value]
    if len(set(map(str, each))) == 1 and isinstance(each[0], int):
        return int(each[0])
    shown = ", ".join(map(str, each[:4])) + (", …" if len(each) > 4 else "")
    raise ModelError(
        f"{key} differs from layer to layer ({shown}): one size for all layers is needed",
        place=place,
        fix="use a model whose layers are alike",
    )


def _needed(config: PreTrainedConfig, key: str, place: str) -> int:
    value = _size(config, key, place)
    if value is None:
        raise ModelError(
            f"its configuration does not say its {key}",
            place=place,
            fix="use a transformer for text: a decoder, an encoder or an encoder-decoder",
        )
    return value


def describe_config(config: PreTrainedConfig, stack: Stack | None = None) -> ModelShape:
    """Sizes from a configuration alone: the model is built without memory for its weights."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return describe_model(model, stack)


def forward_flops(
    shape: ModelShape,
    num_tokens: int,
    sum_squared_lengths: int,
    num_layers: int | None = None,
    with_lm_head: bool = True,
    num_head_tokens: int | None = None,
    qkv_of_next_layer: bool = False,
) -> int:
    """FLOPs of one forward pass.

    num_tokens and sum_squared_lengths: of the batch as run (padding included: B * T and B * T * T), see
    `batch_geometry`. num_layers: the lowest n only. num_head_tokens: positions the LM head sees (unset: all).
    qkv_of_next_layer: the projections of one more layer, which is where an early-stopped capture ends.
    with_lm_head counts for decoders only. A decoder stack's cross-attention is not counted.
    """
    layers = shape.num_layers if num_layers is None else num_layers
    q_width, kv_width = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    qkv = 2 * num_tokens * shape.hidden_size * (q_width + 2 * kv_width)
    output = 2 * num_tokens * shape.hidden_size * q_width
    attention = 4 * sum_squared_lengths * q_width  # q.k and weights.v
    mlp = 2 * num_tokens * shape.mlp_matrices * shape.hidden_size * shape.intermediate_size
    total = layers * (qkv + output + attention + mlp)
    if qkv_of_next_layer:
        total += qkv
    if with_lm_head and shape.kind == "decoder":
        head_tokens = num_tokens if num_head_tokens is None else num_head_tokens
        total += 2 * head_tokens * shape.hidden_size * shape.vocab_size
    return total


def capture_flops(shape: ModelShape, num_tokens: int, sum_squared_lengths: int, top_layer: int) -> int:
    """FLOPs of an early-stopped capture whose highest layer is `top_layer`: full layers below, only q, k, v of it."""
    return forward_flops(
        shape, num_tokens, sum_squared_lengths, num_layers=top_layer, with_lm_head=False, qkv_of_next_layer=True
    )


def batch_geometry(lengths: Iterable[int]) -> tuple[int, int]:
    """(num_tokens, sum_squared_lengths) of sequences of these lengths; a padded batch is B times its width T."""
    lengths = list(lengths)
    return sum(lengths), sum(n * n for n in lengths)
