"""The fit stage: what is computed once from captured targets and then only read by training.

Channel statistics of each aligned teacher; closed-form (ridge) projectors where the recipe freezes or starts from
one; prototypes for similarity routing. One content-addressed folder per (arm's alignment, teacher, seed where the
student's initial weights matter), shared by all arms that align alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdistill.align import MapProjectionAligner
from kvdistill.batches import BatchMaker
from kvdistill.core.config import arm_recipe
from kvdistill.core.kv import KV
from kvdistill.core.layout import fit_root, folder_lock
from kvdistill.core.maps import SparseMap
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import derive_seed, pick_device
from kvdistill.core.store import StoreReader, StoreWriter, find_store
from kvdistill.core.targets import TeacherTargets
from kvdistill.fuse import fit_prototypes
from kvdistill.models import capture_kv, fingerprint_model, load_model, positions_from_mask, unrotate_keys
from kvdistill.teachers import (
    key_frame,
    load_teacher,
    load_tokenizer_of,
    needed_layers,
    open_targets,
    pair,
    run_teacher,
    split_examples,
    target_identity,
)

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
    )


def initial_student(recipe: Recipe, run: Path, seed: int) -> Any:
    """The student as training starts it, before adapters: the same bits for every arm of a seed."""
    vocab_size = len(load_tokenizer_of(run))
    return load_model(recipe.student, vocab_size=vocab_size, seed=derive_seed(seed, "student"), place="student")


def fit(recipe: Recipe, run: Path, runs: list[tuple[str, int]], progress: Progress = silent) -> None:
    """Fit what these (arm, seed) runs need and is not there yet."""
    for done, (arm_name, seed) in enumerate(runs):
        arm = arm_recipe(recipe, arm_name)
        for name in arm.teachers if arm.needs_kv else ():
            _fit_one(recipe, run, arm, name, seed)
        progress("fit", done + 1, len(runs))


def fitted_tensors(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> Mapping[str, Tensor]:
    """What `fit` left for this arm, teacher and seed: `aligner.*`, and `prototypes` for similarity."""
    identity = _identity(recipe, run, arm, name, seed)
    folder = find_store(fit_root(run), KIND, name, identity, make="kvdistill fit RECIPE")
    return StoreReader(folder).shards[0]


def _identity(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, seed: int) -> dict[str, Any]:
    needs_student = _needs_student(arm)
    similarity = arm.fuse.fusion_strategy == "similarity"
    return {
        **target_identity(recipe, run, name, "train"),
        "align": arm.align.model_dump(mode="json"),
        "distill_layers": arm.loss.distill_layers,
        "compress": arm.compress.model_dump(mode="json"),
        "kv_on": arm.loss.kv_on,
        "student": recipe.student.model_dump(mode="json"),
        "seed": seed if needs_student or (similarity and arm.align.match_in == "student") else None,
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
        if arm.align.standardise:
            aligner.fit_statistics((_kv(t), m) for _, t, m in _batches(recipe, run, arm, name, device))
        extra: dict[str, Any] = {}
        if aligner.needs_fit:
            student = initial_student(recipe, run, seed).to(device)
            extra["student_fingerprint"] = fingerprint_model(student)
            aligner.fit_projector(
                (_kv(t), _student_kv(student, batch, arm, aligner), m)
                for batch, t, m in _batches(recipe, run, arm, name, device)
            )
        tensors = {f"aligner.{key}": value for key, value in aligner.state_dict().items()}
        if not aligner.needs_fit:  # the seeded initial projector is made again by training, not stored
            tensors = {key: value for key, value in tensors.items() if not key.startswith("aligner.proj_")}
        if arm.fuse.fusion_strategy == "similarity":
            tensors["prototypes"] = _prototypes(recipe, run, arm, name, aligner, device)
        writer.add(tensors or {"nothing": torch.zeros(1)})
        writer.finish(extra)


def _prototypes(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, aligner: Any, device: Any) -> Tensor:
    def keys() -> Iterator[tuple[Tensor, Tensor]]:
        for _, targets, mapping in _batches(recipe, run, arm, name, device):
            aligned, mask_BT = aligner.targets(targets.kv, mapping)
            yield aligner.unstandardised_keys(aligned), mask_BT

    return fit_prototypes(keys(), arm.fuse.prototype, arm.fuse.num_prototypes, derive_seed(recipe.data.seed, name))


def _kv(targets: TeacherTargets) -> KV:
    assert targets.kv is not None
    return targets.kv


def _batches(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, device: torch.device) -> Iterator[Batch]:
    """The calibration examples with one teacher's targets, from the store or from the teacher itself."""
    examples = split_examples(recipe, run, "train")
    alone = arm.model_copy(update={"teachers": [name], "placebo": False})
    online = recipe.capture.source == "online"
    readers = {} if online else {name: open_targets(recipe, run, name, "train")}
    batches = BatchMaker(examples, load_tokenizer_of(run).pad_token_id, alone, readers)
    model = load_teacher(recipe, run, name, device) if online else None
    layers = needed_layers(recipe, run, name)
    frame = key_frame(recipe, run, arm, name, device)
    order = torch.randperm(
        len(examples), generator=torch.Generator().manual_seed(derive_seed(recipe.data.seed, "calibration"))
    ).tolist()[: arm.align.calibration_examples]
    for start in range(0, len(order), recipe.capture.batch_size):
        batch = batches(order[start : start + recipe.capture.batch_size])
        ids, segments = batch["input_ids"].to(device), batch["segments"].to(device)
        if model is not None:
            targets = run_teacher(model, ids, segments, layers=layers, dtype=recipe.capture.dtype, want_nll=False)
        else:
            targets = batch["targets"][name].to(device)
        targets = replace(targets, kv=frame(_kv(targets)))
        mapping = batch["maps"].get(name)
        yield {"input_ids": ids, "segments": segments}, targets, None if mapping is None else mapping.to(device)


@torch.no_grad()
def _student_kv(student: Any, batch: dict[str, Any], arm: ArmRecipe, aligner: MapProjectionAligner) -> KV:
    mask_BT = batch["segments"] > 0
    positions_BT = positions_from_mask(mask_BT)
    with capture_kv(student, layers=aligner.student_layers) as captured:
        student(input_ids=batch["input_ids"], attention_mask=mask_BT.long(), position_ids=positions_BT, use_cache=False)
    kv = captured.kv(mask_BT, positions_BT)
    return kv if arm.align.keys == "rotated" else unrotate_keys(kv, student)
