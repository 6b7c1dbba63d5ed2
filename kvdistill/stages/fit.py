"""The fit stage: what is computed once from captured targets and then only read by training.

Channel statistics of each aligned teacher; closed-form (ridge) projectors where the recipe freezes or starts from
one; prototypes for similarity routing. One content-addressed folder per (arm's alignment, teacher, seed where the
student's initial weights matter), shared by all arms that align alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdistill.align import AlignedKV, MapProjectionAligner, SharedSpace, SharedSpaceFit
from kvdistill.align.time import segment_report
from kvdistill.arms.batches import arm_batches, moved_to
from kvdistill.arms.pairing import needed_layers, pair, shared_size
from kvdistill.arms.running import key_frame, load_teacher, run_teacher, teacher_rotation
from kvdistill.arms.targets import open_targets, target_identity
from kvdistill.arms.texts import load_tokenizer_of
from kvdistill.core.config import arm_recipe
from kvdistill.core.kv import KV
from kvdistill.core.layout import fit_root, folder_lock
from kvdistill.core.maps import SparseMap
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import derive_seed, pick_device
from kvdistill.core.targets import TeacherTargets
from kvdistill.fuse import fit_prototypes
from kvdistill.models import capture_kv, fingerprint_model, load_model, positions_from_mask, unrotate_keys
from kvdistill.store.shards import StoreReader, StoreWriter, find_store

KIND = "aligner"
Batch = tuple[dict[str, Any], TeacherTargets, SparseMap | None]


def make_aligner(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> MapProjectionAligner:
    """The aligner of one arm and teacher, with its seeded initial projector and nothing fitted yet."""
    sizes = pair(recipe, run, arm, name)
    teacher, student = sizes.teacher, sizes.student
    return MapProjectionAligner(
        arm.align,
        (teacher.num_layers, teacher.num_kv_heads, teacher.head_size),
        (student.num_layers, student.num_kv_heads, student.head_size),
        sizes.student_layers,
        seed=derive_seed(seed, "aligner", name),
        layer_map=sizes.mapping,
        query_heads=(teacher.num_heads, student.num_heads) if arm.compares_attention else None,
        shared_size=shared_size(recipe, run, arm) if arm.align.match_in == "shared" else None,
    )


def initial_student(recipe: Recipe, run: Path, seed: int) -> Any:
    """The student as training starts it, before adapters: the same bits for every arm of a seed."""
    vocab_size = len(load_tokenizer_of(run))
    return load_model(recipe.student, vocab_size=vocab_size, seed=derive_seed(seed, "student"), place="student")


def fit(recipe: Recipe, run: Path, runs: list[tuple[str, int]], progress: Progress = silent) -> None:
    """Fit what these (arm, seed) runs need and is not there yet."""
    for done, (arm_name, seed) in enumerate(runs):
        arm = arm_recipe(recipe, arm_name)
        if arm.needs_kv and arm.align.match_in == "shared":
            _fit_shared(recipe, run, arm, seed)
        for name in arm.teachers if arm.needs_kv else ():
            _fit_one(recipe, run, arm, name, seed)
        progress("fit", done + 1, len(runs))


def fitted_tensors(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> Mapping[str, Tensor]:
    """What `fit` left for this arm, teacher and seed: `aligner.*`, and `prototypes` for similarity."""
    return _fitted(recipe, run, arm, name, seed).shards[0]


def fitted_notes(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> dict[str, Any]:
    """What `fit` noted beside it: which of the calibration tokens have a target, which segments are missing, …"""
    return dict(_fitted(recipe, run, arm, name, seed).extra)


def _fitted(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> StoreReader:
    identity = _identity(recipe, run, arm, name, seed)
    return StoreReader(find_store(fit_root(run), KIND, name, identity, make="kvdistill fit RECIPE"))


def _identity(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> dict[str, Any]:
    needs_student = _needs_student(arm)
    similarity = arm.fuse.fusion_strategy == "similarity"
    mapping = pair(recipe, run, arm, name).mapping
    together = {n: target_identity(recipe, run, n, "train") for n in arm.teachers if arm.align.match_in == "shared"}
    return {
        **target_identity(recipe, run, name, "train"),
        "align": arm.align.model_dump(mode="json"),
        "layer_map": [mapping.index.tolist(), mapping.weight.tolist()],
        "together": together,
        "attention": arm.compares_attention,
        "distill_layers": arm.loss.distill_layers,
        "compress": arm.compress.model_dump(mode="json"),
        "kv_on": arm.loss.kv_on,
        "student": recipe.student.model_dump(mode="json"),
        "seed": seed if needs_student or (similarity and arm.align.match_in != "teacher") else None,
        "prototype": [arm.fuse.prototype, arm.fuse.num_prototypes] if similarity else None,
    }


def _needs_student(arm: ArmRecipe) -> bool:
    """A closed-form projector is fitted against the student's own initial keys and values."""
    trained = arm.align.match_in == "teacher" if arm.align.train_projector is None else arm.align.train_projector
    return arm.align.init == "ridge" or not trained


def _fit_one(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> None:
    writer = StoreWriter(fit_root(run), KIND, name, _identity(recipe, run, arm, name, seed))
    if writer.complete:
        return
    device = pick_device(recipe.hardware.device)
    aligner = make_aligner(recipe, run, arm, name, seed).to(device)
    with folder_lock(writer.folder, wait=True):
        counts = _Counts()
        if arm.align.standardise:
            aligner.fit_statistics((_kv(t), m) for _, t, m in _batches(recipe, run, arm, name, device, counts))
        extra: dict[str, Any] = {"calibration": counts.as_dict()}
        if aligner.needs_fit:
            student = initial_student(recipe, run, seed).to(device)
            extra["student_fingerprint"] = fingerprint_model(student)
            rotate = teacher_rotation(recipe, name, device) if arm.align.ridge_on == "attention" else None
            aligner.fit_projector(
                (
                    (_kv(t), _student_kv(student, batch, arm, aligner), m)
                    for batch, t, m in _batches(
                        recipe, run, arm, name, device, None if arm.align.standardise else counts
                    )
                ),
                rotate,
            )
        _write(recipe, run, arm, name, aligner, writer, extra)


def _write(
    recipe: Recipe,
    run: Path,
    arm: ArmRecipe,
    name: str,
    aligner: MapProjectionAligner,
    writer: StoreWriter,
    extra: dict[str, Any],
) -> None:
    tensors = {f"aligner.{key}": value for key, value in aligner.state_dict().items()}
    if not aligner.needs_fit:  # the seeded initial projector is made again by training, not stored
        tensors = {key: value for key, value in tensors.items() if not key.startswith("aligner.proj_")}
    if arm.fuse.fusion_strategy == "similarity":
        tensors["prototypes"] = _prototypes(recipe, run, arm, name, aligner, pick_device(recipe.hardware.device))
    writer.add(tensors or {"nothing": torch.zeros(1)})
    writer.finish(extra)


# -- one space for all models of an arm ---------------------------------------------------------------

STUDENT = "the student"  # no teacher can have this name


def _fit_shared(recipe: Recipe, run: Path, arm: ArmRecipe, seed: int) -> None:
    """Adapters of the student and of every teacher of an arm, from the same calibration texts."""
    names = arm.teachers
    writers = {n: StoreWriter(fit_root(run), KIND, n, _identity(recipe, run, arm, n, seed)) for n in names}
    if all(writer.complete for writer in writers.values()):
        return
    device = pick_device(recipe.hardware.device)
    aligners = {name: make_aligner(recipe, run, arm, name, seed).to(device) for name in names}
    with ExitStack() as locks:
        for writer in writers.values():
            locks.enter_context(folder_lock(writer.folder, wait=True))
        counts = {name: _Counts() for name in names}
        for name, aligner in aligners.items():
            if arm.align.standardise:
                batches = _batches(recipe, run, arm, name, device, counts[name])
                aligner.fit_statistics((_kv(t), m) for _, t, m in batches)
        student = initial_student(recipe, run, seed).to(device)
        spaces, said = _shared_spaces(recipe, run, arm, aligners, student, seed, device)
        extra = {"student_fingerprint": fingerprint_model(student), "note": said}
        for name, writer in writers.items():
            if not writer.complete:
                aligners[name].set_adapters(*spaces, name, STUDENT)
                found = {**extra, "calibration": counts[name].as_dict()}
                _write(recipe, run, arm, name, aligners[name], writer, found)


def _shared_spaces(
    recipe: Recipe,
    run: Path,
    arm: ArmRecipe,
    aligners: Mapping[str, MapProjectionAligner],
    student: Any,
    seed: int,
    device: torch.device,
) -> tuple[tuple[SharedSpace, SharedSpace], str]:
    """A space for keys and one for values, on the tokens that every teacher has something at."""
    first = next(iter(aligners.values()))
    size, num_layers = shared_size(recipe, run, arm), len(first.student_layers)
    fits: list[SharedSpaceFit] = []
    streams = [_batches(recipe, run, arm, name, device) for name in aligners]
    for together in zip(*streams, strict=True):
        mine = first.student_channels(_student_kv(student, together[0][0], arm, first))
        mask_BT = together[0][0]["segments"] > 0
        theirs: list[AlignedKV] = []
        for aligner, (_, targets, mapping) in zip(aligners.values(), together, strict=True):
            flat, mask = aligner.teacher_channels(_kv(targets), mapping)
            theirs.append(flat)
            mask_BT = mask_BT & (mask if mask.ndim == 2 else mask.all(0))
        for side in range(2):
            channels = {STUDENT: mine[side]} | {n: t[side] for n, t in zip(aligners, theirs, strict=True)}
            if len(fits) <= side:
                widths = {name: x.shape[-1] for name, x in channels.items()}
                seeded = derive_seed(seed, "shared", side)
                fits.append(SharedSpaceFit(widths, num_layers, size, arm.align.shared_fit, seed=seeded))
            fits[side].update(channels, mask_BT)
    keys, values = (one.solve(arm.align.ridge_l2, drop_spare=True) for one in fits)
    return (keys, values), "; ".join(dict.fromkeys(x.reason for x in (keys, values) if x.reason))


def _prototypes(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, aligner: Any, device: Any) -> Tensor:
    def keys() -> Iterator[tuple[Tensor, Tensor]]:
        for _, targets, mapping in _batches(recipe, run, arm, name, device):
            aligned, mask = aligner.targets(targets.kv, mapping)
            yield aligner.unstandardised_keys(aligned), mask if mask.ndim == 2 else mask.all(0)

    return fit_prototypes(keys(), arm.fuse.prototype, arm.fuse.num_prototypes, derive_seed(recipe.data.seed, name))


def _kv(targets: TeacherTargets) -> KV:
    assert targets.kv is not None
    return targets.kv


class _Counts:
    """What of the calibration texts has nothing behind it, for the ledger: by rule, not by accident."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()

    def add(self, batch: dict[str, Any], theirs_BS: Tensor, name: str) -> None:
        mine_BT = batch["segments"]
        mask = batch["kv_masks"][name]
        self._sums["tokens"] += int((mine_BT > 0).sum())
        self._sums["tokens_with_a_target"] += int(mask.sum()) // (1 if mask.ndim == 2 else mask.shape[0])
        self._sums.update(segment_report(theirs_BS, mine_BT))

    def as_dict(self) -> dict[str, int]:
        return {name: number for name, number in self._sums.items() if number or name.startswith("tokens")}


def _batches(
    recipe: Recipe, run: Path, arm: ArmRecipe, name: str, device: torch.device, counts: _Counts | None = None
) -> Iterator[Batch]:
    """The calibration examples with one teacher's targets, from the store or from the teacher itself."""
    alone = arm.model_copy(update={"teachers": [name], "placebo": False})
    online = recipe.capture.source == "online"
    readers = {} if online else {name: open_targets(recipe, run, name, "train")}
    batches = arm_batches(recipe, run, alone, "train", load_tokenizer_of(run).pad_token_id, readers)
    model = load_teacher(recipe, run, name, device) if online else None
    layers = needed_layers(recipe, run, name)
    frame = key_frame(recipe, run, arm, name, device)
    order = torch.randperm(
        len(batches.examples), generator=torch.Generator().manual_seed(derive_seed(recipe.data.seed, "calibration"))
    ).tolist()[: arm.align.calibration_examples]
    for start in range(0, len(order), recipe.capture.batch_size):
        batch = batches(order[start : start + recipe.capture.batch_size])
        ids, segments = batch["input_ids"].to(device), batch["segments"].to(device)
        if model is not None:
            theirs = moved_to(batch["teacher_inputs"][name], device)
            targets = run_teacher(
                model,
                *theirs,
                layers=layers,
                dtype=recipe.capture.dtype,
                want_nll=False,
                queries=arm.needs_queries,
            )
        else:
            targets = batch["targets"][name].to(device)
        targets = replace(targets, kv=frame(_kv(targets)))
        mapping = batch["maps"].get(name)
        if counts is not None:
            counts.add(batch, targets.segments_BS.cpu(), name)
        yield {"input_ids": ids, "segments": segments}, targets, None if mapping is None else mapping.to(device)


@torch.no_grad()
def _student_kv(student: Any, batch: dict[str, Any], arm: ArmRecipe, aligner: MapProjectionAligner) -> KV:
    mask_BT = batch["segments"] > 0
    positions_BT = positions_from_mask(mask_BT)
    with capture_kv(student, layers=aligner.student_layers, queries=arm.compares_attention) as captured:
        student(input_ids=batch["input_ids"], attention_mask=mask_BT.long(), position_ids=positions_BT, use_cache=False)
    kv = captured.kv(mask_BT, positions_BT)
    return kv if arm.align.keys == "rotated" else unrotate_keys(kv, student)
