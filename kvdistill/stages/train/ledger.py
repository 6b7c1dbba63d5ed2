"""What a training run cost: tokens, problems, steps, FLOPs by closed form, seconds, memory. Written as ledger.json.

What its `flops` hold, and by which convention, is in `core/costs.py`.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvdistill.arms.arm import Arm
from kvdistill.arms.costs import all_sharers, run_flops, shared_keys
from kvdistill.arms.lessons import writing_facts
from kvdistill.core.costs import amortised
from kvdistill.core.files import read_json_lines
from kvdistill.core.runtime import Stopwatch
from kvdistill.core.tuning import read_tuned


def training_ledger(arm: Arm, order: Sequence[int], steps: int, seen: Tensor, watch: Stopwatch) -> dict[str, Any]:
    """The ledger of one run, that of its learning curve from its log.

    Args:
        order: example numbers, as trained on.
        steps: that were trained, whichever's weights are kept.
        seen: real tokens and loss tokens.
    """
    recipe = arm.experiment.recipe
    flops, shared = run_flops(arm, order), shared_keys(arm.recipe, arm.seed, recipe, arm.name)
    if (tuned := recipe.tuned_as(arm.name)) is not None:
        flops["tuning"] = {tuned: read_tuned(arm.experiment.run)[tuned]["flops"]}
    flops["teachers_amortised"] = amortised("teachers", flops, shared, all_sharers(arm.experiment))
    flops["measuring"] = measured_flops(arm.folder / "log.jsonl")
    texts: dict[str, Any] = {}
    if arm.recipe.texts != "own":
        beside = len(arm.lessons) - len(arm.experiment.split("train"))
        texts = {"texts": arm.recipe.texts, "from": arm.recipe.texts_from}
        texts |= {"own": len(arm.own_numbers), "beside": beside}
    if arm.recipe.writers:
        texts["written"] = {name: writing_facts(arm.experiment, name) for name in arm.recipe.writers}
    return {
        "optimiser_steps": steps,
        "problems_seen": len(order),
        "problems_distinct": len({*order}),
        "tokens_nonpadding": int(seen[0]),
        "tokens_loss": int(seen[1]),
        "flops": flops,
        "shared": shared,
        "seconds": watch.wall_s(),
        "cpu_seconds": watch.cpu_s(),
        "peak_memory_bytes": int(torch.cuda.max_memory_allocated(arm.device))
        if arm.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **({"texts": texts} if texts else {}),
    }


def measured_flops(log: Path) -> int:
    """What the points of a learning curve cost."""
    return sum(row.get("flops", 0) for row in read_json_lines(log) if "val" in row) if log.exists() else 0
