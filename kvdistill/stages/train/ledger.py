"""What a training run cost: tokens, steps, FLOPs by closed form, seconds, memory. Written as ledger.json.

FLOPs count multiply and add as two, non-padding tokens only, a backward pass as two forwards (one where the base
weights are frozen under LoRA, plus the adapters), and one more forward under gradient checkpointing.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdistill.arms.distiller import Distiller
from kvdistill.arms.pairing import needed_layers, shape_of_student, shape_of_teacher
from kvdistill.arms.texts import teacher_texts
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.core.runtime import Stopwatch
from kvdistill.data.encode import Example
from kvdistill.models import batch_geometry, capture_flops, forward_flops


def training_ledger(
    recipe: Recipe,
    run: Path,
    arm: ArmRecipe,
    distiller: Distiller,
    examples: Sequence[Example],
    order: Sequence[int],
    seen: Tensor,
    watch: Stopwatch,
) -> dict[str, Any]:
    """The ledger of one run. Teacher FLOPs: one pass over the stored texts (unamortised), or one per step online."""
    tokens, squares = batch_geometry(len(examples[i].input_ids) for i in order)
    forward = forward_flops(shape_of_student(recipe, run), tokens, squares)
    backward = forward * (1 if recipe.student.lora is not None else 2)
    backward += forward if recipe.student.gradient_checkpointing else 0
    online = recipe.capture.source == "online"
    teachers = {
        name: _teacher_flops(recipe, run, arm, name, examples, order if online else None) for name in _used(arm)
    }
    projected = sum(p.numel() for aligner in distiller.aligners.values() for p in aligner.parameters())
    return {
        "optimiser_steps": recipe.train.steps,
        "tokens_nonpadding": int(seen[0]),
        "tokens_loss": int(seen[1]),
        "flops": {
            "student_forward": forward,
            "student_backward": backward,
            "teachers": teachers,
            "teachers_amortised": {
                n: f / max(1, _sharers(recipe, n)) if not online else f for n, f in teachers.items()
            },
            "aligner": 6 * projected * tokens,
        },
        "seconds": watch.wall_s(),
        "cpu_seconds": watch.cpu_s(),
        "peak_memory_bytes": _peak_memory_bytes(),
    }


def _used(arm: ArmRecipe) -> list[str]:
    return list(arm.teachers) if arm.needs_kv or arm.needs_logits else []


def _teacher_flops(
    recipe: Recipe, run: Path, arm: ArmRecipe, name: str, examples: Sequence[Example], order: Sequence[int] | None
) -> int:
    shape = shape_of_teacher(recipe, run, name)
    own = teacher_texts(recipe, run, arm, "train").get(name)
    examples = examples if own is None else own.examples
    lengths = [len(examples[i].input_ids) for i in order] if order is not None else [len(e.input_ids) for e in examples]
    tokens, squares = batch_geometry(lengths)
    layers = needed_layers(recipe, run, name)
    if shape.kind != "decoder" and layers:  # predicts no next token, so it always stops at the highest layer needed
        return capture_flops(shape, tokens, squares, max(layers))
    if order is not None and not arm.needs_logits and arm.fuse.fusion_strategy != "competence" and layers:
        return capture_flops(shape, tokens, squares, max(layers))
    return forward_flops(shape, tokens, squares)


def _sharers(recipe: Recipe, name: str) -> int:
    """Runs of the study that read this teacher's stored targets."""
    from kvdistill.core.config import arm_recipe

    arms = [arm_recipe(recipe, arm) for arm in recipe.arms]
    return len(recipe.seeds) * sum(name in _used(arm) for arm in arms)


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
