"""Student, aligners and fusion as one module: a batch in, the loss and each of its terms out.

    student(ids) ── captured k, v ──▶ unrotate ──▶ aligner.sources ──┐
    teacher targets ──▶ time map ──▶ layer map ──▶ standardise ──────┴─▶ distance ─▶ × router weight ─▶ mean over tokens

One module, so that gradients of projectors are averaged over ranks with the student's. It reads no files, runs
no teacher and knows no optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.align import AlignedKV, MapProjectionAligner, attention_rules, attention_sources, attention_targets
from kvdistill.arms.batches import CE_SEGMENTS, ITSELF, Batch, in_segments
from kvdistill.arms.student import Student, StudentOutput
from kvdistill.arms.teacher_pass import rkv_of
from kvdistill.compress import kept_by_layer, selection_map
from kvdistill.core.kv import KV
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe
from kvdistill.fuse import Fusion, fuse_caches
from kvdistill.losses import (
    QKV,
    AbstractKVDistance,
    build_distance,
    chunk_divergence,
    cross_entropy,
    each_token,
    logit_divergence,
    masked_token_mean,
    prediction_mask,
)
from kvdistill.models import rotate_keys

HIGHEST = 3  # layers whose keys and values tell what share of the gradient each term has


@dataclass
class DistillOutput:
    """loss: scalar with graph. terms: name -> (raw mean per token, the term's weight, what entered the loss), detached.

    Raw values know no router: they are the same figure for every arm, so their curves can be compared.

    weights: router weights [N, L or 1, B, T or 1], or None for arms without teachers.
    parts: name -> what entered the loss, with graph. seen: keys and values of the student's highest layers that take
    part, as its own attention took them; `shares.py` takes gradients of the one with respect to the other.
    """

    loss: Tensor
    terms: dict[str, tuple[Tensor, float, Tensor]] = field(default_factory=dict)
    weights: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Tensor] = field(default_factory=list)


class Distiller(nn.Module):
    """student: what learns. aligners, fusion: of the arm's teachers; None for an arm without any."""

    def __init__(
        self,
        student: Student,
        arm: ArmRecipe | None = None,
        aligners: Mapping[str, MapProjectionAligner] | None = None,
        fusion: Fusion | None = None,
        student_layers: Sequence[int] = (),
        frames: Mapping[str, Callable[[KV], KV]] | None = None,
        rotations: Mapping[str, Callable[[KV], KV]] | None = None,
    ) -> None:
        """frames: by teacher, its targets to the frame they are compared in. rotations: by teacher, how keys and
        queries turn in the space the two meet in, where attention is compared; unset: as the student turns them."""
        super().__init__()
        self.student: Any = student  # an nn.Module, whatever its kind
        self.arm = arm
        self.teachers = list(arm.teachers) if arm is not None else []
        self.fusion = fusion
        self.student_layers = list(student_layers)
        self._frames, self._rotations = dict(frames or {}), dict(rotations or {})
        # teacher names may hold dots, module names may not: aligners go by the teacher's number
        self.aligners = nn.ModuleDict({str(self.teachers.index(n)): a for n, a in (aligners or {}).items()})
        assert all(a.student_layers == self.student_layers for a in self.aligners.values())
        compares = arm is not None and (arm.needs_kv or arm.learns_from_itself)
        self._distance = build_distance(arm.loss) if arm is not None and compares else None

    def forward(
        self, batch: Batch, counts: Tensor, kv_weight: float = 0.0, self_weight: float = 0.0, thinks: bool = True
    ) -> DistillOutput:
        """One step's loss.

        Args:
            batch: with targets of every teacher of the arm.
            counts: what each term's sum is divided by (`token_counts`), float32.
            kv_weight: of the KV terms at this step.
            self_weight: of the KV term of latents to the student's own written reasoning.
            thinks: whether a student that thinks in latents does in this step, or learns to write alone.
        """
        arm = self.arm
        latent = arm is not None and arm.thinks
        needs_kv = arm is not None and (arm.learns_from_itself and thinks if latent else arm.needs_kv)
        supervised_BT = self._supervised(batch)
        logits, kv, seen = self._run_student(batch, capture=needs_kv, head=supervised_BT)
        assert logits is not None
        ce = cross_entropy(logits, batch.input_ids_BT, supervised_BT, counts[0])
        ce_weight = arm.loss.ce_weight if arm is not None else 1.0
        out = DistillOutput(loss=ce_weight * ce, terms={"ce": (ce.detach(), ce_weight, ce_weight * ce.detach())})
        out.parts["ce"] = out.loss
        if latent and thinks:
            own = None if kv is None or seen is None else (kv.detach(), seen.detach())
            self._add_latent_terms(out, batch, counts, own, (kv_weight, self_weight))
        if latent:
            return out
        if seen is not None:
            out.seen = [*seen.keys[-HIGHEST:], *seen.values[-HIGHEST:]]
        if arm is None or not (needs_kv or arm.needs_logits):
            return out
        sources: dict[str, AlignedKV] = {}
        if kv is not None:  # gathered once, since the aligners of an arm take the same layers
            flat = self.aligner(self.teachers[0]).student_channels(kv)
            sources = {n: self.aligner(n).project(flat) for n in self.teachers}
        out.weights = self.router_weights(batch, sources)
        if kv is not None and arm.compares_attention:
            self._add_attention_terms(out, kv, batch, counts, kv_weight)
        elif kv is not None:
            self._add_kv_terms(out, sources, batch, counts, kv_weight)
        if arm.needs_logits:
            self._add_logit_terms(out, logits, batch, supervised_BT, counts[0])
        return out

    @torch.no_grad()
    def cross_entropy_only(self, batch: Batch, counts: Tensor) -> Tensor:
        """Cross-entropy of a batch without any teacher: what learning curves compare train and validation by."""
        supervised_BT = self._supervised(batch)
        logits = self._run_student(batch, capture=False, head=supervised_BT).logits
        assert logits is not None
        return cross_entropy(logits, batch.input_ids_BT, supervised_BT, counts[0])

    @torch.no_grad()
    def completion_nll(self, batch: Batch) -> tuple[float, int]:
        """Sum of -log p over the tokens after the prompts, whatever the arm's cross-entropy is of, and their number."""
        completion_BT = in_segments(batch.segments_BT, CE_SEGMENTS["reasoning+answer"])
        if self.arm is not None and self.arm.thinks:  # what it is to give: the answer behind its latents
            thinking = self.student.think(batch.questions)
            nll_N = nn.functional.cross_entropy(thinking.logits_NV.float(), thinking.labels_N, reduction="sum")
            return float(nll_N), len(thinking.labels_N)
        logits = self._run_student(batch, capture=False, head=completion_BT).logits
        assert logits is not None
        return float(cross_entropy(logits, batch.input_ids_BT, completion_BT, 1)), int(completion_BT[:, 1:].sum())

    @torch.no_grad()
    def match(self, batch: Batch, name: str) -> tuple[AlignedKV, AlignedKV]:
        """Student and teacher `name` in the space they meet in, for match figures: two [L, B, T, C] pairs (of latent
        slots in the place of tokens, where the student thinks in those)."""
        if self.arm is not None and self.arm.thinks:
            kv = self.student.think(batch.questions, self.student_layers, self.arm.align.keys).kv
        else:
            kv = self._run_student(batch, capture=True, head=None).kv
        assert kv is not None
        return self.aligner(name).sources(kv), self._target_channels(name, batch)

    def aligner(self, name: str) -> MapProjectionAligner:
        """Of one teacher."""
        return self.aligners[str(self.teachers.index(name))]  # type: ignore[return-value]

    def rotation(self, name: str) -> Callable[[KV], KV]:
        """How keys and queries turn in the space that the student and this teacher meet in."""
        return self._rotations.get(name, lambda kv: rotate_keys(kv, self.student.model))

    def _add_latent_terms(
        self,
        out: DistillOutput,
        batch: Batch,
        counts: Tensor,
        own: tuple[KV, KV] | None,
        kv_weights: tuple[float, float],
    ) -> None:
        """The answer behind latents, and the latents' keys and values against those of written reasoning.

        own: the student's, of its own written reasoning: as compared, and as its attention takes them. kv_weights: of
        teachers, and of itself, at this step.
        """
        arm = self.arm
        assert arm is not None and batch.questions is not None
        thinking = self.student.think(batch.questions, self.student_layers, arm.align.keys)
        nll = nn.functional.cross_entropy(thinking.logits_NV.float(), thinking.labels_N, reduction="sum") / counts[-2]
        self._add(out, "answer", nll, arm.latent.answer_weight, nll)
        out.seen = [x for side in thinking.seen for x in side[-HIGHEST:]]
        if arm.needs_kv:
            flat = self.aligner(self.teachers[0]).student_channels(thinking.kv)
            sources = {name: self.aligner(name).project(flat) for name in self.teachers}
            out.weights = self.router_weights(batch, sources)
            self._add_kv_terms(out, sources, batch, counts, kv_weights[0])
        if own is None:
            return
        slots, mask = self._own_slots(batch, own[1])
        for side, weight in (("k", arm.loss.k_weight), ("v", arm.loss.v_weight)):
            if weight == 0:
                continue
            mine, theirs = (stacked(kv, side).float() for kv in (thinking.kv, own[0]))
            target_LBMC = torch.stack([slots.of_layer(n).apply(layer, 1) for n, layer in enumerate(theirs)])
            scale_L111 = _deviation(target_LBMC, mask)
            assert self._distance is not None
            distance_LBM = self._distance(mine / scale_L111, target_LBMC / scale_L111)
            raw = masked_token_mean(distance_LBM, mask, None, counts[-1])
            self._add(out, f"kv/{ITSELF}/{side}", raw, kv_weights[1] * weight, raw)

    def _own_slots(self, batch: Batch, own: KV) -> tuple[SparseMap, Tensor]:
        """From the student's own reasoning tokens to its latent slots, and which slots have one: [B, M], or [L, B, M]
        where layers keep other tokens (r-kv). own: as its attention takes them."""
        if ITSELF in batch.maps:
            return batch.maps[ITSELF], batch.kv_masks[ITSELF]
        assert self.arm is not None
        compress, num_slots = self.arm.compress, self.arm.latent.tokens
        scores = rkv_of(own, batch.segments_BT)
        kept_LBT = kept_by_layer(scores, compress.keep or num_slots, compress.importance_share)
        slots = selection_map(kept_LBT, num_slots)
        return slots, slots.mask()

    def _supervised(self, batch: Batch) -> Tensor:
        """Tokens that cross-entropy (and logit distillation) learns to predict."""
        return in_segments(batch.segments_BT, CE_SEGMENTS[self.arm.loss.ce_on if self.arm else "reasoning+answer"])

    def _target_channels(self, name: str, batch: Batch) -> AlignedKV:
        kv = batch.targets[name].kv
        assert kv is not None
        kv = self._frames[name](kv) if name in self._frames else kv
        return self.aligner(name).targets(kv, batch.maps.get(name))[0]

    def _run_student(self, batch: Batch, *, capture: bool, head: Tensor | None) -> StudentOutput:
        """head: the labels that logits are wanted for; None: only keys and values are looked at."""
        at = False if head is None else prediction_mask(head)
        if not capture:
            return self.student(batch.input_ids_BT, batch.mask_BT, head=at)
        assert self.arm is not None
        return self.student(
            batch.input_ids_BT,
            batch.mask_BT,
            layers=self.student_layers,
            queries=self.arm.compares_attention or (self.arm.thinks and self.arm.compress.kv_compression == "r-kv"),
            keys=self.arm.align.keys,
            head=at,
        )

    def router_weights(self, batch: Batch, sources: Mapping[str, AlignedKV]) -> Tensor:
        """Weight of each teacher, [N, L or 1, B, T or 1], without gradient.

        Args:
            batch: with targets.
            sources: by teacher the student in its space; read where weights depend on it.
        """
        assert self.fusion is not None
        mask_BT = batch.mask_BT
        if self.arm is not None and self.arm.thinks:  # slots that any teacher fills
            masks = [batch.kv_masks[name] for name in self.teachers]
            filled = [mask if mask.ndim == 2 else mask.any(0) for mask in masks]
            mask_BT = torch.stack(filled).any(0)
        given: dict[str, Any] = {"mask_BT": mask_BT}
        if "nll_BN" in self.fusion.needs:
            given["nll_BN"] = torch.stack([batch.targets[n].nll_B for n in self.teachers], dim=1)  # type: ignore[misc]
        if "query_N_LBTC" in self.fusion.needs:
            given["query_N_LBTC"] = [self.aligner(n).unstandardised_keys(sources[n]) for n in self.teachers]
        return self.fusion.weights(mask_BT.shape[0], mask_BT.device, **given)

    def _add_kv_terms(
        self, out: DistillOutput, sources: Mapping[str, AlignedKV], batch: Batch, counts: Tensor, kv_weight: float
    ) -> None:
        """Keys and values, each teacher by itself, or all fused into one cache."""
        assert self.arm is not None and self._distance is not None and out.weights is not None
        distance, names = self._distance, self.teachers
        aligned = {name: self._target_channels(name, batch) for name in names}

        def between(source: Tensor, target: Tensor, mask: Tensor, live_LC: Tensor | None = None) -> Tensor:
            if distance.needs_mask:
                return distance(source, target, mask)
            if live_LC is None or not isinstance(distance, AbstractKVDistance):
                return distance(source, target)
            share_L11 = live_LC.float().mean(1).clamp_min(1 / live_LC.shape[1])[:, None, None]
            return distance.over_live(source, target, share_L11)

        for side, place, side_weight in (("k", 0, self.arm.loss.k_weight), ("v", 1, self.arm.loss.v_weight)):
            if side_weight == 0:
                continue
            if self.arm.fuse.fuse_at == "kv":  # where all sources are the student's own channels
                masks = [batch.kv_masks[n] for n in names]
                fused, mask_BT = fuse_caches([aligned[n][place] for n in names], masks, out.weights)
                distance_LBT = between(sources[names[0]][place], fused, mask_BT)
                raw = masked_token_mean(distance_LBT, mask_BT, None, counts[1 + len(names)])
                self._add(out, f"kv/fused/{side}", raw, kv_weight * side_weight, raw)
                continue
            for name in names:
                live = self.aligner(name).live()
                sides = sources[name][place], aligned[name][place], batch.kv_masks[name]
                distance_LBT = between(*sides, None if live is None else live[place])
                self._add_routed(out, name, side, distance_LBT, batch, counts, kv_weight * side_weight)

    def _add_attention_terms(self, out: DistillOutput, kv: KV, batch: Batch, counts: Tensor, kv_weight: float) -> None:
        """Keys, values and queries of both sides in one distance, rotated in the space they meet in."""
        assert self._distance is not None
        for name in self.teachers:
            theirs = batch.targets[name].kv
            assert theirs is not None
            aligner, rotate = self.aligner(name), self.rotation(name)
            source = attention_sources(aligner, kv, theirs, rotate)
            target = attention_targets(aligner, kv, theirs, batch.maps.get(name), rotate)
            rules = attention_rules(aligner, kv, theirs)
            distance_LBT = self._distance(QKV(*source), QKV(*target), batch.kv_masks[name], rules)
            self._add_routed(out, name, "attention", distance_LBT, batch, counts, kv_weight * 1.0)

    def _add_routed(
        self,
        out: DistillOutput,
        name: str,
        side: str,
        distance_LBT: Tensor,
        batch: Batch,
        counts: Tensor,
        weight: float,
    ) -> None:
        """One teacher's term: with the router's weight and the tokens' in the loss, with the tokens' in the log."""
        assert out.weights is not None
        number = self.teachers.index(name)
        count, router = counts[1 + number], out.weights[number]
        mask, tokens = batch.kv_masks[name], batch.token_weights.get(name)
        routed = masked_token_mean(distance_LBT, mask, router if tokens is None else router * tokens, count)
        raw = masked_token_mean(distance_LBT.detach(), mask, tokens, count)
        self._add(out, f"kv/{name}/{side}", raw, weight, routed)

    def _add_logit_terms(
        self,
        out: DistillOutput,
        logits: Tensor,
        batch: Batch,
        supervised_BT: Tensor,
        num_tokens: Tensor,
    ) -> None:
        assert self.arm is not None and out.weights is not None
        predicts_BT = prediction_mask(supervised_BT)
        for number, name in enumerate(self.teachers):
            target = batch.targets[name]
            assert target.topk_index_BSK is not None and target.topk_logprob_BSK is not None
            weight_BT = out.weights[number].mean(0).expand(predicts_BT.shape)  # mean over layers
            theirs, form = (target.topk_index_BSK, target.topk_logprob_BSK), self.arm.loss.logit_match
            temperature, chunks = self.arm.loss.logit_temperature, batch.chunks.get(name)
            if chunks is None and form != "sorted":
                divergence_N = logit_divergence(logits, *theirs, predicts_BT, temperature)
                weight_N = weight_BT[predicts_BT]
            else:  # N: terms
                chunks = chunks or each_token(predicts_BT, batch.input_ids_BT, logits.shape[-1])
                form = "spans" if form == "auto" or form == "same" else form
                ids_BT = batch.input_ids_BT
                found = chunk_divergence(logits, predicts_BT, ids_BT, *theirs, chunks, form, temperature)
                divergence_N, weight_N = found.divergence_N, weight_BT[found.row_N, found.place_N]
            routed = (divergence_N * weight_N).sum() / num_tokens
            raw = divergence_N.detach().sum() / num_tokens
            self._add(out, f"logit/{name}", raw, self.arm.loss.logit_weight, routed)

    @staticmethod
    def _add(out: DistillOutput, name: str, raw: Tensor, weight: float, routed: Tensor) -> None:
        """raw: mean per token, for the log. routed: the same with the router's weights, what is learned from."""
        entered = weight * routed
        out.terms[name], out.parts[name] = (raw.detach(), weight, entered.detach()), entered
        out.loss = out.loss + entered


def stacked(kv: KV, side: str) -> Tensor:
    """Keys (k) or values (v) of all layers, the channels of all heads in one axis: [L, B, T, C]."""
    layers = kv.keys if side == "k" else kv.values
    return torch.stack([layer.transpose(1, 2).flatten(2) for layer in layers])


def _deviation(x_LBMC: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of each layer over live slots and channels, without graph, [L, 1, 1, 1]; 1 where it is 0."""
    live = (mask if mask.ndim == 3 else mask[None]).expand(x_LBMC.shape[:3])[..., None].to(x_LBMC.dtype)
    count_L111 = (live.sum((1, 2, 3), keepdim=True) * x_LBMC.shape[-1]).clamp_min(1)
    mean_L111 = (x_LBMC * live).sum((1, 2, 3), keepdim=True) / count_L111
    variance_L111 = ((x_LBMC - mean_L111).square() * live).sum((1, 2, 3), keepdim=True) / count_L111
    return torch.where(variance_L111 > 0, variance_L111.sqrt(), 1.0)
