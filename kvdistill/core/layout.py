"""Where everything lies in a run folder, and the marks that say a stage is finished. The one place for these names.

runs/NAME/
  recipe.json  provenance.json  study.json  declared.json
  training_budget_config.json    what every arm will spend, and the steps of those that are matched
  tuned.json                     values chosen for arms that are tuned, and all trials (`arms/ARM@tuneN/`)
  tokenizer/   data/{train,val,test,teach}.parquet  data/manifest.json  data/validation_report.json
  data/teachers/NAME/            what a teacher with its own tokenizer or chains reads, and a manifest
  layers/NAME.{json,png,svg}     similarity of the student's layers to a teacher's
  teachers/NAME/{model/, log.jsonl, report.json}
  written/NAME/{answers.jsonl, solutions.parquet, written.json}
  store/KIND-NAME-HASH/          captured targets
  fit/KIND-NAME-HASH/            channel statistics, closed-form projectors, prototypes
  arms/ARM/seed-N/{model/, adapters.safetensors, log.jsonl, ledger.json, match.json, trained.json,
                   records.jsonl, latent.json, evaluated.json, checkpoints/}
  replicates/seed-N/{data/, tokenizer/, teachers/, written/, layers/}
                                 what varies with the seed (`replicate`), in place of the folders of these names above
  profile/ARM.json               what `profile-alignment` measured
  figures/  statistical_results.json  summary.json  report.html
  .lock  .locks/                 held while a command plans, and while a job is done
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import disk_full_error

CHECKPOINTS, ANSWERS, EVALUATIONS = "checkpoints", "evaluated", "evaluations"  # in an arm's folder
LATENTS = "latent.json"  # there, too: what an answer takes, and what becomes of it without its latents
DRY_RUN = "dry-run"  # of a rehearsal, while it lasts
LOCK, LOCKS = ".lock", ".locks"  # of a folder that one process works in; of a run folder's jobs


def replicate_folder(run: Path, seed: int) -> Path:
    """Where a seed has data, teachers or layer maps of its own: in folders as the run folder has them."""
    return run / "replicates" / f"seed-{seed}"


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


def written_folder(run: Path, teacher: str) -> Path:
    return run / "written" / teacher


def store_root(run: Path) -> Path:
    return run / "store"


def fit_root(run: Path) -> Path:
    return run / "fit"


def arm_folder(run: Path, arm: str, seed: int) -> Path:
    return run / "arms" / arm / f"seed-{seed}"


def trained_mark(folder: Path) -> Path:
    """Written last by training: the model beside it is whole."""
    return folder / "trained.json"


def written_mark(folder: Path) -> Path:
    """Written last: a teacher's solutions beside it are whole."""
    return folder / "written.json"


def evaluated_mark(folder: Path) -> Path:
    return folder / "evaluated.json"


def locks_folder(run: Path) -> Path:
    """A file for each job, locked while somebody does it; and `working`, shared by all commands that are at work."""
    return run / LOCKS


def refuse_foreign(folder: Path, identity: str, fix: str) -> None:
    """RunFolderError where `folder` is a file, or holds files of somebody else: any, but no file named `identity`.

    The file is looked for after the listing, since whoever begins here writes it before anything else; what a lock
    or a kill while writing it leaves behind is nobody's.
    """
    if not folder.exists():
        return
    what = "this is a file, not a folder"
    if folder.is_dir():
        ours = (LOCK, LOCKS, DRY_RUN, identity)
        foreign = [e for e in folder.iterdir() if e.name not in ours and not e.name.startswith(f".{identity}.part-")]
        if not foreign or (folder / identity).exists():
            return
        what = f"this folder holds files but no {identity}"
    raise RunFolderError(what, place=str(folder), fix=fix)


def folder_lock(folder: Path, *, wait: bool) -> AbstractContextManager[None]:
    """Only one process works in `folder`. `wait`: until the other one ends; else RunFolderError at once."""
    return file_lock(folder / LOCK, wait=wait)


@contextmanager
def file_lock(path: Path, *, wait: bool, shared: bool = False) -> Iterator[None]:
    """Hold the lock `path`, a file that is made where it is missing and never written to; it ends with the process.

    wait: until nobody else holds it; else RunFolderError at once. shared: others may hold it too, if shared as well.
    A link in its place is refused: what it points to is not ours.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if full := disk_full_error(error, folder):
            raise full from error
        if error.errno == errno.ELOOP:
            raise RunFolderError("the lock is a link", place=str(path), fix="delete the link") from None
        raise RunFolderError(
            f"cannot write here ({error.strerror})", place=str(folder), fix="give another folder with run_dir=…"
        ) from None
    with open(opened, "rb"):
        try:
            fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunFolderError(
                "another command is working in this run folder", place=str(folder), fix="wait for it, or stop it first"
            ) from None
        yield
