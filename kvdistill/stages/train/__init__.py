"""The train stage: one student of one arm and seed, or one teacher that is trained on the spot.

Reads the run's data, store and fit; writes one folder: model/ (plain transformers), adapters.safetensors,
log.jsonl, ledger.json, match.json and, last, trained.json. Resumes from the newest good checkpoint to the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from kvdistill.arms.batches import BatchMaker, arm_batches, data_order, order_fingerprint
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.pairing import captured_top_k, needed_layers, pair
from kvdistill.arms.running import key_frame, load_teacher, run_teacher, teacher_rotation
from kvdistill.arms.sources import teacher_place, teacher_recipe
from kvdistill.arms.targets import open_targets
from kvdistill.arms.texts import load_teacher_tokenizer, load_tokenizer_of, spread, teacher_lessons
from kvdistill.core.config import arm_recipe
from kvdistill.core.errors import DataError
from kvdistill.core.files import read_json, replacing_folder, write_json, write_tensors
from kvdistill.core.layout import arm_folder, data_folder, folder_lock, teacher_folder, trained_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import ArmRecipe, OptimiserRecipe, Recipe, TeacherRecipe
from kvdistill.core.runtime import Stopwatch, derive_seed, pick_device, seed_everything
from kvdistill.data.encode import Example
from kvdistill.data.tables import read_split
from kvdistill.fuse import build_fusion
from kvdistill.models import add_lora, describe_model, fingerprint_model, load_model, merge_lora
from kvdistill.stages.fit import fitted_notes, fitted_tensors, initial_student, make_aligner
from kvdistill.stages.train.curves import LearningCurve, accuracy_by_task
from kvdistill.stages.train.ledger import training_ledger
from kvdistill.stages.train.matching import match_on_held_out
from kvdistill.stages.train.trainer import DistillTrainer, TeacherRun, training_arguments


def train_student(recipe: Recipe, run: Path, arm_name: str, seed: int, progress: Progress = silent) -> None:
    """Train one arm with one seed. Returns at once where that is done."""
    folder = arm_folder(run, arm_name, seed)
    if trained_mark(folder).exists():
        return
    arm = arm_recipe(recipe, arm_name)
    device = pick_device(recipe.hardware.device)
    watch = Stopwatch()
    # one lock for all ranks of a torchrun, held by the first
    with folder_lock(folder, wait=True) if os.environ.get("RANK", "0") == "0" else nullcontext():
        seed_everything(derive_seed(seed, "training"))
        examples = read_split(run, "train")
        tokenizer = load_tokenizer_of(run)
        student = initial_student(recipe, run, seed)
        init_fingerprint = fingerprint_model(student)
        distiller = build_distiller(recipe, run, arm, seed, student, device)
        order = data_order(len(examples), _num_needed(recipe.train), derive_seed(seed, "data"))
        readers = _readers(recipe, run, arm, "train")
        batches = arm_batches(recipe, run, arm, "train", tokenizer.pad_token_id, readers, seed)
        curve = LearningCurve(recipe, run, arm, tokenizer, folder / "log.jsonl", seed)
        trainer = DistillTrainer(
            distiller,
            training_arguments(recipe.train, folder, seed=seed, cpu=device.type == "cpu"),
            batches,
            order,
            arm=arm,
            run_teachers=_online_teachers(recipe, run, arm, device),
            log_file=folder / "log.jsonl",
            projector_lr_scale=recipe.train.projector_lr_scale,
            tensorboard=folder / "tensorboard" if "tensorboard" in recipe.train.report_to else None,
            on_step=_step_hook(recipe.train.steps, progress, f"{arm_name} seed {seed}", curve),
            clock=watch,
        )
        trainer.resume_or_start()
        if not trainer.is_world_process_zero():
            return
        distiller = trainer.accelerator.unwrap_model(trainer.model)
        match = match_on_held_out(recipe, run, arm, distiller, tokenizer.pad_token_id, seed) if arm.needs_kv else {}
        write_json(folder / "match.json", match)
        ledger = training_ledger(recipe, run, arm, distiller, examples, order, trainer.seen, watch)
        ledger |= {
            "data_fingerprint": read_json(data_folder(run) / "manifest.json")["fingerprint"]["all"],
            "init_fingerprint": init_fingerprint,
            "order_fingerprint": order_fingerprint(order, examples),
        }
        if arm.needs_kv:
            ledger["alignment"] = {name: fitted_notes(recipe, run, arm, name, seed) for name in arm.teachers}
        write_json(folder / "ledger.json", ledger)
        _save_adapters(folder, distiller)
        _save_model(folder, distiller, tokenizer)
        write_json(trained_mark(folder), {"arm": arm_name, "seed": seed, "steps": recipe.train.steps})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def train_teacher(recipe: Recipe, run: Path, name: str, progress: Progress = silent) -> None:
    """Train a scratch teacher on its own tasks with plain cross-entropy; note how well it does on validation."""
    folder = teacher_folder(run, name)
    if trained_mark(folder).exists():
        return
    teacher = teacher_recipe(recipe, name)
    device = pick_device(recipe.hardware.device)
    watch = Stopwatch()
    with folder_lock(folder, wait=True):
        seed_everything(derive_seed(teacher.seed, "teacher", name))
        examples = _lessons(run, teacher, apart=recipe.data.disjoint_teachers)
        if not examples:
            raise DataError(
                f"no training examples of {', '.join(teacher.train_on)}",
                place=teacher_place(recipe, name),
                fix="give these tasks a `train` count above 0",
            )
        tokenizer = load_teacher_tokenizer(run, teacher)
        model = load_model(
            teacher, vocab_size=len(tokenizer), seed=derive_seed(teacher.seed, name), place=teacher_place(recipe, name)
        )
        order = data_order(len(examples), _num_needed(teacher.optimiser), derive_seed(teacher.seed, "data", name))
        trainer = DistillTrainer(
            Distiller(model),
            training_arguments(teacher.optimiser, folder, seed=teacher.seed, cpu=device.type == "cpu"),
            BatchMaker(examples, tokenizer.pad_token_id),
            order,
            log_file=folder / "log.jsonl",
            on_step=_step_hook(teacher.optimiser.steps, progress, f"teacher {name}", None),
        )
        trainer.resume_or_start()
        distiller = trainer.accelerator.unwrap_model(trainer.model)
        _save_model(folder, distiller, tokenizer)
        val = teacher_lessons(run, "val", teacher)
        held_out = [val[i] for i in spread(val, 4 * recipe.train.eval_examples)]
        by_task = accuracy_by_task(distiller.student, tokenizer, held_out, recipe.evaluate.max_new_tokens)
        report = {"accuracy_by_task": by_task, "steps": teacher.optimiser.steps, "seconds": watch.wall_s()}
        write_json(folder / "report.json", {**report, "parameters": describe_model(distiller.student).num_parameters})
        write_json(trained_mark(folder), {"teacher": name, "steps": teacher.optimiser.steps})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _checkpoint_activations(student: Any) -> None:
    """Recompute activations in the backward pass, the non-reentrant way (the other one cuts captured gradients)."""
    if hasattr(student, "activation_checkpointing_enable"):  # transformers 5.2x renamed it
        student.activation_checkpointing_enable({"use_reentrant": False})
    else:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _lessons(run: Path, teacher: TeacherRecipe, *, apart: bool) -> list[Example]:
    """What a teacher studies: the students' training problems of its tasks, and the `teach` problems beside them.

    apart: only the latter, so that no student sees a text that its teacher was trained on.
    """
    splits = ("teach",) if apart else ("train", "teach")
    lessons = (example for split in splits for example in teacher_lessons(run, split, teacher))
    return [example for example in lessons if example.task in teacher.train_on]


def build_distiller(
    recipe: Recipe, run: Path, arm: ArmRecipe, seed: int, student: Any, device: torch.device
) -> Distiller:
    """Student (with adapters where asked for), fitted aligners and fusion of one arm, ready to train."""
    if recipe.student.lora is not None:
        student = add_lora(student, recipe.student.lora, seed=derive_seed(seed, "lora"))
    if recipe.student.gradient_checkpointing:
        _checkpoint_activations(student)
        if recipe.student.lora is not None:
            student.enable_input_require_grads()
    student.to(device)
    if not arm.teachers or not (arm.needs_kv or arm.needs_logits):
        return Distiller(student, arm.model_copy(update={"teachers": []}))
    aligners, prototypes, frames, rotations = {}, [], {}, {}
    layers: tuple[int, ...] = ()
    for name in arm.teachers if arm.needs_kv else ():
        aligner = make_aligner(recipe, run, arm, name, seed)
        tensors = fitted_tensors(recipe, run, arm, name, seed)
        aligner.load_state_dict(
            {**aligner.state_dict(), **{k.removeprefix("aligner."): v for k, v in tensors.items() if "." in k}}
        )
        aligners[name] = aligner.to(device)
        frames[name] = key_frame(recipe, run, arm, name, device)
        if arm.compares_attention and arm.align.match_in == "teacher":
            rotations[name] = teacher_rotation(recipe, name, device)
        layers = pair(recipe, run, arm, name).student_layers
        if "prototypes" in tensors:
            prototypes.append(tensors["prototypes"].to(device))
    fusion = build_fusion(arm.fuse, arm.teachers, max(1, len(layers)), prototypes or None)
    return Distiller(student, arm, aligners, fusion, layers, frames, rotations)


def _readers(recipe: Recipe, run: Path, arm: ArmRecipe, split: str) -> dict[str, Any]:
    if recipe.capture.source == "online" or not (arm.needs_kv or arm.needs_logits):
        return {}
    return {name: open_targets(recipe, run, name, split) for name in arm.teachers}


def _online_teachers(recipe: Recipe, run: Path, arm: ArmRecipe, device: torch.device) -> dict[str, TeacherRun]:
    if recipe.capture.source == "store" or not (arm.needs_kv or arm.needs_logits):
        return {}
    return {name: online_teacher(recipe, run, arm, name, device) for name in arm.teachers}


def online_teacher(recipe: Recipe, run: Path, arm: ArmRecipe, name: str, device: torch.device) -> TeacherRun:
    """A function (ids, segments) -> targets that runs the teacher now, and only as far as this arm needs."""
    model = load_teacher(recipe, run, name, device)
    layers = needed_layers(recipe, run, name) if arm.needs_kv else []
    competence = arm.fuse.fusion_strategy == "competence"
    top_k = captured_top_k(recipe, name) if arm.needs_logits else 0

    def run_now(ids: torch.Tensor, segments: torch.Tensor) -> Any:
        return run_teacher(
            model,
            ids,
            segments,
            layers=layers,
            dtype=recipe.capture.dtype,
            want_nll=competence,
            top_k=top_k,
            queries=arm.needs_queries,
        )

    return run_now


def _num_needed(optimiser: OptimiserRecipe) -> int:
    return optimiser.steps * optimiser.batch_size * optimiser.accumulation * int(os.environ.get("WORLD_SIZE", 1))


def _step_hook(
    steps: int, progress: Progress, what: str, curve: LearningCurve | None
) -> Callable[[int, DistillTrainer], None]:
    def on_step(step: int, trainer: DistillTrainer) -> None:
        progress(what, step, steps)
        if curve is not None and trainer.is_world_process_zero():
            curve.point(step, trainer.accelerator.unwrap_model(trainer.model))

    return on_step


def _save_adapters(folder: Path, distiller: Distiller) -> None:
    tensors = {
        f"{distiller.teachers[int(number)]}/{name}": tensor
        for number, aligner in distiller.aligners.items()
        for name, tensor in aligner.state_dict().items()
    }
    if tensors:
        write_tensors(folder / "adapters.safetensors", tensors, {"teachers": ",".join(distiller.teachers)})


def _save_model(folder: Path, distiller: Distiller, tokenizer: Any) -> None:
    """A folder that plain transformers loads: merged weights (safetensors), config, generation ids, tokenizer."""
    model = merge_lora(distiller.student)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.bos_token_id = tokenizer.bos_token_id
    with replacing_folder(folder / "model") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


__all__: Sequence[str] = ["build_distiller", "train_student", "train_teacher"]
