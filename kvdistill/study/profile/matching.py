"""Match figures of the untrained student: at the start, and what a closed-form map reaches; held-out text.

start: with the aligner as training gets it (fitted or seeded). linear: with a ridge fit of the same kind of projector
on calibration texts, student to teacher; where the arm meets elsewhere, or its projector takes no such fit, with one
full matrix from what the student offers to what it is to match. The student has learned nothing in either.

Beside both the same with mismatched texts (the placebo's partners), fitted and measured on them: what is reached
there comes from positions and from what all texts share, and a high cosine is reached there too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from kvdistill.align import AlignedKV, RidgeFit
from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import Batch, BatchMaker
from kvdistill.core.errors import AlignmentError
from kvdistill.core.kv import KV
from kvdistill.core.runtime import derive_seed
from kvdistill.match import FIGURES, TeacherMatch
from kvdistill.models import forward_flops

FIT_TEXTS, HELD_OUT_TEXTS = 256, 64
PATIENCE_FLOPS = 4e12  # of all the student's passes together; a fixed number, so that figures are the same everywhere
LEAST_TOKENS_PER_CHANNEL, LEAST_HELD_OUT = 16, 16
Map = Callable[[AlignedKV], AlignedKV]  # student channels -> the space the two meet in
Pairs = Callable[[str, BatchMaker, Sequence[Sequence[int]]], Iterator[tuple[Batch, KV, KV]]]


def match_figures(arm: Arm, progress: Callable[[float], None]) -> dict[str, Any]:
    """{"teachers": {name: {"matched", "mismatched": {"start", "linear": {"k", "v": figures}}}}}, texts, and how."""
    teachers: dict[str, Any] = {}
    names, seen, counts = arm.recipe.teachers, 0, num_texts(arm)

    def pairs(name: str, maker: BatchMaker, numbers: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, KV, KV]]:
        """As `Arm.pairs`, and the progress after each batch."""
        nonlocal seen
        for batch, teacher, student in arm.pairs(arm.distiller.student, maker, numbers, name):
            yield batch, teacher, student
            seen += len(batch.tasks)
            progress(seen / (2 * len(names) * sum(counts)))

    for name in names:
        teachers[name] = {}
        for texts in ("matched", "mismatched"):
            found, how = _figures(arm, name, counts, pairs, mismatched=texts == "mismatched")
            teachers[name] |= {texts: found, "linear": how}
    return {
        "texts": sum(map(len, arm.held_out_numbers(counts[1]))),
        "fit_texts": sum(map(len, arm.calibration_numbers(counts[0]))),
        "teachers": teachers,
    }


def num_texts(arm: Arm) -> tuple[int, int]:
    """Texts to fit on and to measure on: fewer where the student is large, but enough tokens for a fit."""
    shape, examples = arm.experiment.student_shape, arm.experiment.examples("train")
    lengths = [len(examples[i].input_ids) for i in range(min(len(examples), FIT_TEXTS))]
    tokens = sum(lengths) / max(1, len(lengths))
    flops = forward_flops(shape, round(tokens), round(tokens**2), with_lm_head=False)
    room = PATIENCE_FLOPS / (2 * len(arm.recipe.teachers) * flops)
    least = LEAST_TOKENS_PER_CHANNEL * shape.num_kv_heads * shape.head_size / max(1.0, tokens)
    share = FIT_TEXTS / (FIT_TEXTS + HELD_OUT_TEXTS)
    fit_texts = min(FIT_TEXTS, round(max(room * share, least)))
    return fit_texts, min(HELD_OUT_TEXTS, max(LEAST_HELD_OUT, round(room * (1 - share))))


@torch.no_grad()
def _figures(
    arm: Arm, name: str, counts: tuple[int, int], pairs: Pairs, *, mismatched: bool
) -> tuple[dict[str, Any], str]:
    aligner = arm.distiller.aligner(name)
    linear, how = _linear_map(arm, name, counts[0], pairs, arm.batches("train", mismatched=mismatched))
    maps: dict[str, Map] = {"start": aligner.project, "linear": linear}
    num_layers, seed = len(aligner.student_layers), derive_seed(arm.seed, "profile", "match")
    meters = {when: TeacherMatch(num_layers, seed=seed) for when in maps}
    numbers = arm.held_out_numbers(counts[1])
    for batch, teacher, student in pairs(name, arm.batches("val", mismatched=mismatched), numbers):
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


def _linear_map(arm: Arm, name: str, fit_texts: int, pairs: Pairs, maker: BatchMaker) -> tuple[Map, str]:
    """The fit, and in words what was fitted."""
    aligner = arm.distiller.aligner(name)
    numbers = arm.calibration_numbers(fit_texts)
    if aligner.recipe.match_in == "teacher":
        fitted = copy.deepcopy(aligner)
        rotate = None
        if aligner.recipe.ridge_on == "attention":
            rotate = arm.teachers[name].rotation()
        sides = pairs(name, maker, numbers)
        try:
            fitted.fit_projector(((theirs, mine, batch.maps.get(name)) for batch, theirs, mine in sides), rotate)
            return fitted.project, f"ridge fit of the arm's own {type(fitted.proj_k).__name__}"
        except AlignmentError as error:
            why = f" (the arm's own projector takes none: {error.what})"
    else:
        why = f" (the arm meets in space {aligner.recipe.match_in!r})"
    return _full_matrix(arm, name, pairs(name, maker, numbers)), f"ridge fit of one full matrix a layer{why}"


def _full_matrix(arm: Arm, name: str, sides: Iterable[tuple[Batch, KV, KV]]) -> Map:
    aligner = arm.distiller.aligner(name)
    fits: list[RidgeFit] = []
    for batch, teacher, student in sides:
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
