"""What cannot work (here), seen in milliseconds: before the run folder is made and before torch is imported.

Comparisons of too few seeds, devices, packages, model folders and memory. What needs a model's config is the `prepare`
job's to see (`arms.checks.check_sizes`), what needs the data the `check` job's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kvdistill.core.arms import arm_recipe
from kvdistill.core.errors import ModelError, RecipeError
from kvdistill.core.family import MIN_SEEDS
from kvdistill.core.provenance import machine_facts
from kvdistill.core.recipe import Recipe, ScratchRecipe
from kvdistill.study.local import visible_gpus

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # train.report_to -> the package that it needs
GIB = 1 << 30


def refuse_early(recipe: Recipe) -> None:
    """Raises RecipeError or ModelError naming the key. For whoever trains or evaluates; a report needs none of it, and
    shows comparisons of too few seeds as refused."""
    pairs = recipe.report.pairs
    if pairs and len(recipe.seeds) < MIN_SEEDS:
        raise RecipeError(
            f"{len(pairs)} comparison{'s are' if len(pairs) > 1 else ' is'} declared for {len(recipe.seeds)} "
            f"seed{'s' if len(recipe.seeds) > 1 else ''}, and a comparison needs at least {MIN_SEEDS} (5 are better)",
            place="seeds",
            fix="give more seeds, or set report.comparisons=[] for runs without a verdict",
        )
    _require_device(recipe.hardware.device)
    arms = [arm_recipe(recipe, name) for name in recipe.arms]
    for name in dict.fromkeys(name for arm in arms for name in arm.train.report_to):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            fix = f"pip install {PACKAGES[name]}, or leave {name} out"
            raise RecipeError(f"the package {PACKAGES[name]} is not installed", place="train.report_to", fix=fix)
    models = [("student", recipe.student), *((f"teachers.{i} ({t.name})", t) for i, t in enumerate(recipe.teachers))]
    for place, model in models:
        if model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            fix = "pip install flash-attn, or set attention: sdpa"
            raise ModelError("the package flash_attn is not installed", place=f"{place}.attention", fix=fix)
        if model.path is not None:
            _require_folder(model.path, model.gguf_file or "config.json", f"{place}.path")
        if model.scratch is not None:
            _require_memory(model.scratch, f"{place}.scratch")


def _require_device(name: str) -> None:
    """RecipeError unless there is such a device. Asks torch only where the driver's files do not answer."""
    kind, _, number = name.partition(":")
    if kind in ("auto", "cpu") or (kind == "cuda" and int(number or 0) < len(visible_gpus())):
        return
    from kvdistill.core.runtime import pick_device

    pick_device(name)


def _require_folder(path: str, needed: str, place: str) -> None:
    if not (path.startswith((".", "/", "~")) or path.count("/") > 1):
        return  # what may be a hub id
    folder = Path(path).expanduser()
    if not (folder / needed).is_file():
        raise ModelError(
            f"{path} has no {needed}" if folder.is_dir() else f"there is no folder {path}",
            place=place,
            fix="give a folder with config.json and *.safetensors, or a hub id like Qwen/Qwen2.5-0.5B",
        )


def _require_memory(scratch: ScratchRecipe, place: str) -> None:
    """ModelError where a model of these sizes would not fit into this machine's memory even once, in float32."""
    width, heads = scratch.hidden_size, scratch.num_heads
    head_size = scratch.head_size or -(-width // heads)
    inner = scratch.intermediate_size or 8 * width // 3
    attention = 2 * width * head_size * (heads + (scratch.num_kv_heads or heads))
    parameters = scratch.num_layers * (attention + 2 * width * inner) + (scratch.vocab_size or 0) * width
    memory = machine_facts()["memory_bytes"]
    if memory and 4 * parameters > memory:
        raise ModelError(
            f"a model of these sizes has at least {parameters / 1e9:,.1f} billion parameters, "
            f"{4 * parameters / GIB:,.0f} GiB; this machine has {memory / GIB:,.0f} GiB of memory",
            place=place,
            fix="lower hidden_size, num_layers or vocab_size",
        )
