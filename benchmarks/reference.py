"""Alignment, fusion and loss as loops: per teacher, layer, example and head, the way published code does it.

Slow and obvious, and the same numbers as kvdistill's (the parts benchmark checks loss and gradients before it times
anything). Nothing here is taken from kvdistill but the aligner's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoopTeacher:
    """One teacher as the loops need it.

    keys, values: per student layer the mapped teacher layer, [B, G, S, E], unrotated. lengths: of its texts by
    example and segment. mean and std of its channels [L, G*E] and the projector [L, H*D, G*E], for K and for V.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    lengths: Sequence[Sequence[int]]
    mean: tuple[Tensor, Tensor]
    std: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]
    bias: tuple[Tensor, Tensor]


def loop_loss(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Sequence[int]],
    teachers: Sequence[LoopTeacher],
    nll_BN: Tensor,
    rope_theta: float,
) -> Tensor:
    """Sum over teachers of router weight times the mean squared difference per token, for K and V, mean over layers.

    keys (rotated), values: the student's, one [B, H, T, D] a layer. lengths: of its texts by example and segment.
    nll_BN: each teacher's NLL on each example; its softmax is the router.
    """
    num_layers, num_examples = len(keys), len(lengths)
    num_tokens = sum(sum(parts) for parts in lengths)
    total = keys[0].new_zeros(())
    for b in range(num_examples):
        router_N = torch.softmax(-nll_BN[b], dim=0)
        n = sum(lengths[b])
        for layer in range(num_layers):
            key_heads = [unrotate(head[:n], rope_theta) for head in keys[layer][b]]
            value_heads = [head[:n] for head in values[layer][b]]
            for number, teacher in enumerate(teachers):
                pairs = ((key_heads, teacher.keys[layer][b]), (value_heads, teacher.values[layer][b]))
                for side, (heads, theirs) in enumerate(pairs):
                    source = torch.cat(heads, dim=-1) @ teacher.weight[side][layer] + teacher.bias[side][layer]
                    target = torch.cat([resample(h, teacher.lengths[b], lengths[b]) for h in theirs], dim=-1)
                    target = (target - teacher.mean[side][layer]) / teacher.std[side][layer]
                    distance = ((source - target.detach()) ** 2).mean(-1).sum()
                    total = total + router_N[number] * distance / num_layers / num_tokens
    return total


def unrotate(key_TD: Tensor, theta: float) -> Tensor:
    """One head's keys at positions 0..T-1 before rotary position embedding (rotate-half layout)."""
    T, D = key_TD.shape
    frequency = 1.0 / theta ** (torch.arange(0, D, 2, device=key_TD.device).float() / D)
    angle = torch.arange(T, device=key_TD.device).float()[:, None] * frequency
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    low, high = key_TD.chunk(2, dim=-1)
    return key_TD * cos + torch.cat([high, -low], dim=-1) * sin


def resample(head_SE: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Each segment of one head stretched linearly to the student's length of it; equal lengths are left alone."""
    if list(source) == list(target):
        return head_SE[: sum(source)]
    parts = []
    start = 0
    for num_source, num_target in zip(source, target, strict=True):
        part = head_SE[start : start + num_source]
        place = torch.arange(num_target, device=head_SE.device) * ((num_source - 1) / max(num_target - 1, 1))
        low = place.floor().long().clamp(max=num_source - 1)
        high = (low + 1).clamp(max=num_source - 1)
        share = (place - low)[:, None].to(head_SE.dtype)
        parts.append(part[low] * (1 - share) + part[high] * share)
        start += num_source
    return torch.cat(parts)
