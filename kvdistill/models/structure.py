"""Where things are inside a transformers model: the plain model under its wrappers, backbone, rotary module.

Everything here only looks. It does not know what is captured, rotated or counted: `capture.py`, `rope.py` and
`describe.py` do.
"""

from __future__ import annotations

import sys
from typing import Any

from jaxtyping import Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvdistill.core.runtime import ModelError


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model under DDP, torch.compile and peft wrappers.

    Raises ModelError where there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):  # peft; asked this way because importing peft takes seconds
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        else:
            raise ModelError(
                f"{type(model).__name__} is not a transformers model, nor a known wrapper around one",
                place=type(model).__name__,
                fix="pass a transformers PreTrainedModel (plain, or wrapped by peft, DDP or torch.compile)",
            )
    return inner


def model_name(model: nn.Module) -> str:
    """What errors call this model: its folder or hub id if it has one, and its class."""
    inner = unwrap_model(model)
    path = getattr(inner.config, "name_or_path", "")
    return f"{path} ({type(inner).__name__})" if path else type(inner).__name__


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the language part."""
    return unwrap_model(model).config.get_text_config(decoder=True)


def find_backbone(model: nn.Module) -> nn.Module:
    """The stack of layers without the LM head: its output is the last hidden state."""
    inner = unwrap_model(model)
    if inner.config.is_encoder_decoder:
        raise ModelError(
            "encoder-decoder models have two stacks; only decoders are captured",
            place=model_name(inner),
            fix="use a decoder-only model",
        )
    return inner.get_decoder()


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of the backbone that carries a layer number and a config, cross-attention left out.

    Decoder layers may be among them: harmless, only attention modules ever reach the attention interface.
    """
    return [
        module
        for module in find_backbone(model).modules()
        if isinstance(module.__dict__.get("layer_idx"), int)
        and "config" in module.__dict__
        and not module.__dict__.get("is_cross_attention", False)
    ]


def find_rotary(model: nn.Module) -> nn.Module | None:
    """The model's own rotary module, or None for a model without rotary positions.

    Raises ModelError where the config speaks of rotary positions and no module makes them.
    """
    backbone = find_backbone(model)
    direct = backbone._modules.get("rotary_emb")
    if direct is not None:
        return direct
    for module in backbone.modules():
        if "rotary" in type(module).__name__.lower():
            return module
    config = text_config(model)
    if getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None):
        raise ModelError(
            "the config has rotary positions, but the model has no rotary module",
            place=model_name(model),
            fix="use a family whose rotary embedding is a module of its own (Qwen, Llama, Mistral, Gemma, …)",
        )
    return None


def from_modeling_file(module: nn.Module, name: str) -> Any:
    """What the file that defines this module's class calls `name`, or None.

    Walks the base classes, because FSDP2 and peft put classes of their own in front.
    """
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), name, None)
        if found is not None and not kind.__module__.startswith("torch."):
            return found
    return None


def positions_from_mask(mask_BT: Shaped[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of each token among the real ones: cumsum(mask) - 1, and 0 before the first.

    Must be passed to the model as `position_ids` under left padding: transformers numbers columns, not tokens.
    mask_BT: [B, T], nonzero at real tokens. Returns int64 [B, T].
    """
    return (mask_BT.long().cumsum(dim=-1) - 1).clamp_min(0)
