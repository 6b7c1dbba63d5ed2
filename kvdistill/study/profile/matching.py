"""Match figures of the untrained student: at the start, and what a closed-form map reaches; held-out text.

start: with the aligner as training gets it (fitted or seeded). linear: with a ridge fit of the same kind of projector
on calibration texts, student to teacher; where the arm meets elsewhere, or its projector takes no such fit, with one
full matrix from what the student offers to what it is to match. The student has learned nothing in either.

Beside both the same with mismatched texts (the placebo's partners), fitted and measured on them: what is reached
there comes from positions and from what all texts share, and a high cosine is reached there too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from kvdistill.align import AlignedKV, RidgeFit
from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import BatchMaker
from kvdistill.core.errors import AlignmentError
from kvdistill.core.runtime import derive_seed
from kvdistill.match import FIGURES, TeacherMatch

FIT_TEXTS, HELD_OUT_TEXTS = 256, 64
Map = Callable[[AlignedKV], AlignedKV]  # student channels -> the space the two meet in


def match_figures(arm: Arm, progress: Callable[[float], None]) -> dict[str, Any]:
    """{"teachers": {name: {"matched", "mismatched": {"start", "linear": {"k", "v": figures}}}}}, texts, and how."""
    teachers: dict[str, Any] = {}
    names = arm.recipe.teachers
    for place, name in enumerate(names):
        teachers[name] = {}
        for number, texts in enumerate(("matched", "mismatched")):
            found, how = _figures(arm, name, mismatched=texts == "mismatched")
            teachers[name] |= {texts: found, "linear": how}
            progress((2 * place + number + 1) / (2 * len(names)))
    return {
        "texts": sum(map(len, arm.held_out_numbers(HELD_OUT_TEXTS))),
        "fit_texts": sum(map(len, arm.calibration_numbers(FIT_TEXTS))),
        "teachers": teachers,
    }


@torch.no_grad()
def _figures(arm: Arm, name: str, *, mismatched: bool) -> tuple[dict[str, Any], str]:
    aligner = arm.distiller.aligner(name)
    linear, how = _linear_map(arm, name, arm.batches("train", mismatched=mismatched))
    maps: dict[str, Map] = {"start": aligner.project, "linear": linear}
    num_layers, seed = len(aligner.student_layers), derive_seed(arm.seed, "profile", "match")
    meters = {when: TeacherMatch(num_layers, seed=seed) for when in maps}
    numbers = arm.held_out_numbers(HELD_OUT_TEXTS)
    for batch, teacher, student in arm.pairs(
        arm.distiller.student, arm.batches("val", mismatched=mismatched), numbers, name
    ):
        target, _ = aligner.targets(teacher, batch.maps.get(name))
        channels, mask = aligner.student_channels(student), batch.kv_masks[name]
        for when, mapped in maps.items():
            source = mapped(channels)
            meters[when].keys.add(source.k, target.k, mask)
            meters[when].values.add(source.v, target.v, mask)
    found = {}
    for when, meter in meters.items():
        fragment = meter.fragment()
        found[when] = {
            side: {figure: fragment[side][figure] for figure in (*FIGURES, "tokens")}
            | {"r2_by_layer": [layer[side]["r2"] for layer in fragment["by_layer"]]}
            for side in ("k", "v")
        }
    return found, how


def _linear_map(arm: Arm, name: str, maker: BatchMaker) -> tuple[Map, str]:
    """The fit, and in words what was fitted."""
    aligner = arm.distiller.aligner(name)
    numbers = arm.calibration_numbers(FIT_TEXTS)
    if aligner.recipe.match_in == "teacher":
        fitted = copy.deepcopy(aligner)
        rotate = None
        if aligner.recipe.ridge_on == "attention":
            rotate = arm.teachers[name].rotation()
        pairs = arm.pairs(arm.distiller.student, maker, numbers, name)
        try:
            fitted.fit_projector(((theirs, mine, batch.maps.get(name)) for batch, theirs, mine in pairs), rotate)
            return fitted.project, f"ridge fit of the arm's own {type(fitted.proj_k).__name__}"
        except AlignmentError as error:
            why = f" (the arm's own projector takes none: {error.what})"
    else:
        why = f" (the arm meets in space {aligner.recipe.match_in!r})"
    return _full_matrix(arm, name, maker), f"ridge fit of one full matrix a layer{why}"


def _full_matrix(arm: Arm, name: str, maker: BatchMaker) -> Map:
    aligner = arm.distiller.aligner(name)
    fits: list[RidgeFit] = []
    for batch, teacher, student in arm.pairs(arm.distiller.student, maker, arm.calibration_numbers(FIT_TEXTS), name):
        target, mask = aligner.targets(teacher, batch.maps.get(name))
        source = aligner.student_channels(student)
        if not fits:
            fits = [RidgeFit(x.shape[-1], y.shape[-1], len(x)) for x, y in zip(source, target, strict=True)]
        for fit, x, y in zip(fits, source, target, strict=True):
            fit.update(x, y, mask)
    solved = [fit.solve(aligner.recipe.ridge_l2) for fit in fits]
    weights = [(weight.float(), bias.float()) for weight, bias in solved]

    def mapped(channels: AlignedKV) -> AlignedKV:
        sides = [
            torch.einsum("lbti,lio->lbto", x.float(), weight) + bias[:, None, None]
            for x, (weight, bias) in zip(channels, weights, strict=True)
        ]
        return AlignedKV(*sides)

    return mapped
