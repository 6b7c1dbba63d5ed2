"""The fit stage: what is computed once from captured targets and then only read by training.

Channel statistics of each aligned teacher; closed-form (ridge) projectors where the recipe freezes or starts from
one; prototypes for similarity routing; moments of the teacher's channels for noise in their place. One
content-addressed folder per (arm's alignment, teacher, seed where the student's initial weights matter), shared by all
arms that align alike (`Arm.fit_identity`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvdistill.align import AlignedKV, MapProjectionAligner, SharedSpace, SharedSpaceFit
from kvdistill.align.time import segment_report
from kvdistill.arms.arm import FIT_KIND, Arm
from kvdistill.arms.batches import Batch
from kvdistill.arms.controls import Moments
from kvdistill.arms.costs import fit_flops
from kvdistill.arms.student import CausalStudent
from kvdistill.core.kv import KV
from kvdistill.core.layout import fit_root
from kvdistill.core.maps import SparseMap
from kvdistill.core.progress import Progress, silent
from kvdistill.core.runtime import derive_seed
from kvdistill.core.stopping import put_off
from kvdistill.fuse import fit_prototypes
from kvdistill.models import fingerprint_model
from kvdistill.store.shards import StoreWriter

STUDENT = "the student"  # no teacher can have this name


def fit(arm: Arm, progress: Progress = silent) -> None:
    """Fit what this arm needs and is not there yet. Asked to end, it does after the fit it is at."""
    names = arm.recipe.teachers if arm.recipe.needs_kv else []
    if names and arm.recipe.align.match_in == "shared":
        with put_off():
            _fit_shared(arm)
    for number, name in enumerate(names):
        with put_off():
            _fit_one(arm, name)
        progress("fit", number + 1, len(names))


def _fit_one(arm: Arm, name: str) -> None:
    with _writer(arm, name) as writer:
        if _is_fitted(writer):
            return
        texts = _Calibration(arm, name)
        aligner = arm.new_aligner(name).to(arm.device)
        if arm.recipe.align.standardise:
            aligner.fit_statistics((kv, mapping) for _, kv, mapping in texts.batches(count=True))
        extra: dict[str, Any] = {}
        if aligner.needs_fit:
            student = CausalStudent(arm.initial_model).to(arm.device)
            fingerprint = fingerprint_model(student.model)
            rotate = arm.teachers[name].rotation() if arm.recipe.align.ridge_on == "attention" else None
            counted = not arm.recipe.align.standardise
            sides = (
                (kv, arm.student_kv(student, batch), mapping) for batch, kv, mapping in texts.batches(count=counted)
            )
            aligner.fit_projector(sides, rotate)
            extra = {"student_fingerprint": fingerprint}
        _write(texts, aligner, writer, {"calibration": texts.counts()} | extra)


def _writer(arm: Arm, name: str) -> StoreWriter:
    return StoreWriter(fit_root(arm.experiment.run), FIT_KIND, name, arm.fit_identity(name))


def _is_fitted(writer: StoreWriter) -> bool:
    """Whether the fit is there. What a kill left of one is of no use, since its notes come with the last word."""
    if writer.complete and writer.num_shards == 1:
        return True
    writer.start_over()
    return False


def _write(texts: _Calibration, aligner: MapProjectionAligner, writer: StoreWriter, extra: dict[str, Any]) -> None:
    """The aligner's tensors, and prototypes of the teacher's keys where the arm's router compares with them."""
    tensors = {f"aligner.{key}": value for key, value in aligner.state_dict().items()}
    if not aligner.needs_fit:  # the seeded initial projector is made again by training, not stored
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aligner.proj_")}
    fuse = texts.arm.recipe.fuse
    if fuse.fusion_strategy == "similarity":

        def keys() -> Iterator[tuple[Tensor, Tensor]]:
            for _, kv, mapping in texts.batches():
                aligned, mask = aligner.targets(kv, mapping)
                yield aligner.unstandardised_keys(aligned), mask if mask.ndim == 2 else mask.all(0)

        seed = derive_seed(texts.arm.experiment.recipe.data.seed, texts.name)
        tensors["prototypes"] = fit_prototypes(keys(), fuse.prototype, fuse.num_prototypes, seed)
    if texts.arm.recipe.control == "noise":  # in the frame in which they are captured
        tensors |= Moments.of(kv for batch, _, _ in texts.batches() if (kv := batch.targets[texts.name].kv)).tensors()
    writer.add(tensors or {"nothing": torch.zeros(1)})
    extra = {**extra, "flops": fit_flops(texts.arm, texts.name)}
    writer.finish({**extra, "dead_channels": aligner.num_dead()} if aligner.recipe.standardise else extra)


def _fit_shared(arm: Arm) -> None:
    """One space for all models of an arm: adapters of the student and of every teacher, from the same texts."""
    writers = {name: _writer(arm, name) for name in arm.recipe.teachers}
    with ExitStack() as held:
        for writer in sorted(writers.values(), key=lambda writer: writer.folder):  # one order for all who wait
            held.enter_context(writer)
        todo = {name: writer for name, writer in writers.items() if not _is_fitted(writer)}
        if not todo:
            return
        texts = {name: _Calibration(arm, name) for name in arm.recipe.teachers}
        aligners = {name: arm.new_aligner(name).to(arm.device) for name in arm.recipe.teachers}
        for name, aligner in aligners.items():
            if arm.recipe.align.standardise:
                aligner.fit_statistics((kv, mapping) for _, kv, mapping in texts[name].batches(count=True))
        student = CausalStudent(arm.initial_model).to(arm.device)
        spaces, said = _shared_spaces(arm, aligners, texts, student)
        extra = {"student_fingerprint": fingerprint_model(student.model), "note": said}
        for name, writer in todo.items():
            aligners[name].set_adapters(*spaces, name, STUDENT)
            _write(texts[name], aligners[name], writer, {**extra, "calibration": texts[name].counts()})


def _shared_spaces(
    arm: Arm, aligners: Mapping[str, MapProjectionAligner], texts: Mapping[str, _Calibration], student: CausalStudent
) -> tuple[tuple[SharedSpace, SharedSpace], str]:
    """A space for keys and one for values, on the tokens that every teacher has something at; and what it says."""
    first, align = next(iter(aligners.values())), arm.recipe.align
    fits: list[SharedSpaceFit] = []
    for together in zip(*(texts[name].batches() for name in aligners), strict=True):
        batch = together[0][0]
        mine = first.student_channels(arm.student_kv(student, batch))
        mask_BT = batch.mask_BT
        theirs: list[AlignedKV] = []
        for aligner, (_, kv, mapping) in zip(aligners.values(), together, strict=True):
            flat, mask = aligner.teacher_channels(kv, mapping)
            theirs.append(flat)
            mask_BT = mask_BT & (mask if mask.ndim == 2 else mask.all(0))
        for side in range(2):
            channels = {STUDENT: mine[side]} | {n: t[side] for n, t in zip(aligners, theirs, strict=True)}
            if len(fits) <= side:
                widths = {name: x.shape[-1] for name, x in channels.items()}
                seeded = derive_seed(arm.seed, "shared", side)
                num_layers = len(first.student_layers)
                fits.append(SharedSpaceFit(widths, num_layers, arm.shared_size, align.shared_fit, seed=seeded))
            fits[side].update(channels, mask_BT)
    keys, values = (one.solve(align.ridge_l2, drop_spare=True) for one in fits)
    return (keys, values), "; ".join(dict.fromkeys(x.reason for x in (keys, values) if x.reason))


class _Calibration:
    """The calibration examples with one teacher's targets, gone through as often as a fit needs, and counted once."""

    def __init__(self, arm: Arm, name: str) -> None:
        self.arm, self.name = arm, name
        self._alone = arm.alone(name)
        self._maker = self._alone.batches("train", seed=0)
        self._sums: Counter[str] = Counter()

    def batches(self, *, count: bool = False) -> Iterator[tuple[Batch, KV, SparseMap | None]]:
        """The batch, the teacher's keys and values, and the map from its tokens to the student's."""
        for numbers in self._alone.calibration_numbers():
            batch = self._alone.load(self._maker, numbers)
            if count:
                mask = batch.kv_masks[self.name]
                self._sums["tokens"] += int(batch.mask_BT.sum())
                self._sums["tokens_with_a_target"] += int(mask.sum()) // (1 if mask.ndim == 2 else mask.shape[0])
                self._sums.update(segment_report(batch.targets[self.name].segments_BS.cpu(), batch.segments_BT.cpu()))
            yield batch, self._alone.teacher_kv(batch, self.name), batch.maps.get(self.name)

    def counts(self) -> dict[str, int]:
        """What of the texts has nothing behind it, for the ledger: by rule, not by accident."""
        return {name: number for name, number in self._sums.items() if number or name.startswith("tokens")}
