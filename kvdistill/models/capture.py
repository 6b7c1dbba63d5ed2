"""Keys, values and queries of every layer, recorded while the model runs, with their gradient.

    with capture_kv(model, layers=[0, 3]) as capture:
        model(input_ids=..., attention_mask=mask_BT, position_ids=positions_BT, use_cache=False)
    kv = capture.kv(mask_BT, positions_BT)          # keys in frame 'rotated', 'none' for GPT-2, BERT and T5

Mechanism: an attention function registered with transformers' attention interface (and the fitting mask function
with the mask interface) records what it is handed and calls the implementation the model had. Keys arrive after
any norm of theirs (Qwen3, Gemma 3), after rotation, and before they are repeated for grouped queries; with them
comes the layer's scaling of q.k and its rule: window, soft cap, sink (`AttentionRule`). Of a position bias (T5) only
that there is one is recorded. The context manager
only changes the name of the implementation in the model's config, and changes it back. Nothing is patched. Hidden
states, where asked for, come from forward hooks on the layers, which stand only as long as the capture.

Records the last forward of the model's backbone. What runs outside of it, like the recomputation of gradient
checkpointing during backward, is not recorded. Does not know rotary positions: `rope.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvdistill.core.errors import ModelError
from kvdistill.core.kv import KV, AttentionRule, RopeFrame
from kvdistill.models.structure import (
    Stack,
    check_interface,
    find_backbone,
    find_rotary,
    from_modeling_file,
    layer_modules,
    model_name,
    model_stack,
    numbered_attention,
    positions_from_mask,
    text_config,
)

_PREFIX = "kvdistill_"  # + the model's own implementation: 'flash' must stay part of a flash implementation's name
_LISTENERS: dict[int, list[KVCapture]] = {}  # id of an attention module -> the captures that want its k, v
_BORROWED: dict[int, list[Any]] = {}  # id of a config -> [config, its own implementation, captures that use it]


class _EnoughRecorded(Exception):
    """Leaves the model's forward once the highest wanted layer is recorded. Never seen outside."""

    def __init__(self, capture: KVCapture) -> None:
        super().__init__("the highest wanted layer is recorded")
        self.capture = capture


class KVCapture:
    """Record keys and values [B, kv_heads, T, D] of `layers` (all by default) in what runs inside the `with` block.

    queries: queries [B, heads, T, D] too. hidden: the output [B, T, C] of each layer too (`hidden()`).
    stop_early: layers above the highest one asked for, and the LM head, are not run: the forward call leaves the
    `with` block at once, so that statements after it inside are skipped.
    stack: `encoder` or `decoder`, for a model that has both; unset: the decoder of a decoder, else the encoder.
    Self-attention only. model: a transformers model, plain or wrapped by peft, DDP or torch.compile. May be nested,
    and several models may be captured at once. Raises ModelError for a layer or stack the model does not have, and
    for a model none of whose attention goes through transformers' attention interface.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        queries: bool = False,
        stop_early: bool = False,
        hidden: bool = False,
        stack: Stack | None = None,
    ) -> None:
        self.name = model_name(model)
        self.backbone = find_backbone(model, stack)
        numbered = numbered_attention(model, stack)
        check_interface(model, numbered)
        self._causal = model_stack(model, stack) == "decoder"
        self.rope: RopeFrame = "none" if find_rotary(model, stack) is None else "rotated"
        num_layers = text_config(model, stack).num_hidden_layers
        self.layers = tuple(range(num_layers)) if layers is None else tuple(sorted(set(layers)))
        outside = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if outside or not self.layers:
            raise ModelError(
                f"layer {outside[0]} is asked for, the model has layers 0-{num_layers - 1}"
                if outside
                else "no layer is asked for",
                place=self.name,
                fix=f"choose layers between 0 and {num_layers - 1}",
            )
        self.queries, self.stop_early = queries, stop_early
        self._wanted, self._last = frozenset(self.layers), self.layers[-1]
        self._modules = [module for _, module in numbered]
        self._numbers = {id(module): number for number, module in numbered}
        self._hidden_of = [(n, layer_modules(model, stack)[n]) for n in self.layers] if hidden else []
        self._recorded: dict[int, tuple[Tensor, Tensor, Tensor | None, float | None]] = {}
        self._rules: dict[int, AttentionRule] = {}
        self._hidden: dict[int, Tensor] = {}
        self._running = self._grad_outside = False
        self._undo = ExitStack()

    # -- installing and removing ------------------------------------------------------------------

    def __enter__(self) -> KVCapture:
        with ExitStack() as undo:  # what was installed before something raises is removed again
            for module in self._modules:
                undo.enter_context(_listening(self, module))
            # the backbone's own config decides which mask is built, the modules' which attention runs
            for config in {id(m.config): m.config for m in [self.backbone, *self._modules]}.values():
                undo.enter_context(_recording(config))
            for hook in (
                self.backbone.register_forward_pre_hook(self._begin_forward),
                self.backbone.register_forward_hook(self._end_forward, always_call=True),
                *(layer.register_forward_hook(partial(self._record_hidden, n)) for n, layer in self._hidden_of),
            ):
                undo.callback(hook.remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._running = False
        self._undo.close()
        return isinstance(error, _EnoughRecorded) and error.capture is self

    # -- recording --------------------------------------------------------------------------------

    def _begin_forward(self, *_: object) -> None:
        rotary = self.backbone._modules.get("rotary_emb")
        if rotary is not None:
            reset_dynamic_rotary(rotary)
        self._recorded, self._hidden = {}, {}
        self._running, self._grad_outside = True, torch.is_grad_enabled()

    def _end_forward(self, *_: object) -> None:
        self._running = False

    def _record(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, settings: Mapping[str, Any]
    ) -> bool:
        """Keep what a layer was handed; settings: by name. True when nothing after it is wanted."""
        layer = self._numbers[id(module)]
        if not self._running or layer not in self._wanted:
            return False
        self._check_gradient(layer)
        if layer in self._recorded:
            raise ModelError(
                f"layer {layer} runs more than once in a forward pass: its keys of one run are not those of another",
                place=self.name,
                fix="use a model that runs each of its layers once",
            )
        self._recorded[layer] = (key, value, query if self.queries else None, settings.get("scaling"))
        sink = settings.get("s_aux")
        self._rules[layer] = AttentionRule(
            causal=self._causal,
            window=settings.get("sliding_window"),
            cap=settings.get("softcap"),
            sink=None if sink is None else sink.detach().flatten(),
            biased=settings.get("position_bias") is not None,
        )
        return self.stop_early and layer == self._last and not self._hidden_of

    def _record_hidden(self, layer: int, _module: nn.Module, _inputs: object, output: Any) -> None:
        if not self._running:
            return
        self._check_gradient(layer)
        self._hidden[layer] = output if isinstance(output, Tensor) else output[0]
        if self.stop_early and layer == self._last:
            raise _EnoughRecorded(self)

    def note_output(self, module: nn.Module, output: Tensor) -> None:
        """What a layer's attention gave on, [B, T, Q, D]; not kept here."""

    def _check_gradient(self, layer: int) -> None:
        if self._grad_outside and not torch.is_grad_enabled():
            raise ModelError(
                f"layer {layer} runs under reentrant gradient checkpointing, which cuts the gradient of its keys",
                place=self.name,
                fix="enable gradient checkpointing with {'use_reentrant': False}",
            )

    # -- reading ----------------------------------------------------------------------------------

    def kv(self, mask_BT: Shaped[Tensor, "B T"], positions_BT: Int[Tensor, "B T"] | None = None) -> KV:
        """What the last forward left, shallow to deep.

        mask_BT: [B, T], nonzero at real tokens. positions_BT: the `position_ids` the model was given; unset:
        `positions_from_mask(mask_BT)`. Raises ModelError where a layer recorded nothing or heads are mixed.
        """
        if not self._recorded:
            raise ModelError(
                "no layer recorded any key: no forward ran inside capture_kv, or the attention bypasses "
                f"transformers' attention interface (first layer asked for: {self.layers[0]})",
                place=self.name,
                fix="run the model inside the `with` block; use a family with ALL_ATTENTION_FUNCTIONS in its code",
            )
        first = self.layers[0]
        for layer in self.layers:
            if layer not in self._recorded:
                raise ModelError(
                    f"layer {layer} recorded no keys: its attention bypasses transformers' attention interface",
                    place=self.name,
                    fix="leave that layer out, or use a family whose every layer is plain attention",
                )
            shapes = [tuple(x.shape[i] for i in (1, 3)) for x in self._recorded[layer][:3] if x is not None]
            wanted = [tuple(x.shape[i] for i in (1, 3)) for x in self._recorded[first][:3] if x is not None]
            if shapes != wanted:
                raise ModelError(
                    f"layer {layer} has (heads, size) {shapes[0]} for keys and {shapes[1]} for values, "
                    f"layer {first} has {wanted[0]} and {wanted[1]}: mixed head sizes",
                    place=self.name,
                    fix="choose layers with equal heads",
                )
        entries = [self._recorded[layer] for layer in self.layers]
        return KV(
            keys=tuple(k for k, _, _, _ in entries),
            values=tuple(v for _, v, _, _ in entries),
            mask_BT=mask_BT.bool(),
            positions_BT=positions_from_mask(mask_BT) if positions_BT is None else positions_BT,
            rope=self.rope,
            queries=tuple(q for _, _, q, _ in entries if q is not None),
            layers=self.layers,
            # where a layer says nothing, the attention functions take 1/sqrt(head size)
            scaling=tuple(k.shape[-1] ** -0.5 if s is None else float(s) for k, _, _, s in entries),
            rules=tuple(self._rules[layer] for layer in self.layers),
        )

    def hidden(self) -> tuple[Tensor, ...]:
        """The output [B, T, C] of each captured layer in the last forward, shallow to deep, padding included.

        A layer's output is the residual stream that enters the next layer; after the last one, it is what the final
        norm has not yet seen. Raises ModelError where hidden states were not asked for or no forward ran.
        """
        missing = [layer for layer in self.layers if layer not in self._hidden]
        if missing:
            raise ModelError(
                f"layer {missing[0]} recorded no hidden states",
                place=self.name,
                fix="capture_kv(..., hidden=True), and run the model inside the `with` block",
            )
        return tuple(self._hidden[layer] for layer in self.layers)


capture_kv = KVCapture


def reset_dynamic_rotary(rotary: Any) -> None:
    """Forget the longest sequence seen: a dynamic rotary module then depends on this batch only, not on history."""
    kinds = getattr(rotary, "rope_type", None)
    for kind, prefix in ((kinds, ""),) if not isinstance(kinds, dict) else ((v, f"{k}_") for k, v in kinds.items()):
        if kind == "dynamic":
            original = getattr(rotary, f"{prefix}original_inv_freq")
            setattr(rotary, f"{prefix}inv_freq", original.to(getattr(rotary, f"{prefix}inv_freq").device).clone())
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


# -- transformers' interfaces ---------------------------------------------------------------------


@contextmanager
def _listening(capture: KVCapture, module: nn.Module) -> Iterator[None]:
    """While open, the capture is told what this attention module is handed."""
    listeners = _LISTENERS.setdefault(id(module), [])
    listeners.append(capture)
    try:
        yield
    finally:
        listeners.remove(capture)
        if not listeners:
            _LISTENERS.pop(id(module), None)


@contextmanager
def _recording(config: Any) -> Iterator[None]:
    """While open, the config names our implementation; the last capture that ends puts back the model's own."""
    entry = _BORROWED.get(id(config))
    if entry is None:
        own = config._attn_implementation or "eager"
        name = _PREFIX + own
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _recording_attention(own))
            if own in ALL_MASK_ATTENTION_FUNCTIONS:
                AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
        entry = _BORROWED[id(config)] = [config, config._attn_implementation, 0]
        config._attn_implementation_internal = name
    entry[2] += 1
    try:
        yield
    finally:
        entry[2] -= 1
        if entry[2] == 0:
            config._attn_implementation_internal = entry[1]
            del _BORROWED[id(config)]


def _recording_attention(own: str) -> Callable[..., Any]:
    def record_and_attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        enough = None
        for capture in _LISTENERS.get(id(module), ()):
            if capture._record(module, query, key, value, kwargs):
                enough = capture
        if enough is not None:
            raise _EnoughRecorded(enough)
        if own == "eager" and getattr(module, "reorder_and_upcast_attn", False):  # GPT-2 asks for the name 'eager'
            return module._upcast_and_reordered_attn(query, key, value, *args[:1])  # type: ignore[operator]
        # what the model would have used: its own file's eager function and overrides come first
        eager = from_modeling_file(module, "eager_attention_forward")
        if own == "eager" and eager is None:
            raise ModelError(
                f"no eager attention function in the file of {type(module).__name__}",
                place=type(module).__name__,
                fix="load the model with attention: sdpa",
            )
        interface = from_modeling_file(module, "ALL_ATTENTION_FUNCTIONS") or ALL_ATTENTION_FUNCTIONS
        attend = interface.get_interface(own, eager)
        if "flash" not in own:
            given = attend(module, query, key, value, *args, **kwargs)
            for capture in _LISTENERS.get(id(module), ()):
                capture.note_output(module, given[0])
            return given
        config: Any = module.config
        borrowed = config._attn_implementation_internal
        config._attn_implementation_internal = own  # flash attention picks its kernels by this name
        try:
            return attend(module, query, key, value, *args, **kwargs)
        finally:
            config._attn_implementation_internal = borrowed

    return record_and_attend
