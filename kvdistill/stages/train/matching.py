"""How well the trained student's KV matches its teachers' on held-out text: the figures of match.json.

A high cosine is no evidence (SPEC of the method: independent teachers reach .96), hence R2 against the channel
mean, centred cosine and retrieval; the placebo arm's figures are measured the same way, against its mismatched texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvdistill.arms.batches import arm_batches, moved_to
from kvdistill.arms.distiller import Distiller
from kvdistill.arms.targets import open_targets
from kvdistill.arms.texts import spread
from kvdistill.core.recipe import ArmRecipe, Recipe
from kvdistill.match import TeacherMatch
from kvdistill.stages.train.curves import BATCH


@torch.no_grad()
def match_on_held_out(
    recipe: Recipe, run: Path, arm: ArmRecipe, distiller: Distiller, pad_id: int, seed: int
) -> dict[str, Any]:
    """match.json: per teacher the figures of keys, values and each layer."""
    distiller.eval()
    device = next(distiller.parameters()).device
    readers = {name: open_targets(recipe, run, name, "val") for name in arm.teachers}
    batches = arm_batches(recipe, run, arm, "val", pad_id, readers, seed)
    chosen = spread(batches.examples, recipe.evaluate.match_examples)
    figures = {name: TeacherMatch(len(distiller.student_layers), seed=seed) for name in arm.teachers}
    for start in range(0, len(chosen), BATCH):
        batch = moved_to(batches(chosen[start : start + BATCH]), device)
        for name in arm.teachers:
            kv = batch["targets"][name].kv
            source, target = distiller.match(batch["input_ids"], batch["segments"], kv, name, batch["maps"].get(name))
            mask_BT = batch["kv_masks"][name]
            figures[name].keys.add(source.k, target.k, mask_BT)
            figures[name].values.add(source.v, target.v, mask_BT)
    return {name: figure.fragment() for name, figure in figures.items()}
