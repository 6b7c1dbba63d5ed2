"""Trains one arm in child processes that are killed (SIGKILL) at random moments, again and again, and then lets it end.

Run by test_resume.py as `python killed_training.py RUN ARM SEED KILLS CHANGES.json`: one process imports torch once
and forks, so that ten kills cost seconds. Prints one JSON object: the step each child had logged when it was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from tiny_recipe import tiny_recipe

from kvdistill.arms.experiment import Experiment
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.stages.fit import fit
from kvdistill.stages.train import train_student


def child(work) -> int:  # type: ignore[no-untyped-def]
    """Fork; the child works and leaves without cleaning up after itself."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def ended_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def num_rows(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def main(run: Path, arm: str, seed: int, kills: int, changes: dict) -> None:
    set_threads(1)
    quiet_libraries()
    recipe = tiny_recipe(run, **changes)
    folder = run / "arms" / arm / f"seed-{seed}"
    log = folder / "log.jsonl"
    chance = random.Random(seed)
    assert ended_well(child(lambda: fit(Experiment(recipe, run).arm(arm, seed))))
    killed_at: list[int] = []
    while len(killed_at) < kills:
        rows_wanted = chance.randint(1, 4)
        before = log.stat().st_mtime_ns if log.exists() else 0
        pid = child(lambda: train_student(Experiment(recipe, run).arm(arm, seed)))
        start, deadline = None, time.monotonic() + 60
        while time.monotonic() < deadline:
            if log.exists() and log.stat().st_mtime_ns != before:
                start = num_rows(log) if start is None else start
                if num_rows(log) >= start + rows_wanted:
                    break
            if os.waitpid(pid, os.WNOHANG)[0]:
                sys.exit("the training ended before it was killed often enough: give it more steps")
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))  # anywhere in a step, a log line or a checkpoint
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lines = log.read_bytes().split(b"\n")[:-1]
        killed_at.append(max((json.loads(line)["step"] for line in lines), default=0))
    assert ended_well(child(lambda: train_student(Experiment(recipe, run).arm(arm, seed))))
    print(json.dumps(killed_at))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(Path(sys.argv[5]).read_text()))
