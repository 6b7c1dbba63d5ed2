"""The order of the examples, the mismatched partner of the placebo, and one padded batch with its targets.

The order is one list of example numbers for the whole training, a function of (seed, examples, steps, batch)
only: every arm of a study sees the same examples in the same order, and resuming is skipping a prefix.
Targets come from stored readers, or are left to the trainer, which runs the teachers (`online`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kvdistill.align import same_places, time_map
from kvdistill.compress import kept_tokens
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.core.targets import ANSWER, PROMPT, REASONING, TargetReader
from kvdistill.data.encode import Example
from kvdistill.models.generate import right_padded

KV_SEGMENTS = {
    "all": (PROMPT, REASONING, ANSWER),
    "reasoning": (REASONING,),
    "answer": (ANSWER,),
    "reasoning+answer": (REASONING, ANSWER),
}
CE_SEGMENTS = {"reasoning+answer": (REASONING, ANSWER), "answer": (ANSWER,)}


def in_segments(segments: Tensor, codes: Sequence[int]) -> Tensor:
    """True where the segment code is one of `codes` (at least one), in the shape of `segments`.

    Comparisons, because torch.isin needs the codes as a tensor: slower, and on a GPU a copy that every step waits for.
    """
    return functools.reduce(torch.logical_or, [segments == code for code in codes])


def data_order(num_examples: int, num_needed: int, seed: int) -> list[int]:
    """Seeded permutations one after another, cut to `num_needed` example numbers."""
    order: list[int] = []
    epoch = 0
    while len(order) < num_needed:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        order += torch.randperm(num_examples, generator=generator).tolist()
        epoch += 1
    return order[:num_needed]


def order_fingerprint(order: Sequence[int], examples: Sequence[Example]) -> str:
    """Hash of which texts come when."""
    digest = hashlib.sha256()
    for i in order:
        digest.update(examples[i].doc_hash.encode())
        digest.update(examples[i].style.encode())
    return digest.hexdigest()


def mismatched_partner(num_examples: int, seed: int) -> list[int]:
    """For each example another one, no example its own: a seeded cycle through all of them."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "placebo"))
    cycle = torch.randperm(num_examples, generator=generator).tolist()
    partner = [0] * num_examples
    for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        partner[here] = there
    return partner


class ExampleNumbers(Dataset[int]):
    """The numbers 0..n-1: batches are made from numbers by `BatchMaker`, which knows the rest."""

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> int:
        return index


class FixedOrder(Sampler[int]):
    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self):
        return iter(self._order)


@dataclass
class BatchMaker:
    """Example numbers -> one right-padded batch: ids, segments, tasks, and per teacher targets, map and mask.

    readers: stored targets by teacher; empty for arms without teachers and for online teachers.
    """

    examples: Sequence[Example]
    pad_id: int
    arm: ArmRecipe | None = None
    readers: Mapping[str, TargetReader] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._partner = (
            mismatched_partner(len(self.examples), self.seed)
            if self.arm is not None and self.arm.placebo and len(self.examples) > 1
            else None
        )

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        rows = [self.examples[i] for i in numbers]
        segments_BT = right_padded([row.segments for row in rows], 0)
        batch: dict[str, Any] = {
            "input_ids": right_padded([row.input_ids for row in rows], self.pad_id),
            "segments": segments_BT,
            "tasks": [row.task for row in rows],
        }
        arm = self.arm
        if arm is None or not arm.teachers or not (arm.needs_kv or arm.needs_logits):
            return batch
        others = numbers if self._partner is None else [self._partner[i] for i in numbers]
        if self._partner is not None and not self.readers:
            batch["teacher_ids"] = right_padded([self.examples[i].input_ids for i in others], self.pad_id)
            batch["teacher_segments"] = right_padded([self.examples[i].segments for i in others], 0)
        batch["targets"] = {
            name: self.readers[name].read(others, kv=arm.needs_kv, logits=arm.needs_logits) for name in self.readers
        }
        if arm.needs_kv:
            batch["maps"], batch["kv_masks"] = self._alignment(batch, arm)
        return batch

    def _alignment(self, batch: dict[str, Any], arm: ArmRecipe) -> tuple[dict[str, SparseMap], dict[str, Tensor]]:
        """Per teacher: the time map where it changes anything, and the student tokens that take part."""
        segments_BT: Tensor = batch["segments"]
        wanted_BT = in_segments(segments_BT, KV_SEGMENTS[arm.loss.kv_on])
        maps: dict[str, SparseMap] = {}
        masks: dict[str, Tensor] = {}
        for name in arm.teachers:
            target = batch["targets"].get(name)
            theirs_BS = target.segments_BS if target is not None else batch.get("teacher_segments", segments_BT)
            if arm.compress.kv_compression == "full" and same_places(arm.align.time, theirs_BS, segments_BT):
                masks[name] = wanted_BT  # tokens stand where they stand: no map to apply
                continue
            aligned = time_map(arm.align.time, theirs_BS, segments_BT)
            kept_BS = kept_tokens(arm.compress.kv_compression, theirs_BS, arm.compress.keep)
            aligned = aligned.masked_source(kept_BS & (theirs_BS > 0))
            maps[name] = aligned
            masks[name] = wanted_BT & aligned.mask()
        return maps, masks


def token_counts(batch: Mapping[str, Any], arm: ArmRecipe | None) -> Tensor:
    """Tokens that each loss term averages over, in this batch: [cross-entropy, kv of teacher 1, …] as float64."""
    segments_BT: Tensor = batch["segments"]
    codes = CE_SEGMENTS[arm.loss.ce_on] if arm is not None else CE_SEGMENTS["reasoning+answer"]
    counts = [in_segments(segments_BT[:, 1:], codes).sum()]
    for name in arm.teachers if arm is not None and arm.needs_kv else ():
        counts.append(batch["kv_masks"][name].sum())
    return torch.stack(counts).double()


def moved_to(value: Any, device: torch.device) -> Any:
    """A batch, or any part of it, on `device`: tensors, maps and targets move, the rest is kept."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved_to(item, device) for name, item in value.items()}
    return value
