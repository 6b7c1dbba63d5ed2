"""What a training run cost: tokens, steps, FLOPs by closed form, seconds, memory. Written as ledger.json.

FLOPs count multiply and add as two, non-padding tokens only, a backward pass as two forwards (one where the base
weights are frozen under LoRA, plus the adapters), and one more forward under gradient checkpointing.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvdistill.arms.arm import Arm
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.lessons import writing_facts
from kvdistill.arms.teacher import Teacher
from kvdistill.core.recipe import WRITTEN
from kvdistill.core.runtime import Stopwatch
from kvdistill.models import batch_geometry, capture_flops, forward_flops


def training_ledger(
    arm: Arm, distiller: Distiller, order: Sequence[int], seen: Tensor, watch: Stopwatch
) -> dict[str, Any]:
    """The ledger of one run. Teacher FLOPs: one pass over the stored texts (unamortised), or one per step online; of
    teachers whose solutions it reads: all that they generated (`NAME~written`); of untrained ones `NAME~untrained`.

    Args:
        order: example numbers, as trained on.
        seen: real tokens and loss tokens.
    """
    recipe, examples = arm.experiment.recipe, arm.lessons
    tokens, squares = batch_geometry(len(examples[i].input_ids) for i in order)
    forward, backward = distiller.student.flops(tokens, squares)
    used = arm.teachers.values() if arm.uses_teachers else ()
    teachers = {teacher.stored_as: _teacher_flops(arm, teacher, order) for teacher in used}
    amortised: dict[str, float] = {**teachers}
    if not arm.runs_online:  # shared by the runs of the study that read this teacher's stored targets
        arms = [one for one in arm.experiment.arms.values() if one.needs_kv or one.needs_logits]
        shared = {name: len(recipe.seeds) * sum(name in one.reads for one in arms) for name in teachers}
        amortised = {name: flops / max(1, shared[name]) for name, flops in teachers.items()}
    texts: dict[str, Any] = {}
    if arm.recipe.texts != "own":
        own = len(arm.experiment.split("train"))
        texts = {"texts": arm.recipe.texts, "from": arm.recipe.texts_from, "own": own, "beside": len(examples) - own}
    for name in arm.recipe.writers:  # what they generated, whether it was kept or not
        texts.setdefault("written", {})[name] = said = writing_facts(arm.experiment, name)
        sharers = len(recipe.seeds) * sum(name in one.writers for one in arm.experiment.arms.values())
        teachers[name + WRITTEN], amortised[name + WRITTEN] = said["flops"], said["flops"] / max(1, sharers)
    projected = sum(p.numel() for aligner in distiller.aligners.values() for p in aligner.parameters())
    on_gpu = torch.cuda.is_available()
    return {
        "optimiser_steps": recipe.train.steps,
        "tokens_nonpadding": int(seen[0]),
        "tokens_loss": int(seen[1]),
        "flops": {
            "student_forward": forward,
            "student_backward": backward,
            "teachers": teachers,
            "teachers_amortised": amortised,
            "aligner": 6 * projected * tokens,
        },
        "seconds": watch.wall_s(),
        "cpu_seconds": watch.cpu_s(),
        "peak_memory_bytes": int(torch.cuda.max_memory_allocated())
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **({"texts": texts} if texts else {}),
    }


def _teacher_flops(arm: Arm, teacher: Teacher, order: Sequence[int]) -> int:
    shape, recipe, examples = teacher.shape, arm.recipe, teacher.examples("train")
    lengths = [len(example.input_ids) for example in examples]
    tokens, squares = batch_geometry([lengths[i] for i in order] if arm.runs_online else lengths)
    layers = teacher.layers
    # what predicts no next token always stops at the highest layer needed; others where nobody asks for more
    stops = arm.runs_online and not recipe.needs_logits and not recipe.needs_nll
    if layers and (stops or shape.kind != "decoder"):
        return capture_flops(shape, tokens, squares, max(layers))
    return forward_flops(shape, tokens, squares)
