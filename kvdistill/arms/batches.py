"""One padded batch with its targets, as the arm's control leaves them (`controls.py`).

Targets come from stored readers, or are left to whoever runs the teachers (`Batch.with_targets`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvdistill.align import TimeWarper
from kvdistill.align.layers import slots_with_all
from kvdistill.align.tokens import same_tokens, token_map
from kvdistill.arms.controls import (
    Change,
    Moments,
    mismatched_partner,
    mismatched_predictions,
    permuted_places,
    predicting_places,
)
from kvdistill.arms.questions import Questions
from kvdistill.arms.texts import TeacherText
from kvdistill.compress import kept_tokens, selection_map, share_that_drops
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.core.targets import ATTENTION, IMPORTANCE, REDUNDANCY, TeacherTargets
from kvdistill.data.encode import Example
from kvdistill.data.steps import StepMarks
from kvdistill.losses import TextChunks, chunks_within, common_chunks, normalise_token_weights
from kvdistill.models.generate import right_padded
from kvdistill.store.packed import TargetReader

LayerSources = Sequence[Sequence[tuple[int, float]]]
KV_SEGMENTS = {
    "all": (PROMPT, REASONING, ANSWER),
    "reasoning": (REASONING,),
    "answer": (ANSWER,),
    "reasoning+answer": (REASONING, ANSWER),
}
ITSELF = "itself"  # the student as a teacher of its latents; no teacher can have this name
CE_SEGMENTS = {"reasoning+answer": (REASONING, ANSWER), "answer": (ANSWER,)}


def in_segments(segments: Tensor, codes: Sequence[int]) -> Tensor:
    """True where the segment code is one of `codes` (at least one), in the shape of `segments`.

    Comparisons, because torch.isin needs the codes as a tensor: slower, and on a GPU a copy that every step waits for.
    """
    return functools.reduce(torch.logical_or, [segments == code for code in codes])


@dataclass(frozen=True)
class Batch:
    """B examples, right-padded to T student tokens, and what each teacher has for them. All dicts go by teacher.

    segments_BT: segment codes (`core.segments`), 0 at padding. tasks: of each example.
    teacher_inputs: ids and segments [B, S] that a teacher is to be run on; empty where targets are stored.
    targets: what the teachers gave, their NLL counted per token of the student's text.
    nll_scale: a teacher's completion tokens by the student's, for teachers that read their own tokens.
    changes: what the arm's control does with targets, for those that it changes.
    maps: from the teacher's tokens to the student's; a teacher without one has every token where the student has it.
    kv_masks: student tokens that take part, [B, T], or [L', B, T] where layers keep different tokens.
    token_weights: [L', B, T], mean 1 over the tokens that take part, where tokens weigh by the teacher's attention.
    chunks: of completions, where logits of a teacher that reads its own tokens are distilled.
    questions: what a student that thinks in latents reads. maps and kv_masks then lead to its slots ([B, M] in the
    place of [B, T]), and those of ITSELF from its own written reasoning.
    """

    input_ids_BT: Int[Tensor, "B T"]
    segments_BT: Int[Tensor, "B T"]
    tasks: list[str]
    teacher_inputs: dict[str, tuple[Int[Tensor, "B _"], Int[Tensor, "B _"]]] = field(default_factory=dict)
    targets: dict[str, TeacherTargets] = field(default_factory=dict)
    nll_scale: dict[str, Float[Tensor, " B"]] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    maps: dict[str, SparseMap] = field(default_factory=dict)
    kv_masks: dict[str, Bool[Tensor, "B _"] | Bool[Tensor, "_ B _"]] = field(default_factory=dict)
    token_weights: dict[str, Float[Tensor, "_ B T"]] = field(default_factory=dict)
    chunks: dict[str, TextChunks] = field(default_factory=dict)
    questions: Questions | None = None

    def __post_init__(self) -> None:
        if self.questions is None:
            wide = {name: mask.shape[-1] for name, mask in self.kv_masks.items()}
            assert set(wide.values()) <= {self.input_ids_BT.shape[1]}, f"kv_masks of tokens, not of slots: {wide}"

    @property
    def mask_BT(self) -> Tensor:
        """Real tokens."""
        return self.segments_BT > 0

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(item) for name, item in value.items()}
            if isinstance(value, tuple):
                return tuple(moved(item) for item in value)
            return value.to(device) if hasattr(value, "to") else value

        return Batch(**{one.name: moved(getattr(self, one.name)) for one in fields(self)})

    def with_targets(self, targets: Mapping[str, TeacherTargets]) -> Batch:
        """The batch with what the teachers gave for it, as the arm's control leaves it.

        Tokenizers cut the same text into more or fewer pieces; what can be compared is how well the text is explained,
        so NLL becomes nats per token of the student (`nll_scale`).
        """
        found = {name: self.changes[name].apply(one) if name in self.changes else one for name, one in targets.items()}
        for name, scale_B in self.nll_scale.items():
            nll_B = found[name].nll_B
            if nll_B is not None:
                found[name] = replace(found[name], nll_B=nll_B * scale_B.to(nll_B.device))
        return replace(self, teacher_inputs={}, targets=found)


@dataclass
class BatchMaker:
    """Example numbers -> one `Batch`.

    readers: stored targets by teacher; empty for arms without teachers and for online teachers.
    texts: of teachers that read something of their own, row by row beside `examples`.
    layers: by teacher, for each student layer that takes part its (teacher layer, share) pairs; what differs from
    layer to layer (r-kv, tokens weighed by attention) needs them.
    moments: by teacher, of its channels; for control: noise. nll: by teacher, of every example, in the place of what
    the targets say. vocab_size: tokens that a prediction may be of.
    pieces: of teachers with their own tokenizer whose logits are distilled, how their pieces are told in the student's.
    partners: numbers among which a placebo finds its mismatched texts; unset: all.
    step_marks: by teacher, of its tokenizer; for compress: steps.
    """

    examples: Sequence[Example]
    pad_id: int
    arm: ArmRecipe | None = None
    readers: Mapping[str, TargetReader] = field(default_factory=dict)
    seed: int = 0
    texts: Mapping[str, TeacherText] = field(default_factory=dict)
    layers: Mapping[str, LayerSources] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    nll: Mapping[str, Tensor] = field(default_factory=dict)
    vocab_size: int = 1
    pieces: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    partners: Sequence[int] | None = None
    step_marks: Mapping[str, StepMarks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._partner: Mapping[int, int] | None = None
        if self.arm is not None:
            align = self.arm.align
            ratio, smoothness = ({str(k): v for k, v in x.items()} for x in (align.segment_ratio, align.smoothness))
            self._warper = TimeWarper(align.time, ratio, smoothness)
            among = range(len(self.examples)) if self.partners is None else self.partners
            if self.arm.control == "placebo" and len(among) > 1:
                partner = mismatched_partner(len(among), self.seed)
                self._partner = {mine: among[there] for mine, there in zip(among, partner, strict=True)}

    def __call__(self, numbers: Sequence[int]) -> Batch:
        rows = [self.examples[i] for i in numbers]
        segments_BT = right_padded([row.segments for row in rows], 0)
        batch = Batch(
            right_padded([row.input_ids for row in rows], self.pad_id), segments_BT, [row.task for row in rows]
        )
        arm = self.arm
        if arm is not None and arm.thinks:
            batch = replace(batch, questions=Questions.of(rows, self.pad_id))
            if arm.learns_from_itself and arm.compress.kv_compression != "r-kv":
                kept_BT = self._kept(ITSELF, segments_BT, None, numbers)
                slots = self._slots(kept_BT, segments_BT)
                batch = replace(batch, maps={ITSELF: slots}, kv_masks={ITSELF: slots.mask()})
        if arm is None or not (arm.needs_kv or arm.needs_logits):
            return batch
        others = numbers if self._partner is None else [self._partner[i] for i in numbers]
        given: dict[str, tuple[Tensor, Tensor]] = {}
        if not self.readers:
            given = {name: self._read_by(name, others) for name in arm.teachers}
        asks = {
            "kv": arm.needs_kv,
            "logits": arm.needs_logits,
            "queries": arm.needs_queries,
            "scores": arm.needs_scores,
        }
        targets = {name: reader.read(others, **asks) for name, reader in self.readers.items()}
        for name, nll_N in self.nll.items():
            targets[name] = replace(targets[name], nll_B=nll_N[list(others)])
        theirs = {name: segments for name, (_, segments) in given.items()}
        theirs |= {name: target.segments_BS for name, target in targets.items()}
        scale: dict[str, Tensor] = {}
        if arm.needs_nll and self.texts:
            # the teacher explains the mismatched text
            mine = (
                segments_BT if self._partner is None else right_padded([self.examples[i].segments for i in others], 0)
            )
            num_B = in_segments(mine, (REASONING, ANSWER)).sum(1).clamp_min(1)
            scale = {n: in_segments(theirs[n], (REASONING, ANSWER)).sum(1) / num_B for n in theirs if n in self.texts}
        changes = self._changes(theirs, segments_BT, numbers)
        chunks = {name: self._chunks(name, theirs[name], segments_BT, numbers) for name in self.pieces}
        batch = replace(batch, teacher_inputs=given, nll_scale=scale, changes=changes, chunks=chunks)
        if targets:
            batch = batch.with_targets(targets)
        return self._aligned(batch, theirs, numbers, others) if arm.needs_kv else batch

    def _read_by(self, name: str, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and segments of what a teacher reads, [B, S]."""
        text = self.texts.get(name)
        rows = [(self.examples if text is None else text.examples)[i] for i in numbers]
        ids_BS = right_padded([row.input_ids for row in rows], self.pad_id if text is None else text.pad_id)
        return ids_BS, right_padded([row.segments for row in rows], 0)

    def _changes(self, theirs: Mapping[str, Tensor], mine_BT: Tensor, numbers: Sequence[int]) -> dict[str, Change]:
        """What the arm's control does with each teacher's targets; none where they are taken as they come.

        Teachers that read the same tokens are permuted alike, so that what they give for one token stays together.
        """
        assert self.arm is not None
        control, rows = self.arm.control, [self.examples[i] for i in numbers]

        def seeds(*words: str) -> tuple[int, ...]:
            return tuple(derive_seed(self.seed, control, *words, row.doc_hash, row.style) for row in rows)

        found: dict[str, Change] = {}
        for name, theirs_BS in theirs.items():
            if control == "placebo" and self.arm.needs_logits:
                found[name] = Change(rows_BT=mismatched_predictions(mine_BT, theirs_BS))
            elif control == "shuffled":
                order_BS = permuted_places(theirs_BS, seeds())
                found[name] = Change(order_BS, predicting_places(order_BS))
            elif control == "noise":
                found[name] = Change(seeds=seeds(name), moments=self.moments.get(name), vocab_size=self.vocab_size)
        return found

    def _aligned(
        self, batch: Batch, theirs: Mapping[str, Tensor], numbers: Sequence[int], others: Sequence[int]
    ) -> Batch:
        """The batch with maps (where they change anything), kv_masks and token_weights (where tokens weigh)."""
        assert self.arm is not None
        wanted_BT = in_segments(batch.segments_BT, KV_SEGMENTS[self.arm.loss.kv_on])
        maps: dict[str, SparseMap] = {}
        masks: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name in self.arm.teachers:
            target = batch.targets.get(name)
            if self.arm.thinks:
                maps[name] = self._slots(self._kept(name, theirs[name], target, others), theirs[name])
                behind = maps[name].mask()
                masks[name] = behind if behind.ndim == 2 else slots_with_all(behind, self._places(name, target))
                continue
            mapping = self._time_map(name, theirs[name], batch.segments_BT, numbers, others)
            mapping = self._compressed(name, mapping, theirs[name], target, others)
            mask = wanted_BT
            if mapping is not None:
                maps[name] = mapping
                behind = mapping.mask()
                mask = wanted_BT & (behind if behind.ndim == 2 else slots_with_all(behind, self._places(name, target)))
            masks[name] = mask
            if self.arm.loss.attention_weighted:
                weights[name] = self._token_weights(name, mapping, target, mask)
        return replace(batch, maps={**batch.maps, **maps}, kv_masks={**batch.kv_masks, **masks}, token_weights=weights)

    def _time_map(
        self, name: str, theirs_BS: Tensor, mine_BT: Tensor, numbers: Sequence[int], others: Sequence[int]
    ) -> SparseMap | None:
        """From the teacher's tokens to the student's; None where every token stands where it stands."""
        text = self.texts.get(name)
        if text is None or text.own is None or self._warper.mode != "pad":
            return self._warper.map(theirs_BS, mine_BT)
        theirs, mine = [text.spans(i) for i in others], [text.student_spans(i) for i in numbers]
        sides = []
        for part in (0, 1):
            for rows, width in ((theirs, theirs_BS.shape[1]), (mine, mine_BT.shape[1])):
                padded = rows[0][part].new_zeros(len(rows), width, *rows[0][part].shape[1:])
                for place, row in zip(padded, rows, strict=True):
                    place[: len(row[part])] = row[part]
                sides.append(padded if padded.is_floating_point() else padded.long())
        return None if same_tokens(*sides) else token_map(*sides)

    def _chunks(self, name: str, theirs_BS: Tensor, mine_BT: Tensor, numbers: Sequence[int]) -> TextChunks:
        """Of the completions, as far as their tokens are learned: where a teacher's logits and the student's meet."""
        assert self.arm is not None
        text, found = self.texts[name], []
        given_BS = in_segments(theirs_BS, (REASONING, ANSWER))
        learned_BT = in_segments(mine_BT, CE_SEGMENTS[self.arm.loss.ce_on])
        for i, given_S, learned_T in zip(numbers, given_BS, learned_BT, strict=True):
            found.append(chunks_within(common_chunks(*text.spans(i), *text.student_spans(i)), given_S, learned_T))
        row_C = torch.arange(len(found)).repeat_interleave(torch.tensor([len(one) for one in found]))
        theirs_C2, mine_C2 = torch.cat(found).split(2, dim=1)
        ids_BS = right_padded([text.examples[i].input_ids for i in numbers], text.pad_id)
        return TextChunks(row_C, theirs_C2, mine_C2, ids_BS, *self.pieces[name])

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
        if self.arm.compress.kv_compression == "full":  # tokens that stand where they stand need no map
            return None if mapping is None else mapping.masked_source(theirs_BS > 0)
        kept = self._kept(name, theirs_BS, target, others)
        mapping = SparseMap.identity(theirs_BS.shape[1]) if mapping is None else mapping
        return mapping.masked_source(kept & (theirs_BS > 0))

    def _kept(
        self, name: str, theirs_BS: Tensor, target: TeacherTargets | None, others: Sequence[int]
    ) -> Bool[Tensor, "*M B S"]:
        """Which of a teacher's tokens take part."""
        assert self.arm is not None
        compress, scores = self.arm.compress, None
        if compress.kv_compression == "r-kv" and target is not None and target.scores_BSMRG is not None:
            scores = target.scores_BSMRG[:, :, :, [IMPORTANCE, REDUNDANCY]].permute(2, 0, 3, 4, 1)
        ends_BS = None
        if compress.kv_compression == "steps":
            ends_BS = self.step_marks[name].ends(*self._read_by(name, others)).ends_BS
        return kept_tokens(
            compress.kv_compression,
            theirs_BS,
            compress.keep or (self.arm.latent.tokens if self.arm.thinks else None),
            scores=scores,
            keys_B=[derive_seed(self.seed, "compress", name, self.examples[i].doc_hash) for i in others],
            ends_BS=ends_BS,
            importance_share=compress.importance_share,
        )

    def shares_that_drop(self, numbers: Sequence[int]) -> dict[str, float]:
        """By teacher (and `itself`), of these examples the share of which compression drops a reasoning token."""
        arm = self.arm
        if arm is None or arm.compress.kv_compression in ("full", "none"):
            return {}
        found = {}
        for name in [*(arm.teachers if arm.needs_kv else ()), *([ITSELF] if arm.learns_from_itself else ())]:
            _, theirs_BS = self._read_by(name, numbers)
            if arm.compress.kv_compression == "steps":
                kept_BS = self._kept(name, theirs_BS, None, numbers)
            else:  # whichever the others keep, they are as many
                kept_BS = kept_tokens("right", theirs_BS, arm.compress.keep or arm.latent.tokens)
            found[name] = share_that_drops(kept_BS, theirs_BS)
        return found

    def _slots(self, kept: Tensor, theirs_BS: Tensor) -> SparseMap:
        """From a teacher's tokens to the student's latent slots: its kept reasoning tokens in their order."""
        assert self.arm is not None
        return selection_map(kept & (theirs_BS == REASONING), self.arm.latent.tokens)

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
            here = [paid_MBS[place] * share for place, share in row]
            if mapping is not None:
                here = [mapping.of_layer(place).apply(x, 1) for x, (place, _) in zip(here, row, strict=True)]
            rows.append(torch.stack(here).sum(0))
        return normalise_token_weights(torch.stack(rows), mask)


def token_counts(batch: Batch, arm: ArmRecipe | None) -> Tensor:
    """Tokens that each loss term averages over, in this batch, as float64.

    [cross-entropy, kv of teacher 1, …]; with `fuse_at: kv` then those where any teacher that has weight has something;
    with latents, at the end, those of the answers and the slots that its own reasoning fills.
    """
    codes = CE_SEGMENTS[arm.loss.ce_on if arm is not None else "reasoning+answer"]
    counts = [in_segments(batch.segments_BT[:, 1:], codes).sum().double()]
    if arm is not None and arm.needs_kv:
        masks = [batch.kv_masks[name] for name in arm.teachers]
        if arm.fuse.fuse_at == "kv":
            fixed = arm.fuse.weights if arm.fuse.fusion_strategy == "fixed" else None
            fused = [mask for n, mask in enumerate(masks) if fixed is None or fixed[n] > 0]
            masks.append(functools.reduce(torch.logical_or, fused))
        counts += [mask.sum().double() / (1 if mask.ndim == 2 else mask.shape[0]) for mask in masks]
    if arm is not None and arm.thinks:
        assert batch.questions is not None
        slots_B = in_segments(batch.segments_BT, (REASONING,)).sum(1).clamp(max=arm.compress.keep or arm.latent.tokens)
        filled = batch.kv_masks.get(ITSELF, slots_B)
        counts += [batch.questions.answer_mask_BA.sum().double(), filled.sum().double()]
    return torch.stack(counts)
