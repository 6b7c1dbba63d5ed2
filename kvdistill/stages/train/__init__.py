"""The train stage: one student of one arm and seed, or one teacher that is trained on the spot.

Reads the run's data, store and fit; writes one folder: model/ (plain transformers), adapters.safetensors,
log.jsonl, ledger.json, match.json and, last, trained.json. Resumes from the newest good checkpoint to the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import BatchMaker
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.order import order_fingerprint, order_prefixes
from kvdistill.arms.student import CausalStudent
from kvdistill.arms.teacher import Teacher
from kvdistill.arms.texts import spread
from kvdistill.core.budgets import budget_path
from kvdistill.core.declared import declare
from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import read_json, write_json, write_tensors
from kvdistill.core.layout import CHECKPOINTS, data_folder, folder_lock, trained_mark
from kvdistill.core.marks import read_mark, write_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.runtime import Stopwatch, derive_seed, seed_everything
from kvdistill.core.tuning import tuned_path
from kvdistill.match import TeacherMatch
from kvdistill.models import fingerprint_model, load_model
from kvdistill.stages.train.curves import LearningCurve, accuracy_by_task, answers_to
from kvdistill.stages.train.handover import hand_over, went_on_from
from kvdistill.stages.train.ledger import training_ledger
from kvdistill.stages.train.selection import Selection
from kvdistill.stages.train.trainer import DistillTrainer, training_arguments

# what a mark vouches for, as far as it is made
COUNTED = 512  # problems of which it is counted how many lose tokens to compression
MADE = ("model", "adapters.safetensors", "log.jsonl", "ledger.json", "match.json", "report.json")


def train_student(arm: Arm, progress: Progress = silent) -> None:
    """Train one arm with one seed. Returns at once where that is done."""
    folder, recipe = arm.folder, arm.recipe
    watch = Stopwatch()
    # one lock for all ranks of a torchrun, held by the first
    with folder_lock(folder, wait=True) if os.environ.get("RANK", "0") == "0" else nullcontext():
        if read_mark(trained_mark(folder)) is not None:
            return
        chosen = settled_values(arm)
        is_trial = arm.name in arm.experiment.trials
        declare(arm.experiment.recipe, arm.experiment.run)
        seed_everything(derive_seed(arm.seed, "training"))
        init_fingerprint = fingerprint_model(arm.initial_model)
        batches, order = arm.batches("train"), arm.training_order()
        curve = LearningCurve(arm, folder / "log.jsonl")
        selection = Selection(recipe.train) if recipe.train.asks_validation else None
        trainer = DistillTrainer(
            arm.distiller,
            training_arguments(recipe.train, folder, seed=arm.seed, cpu=arm.device.type == "cpu"),
            batches,
            order,
            arm=arm.recipe,
            run_teachers=arm.run_teachers,
            log_file=folder / "log.jsonl",
            projector_lr_scale=recipe.train.projector_lr_scale,
            tensorboard=folder / "tensorboard" if "tensorboard" in recipe.train.report_to else None,
            on_step=_step_hook(recipe.train.steps, progress, f"{arm.name} seed {arm.seed}", curve),
            clock=watch,
            selection=selection,
        )
        trainer.resume_or_start()
        if not trainer.is_world_process_zero():
            return
        distiller = trainer.accelerator.unwrap_model(trainer.model)
        if selection is not None:
            selection.put_back(distiller)
        matches = arm.recipe.needs_kv and not is_trial
        write_json(folder / "match.json", match_on_held_out(arm, distiller) if matches else {})
        steps = trainer.state.global_step
        trained_on = order[: steps * len(order) // recipe.train.steps]
        ledger = training_ledger(arm, trained_on, steps, trainer.seen, watch) | {
            "data_fingerprint": read_json(data_folder(arm.experiment.data_run) / "manifest.json")["fingerprint"]["all"],
            "init_fingerprint": init_fingerprint,
            "order_fingerprint": order_fingerprint(order, batches.examples),
            "order_prefixes": order_prefixes(order, batches.examples),
        }
        if drops := batches.shares_that_drop([*dict.fromkeys(order)][:COUNTED]):
            ledger["drops"] = drops
        if before := went_on_from(arm):
            ledger["went_on_from"] = before
        if arm.recipe.needs_kv:
            ledger["alignment"] = {name: dict(arm.fitted(name).extra) for name in arm.recipe.teachers}
        facts: dict[str, Any] = {"arm": arm.name, "seed": arm.seed, "steps": steps}
        if selection is not None:
            facts["selection"] = ledger["selection"] = selection.facts()
            if recipe.train.select == "best":
                ledger["checkpoint_chosen_on"] = "validation"
        if chosen:
            facts["tuned"] = ledger["tuned"] = chosen
        write_json(folder / "ledger.json", ledger)
        if not is_trial:  # of which nobody will ask anything: log, ledger and mark are all of it
            save_student(arm, distiller)
            hand_over(arm)
        write_mark(trained_mark(folder), facts, MADE)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def settled_values(arm: Arm) -> dict[str, Any]:
    """What tuning chose for the arm, empty for one that is not tuned. RunFolderError where that, or the steps of an arm
    that is matched to another, is still to be found out."""
    experiment, match = arm.experiment, arm.recipe.match
    if match is not None and experiment.matched_steps(arm.name) is None:
        raise RunFolderError(
            f"the steps of arm {arm.name!r}, which is matched to {match.arm!r}, are not computed yet",
            place=str(budget_path(experiment.run)),
            fix="run `kvdistill train RECIPE`, which computes them first",
        )
    chosen = experiment.chosen_values(arm.name)
    if chosen is None:
        raise RunFolderError(
            f"the values of arm {arm.name!r}, which is tuned, are not chosen yet",
            place=str(tuned_path(experiment.run)),
            fix="run `kvdistill tune RECIPE`, which chooses them",
        )
    return chosen


def save_student(arm: Arm, distiller: Distiller) -> None:
    """The projectors to each teacher, and the student as plain transformers loads it."""
    tensors = {
        f"{name}/{part}": tensor
        for name in (distiller.teachers if arm.recipe.needs_kv else ())
        for part, tensor in distiller.aligner(name).state_dict().items()
    }
    if tensors:
        write_tensors(arm.folder / "adapters.safetensors", tensors, {"teachers": ",".join(distiller.teachers)})
    distiller.student.save(arm.folder / "model", arm.experiment.as_read(arm.experiment.tokenizer))


@torch.no_grad()
def match_on_held_out(arm: Arm, distiller: Distiller) -> dict[str, Any]:
    """match.json: per teacher how well the student's keys, values and each layer match it on held-out text.

    A high cosine is no evidence (SPEC of the method: independent teachers reach .96), hence R2 against the channel
    mean, centred cosine and retrieval; a placebo's are measured the same way, against its mismatched texts.
    """
    distiller.eval()
    batches = arm.batches("val")
    chosen = spread(batches.examples, arm.experiment.recipe.evaluate.match_examples)
    figures = {name: TeacherMatch(len(distiller.student_layers), seed=arm.seed) for name in arm.recipe.teachers}
    for numbers in arm.measured_in(batches.examples, chosen, head=False, kv=True):
        batch = batches(numbers).to(arm.device)
        for name, figure in figures.items():
            source, target = distiller.match(batch, name)
            figure.keys.add(source.k, target.k, batch.kv_masks[name])
            figure.values.add(source.v, target.v, batch.kv_masks[name])
    return {name: figure.fragment() for name, figure in figures.items()}


def train_teacher(teacher: Teacher, progress: Progress = silent) -> None:
    """Train a scratch teacher on its own tasks with plain cross-entropy; note how well it does on validation."""
    experiment, name, optimiser = teacher.experiment, teacher.name, teacher.recipe.optimiser
    folder = teacher.folder
    watch = Stopwatch()
    with folder_lock(folder, wait=True):
        if read_mark(trained_mark(folder)) is not None:
            return
        seed = teacher.recipe.seed
        seed_everything(derive_seed(seed, "teacher", name))
        examples = teacher.studied()
        tokenizer = teacher.tokenizer
        model = load_model(teacher.recipe, vocab_size=len(tokenizer), seed=teacher.initial_seed, place=teacher.place)
        student = CausalStudent(model)
        trainer = DistillTrainer(
            Distiller(student),
            training_arguments(optimiser, folder, seed=seed, cpu=experiment.device.type == "cpu"),
            BatchMaker(examples, tokenizer.pad_token_id),
            teacher.training_order(len(examples)),
            log_file=folder / "log.jsonl",
            on_step=_step_hook(optimiser.steps, progress, f"teacher {name}", None),
        )
        trainer.resume_or_start()
        student.save(folder / "model", experiment.as_read(tokenizer))
        val = teacher.lessons("val")
        held_out = [val[i] for i in spread(val, 4 * experiment.recipe.train.eval_examples)]
        answers = answers_to(student, tokenizer, held_out, experiment.recipe.evaluate.max_new_tokens)
        by_task = accuracy_by_task(held_out, answers)
        forward, backward = teacher.training_flops
        report = {"accuracy_by_task": by_task, "steps": optimiser.steps, "seconds": watch.wall_s()}
        report |= {"tokens": int(trainer.seen[0]), "flops": {"forward": forward, "backward": backward}}
        write_json(folder / "report.json", {**report, "parameters": student.shape.num_parameters})
        write_mark(trained_mark(folder), {"teacher": name, "steps": optimiser.steps}, MADE)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _step_hook(
    steps: int, progress: Progress, what: str, curve: LearningCurve | None
) -> Callable[[int, DistillTrainer], float | None]:
    def on_step(step: int, trainer: DistillTrainer) -> float | None:
        progress(what, step, steps)
        if curve is None or not trainer.is_world_process_zero():
            return None
        return curve.point(step, trainer.accelerator.unwrap_model(trainer.model))

    return on_step


__all__ = ["train_student", "train_teacher"]
