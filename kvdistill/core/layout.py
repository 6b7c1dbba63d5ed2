"""Where everything lies in a run folder, and the marks that say a stage is finished. The one place for these names.

runs/NAME/
  recipe.json  provenance.json  study.json
  tokenizer/   data/{train,val,test,teach}.parquet  data/manifest.json  data/validation_report.json
  data/teachers/NAME/            what a teacher with its own tokenizer or chains reads, and a manifest
  layers/NAME.{json,png,svg}     similarity of the student's layers to a teacher's
  teachers/NAME/{model/, log.jsonl, report.json}
  store/KIND-NAME-HASH/          captured targets
  fit/KIND-NAME-HASH/            channel statistics, closed-form projectors, prototypes
  arms/ARM/seed-N/{model/, adapters.safetensors, log.jsonl, ledger.json, match.json, trained.json,
                   records.jsonl, evaluated.json, checkpoints/}
  profile/ARM.json               what `profile-alignment` measured
  figures/  statistical_results.json  summary.json  report.html
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import disk_full_error


def tokenizer_folder(run: Path) -> Path:
    return run / "tokenizer"


def data_folder(run: Path) -> Path:
    return run / "data"


def teacher_texts_folder(run: Path, teacher: str) -> Path:
    return data_folder(run) / "teachers" / teacher


def layers_folder(run: Path) -> Path:
    return run / "layers"


def profile_folder(run: Path) -> Path:
    return run / "profile"


def teacher_folder(run: Path, teacher: str) -> Path:
    return run / "teachers" / teacher


def store_root(run: Path) -> Path:
    return run / "store"


def fit_root(run: Path) -> Path:
    return run / "fit"


def arm_folder(run: Path, arm: str, seed: int) -> Path:
    return run / "arms" / arm / f"seed-{seed}"


def trained_mark(folder: Path) -> Path:
    """Written last by training: the model beside it is whole."""
    return folder / "trained.json"


def evaluated_mark(folder: Path) -> Path:
    return folder / "evaluated.json"


@contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Only one process works in `folder`. `wait`: until the other one ends; else RunFolderError at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / ".lock", "w")  # noqa: SIM115 (closed below; only the opening is guarded)
    except OSError as error:
        if full := disk_full_error(error, folder):
            raise full from error
        raise RunFolderError(
            f"cannot write here ({error.strerror})", place=str(folder), fix="give another folder with run_dir=…"
        ) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunFolderError(
                "another command is working in this run folder", place=str(folder), fix="wait for it, or stop it first"
            ) from None
        yield
