"""Models from recipes: a folder or hub id (safetensors only), or random weights of a known family; LoRA around them.

A student is causal. A teacher may be an encoder or an encoder-decoder: then it is what its config says it was saved
as, or for random weights a model for masked words (BERT) or for sequences to sequences (T5).

Checks that cost nothing (`check_model_exists`, `model_config`) are apart from loading, so that a recipe's mistakes
come out before any work. Does not know tokenizers or devices, and never reads pickled weights.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from kvdistill.core.errors import ModelError
from kvdistill.core.hub import hub_reachable
from kvdistill.core.recipe import LoraRecipe, ModelRecipe, StudentRecipe
from kvdistill.core.runtime import DTYPES, derive_seed
from kvdistill.models.scratch import scratch_config
from kvdistill.models.shorten import shorten_config, shorten_model
from kvdistill.models.structure import auto_class, model_kind

_ATTENTION_WORDS = ("attn_implementation", "flash_attn", "FlashAttention", "scaled_dot_product_attention")


# -- before loading -------------------------------------------------------------------------------


def check_model_exists(recipe: ModelRecipe, place: str) -> PreTrainedConfig:
    """The model's config, read without its weights.

    place: the recipe key, for errors (`student`, `teachers[0]`). Raises ModelError where folder, config or weights
    are missing, weights are pickled, the sizes of a scratch model do not go together, or a student is not causal.
    """
    if recipe.scratch is not None:
        return model_config(recipe, recipe.scratch.vocab_size or 1, place)
    assert recipe.path is not None
    folder = Path(recipe.path).expanduser()
    if folder.is_dir() and recipe.gguf_file is not None:
        if not (folder / recipe.gguf_file).is_file():
            raise ModelError(
                f"{folder} has no file {recipe.gguf_file}", place=f"{place}.gguf_file", fix="name a file in that folder"
            )
    elif folder.is_dir():
        _check_folder(folder, f"{place}.path")
    elif recipe.path.startswith((".", "/", "~")) or recipe.path.count("/") > 1:
        raise ModelError(
            f"there is no folder {recipe.path}",
            place=f"{place}.path",
            fix="give a folder with config.json and *.safetensors, or a hub id like Qwen/Qwen2.5-0.5B",
        )
    source = str(folder) if folder.is_dir() else recipe.path
    try:
        config = AutoConfig.from_pretrained(
            source,
            trust_remote_code=recipe.trust_remote_code,
            local_files_only=folder.is_dir() or not hub_reachable(),
            **_gguf(recipe),
        )
    except Exception as error:  # a stranger's file: transformers raises whatever its parsers come across
        raise _cannot_load(recipe, place, error) from error
    if recipe.keep_layers is not None:
        shorten_config(config, recipe.keep_layers, f"{place}.keep_layers")
    if isinstance(recipe, StudentRecipe):
        require_causal(config, f"{place}.path")
    return config


def _gguf(recipe: ModelRecipe) -> dict[str, str]:
    return {} if recipe.gguf_file is None else {"gguf_file": recipe.gguf_file}


def require_causal(config: PreTrainedConfig, place: str) -> None:
    """Raise ModelError unless a model with this config writes text from left to right, as a student has to."""
    kind = model_kind(config)
    if kind != "decoder":
        raise ModelError(
            f"{config.model_type} is an {kind}: it does not continue a text from left to right",
            place=place,
            fix="use a causal decoder here (Qwen, Llama, GPT-2, …); encoders and encoder-decoders can be teachers",
        )


def model_config(recipe: ModelRecipe, vocab_size: int, place: str = "model") -> PreTrainedConfig:
    """The transformers config of a model: its own for `path`, one with the given sizes for `scratch`.

    vocab_size: the tokenizer's length; the model's must not be smaller. Raises ModelError.
    """
    if recipe.scratch is None:
        config = check_model_exists(recipe, place)
    else:
        config = scratch_config(recipe.scratch, vocab_size, f"{place}.scratch")
        if isinstance(recipe, StudentRecipe):
            require_causal(config, f"{place}.scratch.architecture")
    have = config.get_text_config(decoder=True).vocab_size
    if have < vocab_size:
        raise ModelError(
            f"the model has {have} token embeddings, the tokenizer has {vocab_size} tokens",
            place=place,
            fix="use the model's own tokenizer (data.tokenizer), or a larger scratch.vocab_size",
        )
    return config


def _check_folder(folder: Path, place: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json",
            place=place,
            fix="give a folder written by save_pretrained (merge adapters into their model first)",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a weight index", place=place, fix="copy the model again") from error
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ModelError(f"{folder} lacks {missing[0]}", place=place, fix="copy the missing weight files")
    elif not (folder / "model.safetensors").is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise ModelError(
            f"{folder} has no safetensors weights" + (", only pickled ones, which are never loaded" if pickled else ""),
            place=place,
            fix="convert the weights to safetensors where you trust them (save_pretrained writes safetensors)",
        )


def _cannot_load(recipe: ModelRecipe, place: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    suggested = Path(recipe.path or "").expanduser() / "generation_config.json"
    if suggested.is_file() and not _is_readable(suggested):
        fix = f"mend {suggested}, or delete it: answers here are greedy whatever it says"
    elif recipe.gguf_file is not None and isinstance(error, ImportError):
        fix = "pip install gguf"
    elif "trust_remote_code" in str(error):
        fix = "use a model transformers knows; or read the code that comes with this one, then set trust_remote_code"
    else:
        fix = "give a folder with config.json and *.safetensors, or a hub id this machine can reach"
    return ModelError(f"cannot load {recipe.path}: {reason}", place=f"{place}.path", fix=fix)


def _is_readable(generation_config: Path) -> bool:
    try:
        GenerationConfig.from_pretrained(str(generation_config.parent))
    except Exception:  # whatever transformers says to these values
        return False
    return True


# -- loading --------------------------------------------------------------------------------------


def load_model(
    recipe: ModelRecipe, *, vocab_size: int, seed: int, place: str, untrained: bool = False
) -> PreTrainedModel:
    """The model, on the CPU, in eval mode, with the recipe's dtype and attention implementation.

    vocab_size: the tokenizer's length. seed: of random weights (`scratch`); the same seed gives the same bits, and
    the global random state is left alone. place: the recipe key, for errors. untrained: random weights in the place of
    those of `path`, by the family's own rule. Raises ModelError.
    """
    config = model_config(recipe, vocab_size, place)
    dtype = DTYPES[recipe.dtype]
    try:
        if recipe.scratch is not None or untrained:
            own: dict[str, Any] = {"trust_remote_code": True} if recipe.trust_remote_code else {}
            config.__dict__.pop("quantization_config", None)
            made_in = torch.float32 if recipe.scratch is not None else dtype  # a model of billions: never in float32
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "model", "init"))
                auto = auto_class(config)
                model = auto.from_config(config, attn_implementation=recipe.attention, dtype=made_in, **own)
            for parameter in model.parameters():  # not model.to(dtype): the rotary frequencies stay in float32
                parameter.data = parameter.data.to(dtype)
            model.config.dtype = dtype
            return model.eval()
        return _pretrained_model(recipe, config, dtype, place)
    except (ImportError, OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ImportError) or any(word in str(error) for word in _ATTENTION_WORDS):
            raise ModelError(
                f"cannot run attention {recipe.attention} here: {str(error).strip().splitlines()[0]}",
                place=f"{place}.attention",
                fix="set attention: eager"
                if recipe.attention == "sdpa"
                else "attention: sdpa or eager; flash_attention_2 needs its package, a GPU and a half-precision dtype",
            ) from error
        if recipe.path is None:
            raise
        raise _cannot_load(recipe, place, error) from error


def _pretrained_model(recipe: ModelRecipe, config: PreTrainedConfig, dtype: torch.dtype, place: str) -> PreTrainedModel:
    assert recipe.path is not None
    folder = Path(recipe.path).expanduser()
    loaded: Any = auto_class(config).from_pretrained(
        str(folder) if folder.is_dir() else recipe.path,
        config=None if recipe.keep_layers or recipe.gguf_file else config,
        dtype=dtype,
        attn_implementation=recipe.attention,
        trust_remote_code=recipe.trust_remote_code,
        output_loading_info=True,
        local_files_only=folder.is_dir() or not hub_reachable(),
        **({"gguf_file": recipe.gguf_file} if recipe.gguf_file else {"use_safetensors": True}),
    )
    model, report = loaded
    # an encoder's pooler reads its output: capture never runs it, and many folders leave it out
    missing = sorted(key for key in report.get("missing_keys", ()) if not key.startswith("pooler."))
    if missing:
        raise ModelError(
            f"{recipe.path} lacks {len(missing)} weights, first {missing[0]}: they would be random",
            place=f"{place}.path",
            fix=f"give a folder with the whole {type(model).__name__}",
        )
    refuse_non_finite(model, recipe, f"{place}.path")
    if recipe.gguf_file is not None:  # the weights are whole numbers again: what is saved must not say otherwise
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    if recipe.keep_layers is not None:
        shorten_model(model, recipe.keep_layers, f"{place}.keep_layers")
    return model.eval()


def refuse_non_finite(model: nn.Module, recipe: ModelRecipe, place: str) -> None:
    """Raise ModelError where a weight is NaN or infinite, naming file and tensor: later it would look like a step of
    training or a teacher's weight that is to blame. One pass over the weights, without copies.
    """
    weights = ((name, p.detach()) for name, p in model.named_parameters() if p.numel())
    name = next((name for name, w in weights if not all(bool(end.isfinite()) for end in torch.aminmax(w))), None)
    if name is None:
        return
    found, fix = f"weight {name} holds NaN or infinity", "copy or convert the model again: this file is damaged"
    folder = Path(recipe.path or "").expanduser()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with safe_open(str(file), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(key)
                if tensor.is_floating_point() and (number := int((~tensor.isfinite()).sum())):
                    what = (
                        f"{file}: tensor {key} holds {number:,} values of {tensor.numel():,} that are NaN or infinite"
                    )
                    raise ModelError(what, place=place, fix=fix)
    if folder.is_dir():
        found, fix = f"weight {name} has values that {recipe.dtype} cannot hold", "set dtype: bfloat16 or float32"
    raise ModelError(found, place=place, fix=fix)


# -- LoRA -----------------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, lora: LoraRecipe, *, seed: int, place: str = "student.lora") -> nn.Module:
    """A peft model around `model`: only the adapters train. Same seed, same bits. Raises ModelError."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import, and most runs do not need it

    targets = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=model.config.model_type == "gpt2",  # GPT-2 stores its matrices transposed
        task_type="CAUSAL_LM",
    )
    shared = model.get_input_embeddings().weight  # of the output layer as well, where the two are tied
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(derive_seed(seed, "lora", "init"))
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # refused below
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(
                f"no adapter fits: {str(error).strip().splitlines()[0]}",
                place=f"{place}.target_modules",
                fix="name linear layers of this model (q_proj, v_proj, …), or all-linear",
            ) from error
    for name, module in adapted.named_modules():
        base = getattr(module, "base_layer", None)
        if model.config.get_text_config(decoder=True).tie_word_embeddings and getattr(base, "weight", None) is shared:
            raise ModelError(
                f"{name.removeprefix('base_model.model.')} shares its weights with the other end of the model "
                "(tied embeddings): merged into them, an adapter of the one would change both",
                place=f"{place}.target_modules",
                fix="leave lm_head and the embeddings out of it",
            )
    return adapted


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """The plain model with its adapters added into its weights; a model without adapters comes back as it is."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()  # type: ignore[operator]


# -- identity -------------------------------------------------------------------------------------


def fingerprint_model(model: nn.Module) -> str:
    """sha256 (hex) over the name, dtype, shape and bytes of every parameter and saved buffer, in order of name.

    Streams 64 MiB at a time; the same on every device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), 1 << 26):
            digest.update(flat[start : start + (1 << 26)].cpu().numpy().data)
    return digest.hexdigest()
