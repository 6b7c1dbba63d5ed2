"""Checkpoints that resume to the same bits: safetensors and JSON, checksummed, whole or absent. No pickle.

A checkpoint folder holds `trainable.safetensors` (parameters that learn), `optimizer.safetensors`,
`state.json` (step, schedule, Python and NumPy generators, the trainer's own state), `best.safetensors` where weights
of an earlier step may be kept in the end, and, last, `manifest.json` with the checksums. The folder appears under its
name only when all of it is on disk.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kvdistill.core.errors import KVDistillError, RunFolderError
from kvdistill.core.files import (
    open_tensors,
    read_json,
    replacing_folder,
    sha256_file,
    write_json,
    write_tensors,
    write_text,
)

_PREFIX = "checkpoint-"
BEST = "best.safetensors"  # in a checkpoint


class Generators(NamedTuple):
    """States of all generators that a step draws from."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> Generators:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # it is, where a GPU trains
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)  # type: ignore[arg-type]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: Mapping[str, Any],
    trainer_state: str,
    generators: Generators,
    best: Mapping[str, Tensor],
) -> None:
    """Write everything that the next step depends on to `folder`, atomically.

    trainer_state: the Trainer's own, as JSON. generators: as they were when the last step had ended.
    best: what of an earlier step may be kept in the end (`selection.py`); empty: nothing.
    """
    with replacing_folder(folder) as part:
        write_tensors(part / "trainable.safetensors", trainable(model))
        if best:
            write_tensors(part / BEST, best)
        tensors, groups = _flat_optimizer(optimizer)
        tensors["rng/torch"] = generators.torch
        if generators.cuda is not None:
            tensors["rng/cuda"] = generators.cuda
        write_tensors(part / "optimizer.safetensors", tensors)
        version, numbers, gauss = generators.python
        of_numpy = generators.numpy
        numpy_state = of_numpy["state"]
        write_json(
            part / "state.json",
            {
                **state,
                "param_groups": groups,
                "scheduler": scheduler.state_dict(),
                "rng_python": [version, list(numbers), gauss],
                "rng_numpy": [
                    of_numpy["bit_generator"],
                    numpy_state["key"].tolist(),
                    int(numpy_state["pos"]),
                    int(of_numpy["has_gauss"]),
                    float(of_numpy["gauss"]),
                ],
            },
        )
        write_text(part / "trainer_state.json", trainer_state)
        files = sorted(file.name for file in part.iterdir())
        write_json(part / "manifest.json", {name: sha256_file(part / name) for name in files})


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> dict[str, Any]:
    """Put a checkpoint's weights back, or optimiser and schedule where they are given. Returns the state."""
    state = read_json(folder / "state.json")
    if optimizer is None:
        wanted = trainable(model)
        saved = open_tensors(folder / "trainable.safetensors")
        if wanted.keys() != saved.keys():
            odd = sorted(wanted.keys() ^ saved.keys())[0]
            raise RunFolderError(
                f"checkpoint does not fit the model ({odd})",
                place=str(folder),
                fix="delete it, or use the recipe it was made with",
            )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(saved[name])
        return state
    tensors = open_tensors(folder / "optimizer.safetensors")
    _restore_optimizer(optimizer, tensors, state["param_groups"])
    scheduler.load_state_dict({**scheduler.state_dict(), **state["scheduler"]})
    return state


def restore_generators(folder: Path) -> None:
    """Python, NumPy and torch generators as they were when the checkpoint was written."""
    state = read_json(folder / "state.json")
    tensors = open_tensors(folder / "optimizer.safetensors")
    version, numbers, gauss = state["rng_python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["rng_numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng/torch"].clone())
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"].clone())


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; broken ones are left where they are and passed over."""
    for folder in sorted(_checkpoints(root), key=_step, reverse=True):
        if not _broken_file(folder):
            return folder
    return None


def drop_old_checkpoints(root: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what killed writers left half written."""
    for folder in [*sorted(_checkpoints(root), key=_step, reverse=True)[keep:], *root.glob(f".{_PREFIX}*")]:
        shutil.rmtree(folder)


def _broken_file(folder: Path) -> str | None:
    try:
        manifest = read_json(folder / "manifest.json")
        return next((name for name, digest in manifest.items() if sha256_file(folder / name) != digest), None)
    except (KVDistillError, FileNotFoundError):
        return "manifest.json"


def _checkpoints(root: Path) -> list[Path]:
    return [folder for folder in root.glob(f"{_PREFIX}*") if folder.is_dir() and folder.name[len(_PREFIX) :].isdigit()]


def _step(folder: Path) -> int:
    return int(folder.name[len(_PREFIX) :])


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    state = optimizer.state_dict()
    tensors = {
        f"{number}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def _restore_optimizer(optimizer: Any, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        if number != "rng":
            state.setdefault(int(number), {})[name] = value.clone()
    for group in groups:  # JSON turned the pair into a list
        group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
