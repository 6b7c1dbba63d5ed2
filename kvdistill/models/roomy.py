"""A key/value cache with room for tokens to come, so that a generated token does not copy the whole cache.

transformers' own grows by concatenation with every token, which on a CPU takes three quarters of the time of a long
answer. Here it grows by STEP tokens at a time. The numbers are the same to the bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

STEP = 256


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, H, T, D]: views of the first T places of longer tensors. Never reordered."""

    def __init__(self) -> None:
        super().__init__()
        self._length = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._length, self._room = 0, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far, the new ones at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._room is None or self._length > self._room[0].shape[-2]:
            self._room = (self._longer(self.keys, key_states), self._longer(self.values, value_states))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start : self._length] = new
        self.keys, self.values = (room[:, :, : self._length] for room in self._room)
        return self.keys, self.values

    def _longer(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Room for what there is, what comes now, and STEP more."""
        longer = new.new_empty(*new.shape[:2], self._length + STEP, new.shape[-1])
        if old is not None and old.numel():
            longer[:, :, : old.shape[-2]] = old
        return longer


def roomy_cache(model: Any) -> DynamicCache | None:
    """An empty cache for `model.generate(past_key_values=…)`, or None for a model with another kind of cache.

    Layers that keep a sliding window or a state stay transformers' own.
    """
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is None or not supports():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache if cache.layers else None
