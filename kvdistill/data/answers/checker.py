"""Two LaTeX expressions compared by math-verify, in a process of its own with a time and a memory limit.

sympy may run for ever or eat all memory on an expression that a model wrote, and neither can be stopped from inside.
So one child a process is started when it is first needed, asked one question at a time, killed when a comparison takes
too long, and started again. Works in any thread, in forked and daemonic workers: every process has its own child.

The child is a program and no `multiprocessing` pool: a pool's process imports the parent's main program once more
(torch with it, a script without a guard as a whole, and a program read from standard input not at all), and a daemonic
worker may have none. Knows no task and folds nothing; `latex.py` says what is worth asking.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections import Counter
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, Literal, final

from kvdistill.core.errors import KVDistillError

# timeout: not answered within the limit; failed: out of memory, or the child died of it twice
Verdict = Literal["equal", "different", "timeout", "failed"]

LIMIT_S = 5.0  # a comparison; starting the child does not count
MEMORY_BYTES = 4 << 30  # address space of the child
_STARTUP_LIMIT_S = 600.0  # importing sympy from a slow disk on a busy machine
_CHILD = Path(__file__).with_name("math_verify_child.py")


@final
class Checker:
    """A child process and the questions to it, for any number of threads of the process that made it.

    limit_s: a comparison; memory_bytes: address space of the child. Both hold for the next child that is started.
    counts: verdicts given, and `started`: how often a child was. pid: of the child, None while there is none.
    """

    def __init__(self, limit_s: float = LIMIT_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self.limit_s, self.memory_bytes = limit_s, memory_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew without a word to the child; in a forked process it is the parent's."""
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()  # another thread may have held the old one while forking
        if self._child is not None:
            self._channel.close()
            self._child.returncode = 0  # not ours to wait for
        self._child = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def compare(self, first: str, second: str) -> Verdict:
        """What math-verify says of two LaTeX expressions without dollar signs.

        KVDistillError where it cannot be started at all.
        """
        with self._lock:
            try:
                # perhaps the child was killed from outside: once more
                verdict: Verdict = self._ask(first, second) or self._ask(first, second) or "failed"
            except BaseException:
                self._stop()  # its answer would be taken for that to the next question
                raise
            self.counts[verdict] += 1
        return verdict

    def close(self, wait_s: float = -1) -> None:
        """End the child; the next comparison starts another. wait_s: for one under way in another thread."""
        is_free = self._lock.acquire(timeout=wait_s)
        try:
            self._stop()
        finally:
            if is_free:
                self._lock.release()

    def _ask(self, first: str, second: str) -> Verdict | None:
        """The child's verdict, None where it died; after both that and a timeout there is no child."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        try:
            self._channel.send((first, second))
            verdict = self._heard(self.limit_s)
        except OSError:
            verdict = None
        if verdict not in ("equal", "different", "failed"):
            self._stop()
        return verdict

    def _heard(self, limit_s: float) -> Any:
        """What the child says next; None if it is dead, `timeout` if it says nothing."""
        try:
            return self._channel.recv() if self._channel.poll(limit_s) else "timeout"
        except (OSError, EOFError):
            return None

    def _start(self) -> None:
        self._stop()
        self._channel, theirs = Pipe()
        with theirs:
            arguments = [theirs.fileno(), os.getpid(), self.limit_s, self.memory_bytes]
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms follows the hashes
            )
        self.counts["started"] += 1
        said = self._heard(_STARTUP_LIMIT_S)
        if said != "ready":
            reason = f"nothing heard for {_STARTUP_LIMIT_S:.0f} s" if said == "timeout" else said
            reason = reason or f"exit code {self._child.wait()}"
            self._stop()
            raise KVDistillError(
                f"math-verify does not start: {reason}",
                place="comparing LaTeX answers",
                fix="install math-verify into the environment that runs kvdistill, and leave it 1 GB of memory",
            )

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            self._channel.close()
            child.wait()


CHECKER = Checker()  # of this process
os.register_at_fork(after_in_child=CHECKER.forget)
atexit.register(CHECKER.close, wait_s=1.0)  # a thread may still be asking


def count_undecided() -> int:
    """Comparisons of this process so far that ended in a timeout or failed; they count as not equal."""
    return CHECKER.counts["timeout"] + CHECKER.counts["failed"]
