"""Jobs side by side on one machine: worker processes that start once, do one job after another, and end with us.

A job is (verb, arguments); `VERBS` says which stage function it is. Workers import torch once (2-6 s), hold the
thread count they were given, report progress through a queue, and end by themselves when the parent is gone,
so that a killed study never leaves a writer behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdistill.core.errors import KVDistillError, TrainingStopped
from kvdistill.core.files import disk_full_error
from kvdistill.core.progress import Progress, silent

_QUEUE: Any = None


@dataclass(frozen=True)
class Job:
    """verb and arguments of one stage call; `cost` in any unit, for the ETA; `name` for people."""

    name: str
    verb: str
    arguments: tuple[Any, ...]
    cost: float


def num_workers(asked: int, num_jobs: int, device: str) -> int:
    """How many workers: as asked, else one per GPU, else one per usable core; never more than jobs."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if device.startswith("cuda") or (device == "auto" and visible_gpus()):
        available = len(visible_gpus())
    return max(1, min(asked or available, num_jobs))


def visible_gpus() -> list[str]:
    """The GPUs this command may use, as CUDA_VISIBLE_DEVICES names them; without loading torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


class Workers:
    """A pool that runs waves of jobs. Use as a context manager."""

    def __init__(self, workers: int, threads: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._queue = self._context.Queue()
        self._numbers = self._context.Queue()  # each worker takes one: which GPU is its own
        for number in range(workers):
            self._numbers.put(number)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read by the children when they import torch
            if threads > 0:
                os.environ.setdefault(name, str(threads))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=self._context,
            initializer=_start_worker,
            initargs=(self._queue, self._numbers, threads, os.getpid()),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._pool.shutdown(wait=True)
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)

    def run(self, jobs: Sequence[Job], progress: Progress, what: str) -> None:
        """All jobs, most costly first where order is free; the first error stops the rest and is raised."""
        total = sum(job.cost for job in jobs)
        done = {job.name: 0.0 for job in jobs}
        futures: dict[Future[Any], Job] = {
            self._pool.submit(_do, job.verb, job.name, job.arguments): job for job in jobs
        }
        pending = set(futures)
        costs = {job.name: job.cost for job in jobs}
        progress(what, 0.0, total)
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not self._queue.empty():
                name, share = self._queue.get()
                if name in costs:
                    done[name] = max(done[name], share * costs[name])
            for future in finished:
                try:
                    future.result()
                except BrokenProcessPool:
                    raise TrainingStopped(
                        "a worker process was ended from outside (out of memory?)",
                        place=futures[future].name,
                        fix="lower hardware.workers or batch sizes, then give the same command again: "
                        "it goes on where it stopped",
                    ) from None
                done[futures[future].name] = futures[future].cost
            progress(what, sum(done.values()), total)


def _start_worker(queue: Any, numbers: Any, threads: int, parent: int) -> None:
    global _QUEUE
    _QUEUE = queue
    gpus = visible_gpus()
    if len(gpus) > 1:  # before torch is imported: a worker sees one GPU, its own
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[numbers.get() % len(gpus)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends us
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    prepare_process(threads)


def prepare_process(threads: int) -> None:
    """Threads as asked, memory kept, libraries quiet: what every process that works does first."""
    from kvdistill.core.runtime import keep_freed_memory, quiet_libraries, set_threads

    set_threads(threads)
    keep_freed_memory()
    quiet_libraries()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _do(verb: str, name: str, arguments: tuple[Any, ...]) -> None:
    last = [0.0]

    def report(what: str, done: float, total: float) -> None:
        now = time.monotonic()
        if now - last[0] > 0.2 and total:
            last[0] = now
            _QUEUE.put((name, done / total))

    try:
        stage_function(verb)(*arguments, progress=report)
    except KVDistillError:
        raise
    except Exception as error:
        import traceback

        if full := disk_full_error(error, name):  # from a writer that is not ours
            raise full from None
        traceback.print_exc(file=sys.stderr)
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from None


def stage_function(verb: str) -> Callable[..., Any]:
    """The stage behind a verb, imported when it is first needed."""
    if verb == "prepare":
        return _prepare
    if verb == "check":
        return _check
    if verb == "train_teacher":
        from kvdistill.stages.train import train_teacher

        return train_teacher
    if verb == "map_layers":
        from kvdistill.stages.layers import map_layers

        return map_layers
    if verb == "capture":
        from kvdistill.stages.capture import capture

        return capture
    if verb == "fit":
        from kvdistill.stages.fit import fit

        return fit
    if verb == "train_student":
        from kvdistill.stages.train import train_student

        return train_student
    if verb == "evaluate":
        from kvdistill.stages.evaluate import evaluate

        return evaluate
    if verb == "student":
        return _train_and_evaluate
    raise ValueError(verb)


def _prepare(recipe: Any, run: Path, progress: Progress) -> None:
    """The phases of `prepare` as one bar."""
    from kvdistill.stages.prepare import prepare

    parts = {"loading tasks": 0.2, "reading evaluations": 0.3, "checking for leaks": 0.2, "encoding train": 0.2}
    rest = (1 - sum(parts.values())) / 3  # encoding of the other splits
    begins: dict[str, float] = {}

    def report(what: str, done: float, total: float) -> None:
        part = parts.get(what, rest)
        begin = begins.setdefault(what, sum(parts.get(earlier, rest) for earlier in begins))
        progress("prepare", min(1.0, begin + part * done / total) if total else begin, 1.0)

    prepare(recipe, run, progress=report)


def _check(recipe: Any, run: Path, progress: Progress = silent) -> None:
    """Models, and the data of public evaluations: before anything is trained."""
    from kvdistill.arms.checks import check_models

    check_models(recipe, run, progress)
    if recipe.evaluate.tasks:
        from kvdistill.stages.evaluate import check_public

        check_public(recipe, run)


def _train_and_evaluate(recipe: Any, run: Path, arm: str, seed: int, progress: Progress) -> None:
    stage_function("train_student")(
        recipe, run, arm, seed, progress=lambda what, done, total: progress(what, 0.95 * done, total)
    )
    stage_function("evaluate")(
        recipe, run, arm, seed, progress=lambda what, done, total: progress(what, 0.95 * total + 0.05 * done, total)
    )
