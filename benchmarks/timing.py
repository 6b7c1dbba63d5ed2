"""Timing that holds up on a noisy machine: things that are compared take turns in one process, step by step.

Two forms of the same idea. `interleave` calls plain functions in turn; `Turnstile` lets whole training loops take
turns: each runs in its own thread, exactly one at a time, and hands over at the end of each of its steps. Order
within a round is drawn anew each round. A ratio is the median over rounds of (this one / the baseline in the same
round), with a percentile bootstrap interval over rounds. Knows no trainer and no model.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Moment:
    """Wall and CPU (all threads of the process) seconds: of a point in time, or of a stretch."""

    wall: float
    cpu: float

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.wall - other.wall, self.cpu - other.cpu)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.wall + other.wall, self.cpu + other.cpu)


NOTHING = Moment(0.0, 0.0)


def now(device: torch.device | None = None) -> Moment:
    """The time once `device` has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return Moment(time.perf_counter(), time.process_time())


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and its bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:5.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_ratio(times: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Ratio:
    """Round by round times / baseline: median, and the percentile interval of the median over resampled rounds."""
    ratios = np.asarray(times, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def interleave(
    calls: Mapping[str, Callable[[], object]], *, warm_up: int, rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[Moment]]:
    """Time every function once a round, in an order drawn anew each round; the warm-up rounds are thrown away."""
    taken: dict[str, list[Moment]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(seed)
    for number in range(warm_up + rounds):
        draw.shuffle(order)
        for name in order:
            start = now(device)
            calls[name]()
            if number >= warm_up:
                taken[name].append(now(device) - start)
    return taken


class Turnstile:
    """Whole loops, one turn at a time. A loop calls `end_turn(name)` at the end of each of its steps."""

    def __init__(self, loops: Mapping[str, Callable[[], object]], device: torch.device, num_threads: int) -> None:
        self._loops, self._device, self._num_threads = dict(loops), device, num_threads
        self._gates = {name: threading.Semaphore(0) for name in loops}
        self._back = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._turn = NOTHING
        self._started = NOTHING

    def run(self, rounds: int, seed: int = 0) -> dict[str, list[Moment]]:
        """Each loop's turns, in rounds; afterwards the loops run to their end. An error in a loop is raised here."""
        threads = {name: threading.Thread(target=self._follow, args=(name,), daemon=True) for name in self._loops}
        for thread in threads.values():
            thread.start()
        taken: dict[str, list[Moment]] = {name: [] for name in self._loops}
        order, draw = list(self._loops), random.Random(seed)
        for _ in range(rounds):
            draw.shuffle(order)
            for name in order:
                self._let_through(name)
                taken[name].append(self._turn)
        for name, thread in threads.items():
            self._gates[name].release()
            thread.join()
            self._raise()
        return taken

    def end_turn(self, name: str) -> None:
        """Called by the loop, in its own thread: this step is over; wait for the next turn."""
        self._turn = now(self._device) - self._started
        self._back.release()
        self._wait(name)

    def _let_through(self, name: str) -> None:
        self._gates[name].release()
        self._back.acquire()
        self._raise()

    def _wait(self, name: str) -> None:
        self._gates[name].acquire()
        self._started = now(self._device)

    def _follow(self, name: str) -> None:
        torch.set_num_threads(self._num_threads)
        self._wait(name)
        try:
            self._loops[name]()
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
