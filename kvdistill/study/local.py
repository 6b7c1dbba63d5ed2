"""A graph of jobs on one machine: worker processes that start once, do one job after another, and end with us.

Workers import torch once (2-6 s), hold the thread count they were given, report progress through a queue, and end by
themselves when the parent is gone, so that a killed study never leaves a writer behind. A study that is asked to end
asks its workers, which go on to the next safe place and end (`core.stopping`). What a job does is not known here
(`stages.table.perform`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for_ends
from pathlib import Path
from typing import Any

from kvdistill.core.errors import JobsFailed, KVDistillError, TrainingStopped
from kvdistill.core.files import disk_full_error
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import HardwareRecipe, Recipe
from kvdistill.core.stopping import (
    ALWAYS,
    Stopped,
    ask_for_patience,
    held_back,
    is_asked,
    is_idle,
    listening,
    put_off,
)
from kvdistill.stages.table import STAGES, Job, perform

_QUEUE: Any = None  # of a worker: where its progress goes
_RECIPE: Recipe | None = None  # of a worker: read once
_LISTENING = ExitStack()  # of a worker, to its end


def run_jobs(
    recipe: Recipe, jobs: Sequence[Job], progress: Progress, *, what: str | None = None, here: bool = False
) -> None:
    """Do every job as soon as those it comes after are done, first the one with the most costly way behind it.

    A job that fails stops those that wait for it and not its neighbours; at the end what failed is raised: a single
    mistake as it is, several as JobsFailed, which lists them. A job that comes after one that is not among `jobs` does
    not wait for it.

    jobs: none before one that it comes after, as `plan` gives them.
    what: name of the bar; unset: the recipe's.
    here: in this process, one after another.
    """
    waiting, unsettled, way = list(jobs), {job.id for job in jobs}, ways(jobs)
    shares = {job.id: 0.0 for job in jobs}
    running: dict[Future[None], Job] = {}
    failed: dict[str, BaseException] = {}

    def show(job_id: str, share: float) -> None:
        shares[job_id] = max(shares[job_id], share)
        title = (what or recipe.name) + (f", {len(failed)} failed" if failed else "")
        progress(title, sum(job.cost * shares[job.id] for job in jobs), sum(job.cost for job in jobs))

    with Workers(0 if here or not jobs else num_workers(recipe.hardware, jobs), recipe) as workers:
        while waiting or running:
            busy = {job.verb for job in running.values() if STAGES[job.verb].alone}
            ready = [job for job in waiting if not unsettled & {*job.after} and job.verb not in busy]
            if ready and len(running) < max(1, workers.number):
                job = max(ready, key=lambda job: way[job.id])
                waiting.remove(job)
                show(job.id, 0.0)
                running[workers.submit(job, show)] = job
                continue
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            workers.tell(show)
            show(jobs[0].id, 0.0)  # time goes on, also where nobody has said anything
            for future in finished:
                job, error = running.pop(future), future.exception()
                if error is None:
                    unsettled.remove(job.id)
                    show(job.id, 1.0)
                    continue
                if isinstance(error, Stopped):  # somebody asked the worker, not us
                    raise error
                failed[job.id] = error
                if isinstance(error, BrokenProcessPool):  # all workers are gone, and with them what was running
                    waiting, running = [], {}
                    break
                stopped = {job.id}
                for other in waiting:
                    stopped |= {other.id} if stopped & {*other.after} else set()
                waiting = [other for other in waiting if other.id not in stopped]
    if failed:
        raise failure(failed, len(jobs))


def ways(jobs: Sequence[Job]) -> dict[str, float]:
    """Job -> what it costs with the most costly chain of jobs that come after it."""
    way = {job.id: job.cost for job in jobs}
    costs = dict(way)
    for job in reversed(jobs):
        for earlier in way.keys() & {*job.after}:
            way[earlier] = max(way[earlier], costs[earlier] + way[job.id])
    return way


def failure(failed: Mapping[str, BaseException], num_jobs: int) -> BaseException:
    """What to raise for these jobs: their reason if they have one and the same, at all its places; else a list."""
    fix = "lower hardware.workers or batch sizes, then give the same command again: it goes on where it stopped"
    ended = partial(TrainingStopped, "a worker process was ended from outside (out of memory?)", fix=fix)
    errors = [ended(place=job) if isinstance(e, BrokenProcessPool) else e for job, e in failed.items()]
    first, mistakes = errors[0], [error for error in errors if isinstance(error, KVDistillError)]
    if len({(type(e), e.what, e.fix) if isinstance(e, KVDistillError) else (type(e), str(e)) for e in errors}) > 1:
        said = [f"{job}: {error}".replace("\n", "\n  ") for job, error in zip(failed, errors, strict=True)]
        listed = JobsFailed(
            "\n  ".join([f"{len(failed)} of {num_jobs} jobs failed", *said]),
            fix="mend these, then give the same command again: it goes on where it stopped",
        )
        listed.exit_code = first.exit_code if isinstance(first, KVDistillError) else 1
        return listed
    places = list(dict.fromkeys(error.place for error in mistakes))
    if len(places) > 1:
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        return type(mistakes[0])(mistakes[0].what, place=", ".join(places[:3]) + more, fix=mistakes[0].fix)
    return first


class Workers:
    """Worker processes; with number 0, this one.

    Use as a context manager: left by Stopped, it lets them come to a safe place; left by an error, it kills them.
    """

    def __init__(self, number: int, recipe: Recipe) -> None:
        self.number, self._recipe = number, recipe
        self._pool: ProcessPoolExecutor | None = None
        if number == 0:
            return
        context = multiprocessing.get_context("spawn")
        with held_back():  # Python's own helper process would die of a signal to the whole group
            resource_tracker.ensure_running()
        self._queue = context.Queue()
        numbers = context.Queue()  # each worker takes one: which GPU is its own
        for worker in range(number):
            numbers.put(worker)
        threads = recipe.hardware.threads
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read by the children when they import torch
            if threads > 0:
                os.environ.setdefault(name, str(threads))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._pool = ProcessPoolExecutor(
            number,
            mp_context=context,
            initializer=_start_worker,
            initargs=(self._queue, numbers, recipe.model_dump(mode="json"), os.getpid()),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is None:
            return
        if kind is None:
            self._pool.shutdown(wait=True)
            return
        processes = list((self._pool._processes or {}).values())
        try:
            if kind is Stopped:
                _let_end(processes)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            for process in processes:
                process.join(5)

    def submit(self, job: Job, show: Callable[[str, float], None]) -> Future[None]:
        """Give a job to a worker; without workers it is done when this returns, and shown meanwhile."""
        if self._pool is not None:
            with held_back():  # a worker that is begun here hears what comes before it can listen
                return self._pool.submit(_do, job)
        future: Future[None] = Future()
        try:
            perform(job, self._recipe, lambda _, done, total: show(job.id, done / total if total else 0.0))
            future.set_result(None)
        except Exception as error:
            future.set_exception(_disk_full(error, job) or error)
        return future

    def tell(self, show: Callable[[str, float], None]) -> None:
        """Pass on what the workers have said since: a job's id, and how much of it is done."""
        while self._pool is not None and not self._queue.empty():
            show(*self._queue.get())


def num_workers(hardware: HardwareRecipe, jobs: Sequence[Job]) -> int:
    """How many workers: as asked, else one per GPU, else one per usable core; never more than jobs of one verb."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if hardware.device.startswith("cuda") or (hardware.device == "auto" and visible_gpus()):
        available = len(visible_gpus())
    widest = max(Counter(job.verb for job in jobs).values(), default=1)
    return max(1, min(hardware.workers or available, widest))


def visible_gpus() -> list[str]:
    """The GPUs this command may use, as CUDA_VISIBLE_DEVICES names them; without loading torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def _let_end(processes: Sequence[Any]) -> None:
    """Ask workers to end, and wait until they have. None takes longer than a checkpoint does, see `core.stopping`."""
    with put_off(ALWAYS):
        ask_for_patience()
        for process in processes:
            process.terminate()
        left = {process.sentinel for process in processes}
        while left:
            left -= {*wait_for_ends(left)}


def _start_worker(queue: Any, numbers: Any, tree: dict[str, Any], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it asks us
    signal.signal(signal.SIGUSR2, _leave)
    _LISTENING.enter_context(listening(limit_s=ALWAYS))  # between jobs there is nothing to interrupt
    global _QUEUE, _RECIPE
    _QUEUE, _RECIPE = queue, Recipe.model_validate(tree)
    queue.cancel_join_thread()  # whoever was killed while it told may hold the pipe for ever: nobody waits to tell
    gpus = visible_gpus()
    if len(gpus) > 1:  # before torch is imported: a worker sees one GPU, its own
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[numbers.get() % len(gpus)]
    with put_off(ALWAYS):
        threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
        prepare_process(_RECIPE.hardware.threads)


def prepare_process(threads: int) -> None:
    """Threads as asked, memory kept, libraries quiet: what every process that works does first."""
    from kvdistill.core.runtime import keep_freed_memory, quiet_libraries, set_threads

    set_threads(threads)
    keep_freed_memory()
    quiet_libraries()


def _end_with_parent(parent: int) -> None:
    """Watch whether the parent lives; and end a worker that was asked to, when it has nothing to do."""
    idle = 0
    while os.getppid() == parent:
        time.sleep(0.2)
        idle = idle + 1 if is_asked() and is_idle() else 0
        if idle == 2:  # looks in a row: what a job raised has gone its way back
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGUSR2)
    os._exit(1)


def _leave(number: int, frame: Any) -> None:
    sys.exit(0)


def _disk_full(error: Exception, job: Job) -> TrainingStopped | None:
    """The clear error behind one from a writer that is not ours; it may not say where it wrote."""
    return disk_full_error(error, getattr(error, "filename", None) or str(job.arguments.get("run", job.id)))


def _do(job: Job) -> None:
    """A job in a worker. What it raises must survive the way back."""
    last = [0.0]

    def report(what: str, done: float, total: float) -> None:
        now = time.monotonic()
        if now - last[0] > 0.2 and total:
            last[0] = now
            _QUEUE.put((job.id, done / total))

    assert _RECIPE is not None
    try:
        with put_off(0.0):
            perform(job, _RECIPE, report)
    except KVDistillError:
        raise
    except Exception as error:
        import traceback

        if full := _disk_full(error, job):
            raise full from None
        traceback.print_exc(file=sys.stderr)
        raise RuntimeError(f"{job.id}: {type(error).__name__}: {error}") from None
