"""Which models these are: weights by their checksums, so that what was made of them is never taken for another's."""

from __future__ import annotations

from pathlib import Path

from kvdistill.arms.sources import teacher_place, teacher_source
from kvdistill.core.files import read_json, sha256_file, sha256_of, write_json
from kvdistill.core.layout import layers_folder, teacher_folder
from kvdistill.core.recipe import Recipe
from kvdistill.models import model_config


def similarity_path(run: Path, name: str) -> Path:
    """Where `map-layers` leaves how alike the student's layers and this teacher's are."""
    return layers_folder(run) / f"{name}.json"


def model_identities(recipe: Recipe, run: Path, name: str) -> dict[str, str]:
    """What a file of similarities is of: `teacher` by its weights, `student` by its source and first seed."""
    student = recipe.student.model_dump(mode="json", include={"path", "scratch", "dtype"})
    seed = recipe.seeds[0] if recipe.student.scratch is not None else None
    return {
        "teacher": weights_fingerprint(recipe, run, name),
        "student": sha256_of({"student": student, "seed": seed}),
    }


def weights_fingerprint(recipe: Recipe, run: Path, name: str) -> str:
    """Hash of the teacher's weight files; a hub model's commit. Noted in the run folder against size and time."""
    source = teacher_source(recipe, run, name)
    assert source.path is not None
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        config = model_config(source, 1, teacher_place(recipe, name))
        return f"hub:{source.path}@{getattr(config, '_commit_hash', None)}"
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    note = teacher_folder(run, name) / "fingerprint.json"
    if note.exists() and (known := read_json(note))["stamp"] == stamp:
        return str(known["sha256"])
    digest = sha256_of([[f.name, sha256_file(f)] for f in files])
    write_json(note, {"stamp": stamp, "sha256": digest})
    return digest
