"""Take the rotation off captured keys (and queries), and put it on again, with the model's own rotary module.

Rotary position embedding (Su et al. 2021, eq. 34, in the "rotate half" layout): channel pair (i, i + r/2) of a key
at position p is turned by the angle p * theta_i and multiplied by the module's attention factor f (YaRN, longrope;
1 elsewhere). The inverse turns back and divides by f. Scaling (linear, dynamic, YaRN, llama3, …) and partial rotary
come from the module's cos and sin, so nothing of it is written again here. cos, sin and the products are fp32.

The layout is not assumed: the first use on a model compares with the `apply_rotary_pos_emb` of the model's own
file. Families that interleave (Cohere, GLM) turn channels 2i and 2i + 1 in place of i and i + r/2; layers without
rotation (EXAONE 4, Cohere 2, SmolLM3) are left alone; another rotation gets an error. What a model does around its
rotation, like a norm after it, is seen only by running it: `probe.py` does, before anything is captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvdistill.core.errors import AlignmentError, ModelError
from kvdistill.core.kv import KV, RopeFrame
from kvdistill.models.capture import reset_dynamic_rotary
from kvdistill.models.structure import (
    Stack,
    auto_class,
    find_rotary,
    from_modeling_file,
    model_name,
    numbered_attention,
    text_config,
)


class RotaryLayout(NamedTuple):
    """interleaved: channels 2i and 2i + 1 turn together, in place of i and i + r/2. interleaved_angles: the module
    gives each angle twice in a row, in place of all angles twice."""

    interleaved: bool
    interleaved_angles: bool


HALVES = RotaryLayout(False, False)
_LAYOUTS: WeakKeyDictionary[nn.Module, dict[int, RotaryLayout]] = WeakKeyDictionary()
# families whose layers with full attention have no rotation, as they tell the layers apart (EXAONE 4 turns all where
# there is no window)
_ONLY_WINDOWS_TURN = ("cohere2", "cohere2_moe", "exaone4", "exaone4_5", "exaone_moe", "flint", "kolibri1")


def unrotate_keys(kv: KV, model: nn.Module, stack: Stack | None = None) -> KV:
    """The same KV with keys and queries as they were before rotation at kv.positions_BT: exact, differentiable.

    What stands before the rotation in the model, like the norms of Qwen3 and Gemma 3, stays in. KV without rotary
    positions comes back as it is. stack: as in `capture_kv`. Raises AlignmentError for keys that are already
    unrotated and ModelError for a rotary layout that is not supported.
    """
    if kv.rope == "unrotated":
        raise AlignmentError("keys are already unrotated", place=model_name(model), fix="call unrotate_keys once")
    if kv.rope == "none":
        return kv
    return _turn_kv(kv, model, kv.positions_BT, "unrotated", stack)


def rotate_keys(
    kv: KV, model: nn.Module, positions_BT: Int[Tensor, "B T"] | None = None, stack: Stack | None = None
) -> KV:
    """Keys and queries rotated as `model` would at positions_BT [B, T] (unset: kv.positions_BT), differentiable.

    The result carries the new positions. Dynamic (NTK-aware) and longrope angles depend on the last position: they
    are those of a text that ends there. KV without rotary positions comes back as it is. stack: as in `capture_kv`.
    Raises AlignmentError for keys that are already rotated and ModelError for a rotary layout that is not supported.
    """
    if kv.rope == "rotated":
        raise AlignmentError("keys are already rotated", place=model_name(model), fix="unrotate_keys first")
    if kv.rope == "none":
        return kv
    return _turn_kv(kv, model, kv.positions_BT if positions_BT is None else positions_BT, "rotated", stack)


def _turn_kv(kv: KV, model: nn.Module, positions_BT: Tensor, frame: RopeFrame, stack: Stack | None) -> KV:
    rotary = find_rotary(model, stack)
    if rotary is None:
        raise AlignmentError(
            "the keys have rotary positions, this model has none",
            place=model_name(model),
            fix="use the model the keys came from",
        )
    layout = check_layout(model, rotary, kv.keys[0].shape[-1], stack)
    types, turns = _layer_types(model, rotary, kv.layers, stack), turning_layers(model, kv.layers, stack)
    turned = [*kv.keys, *kv.queries]
    for kind in dict.fromkeys(types):  # one cos/sin table for all layers of a type; most models have one type
        chosen = [i for i in range(len(turned)) if types[i % kv.num_layers] == kind and turns[i % kv.num_layers]]
        if not chosen:
            continue
        cos_BTR, sin_BTR = rotary_angles(rotary, positions_BT, kind, layout)
        if frame == "unrotated":
            factor_BTR = cos_BTR.square() + sin_BTR.square()  # attention factor squared; 1 in most families
            cos_BTR, sin_BTR = cos_BTR / factor_BTR, -sin_BTR / factor_BTR
        turn = _turn_neighbours if layout.interleaved else turn_pairs
        out = turn(cos_BTR[:, None], sin_BTR[:, None], *(turned[i] for i in chosen))
        for i, x in zip(chosen, out, strict=True):
            turned[i] = x
    keys, queries = tuple(turned[: kv.num_layers]), tuple(turned[kv.num_layers :])
    return replace(kv, keys=keys, queries=queries, positions_BT=positions_BT, rope=frame)


def rotary_angles(
    rotary: nn.Module,
    positions_BT: Int[Tensor, "B T"],
    layer_type: str | None = None,
    layout: RotaryLayout = HALVES,
) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
    """cos and sin [B, T, R/2] in fp32, times the attention factor, of the module's own scaling at these positions."""
    reset_dynamic_rotary(rotary)
    probe = torch.empty(1, dtype=torch.float32, device=positions_BT.device)  # the module reads its dtype and device
    extra = () if layer_type is None else (layer_type,)
    with torch.no_grad():
        cos, sin = rotary(probe, positions_BT, *extra)
    once = slice(None, None, 2) if layout.interleaved_angles else slice(cos.shape[-1] // 2)
    return cos[..., once].float(), sin[..., once].float()


def _turn_neighbours(cos_B1TR: Tensor, sin_B1TR: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """As `turn_pairs`, of channels (2i, 2i + 1)."""
    width = 2 * cos_B1TR.shape[-1]

    def apart(x: Tensor) -> Tensor:  # all even channels, all odd ones, the rest
        return torch.cat([x[..., :width:2], x[..., 1:width:2], x[..., width:]], dim=-1)

    def together(x: Tensor) -> Tensor:
        return torch.cat([x[..., :width].unflatten(-1, (2, -1)).mT.flatten(-2), x[..., width:]], dim=-1)

    return tuple(together(x) for x in turn_pairs(cos_B1TR, sin_B1TR, *(apart(x) for x in tensors)))


def turn_pairs(
    cos_B1TR: Float[Tensor, "B 1 T R"], sin_B1TR: Float[Tensor, "B 1 T R"], *tensors: Float[Tensor, "b _ T _"]
) -> tuple[Tensor, ...]:
    """Each [B, H, T, D] with channels (i, i + r) turned to (x_i c - x_{i+r} s, x_{i+r} c + x_i s), i < r <= D/2.

    Channels from 2r on are left alone. At least fp32 inside, input dtype outside.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _TurnPairs.apply(cos_B1TR, sin_B1TR, *tensors)  # type: ignore[return-value, no-untyped-call]
    return _turn_all(cos_B1TR, sin_B1TR, tensors)


class _TurnPairs(torch.autograd.Function):
    """The gradient of a turn is the turn back: nothing but cos and sin is kept for backward."""

    @staticmethod
    def forward(ctx, cos, sin, *tensors):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return _turn_all(cos, sin, tensors)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        turned = iter(turn_pairs(cos, -sin, *(g for g in grads if g is not None)))
        return None, None, *(None if g is None else next(turned) for g in grads)


def _turn_all(cos: Tensor, sin: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    cos_wide, sin_wide = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    tables: dict[object, tuple[Tensor, Tensor]] = {}
    out = []
    for x in tensors:
        layout = (x.shape, x.stride())
        if layout not in tables:
            tables[layout] = (_spread(cos_wide, x), _spread(sin_wide, x))
        cos, sin = tables[layout]
        width = cos.shape[-1]
        half = width // 2
        wide = x if x.dtype == torch.float64 else x.float()
        turned = torch.empty_like(wide)  # filled in place: fewer passes over memory than concatenating halves
        turned[..., :half] = wide[..., half:width]
        turned[..., half:width] = wide[..., :half]
        turned[..., :width].mul_(sin).addcmul_(wide[..., :width], cos)
        if width < x.shape[-1]:
            turned[..., width:] = wide[..., width:]
        out.append(turned.to(x.dtype))
    return tuple(out)


def _spread(table_B1TR: Tensor, x: Tensor) -> Tensor:
    # On the CPU, products broadcast over heads have inner loops of a few channels: a table laid out like the keys,
    # made once for all layers, halves the time. On a GPU the broadcast is the cheaper one (fewer bytes).
    if x.device.type != "cpu":
        return table_B1TR
    return torch.empty_like(x[..., : table_B1TR.shape[-1]], dtype=table_B1TR.dtype).copy_(table_B1TR)


def rotary_only(config: PreTrainedConfig, device: torch.device | str = "cpu") -> nn.Module:
    """A model without memory for its weights whose rotary modules work on `device`: for `rotate_keys` of kept keys."""
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if "rotary" in type(module).__name__.lower() and hasattr(module, "config"):
                setattr(parent, name, type(module)(module.config).to(device))  # type: ignore[arg-type]
    return model


# -- what the model does --------------------------------------------------------------------------


def _layer_types(model: nn.Module, rotary: nn.Module, layers: tuple[int, ...], stack: Stack | None) -> list[str | None]:
    """For each layer the kind its rotary module asks for (Gemma 3: sliding or full attention), or None."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return [None] * len(layers)
    kinds = getattr(text_config(model, stack), "layer_types", None)
    return [None] * len(layers) if kinds is None else [kinds[layer] for layer in layers]


def turning_layers(model: nn.Module, layers: Sequence[int], stack: Stack | None = None) -> list[bool]:
    """For each of these layers whether it turns its keys; some families leave out those with full attention."""
    numbered = dict(reversed(numbered_attention(model, stack)))  # a number's first module is a layer's own
    only_windows = text_config(model, stack).model_type in _ONLY_WINDOWS_TURN

    def turns(module: nn.Module | None) -> bool:
        own: dict[str, Any] = {} if module is None else module.__dict__
        if "use_rope" in own:
            return bool(own["use_rope"])
        if not only_windows or "sliding_window" not in own:
            return True
        if "is_sliding" in own:
            return bool(own["is_sliding"]) or own["sliding_window"] is None
        return own["sliding_window"] is not None

    return [turns(numbered.get(layer)) for layer in layers]


def check_layout(model: nn.Module, rotary: nn.Module, head_size: int, stack: Stack | None = None) -> RotaryLayout:
    """How this model turns channels; looks once per rotary module. Raises ModelError where `turn_pairs` cannot."""
    checked = _LAYOUTS.setdefault(rotary, {})
    if head_size in checked:
        return checked[head_size]
    apply = _own_rotation(model, stack)
    device = next(rotary.buffers(), next(model.parameters())).device
    positions = torch.tensor([[0, 1, 5]], device=device)
    probe = torch.empty(1, device=device)
    key = torch.linspace(-1, 1, 3 * head_size, device=device).sin().view(1, 1, 3, head_size)
    kinds = _layer_types(model, rotary, tuple(range(text_config(model, stack).num_hidden_layers)), stack)
    fitting = [RotaryLayout(*each) for each in ((False, False), (True, True), (True, False))]
    for kind in dict.fromkeys(kinds):
        try:
            with torch.no_grad():
                cos, sin = rotary(probe, positions, *(() if kind is None else (kind,)))
                r = cos.shape[-1]  # partial rotary: in these families the attention module cuts r channels out itself
                theirs = torch.cat([apply(key[..., :r], cos, sin), key[..., r:]], dim=-1)
                for layout in tuple(fitting):
                    angles = (x[:, None] for x in rotary_angles(rotary, positions, kind, layout))
                    ours = (_turn_neighbours if layout.interleaved else turn_pairs)(*angles, key)[0]
                    if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-4):
                        fitting.remove(layout)
        except (TypeError, RuntimeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise _unsupported(model, f"its rotary module or function takes other arguments ({error})") from error
        if not fitting:
            raise _unsupported(model, "it turns neither channel i with channel i + half nor 2i with 2i + 1")
    checked[head_size] = fitting[0]
    return fitting[0]


def _own_rotation(model: nn.Module, stack: Stack | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(keys, cos, sin) -> keys turned by the function in the model's own file; some take one tensor, some two."""
    apply = from_modeling_file(numbered_attention(model, stack)[0][1], "apply_rotary_pos_emb")
    if apply is None:
        raise _unsupported(model, "its file has no apply_rotary_pos_emb to compare with")
    if list(inspect.signature(apply).parameters)[1] == "k":
        return lambda key, cos, sin: apply(key, key, cos, sin)[1]
    return apply  # type: ignore[no-any-return]


def _unsupported(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"the rotary positions of this model cannot be taken off its keys: {why}",
        place=model_name(model),
        fix="use a family whose keys can be unrotated (Qwen, Llama, Gemma, OLMo, Cohere, GLM, …: docs/models.md)",
    )
