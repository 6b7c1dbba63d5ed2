"""What the models of a study are, read from the files beside their weights: sizes, parameters. Needs no torch.

A saved model is a folder with `config.json` and safetensors, whose headers say how large each tensor is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kvdistill.core.layout import arm_folder, teacher_folder
from kvdistill.core.recipe import ModelRecipe, Recipe

STUDENT = ""
_MAX_HEADER = 100 << 20  # as safetensors itself


def read_models(recipe: Recipe, run: Path, of_teachers: Path | None = None) -> dict[str, dict[str, Any]]:
    """Teachers by name, and the student as "": family, layers, width, heads, kv_heads, head_size, vocabulary,
    parameters; None for what is not known here (a published model that is not in a folder of this machine).

    of_teachers: where scratch teachers lie, if not in the run folder itself.
    """
    found = {}
    for teacher in recipe.teachers:
        found[teacher.name] = _sizes(teacher, teacher_folder(of_teachers or run, teacher.name) / "model")
    saved = [arm_folder(run, arm, seed) / "model" for arm in recipe.arms for seed in recipe.seeds]
    folder = next((one for one in saved if (one / "config.json").is_file()), run / "student")
    found[STUDENT] = _sizes(recipe.student, folder)
    return found


def _sizes(model: ModelRecipe, folder: Path) -> dict[str, Any]:
    """From the saved model; else from the recipe's own sizes, or the folder of its `path`."""
    if not (folder / "config.json").is_file() and model.path:
        folder = Path(model.path).expanduser()
    config = _config(folder / "config.json")
    if not config and model.scratch is not None:
        sizes = model.scratch
        config = {"model_type": sizes.architecture, "num_hidden_layers": sizes.num_layers, **sizes.model_dump()}
        config |= {"num_attention_heads": sizes.num_heads, "num_key_value_heads": sizes.num_kv_heads}
    heads, width = (
        _first(config, "num_attention_heads", "n_head", "num_heads"),
        _first(config, "hidden_size", "n_embd", "d_model"),
    )
    size = _first(config, "head_dim", "head_size", "d_kv") or (width // heads if width and heads else None)
    return {
        "family": config.get("model_type"),
        "layers": model.keep_layers or _first(config, "num_hidden_layers", "n_layer", "num_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": size,
        "vocabulary": config.get("vocab_size"),
        "parameters": None if model.keep_layers and folder == Path(model.path or "") else count_parameters(folder),
    }


def _config(path: Path) -> dict[str, Any]:
    """{} where there is none that can be read: the page then says less, and is no place to fail."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = found if isinstance(found, dict) else {}
    inner = found.get("text_config")
    return inner if isinstance(inner, dict) and "num_hidden_layers" in inner else found


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def count_parameters(folder: Path) -> int | None:
    """Numbers in the tensors of a folder's safetensors files (tied weights are saved once); None: there are none."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length)) if length <= _MAX_HEADER else {}
            except ValueError:
                return None
        if not isinstance(header, dict):
            return None
        total += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    return total or None
