"""A model with fewer layers: evenly spread over its own, first and last among them (a cheap student of a big one)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvdistill.core.errors import ModelError
from kvdistill.models.structure import find_backbone, layer_modules


def kept_layers(there: int, keep: int) -> list[int]:
    """Numbers of the layers that stay, ascending; of one layer the first."""
    return [round(i * (there - 1) / max(1, keep - 1)) for i in range(keep)]


def shorten_config(config: PreTrainedConfig, keep: int, place: str) -> None:
    """The config of the shorter model, in place: its number of layers, and whatever it lists by layer.

    Raises ModelError where the model has fewer layers than that.
    """
    text = config.get_text_config(decoder=True)
    there = text.num_hidden_layers
    if keep > there:
        raise ModelError(
            f"{keep} layers are to be kept, the model has {there}", place=place, fix=f"choose between 1 and {there}"
        )
    chosen = kept_layers(there, keep)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == there and name != "architectures":
            setattr(text, name, [value[i] for i in chosen])
    text.num_hidden_layers = keep


def shorten_model(model: PreTrainedModel, keep: int, place: str) -> None:
    """Take the other layers out of a loaded model, in place; those that stay are numbered anew."""
    layers = layer_modules(model)
    chosen = kept_layers(len(layers), keep)
    [holder] = [m for m in find_backbone(model).modules() if isinstance(m, nn.ModuleList) and [*m] == layers]
    shorten_config(model.config, keep, place)
    holder._modules = {str(new): layers[old] for new, old in enumerate(chosen)}
    for new, layer in enumerate(holder):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = new
