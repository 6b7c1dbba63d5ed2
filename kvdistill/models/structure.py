"""Where things are inside a transformers model: its kind, its stacks, layers, attention modules, rotary module.

A *stack* is a column of layers: a decoder has one, so has an encoder, and an encoder-decoder has two. Where none is
named, the decoder of a decoder is meant and the encoder of everything else.

Everything here only looks. It does not know what is captured, rotated or counted: `capture.py`, `rope.py` and
`describe.py` do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Int, Shaped
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from kvdistill.core.errors import ModelError

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]
Stack = Literal["encoder", "decoder"]

_CROSS_ATTENTION = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)  # as BERT, T5 and BART name theirs


def model_kind(config: PreTrainedConfig) -> ModelKind:
    """`decoder` (causal), `encoder` (every token sees every token) or `encoder-decoder`."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if getattr(config, "is_decoder", False):
        return "decoder"
    named = (getattr(config, "architectures", None) or [""])[0]
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "decoder"
    encoders = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,  # the encoder of T5 alone, for one
    )
    return "encoder" if any(config.model_type in names for names in encoders) else "decoder"


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' auto class for what this config was saved as: causal, masked words, sequence to sequence, …"""
    kind, named = model_kind(config), (getattr(config, "architectures", None) or [""])[0]
    if kind == "decoder":
        return AutoModelForCausalLM
    if named.endswith("EncoderModel"):  # T5's encoder alone
        return AutoModelForTextEncoding
    if kind == "encoder-decoder" and (not named or named.endswith("ForConditionalGeneration")):
        return AutoModelForSeq2SeqLM
    if kind == "encoder" and (not named or named.endswith("ForMaskedLM")):
        return AutoModelForMaskedLM
    return AutoModel


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


def model_stack(model: nn.Module, stack: Stack | None = None) -> Stack:
    """`stack`, or the one meant where none is named. Raises ModelError for a stack the model does not have."""
    kind = model_kind(unwrap_model(model).config)
    if stack is None:
        return "decoder" if kind == "decoder" else "encoder"
    if kind not in (stack, "encoder-decoder"):
        raise ModelError(
            f"the {stack} stack is asked for, and this model is {'a decoder' if kind == 'decoder' else 'an encoder'}",
            place=model_name(model),
            fix="leave `stack` out, or use an encoder-decoder",
        )
    return stack


def text_config(model: nn.Module, stack: Stack | None = None) -> PreTrainedConfig:
    """The configuration of the language part; of an encoder-decoder, that of the stack."""
    config = unwrap_model(model).config
    if not config.is_encoder_decoder:
        return config.get_text_config(decoder=True)
    stack = model_stack(model, stack)
    own: Any = find_backbone(model, stack).config
    # T5 gives each stack a config of its own, BART one to both
    return own if own is not config else config.get_text_config(**{stack: True})


def find_backbone(model: nn.Module, stack: Stack | None = None) -> nn.Module:
    """The stack of layers without a head: its output is the last hidden state, its input token ids.

    Raises ModelError for a stack the model does not have.
    """
    inner = unwrap_model(model)
    stack, kind = model_stack(inner, stack), model_kind(inner.config)
    if kind == "encoder":  # get_encoder() would be the part after the embeddings
        return inner.base_model
    return inner.get_encoder() if stack == "encoder" else inner.get_decoder()


def numbered_attention(model: nn.Module, stack: Stack | None = None) -> list[tuple[int, nn.Module]]:
    """(layer, module) for every module of the stack that may be a layer's self-attention, cross-attention left out.

    Modules carry their layer number, in most families; elsewhere it is the place of the layer they are in. Decoder
    layers may be among them: harmless, only attention modules ever reach the attention interface.
    """
    backbone = find_backbone(model, stack)
    found = [
        (module.__dict__["layer_idx"], module)
        for name, module in backbone.named_modules()
        if isinstance(module.__dict__.get("layer_idx"), int) and _is_self_attention(name, module)
    ]
    if found:
        return found
    return [
        (number, module)
        for number, layer in enumerate(_layer_list(backbone, text_config(model, stack).num_hidden_layers))
        for name, module in layer.named_modules()
        if "attention" in type(module).__name__.lower() and _is_self_attention(name, module)
    ]


def _is_self_attention(name: str, module: nn.Module) -> bool:
    own = module.__dict__
    return "config" in own and not own.get("is_cross_attention", False) and not _CROSS_ATTENTION.search(name)


def layer_modules(model: nn.Module, stack: Stack | None = None) -> list[nn.Module]:
    """The layers of the stack, shallow to deep. Raises ModelError where they do not stand in one list."""
    layers = _layer_list(find_backbone(model, stack), text_config(model, stack).num_hidden_layers)
    if not layers:
        raise ModelError(
            "its layers do not stand in one list (shared layers?), so that their outputs cannot be told apart",
            place=model_name(model),
            fix="compare keys or values instead of hidden states (align.cka_on)",
        )
    return layers


def _layer_list(backbone: nn.Module, num_layers: int) -> list[nn.Module]:
    for module in backbone.modules():  # from the outside in: a list inside of a layer comes later
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    return []


def speaks_interface(numbered: Sequence[tuple[int, nn.Module]]) -> bool:
    """Whether any of these modules can go through the attention interface: its file, or a base class's, imports it."""
    files = {kind.__module__ for _, module in numbered for kind in type(module).__mro__}
    return any(
        isinstance(x, AttentionInterface) for file in files for x in vars(sys.modules.get(file, object)).values()
    )


def check_interface(model: nn.Module, numbered: Sequence[tuple[int, nn.Module]]) -> None:
    """Raise ModelError, before anything runs, where none of these modules can go through the attention interface."""
    if speaks_interface(numbered):
        return
    where = f"layer {numbered[0][0]} ({type(numbered[0][1]).__name__})" if numbered else "layer 0"
    raise ModelError(
        f"{where} recorded no keys: its attention bypasses transformers' attention interface, or it has no attention",
        place=model_name(model),
        fix="use a family with ALL_ATTENTION_FUNCTIONS in its code (T5: a transformers newer than 5.13)",
    )


def find_rotary(model: nn.Module, stack: Stack | None = None) -> nn.Module | None:
    """The model's own rotary module, or None for a model without rotary positions.

    Raises ModelError where the config speaks of rotary positions and no module makes them.
    """
    backbone = find_backbone(model, stack)
    direct = backbone._modules.get("rotary_emb")
    if direct is not None:
        return direct
    for module in backbone.modules():
        if "rotary" in type(module).__name__.lower():
            return module
    config = text_config(model, stack)
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
