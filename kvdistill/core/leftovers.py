"""What killed processes leave in a run folder, and its removal by whoever comes next.

Temporary files and folders (`core.files` names them `.NAME.part-PID` and `.NAME.old-PID`), checkpoints and answers of
stages that were killed between their mark and tidying up, and a rehearsal. Only where nobody is at work in the folder,
and never what carries the number of a process that lives.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from kvdistill.core.errors import RunFolderError
from kvdistill.core.layout import (
    ANSWERS,
    CHECKPOINTS,
    DRY_RUN,
    EVALUATIONS,
    evaluated_mark,
    file_lock,
    folder_lock,
    locks_folder,
    trained_mark,
)
from kvdistill.core.marks import read_mark

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>part|old)-(?P<pid>\d+)(-.*)?")


def sweep_run(run: Path, *, keeps_answers: bool) -> None:
    """Tidy up a run folder, if nobody is at work in it (or in a part of it that has a lock of its own).

    keeps_answers: `evaluated/` stays beside what is evaluated, as it does with public evaluations.
    """
    try:
        with file_lock(locks_folder(run) / "working", wait=False):
            sweep_temporary(run, skip=(DRY_RUN, EVALUATIONS))
            for folder in [*run.glob("arms/*/seed-*"), *run.glob("teachers/*"), *run.glob("replicates/*/teachers/*")]:
                if read_mark(trained_mark(folder)) is not None:
                    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
                if read_mark(evaluated_mark(folder)) is not None and not keeps_answers:
                    shutil.rmtree(folder / ANSWERS, ignore_errors=True)
        if (run / DRY_RUN).exists():
            with folder_lock(run / DRY_RUN, wait=False):
                shutil.rmtree(run / DRY_RUN, ignore_errors=True)
    except RunFolderError:
        pass  # somebody is at work: the last to leave tidies up


def sweep_temporary(folder: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Remove what dead writers left half written below `folder`; an old folder whose new one never came is put back.

    skip: names of folders that are not looked into. What cannot be removed stays.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        for name in [*folders, *files]:
            found = _TEMPORARY.fullmatch(name)
            if found is None or _is_alive(int(found["pid"])):
                continue
            path, target = Path(place, name), Path(place, found["name"])
            if name in folders:
                folders.remove(name)
            try:
                if found["kind"] == "old" and not target.exists():
                    os.replace(path, target)
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError:
                continue


def _is_alive(pid: int) -> bool:
    """Whether another process has this number. We have nothing half written when we tidy up, so ours is an old one."""
    if pid in (0, os.getpid()):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
