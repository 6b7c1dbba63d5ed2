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

from kvdistill.align import AlignedKV, MapProjectionAligner, attention_sources, attention_targets
from kvdistill.arms.batches import CE_SEGMENTS, in_segments
from kvdistill.core.kv import KV
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import ArmRecipe
from kvdistill.core.targets import TeacherTargets
from kvdistill.fuse import Fusion, fuse_caches
from kvdistill.losses import QKV, build_distance, cross_entropy, logit_divergence, masked_token_mean, prediction_mask
from kvdistill.models import capture_kv, positions_from_mask, rotate_keys, unrotate_keys


@dataclass
class DistillOutput:
    """loss: scalar with graph. terms: name -> (raw mean per token, the term's weight, what entered the loss), detached.

    Raw values know no router: they are the same figure for every arm, so their curves can be compared.

    weights: router weights [N, L or 1, B, T or 1], or None for arms without teachers.
    """

    loss: Tensor
    terms: dict[str, tuple[Tensor, float, Tensor]] = field(default_factory=dict)
    weights: Tensor | None = None


@dataclass(frozen=True)
class _KVStep:
    """What all KV terms of a batch share. masks, token_weights: by teacher. counts: as `token_counts`."""

    masks: Mapping[str, Tensor]
    token_weights: Mapping[str, Tensor]
    counts: Tensor
    kv_weight: float


class Distiller(nn.Module):
    """student: a causal model. aligners, fusion: of the arm's teachers; None for an arm without any."""

    def __init__(
        self,
        student: nn.Module,
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
        self.student = student
        self.arm = arm
        self.teachers = list(arm.teachers) if arm is not None else []
        self.fusion = fusion
        self.student_layers = list(student_layers)
        self._frames, self._rotations = dict(frames or {}), dict(rotations or {})
        # teacher names may hold dots, module names may not: aligners go by the teacher's number
        self.aligners = nn.ModuleDict({str(self.teachers.index(n)): a for n, a in (aligners or {}).items()})
        assert all(a.student_layers == self.student_layers for a in self.aligners.values())
        self._distance = build_distance(arm.loss) if arm is not None and arm.needs_kv else None

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor,
        counts: Tensor,
        kv_weight: float = 0.0,
        targets: Mapping[str, TeacherTargets] | None = None,
        maps: Mapping[str, SparseMap] | None = None,
        kv_masks: Mapping[str, Tensor] | None = None,
        token_weights: Mapping[str, Tensor] | None = None,
        **_unused: Any,
    ) -> DistillOutput:
        """input_ids, segments [B, T], right-padded. counts: what each term's sum is divided by (`token_counts`).

        targets, maps, kv_masks, token_weights: by teacher, as `BatchMaker` makes them.
        """
        arm = self.arm
        mask_BT = segments > 0
        needs_kv = arm is not None and arm.needs_kv
        logits_BTV, kv = self._run_student(input_ids, mask_BT, capture=needs_kv)
        codes = CE_SEGMENTS[arm.loss.ce_on if arm is not None else "reasoning+answer"]
        supervised_BT = in_segments(segments, codes)
        ce = cross_entropy(logits_BTV, input_ids, supervised_BT, counts[0])
        ce_weight = arm.loss.ce_weight if arm is not None else 1.0
        out = DistillOutput(loss=ce_weight * ce, terms={"ce": (ce.detach(), ce_weight, ce_weight * ce.detach())})
        if arm is None or not (needs_kv or arm.needs_logits):
            return out
        targets, maps = targets or {}, maps or {}
        sources = self._sources(kv) if needs_kv else {}
        out.weights = self.router_weights(targets, sources, mask_BT)
        if needs_kv:
            step = _KVStep(kv_masks or {}, token_weights or {}, counts, kv_weight)
            if arm.compares_attention:
                self._add_attention_terms(out, kv, targets, maps, step)
            else:
                aligned = {n: self._target_channels(n, targets[n].kv, maps.get(n)) for n in self.teachers}
                self._add_kv_terms(out, sources, aligned, step)
        if arm.needs_logits:
            self._add_logit_terms(out, logits_BTV, targets, supervised_BT, counts[0])
        return out

    @torch.no_grad()
    def cross_entropy_only(self, input_ids: Tensor, segments: Tensor, counts: Tensor) -> Tensor:
        """Cross-entropy of a batch without any teacher: what learning curves compare train and validation by."""
        logits_BTV, _ = self._run_student(input_ids, segments > 0, capture=False)
        codes = CE_SEGMENTS[self.arm.loss.ce_on if self.arm is not None else "reasoning+answer"]
        supervised_BT = in_segments(segments, codes)
        return cross_entropy(logits_BTV, input_ids, supervised_BT, counts[0])

    @torch.no_grad()
    def match(
        self, input_ids: Tensor, segments: Tensor, target: KV, name: str, time: SparseMap | None
    ) -> tuple[AlignedKV, AlignedKV]:
        """Student and teacher `name` in the space they meet in, for match figures: two [L, B, T, C] pairs."""
        _, kv = self._run_student(input_ids, segments > 0, capture=True)
        assert kv is not None
        return self._aligner(name).sources(kv), self._target_channels(name, target, time)

    def _target_channels(self, name: str, kv: KV | None, time: SparseMap | None) -> AlignedKV:
        assert kv is not None
        return self._aligner(name).targets(self._frames[name](kv) if name in self._frames else kv, time)[0]

    def _sources(self, kv: KV | None) -> dict[str, AlignedKV]:
        """The student in every teacher's space; gathered once, since the aligners of an arm take the same layers."""
        assert kv is not None
        flat = self._aligner(self.teachers[0]).student_channels(kv)
        return {n: self._aligner(n).project(flat) for n in self.teachers}

    def _aligner(self, name: str) -> MapProjectionAligner:
        return self.aligners[str(self.teachers.index(name))]  # type: ignore[return-value]

    def _run_student(self, input_ids: Tensor, mask_BT: Tensor, *, capture: bool) -> tuple[Tensor, KV | None]:
        positions_BT = positions_from_mask(mask_BT)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask_BT.long(),
            "position_ids": positions_BT,
            "use_cache": False,
        }
        if not capture:
            return self.student(**inputs).logits, None
        queries = self.arm is not None and self.arm.compares_attention
        with capture_kv(self.student, layers=self.student_layers, queries=queries) as captured:
            logits_BTV = self.student(**inputs).logits
        kv = captured.kv(mask_BT, positions_BT)
        assert self.arm is not None
        return logits_BTV, kv if self.arm.align.keys == "rotated" else unrotate_keys(kv, self.student)

    def router_weights(
        self, targets: Mapping[str, TeacherTargets], sources: Mapping[str, AlignedKV], mask_BT: Tensor
    ) -> Tensor:
        """Weight of each teacher, [N, L or 1, B, T or 1], without gradient."""
        assert self.fusion is not None
        given: dict[str, Any] = {"mask_BT": mask_BT}
        if "nll_BN" in self.fusion.needs:
            given["nll_BN"] = torch.stack([targets[n].nll_B for n in self.teachers], dim=1)  # type: ignore[misc]
        if "query_N_LBTC" in self.fusion.needs:
            given["query_N_LBTC"] = [self._aligner(n).unstandardised_keys(sources[n]) for n in self.teachers]
        return self.fusion.weights(mask_BT.shape[0], mask_BT.device, **given)

    def _add_kv_terms(
        self,
        out: DistillOutput,
        sources: Mapping[str, AlignedKV],
        aligned: Mapping[str, AlignedKV],
        step: _KVStep,
    ) -> None:
        assert self.arm is not None and self._distance is not None and out.weights is not None
        sides = (("k", 0, self.arm.loss.k_weight), ("v", 1, self.arm.loss.v_weight))
        names = self.teachers
        for side, place, side_weight in sides:
            if side_weight == 0:
                continue
            if self.arm.fuse.fuse_at == "kv":  # where all sources are the student's own channels
                masks = [step.masks[n] for n in names]
                fused, mask_BT = fuse_caches([aligned[n][place] for n in names], masks, out.weights)
                distance_LBT = self._between(sources[names[0]][place], fused, mask_BT)
                raw = masked_token_mean(distance_LBT, mask_BT, None, step.counts[1 : 1 + len(names)].max())
                self._add(out, f"kv/fused/{side}", raw, step.kv_weight * side_weight, raw)
                continue
            for number, name in enumerate(names):
                distance_LBT = self._between(sources[name][place], aligned[name][place], step.masks[name])
                self._add_routed(out, f"kv/{name}/{side}", distance_LBT, number, step, side_weight)

    def _between(self, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        assert self._distance is not None
        return self._distance(source, target, mask) if self._distance.needs_mask else self._distance(source, target)

    def _add_attention_terms(
        self,
        out: DistillOutput,
        kv: KV | None,
        targets: Mapping[str, TeacherTargets],
        maps: Mapping[str, SparseMap],
        step: _KVStep,
    ) -> None:
        """Keys, values and queries of both sides in one distance, rotated in the space they meet in."""
        assert kv is not None and self._distance is not None
        for number, name in enumerate(self.teachers):
            theirs = targets[name].kv
            assert theirs is not None
            aligner, rotate = self._aligner(name), self._rotations.get(name, self._rotate_as_student)
            source = attention_sources(aligner, kv, theirs, rotate)
            target = attention_targets(aligner, kv, theirs, maps.get(name), rotate)
            distance_LBT = self._distance(QKV(*source), QKV(*target), step.masks[name])
            self._add_routed(out, f"kv/{name}/attention", distance_LBT, number, step, 1.0)

    def _rotate_as_student(self, kv: KV) -> KV:
        return rotate_keys(kv, self.student)

    def _add_routed(
        self, out: DistillOutput, term: str, distance_LBT: Tensor, number: int, step: _KVStep, weight: float
    ) -> None:
        """One teacher's term: with the router's weight and the tokens' in the loss, with the tokens' in the log."""
        assert out.weights is not None
        name, count = self.teachers[number], step.counts[1 + number]
        mask, tokens = step.masks[name], step.token_weights.get(name)
        router = out.weights[number]
        routed = masked_token_mean(distance_LBT, mask, router if tokens is None else router * tokens, count)
        raw = masked_token_mean(distance_LBT.detach(), mask, tokens, count)
        self._add(out, term, raw, step.kv_weight * weight, routed)

    def _add_logit_terms(
        self,
        out: DistillOutput,
        logits_BTV: Tensor,
        targets: Mapping[str, TeacherTargets],
        supervised_BT: Tensor,
        num_tokens: Tensor,
    ) -> None:
        assert self.arm is not None and out.weights is not None
        predicts_BT = prediction_mask(supervised_BT)
        for number, name in enumerate(self.teachers):
            target = targets[name]
            assert target.topk_index_BSK is not None and target.topk_logprob_BSK is not None
            weight_BT = out.weights[number].mean(0)  # over layers
            divergence_N = logit_divergence(
                logits_BTV,
                target.topk_index_BSK,
                target.topk_logprob_BSK,
                predicts_BT,
                self.arm.loss.logit_temperature,
            )
            routed = (divergence_N * weight_BT.expand(predicts_BT.shape)[predicts_BT]).sum() / num_tokens
            raw = divergence_N.detach().sum() / num_tokens
            self._add(out, f"logit/{name}", raw, self.arm.loss.logit_weight, routed)

    @staticmethod
    def _add(out: DistillOutput, name: str, raw: Tensor, weight: float, routed: Tensor) -> None:
        """raw: mean per token, for the log. routed: the same with the router's weights, what is learned from."""
        entered = weight * routed
        out.terms[name] = (raw.detach(), weight, entered.detach())
        out.loss = out.loss + entered
