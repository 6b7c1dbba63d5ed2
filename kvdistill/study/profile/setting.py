"""One arm as training would start it: the untrained student with fitted aligners, and batches as training reads them.

The same functions make it that training calls (`train.build_distiller`, `batches.arm_batches`), so that what is
measured here is what will run. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvdistill.align import MapProjectionAligner
from kvdistill.arms.batches import BatchMaker, arm_batches, data_order, moved_to, scaled_nll
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.running import key_frame, teacher_rotation
from kvdistill.arms.targets import open_targets
from kvdistill.arms.texts import load_tokenizer_of, spread
from kvdistill.core.config import arm_recipe
from kvdistill.core.kv import KV
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import derive_seed, pick_device
from kvdistill.models import capture_kv, positions_from_mask, rotate_keys, unrotate_keys
from kvdistill.stages.fit import initial_student
from kvdistill.stages.train import build_distiller, online_teacher
from kvdistill.stages.train.trainer import TeacherRun
from kvdistill.store.packed import TargetReader


@dataclass(frozen=True, eq=False)
class Setting:
    """frames: by teacher, its targets to the frame in which keys are compared. rotations: as `Distiller` has them."""

    recipe: Recipe
    run: Path
    arm: ArmRecipe
    seed: int
    device: torch.device
    pad_id: int
    distiller: Distiller
    frames: dict[str, Callable[[KV], KV]]
    rotations: dict[str, Callable[[KV], KV]]
    _readers: dict[str, dict[str, TargetReader]] = field(default_factory=dict)  # by split: checked once
    _online: dict[str, TeacherRun] = field(default_factory=dict)

    @property
    def is_online(self) -> bool:
        return self.recipe.capture.source == "online"

    def aligner(self, name: str) -> MapProjectionAligner:
        return self.distiller.aligners[str(self.arm.teachers.index(name))]  # type: ignore[return-value]

    # -- batches ----------------------------------------------------------------------------------

    def maker(self, split: str, mismatched: bool | None = None) -> BatchMaker:
        """Batches of a split as this arm trains on them; with texts matched or mismatched whatever the arm says."""
        arm = self.arm if mismatched is None else self.arm.model_copy(update={"placebo": mismatched})
        stored = split != "train" or not self.is_online
        if stored and split not in self._readers:
            self._readers[split] = {name: open_targets(self.recipe, self.run, name, split) for name in arm.teachers}
        readers = self._readers.get(split, {})
        return arm_batches(self.recipe, self.run, arm, split, self.pad_id, readers, self.seed)

    def run_teachers(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with targets, where teachers run online; else as it is."""
        given = batch.pop("teacher_inputs", None)
        if given is not None:
            for name in given.keys() - self._online.keys():
                self._online[name] = online_teacher(self.recipe, self.run, self.arm, name, self.device)
            scale = batch["nll_scale"]
            batch["targets"] = {n: scaled_nll(self._online[n](*given[n]), scale.get(n)) for n in self.arm.teachers}
        return batch

    def load(self, maker: BatchMaker, numbers: Sequence[int]) -> dict[str, Any]:
        """One batch on the device, with targets."""
        return self.run_teachers(moved_to(maker(numbers), self.device))

    def training_numbers(self, num_batches: int) -> list[list[int]]:
        """The examples of the first batches of training (round again where there are fewer)."""
        size = self.recipe.train.batch_size
        seed = derive_seed(self.seed, "data")
        order = data_order(len(self.maker("train").examples), num_batches * size, seed)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def calibration_numbers(self, most: int) -> list[list[int]]:
        """Of the texts that projectors are fitted on the first `most`, in batches."""
        num_examples = len(self.maker("train").examples)
        generator = torch.Generator().manual_seed(derive_seed(self.recipe.data.seed, "calibration"))
        order = torch.randperm(num_examples, generator=generator).tolist()
        return self._in_batches(order[: min(most, self.arm.align.calibration_examples)])

    def held_out_numbers(self, most: int) -> list[list[int]]:
        """Validation texts, evenly over the tasks."""
        return self._in_batches(spread(self.maker("val").examples, min(most, self.recipe.evaluate.match_examples)))

    def _in_batches(self, numbers: Sequence[int]) -> list[list[int]]:
        size = self.recipe.capture.batch_size  # nothing here keeps a graph
        return [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]

    # -- both sides -------------------------------------------------------------------------------

    def teacher_kv(self, batch: dict[str, Any], name: str) -> KV:
        kv = batch["targets"][name].kv
        assert kv is not None
        return self.frames[name](kv)

    def student_kv(self, batch: dict[str, Any]) -> KV:
        """The student's KV (with queries where the arm compares attention), without graph."""
        mask_BT = batch["segments"] > 0
        positions_BT = positions_from_mask(mask_BT)
        student, arm = self.distiller.student, self.arm
        layers = self.distiller.student_layers
        with torch.no_grad(), capture_kv(student, layers=layers, queries=arm.compares_attention) as captured:
            student(
                input_ids=batch["input_ids"],
                attention_mask=mask_BT.long(),
                position_ids=positions_BT,
                use_cache=False,
            )
        kv = captured.kv(mask_BT, positions_BT)
        return kv if arm.align.keys == "rotated" else unrotate_keys(kv, student)

    def pairs(self, maker: BatchMaker, numbers: Sequence[Sequence[int]], name: str) -> Iterator[tuple[Any, KV, KV]]:
        """Batch after batch: (batch, teacher's KV, student's KV)."""
        for chosen in numbers:
            batch = self.load(maker, chosen)
            yield batch, self.teacher_kv(batch, name), self.student_kv(batch)


def open_setting(recipe: Recipe, run: Path, arm_name: str, seed: int) -> Setting:
    """Raises StoreError where targets or fits are missing."""
    arm, device = arm_recipe(recipe, arm_name), pick_device(recipe.hardware.device)
    distiller = build_distiller(recipe, run, arm, seed, initial_student(recipe, run, seed), device)
    student = distiller.student
    in_teacher = arm.compares_attention and arm.align.match_in == "teacher"
    return Setting(
        recipe,
        run,
        arm,
        seed,
        device,
        load_tokenizer_of(run).pad_token_id,
        distiller.eval(),
        {name: key_frame(recipe, run, arm, name, device) for name in arm.teachers},
        {
            name: teacher_rotation(recipe, name, device) if in_teacher else lambda kv: rotate_keys(kv, student)
            for name in arm.teachers
        },
    )
