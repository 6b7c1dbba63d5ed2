"""`KV`: the keys, values and queries of one batch, and the rotary frame its keys are in.

A cached key is rotated by its position. Resampling, averaging or projecting rotated keys mixes
phases, so the frame travels with the tensor and every consumer asks for the frame it needs
(`require_frame`). This file does not know how a rotation is made: `kvdistill.models.rope` does.

Axes: B batch, H (or G) key/value heads, T (or S) tokens, D (or E) head size; L (or M) layers are
the positions of the tuples, so that the student's per-layer graph is never copied into one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvdistill.core.errors import AlignmentError

RopeFrame = Literal["unrotated", "rotated", "none"]


@dataclass(frozen=True)
class AttentionRule:
    """How one layer makes attention weights of its scaled q.k.

    causal: a token sees itself and what comes before it; else every token. window: of those only tokens less than so
    many places away; None: all. cap: logits become cap * tanh(logit / cap). sink: [Q], a logit of each query head that
    takes part in the softmax and belongs to no token. biased: something is added by the distance of two tokens (T5,
    ALiBi) that is not kept: weights cannot be made again.
    """

    causal: bool = True
    window: int | None = None
    cap: float | None = None
    sink: Tensor | None = field(default=None, compare=False)
    biased: bool = False

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a token at place `query` looks at one at place `key`, whichever of them are real."""
        ahead = query - key
        seen = ahead >= 0 if self.causal else torch.ones_like(ahead, dtype=torch.bool)
        return seen if self.window is None else seen & (ahead.abs() < self.window)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**vars(self), "sink": None if self.sink is None else self.sink.tolist()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> AttentionRule:
        return cls(**{**row, "sink": None if row["sink"] is None else torch.tensor(row["sink"])})


CAUSAL = AttentionRule()  # as most layers attend


def require_unbiased(rules: Sequence[AttentionRule]) -> None:
    """Raise where attention weights cannot be made again of queries and keys."""
    if any(rule.biased for rule in rules):
        raise AlignmentError(
            "this model adds to q.k by the distance of two tokens, which is not captured: its attention weights "
            "cannot be made again",
            fix="compare keys and values (loss.kind: mse, …, compress without r-kv, no attention weights)",
        )


@dataclass(frozen=True)
class KV:
    """Keys and values (and, when captured, queries) of every layer of one batch.

    keys, values: one tensor [B, H, T, D] a layer, shallow to deep.
    mask_BT: True at real tokens. positions_BT: rotary position of each token.
    rope: `unrotated` or `rotated` for models with rotary positions, `none` for models without.
    queries: one tensor [B, Hq, T, D] a layer, in the same frame as the keys, or empty.
    layers: the number each entry has in its model (0 is the shallowest).
    scaling: what each layer multiplies q.k with before the softmax (1 in T5, 1/sqrt(head size) in most), or None
    where nobody said. A YaRN model's own attention factor is in its rotated keys and queries, not here.
    rules: what each layer does with scaled q.k; unset: causal attention to everything before.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask_BT: Tensor
    positions_BT: Tensor
    rope: RopeFrame
    queries: tuple[Tensor, ...] = ()
    layers: tuple[int, ...] = ()
    scaling: tuple[float, ...] | None = None
    rules: tuple[AttentionRule, ...] = ()

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values) or not self.keys:
            raise AlignmentError(
                f"KV: {len(self.keys)} key layers and {len(self.values)} value layers",
                fix="capture at least one layer, and as many keys as values",
            )
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(len(self.keys))))
        if self.scaling is not None and len(self.scaling) != len(self.keys):
            raise AlignmentError(
                f"KV: {len(self.scaling)} scalings for {len(self.keys)} layers", fix="give one scaling a layer, or none"
            )
        if not self.rules:
            object.__setattr__(self, "rules", (CAUSAL,) * len(self.keys))
        assert len(self.rules) == len(self.keys)
        B, T = self.mask_BT.shape
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            if k.ndim != 4 or k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[2]) != (B, T):
                raise AlignmentError(
                    f"KV layer {layer}: keys {tuple(k.shape)}, values {tuple(v.shape)}, mask {(B, T)}",
                    fix="each layer needs [batch, heads, tokens, size] with the mask's batch and tokens",
                )

    def __repr__(self) -> str:
        """One line of shapes; sizes that differ between layers are all named."""

        def sizes(tensors: Sequence[Tensor], axis: int) -> str:
            return "|".join(map(str, sorted({tensor.shape[axis] for tensor in tensors})))

        B, T = self.mask_BT.shape
        k, v = sizes(self.keys, 3), sizes(self.values, 3)
        size = k if k == v else f"{k} (values {v})"
        queries = f", {sizes(self.queries, 1)} query heads" if self.queries else ""
        return (
            f"KV({self.num_layers} layers: [{B} texts, {sizes(self.keys, 1)} heads, {T} tokens, size {size}]{queries}, "
            f"keys {self.rope if self.rope != 'none' else 'without rotation'}, "
            f"{str(self.keys[0].dtype).removeprefix('torch.')} on {self.keys[0].device})"
        )

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [B, L, H, T, D]: a copy; needs equal head shapes in every layer."""
        shapes = {tuple(k.shape) for k in self.keys} | {
            (*tuple(v.shape[:3]), self.keys[0].shape[3]) for v in self.values
        }
        if len(shapes) > 1:
            raise AlignmentError(f"KV: layers differ in shape: {sorted(shapes)}", fix="use the per-layer tuples")
        return torch.stack(self.keys, dim=1), torch.stack(self.values, dim=1)

    def map_layers(self, change: Callable[[Tensor], Tensor]) -> KV:
        """The same KV with `change` applied to every tensor (keys, values, queries)."""
        return replace(
            self,
            keys=tuple(change(k) for k in self.keys),
            values=tuple(change(v) for v in self.values),
            queries=tuple(change(q) for q in self.queries),
        )

    def select_layers(self, chosen: Sequence[int]) -> KV:
        """Only the entries at these places of the tuples, in this order."""
        return replace(
            self,
            keys=tuple(self.keys[i] for i in chosen),
            values=tuple(self.values[i] for i in chosen),
            queries=tuple(self.queries[i] for i in chosen) if self.queries else (),
            layers=tuple(self.layers[i] for i in chosen),
            scaling=None if self.scaling is None else tuple(self.scaling[i] for i in chosen),
            rules=tuple(self.rules[i] for i in chosen),
        )

    def detach(self) -> KV:
        return self.map_layers(Tensor.detach)

    def to(self, *args: object, **kwargs: object) -> KV:
        moved = self.map_layers(lambda x: x.to(*args, **kwargs))  # type: ignore[call-overload]
        device = moved.keys[0].device
        return replace(moved, mask_BT=self.mask_BT.to(device), positions_BT=self.positions_BT.to(device))


def require_frame(*caches: KV, frame: RopeFrame) -> None:
    """Raise unless every cache is in `frame` (a model without rotary positions fits any frame)."""
    for cache in caches:
        if cache.rope not in (frame, "none"):
            raise AlignmentError(
                f"keys are {cache.rope}, {frame} keys are needed here",
                fix="rotated keys carry their position's phase: kvdistill.models.unrotate_keys / rotate_keys first",
            )
