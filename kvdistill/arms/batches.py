"""The order of the examples, the mismatched partner of the placebo, and one padded batch with its targets.

The order is one list of example numbers for the whole training, a function of (seed, examples, steps, batch)
only: every arm of a study sees the same examples in the same order, and resuming is skipping a prefix.
Targets come from stored readers, or are left to the trainer, which runs the teachers (`online`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kvdistill.align import TimeWarper
from kvdistill.align.layers import slots_with_all
from kvdistill.align.tokens import same_tokens, token_map
from kvdistill.arms.pairing import layer_sources_of
from kvdistill.arms.texts import TeacherText, split_examples, teacher_texts
from kvdistill.compress import kept_tokens
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import derive_seed
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.core.targets import ATTENTION, IMPORTANCE, REDUNDANCY, TeacherTargets
from kvdistill.data.encode import Example
from kvdistill.losses import normalise_token_weights
from kvdistill.models.generate import right_padded
from kvdistill.store.packed import TargetReader

LayerSources = Sequence[Sequence[tuple[int, float]]]
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
    texts: of teachers that read something of their own, row by row beside `examples`.
    layers: by teacher, for each student layer that takes part its (teacher layer, share) pairs; what differs from
    layer to layer (r-kv, tokens weighed by attention) needs them.
    """

    examples: Sequence[Example]
    pad_id: int
    arm: ArmRecipe | None = None
    readers: Mapping[str, TargetReader] = field(default_factory=dict)
    seed: int = 0
    texts: Mapping[str, TeacherText] = field(default_factory=dict)
    layers: Mapping[str, LayerSources] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._warper: TimeWarper | None = None
        if self.arm is not None:
            align = self.arm.align
            ratio, smoothness = ({str(k): v for k, v in x.items()} for x in (align.segment_ratio, align.smoothness))
            self._warper = TimeWarper(align.time, ratio, smoothness)
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
        if not self.readers:
            batch["teacher_inputs"] = {name: self._teacher_input(name, others) for name in arm.teachers}
        batch["targets"] = {name: self._read(reader, others) for name, reader in self.readers.items()}
        if arm.fuse.fusion_strategy == "competence":
            self._scale_nll(batch, others)
        if arm.needs_kv:
            self._align(batch, arm, numbers, others)
        return batch

    def _read(self, reader: TargetReader, others: Sequence[int]) -> TeacherTargets:
        arm = self.arm
        assert arm is not None
        return reader.read(
            others, kv=arm.needs_kv, logits=arm.needs_logits, queries=arm.needs_queries, scores=arm.needs_scores
        )

    def _teacher_input(self, name: str, others: Sequence[int]) -> tuple[Tensor, Tensor]:
        """ids and segments [B, S] that an online teacher is run on."""
        text = self.texts.get(name)
        rows = [(text.examples if text is not None else self.examples)[i] for i in others]
        ids = right_padded([row.input_ids for row in rows], text.pad_id if text is not None else self.pad_id)
        return ids, right_padded([row.segments for row in rows], 0)

    def _scale_nll(self, batch: dict[str, Any], others: Sequence[int]) -> None:
        """Adds nll_scale: by teacher that reads its own tokens, its completion tokens by the student's, [B].

        Tokenizers cut the same text into more or fewer pieces; what can be compared is how well the text is explained:
        NLL per token of the student. Targets from the store are scaled here, those of online teachers when they come.
        """
        mine = batch["segments"]
        if self._partner is not None:  # the teacher explains the mismatched text
            mine = right_padded([self.examples[i].segments for i in others], 0)
        batch["nll_scale"] = {}
        for name in (name for name in batch["targets"] or batch["teacher_inputs"] if name in self.texts):
            stored = batch["targets"].get(name)
            theirs = stored.segments_BS if stored is not None else batch["teacher_inputs"][name][1]
            scale_B = num_completion_tokens(theirs) / num_completion_tokens(mine).clamp_min(1)
            batch["nll_scale"][name] = scale_B
            if stored is not None:
                batch["targets"][name] = scaled_nll(stored, scale_B)

    def _align(self, batch: dict[str, Any], arm: ArmRecipe, numbers: Sequence[int], others: Sequence[int]) -> None:
        """Adds, by teacher: maps (where they change anything), kv_masks (student tokens that take part) and
        token_weights (where tokens weigh by attention)."""
        segments_BT: Tensor = batch["segments"]
        wanted_BT = in_segments(segments_BT, KV_SEGMENTS[arm.loss.kv_on])
        batch |= {"maps": {}, "kv_masks": {}, "token_weights": {}}
        for name in arm.teachers:
            target = batch["targets"].get(name)
            theirs_BS = target.segments_BS if target is not None else batch["teacher_inputs"][name][1]
            mapping = self._time_map(name, theirs_BS, segments_BT, numbers, others)
            mapping = self._compressed(name, mapping, theirs_BS, target, others)
            mask = wanted_BT if mapping is None else wanted_BT & self._mask(name, mapping, target)
            batch["kv_masks"][name] = mask
            if mapping is not None:
                batch["maps"][name] = mapping
            if arm.loss.attention_weighted:
                batch["token_weights"][name] = self._token_weights(name, mapping, target, mask)

    def _compressed(
        self,
        name: str,
        mapping: SparseMap | None,
        theirs_BS: Tensor,
        target: TeacherTargets | None,
        others: Sequence[int],
    ) -> SparseMap | None:
        """The map without the teacher tokens that do not take part: [B, T, k], with r-kv [M, B, T, k]."""
        assert self.arm is not None
        compress = self.arm.compress
        if compress.kv_compression == "full":  # tokens that stand where they stand need no map
            return None if mapping is None else mapping.masked_source(theirs_BS > 0)
        scores = None if target is None or target.scores_BSMRG is None else _selection_scores(target.scores_BSMRG)
        kept = kept_tokens(
            compress.kv_compression,
            theirs_BS,
            compress.keep,
            scores=scores if compress.kv_compression == "r-kv" else None,
            keys_B=[derive_seed(self.seed, "compress", name, self.examples[i].doc_hash) for i in others],
            importance_share=compress.importance_share,
        )
        mapping = SparseMap.identity(theirs_BS.shape[1]) if mapping is None else mapping
        return mapping.masked_source(kept & (theirs_BS > 0))

    def _mask(self, name: str, mapping: SparseMap, target: TeacherTargets | None) -> Tensor:
        """Student tokens with something behind them: [B, T], or [L', B, T] where layers keep different tokens.

        A student layer that reads several teacher layers takes part where all of them kept the token.
        """
        mask = mapping.mask()
        return mask if mask.ndim == 2 else slots_with_all(mask, self._places(name, target))

    def _places(self, name: str, target: TeacherTargets | None) -> list[list[tuple[int, float]]]:
        """For each student layer, where its teacher layers stand among the captured ones, and their shares."""
        assert target is not None and target.kv is not None
        place = {layer: i for i, layer in enumerate(target.kv.layers)}
        return [[(place[layer], share) for layer, share in row] for row in self.layers[name]]

    def _token_weights(
        self, name: str, mapping: SparseMap | None, target: TeacherTargets | None, mask: Tensor
    ) -> Tensor:
        """What the teacher's answer looks at, at the student's tokens: [L', B, T], mean 1 over those that take part."""
        assert target is not None and target.scores_BSMRG is not None
        paid_MBS = target.scores_BSMRG[:, :, :, ATTENTION].mean(-1).permute(2, 0, 1)
        rows = []
        for row in self._places(name, target):
            here = [
                paid_MBS[place] * share
                if mapping is None
                else mapping.of_layer(place).apply(paid_MBS[place] * share, 1)
                for place, share in row
            ]
            rows.append(torch.stack(here).sum(0))
        return normalise_token_weights(torch.stack(rows), mask)

    def _time_map(
        self, name: str, theirs_BS: Tensor, mine_BT: Tensor, numbers: Sequence[int], others: Sequence[int]
    ) -> SparseMap | None:
        """From the teacher's tokens to the student's; None where every token stands where it stands."""
        assert self._warper is not None
        text = self.texts.get(name)
        if text is None or text.own is None or self._warper.mode != "pad":
            return self._warper.map(theirs_BS, mine_BT)
        theirs, mine = [text.spans(i) for i in others], [text.student_spans(i) for i in numbers]
        sides = [
            _padded([row[part] for row in rows], width)
            for part in (0, 1)
            for rows, width in ((theirs, theirs_BS.shape[1]), (mine, mine_BT.shape[1]))
        ]
        return None if same_tokens(*sides) else token_map(*sides)


def arm_batches(
    recipe: Recipe,
    run: Path,
    arm: ArmRecipe,
    split: str,
    pad_id: int,
    readers: Mapping[str, TargetReader],
    seed: int = 0,
) -> BatchMaker:
    """Batches of one arm over the examples of a split whose targets are captured, with all that its teachers read."""
    layers = layer_sources_of(recipe, run, arm) if arm.needs_scores else {}
    texts = teacher_texts(recipe, run, arm, split)
    return BatchMaker(split_examples(recipe, run, split), pad_id, arm, readers, seed, texts, layers)


def num_completion_tokens(segments_BT: Tensor) -> Tensor:
    return in_segments(segments_BT, (REASONING, ANSWER)).sum(1)


def scaled_nll(targets: TeacherTargets, scale_B: Tensor | None) -> TeacherTargets:
    """Targets whose NLL is per token of the student's text; None where teacher and student read the same tokens."""
    if scale_B is None or targets.nll_B is None:
        return targets
    return replace(targets, nll_B=targets.nll_B * scale_B.to(targets.nll_B.device))


def _selection_scores(scores_BSMRG: Tensor) -> Tensor:
    """Importance and redundancy as `compress` takes them: [M, B, 2, G, S]."""
    return scores_BSMRG[:, :, :, [IMPORTANCE, REDUNDANCY]].permute(2, 0, 3, 4, 1)


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """[B, width, …], 0 behind each row."""
    out = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out if out.is_floating_point() else out.long()


def token_counts(batch: Mapping[str, Any], arm: ArmRecipe | None) -> Tensor:
    """Tokens that each loss term averages over, in this batch: [cross-entropy, kv of teacher 1, …] as float64."""
    segments_BT: Tensor = batch["segments"]
    codes = CE_SEGMENTS[arm.loss.ce_on] if arm is not None else CE_SEGMENTS["reasoning+answer"]
    counts = [in_segments(segments_BT[:, 1:], codes).sum().double()]
    for name in arm.teachers if arm is not None and arm.needs_kv else ():
        mask = batch["kv_masks"][name]
        num_layers = 1 if mask.ndim == 2 else mask.shape[0]
        counts.append(mask.sum().double() / num_layers)
    return torch.stack(counts)


def moved_to(value: Any, device: torch.device) -> Any:
    """A batch, or any part of it, on `device`: tensors, maps and targets move, the rest is kept."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved_to(item, device) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved_to(item, device) for item in value)
    return value
