"""Two LaTeX expressions compared by math-verify, in a process of its own with a time and a memory limit.

sympy may run for ever or eat all memory on an expression that a model wrote, and neither can be stopped from inside.
So one child a process is started when it is first needed, asked over pipes (JSON lines, many questions under way at
once), killed when a comparison takes too long, and started again. Works in any thread, in forked and daemonic
workers: every process has its own child. Knows no task and folds nothing; `latex.py` says what is worth asking.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, final

from kvdistill.core.errors import KVDistillError
from kvdistill.data.math_verify_child import ANSWERS, BROKEN, READY

# timeout: not answered within the limit; failed: out of memory, or the child died of it twice
Verdict = Literal["equal", "different", "timeout", "failed"]
Pair = tuple[str, str]

LIMIT_S = 5.0  # a comparison; starting the child does not count
MEMORY_BYTES = 4 << 30  # address space of the child
_STARTUP_LIMIT_S = 600.0  # importing sympy from a slow disk on a busy machine
_NUM_UNDER_WAY = 64
_CHILD = Path(__file__).with_name("math_verify_child.py")


@final
class Checker:
    """A child process and the questions to it, for any number of threads of the process that made it.

    limit_s: a comparison; memory_bytes: address space of the child. Both hold for the next child that is started.
    """

    def __init__(self, limit_s: float = LIMIT_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self.limit_s, self.memory_bytes = limit_s, memory_bytes
        self.counts: Counter[str] = Counter()  # verdicts given, and `started`: how often a child was
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._unread, self._unsent = b"", b""

    @property
    def pid(self) -> int | None:
        """Of the child, where there is one."""
        return None if self._child is None else self._child.pid

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order. Raises KVDistillError where math-verify cannot be started at all."""
        verdicts: list[Verdict] = []
        for start in range(0, len(pairs), _NUM_UNDER_WAY):
            with self._lock:
                verdicts += self._compare_some(pairs[start : start + _NUM_UNDER_WAY])
        return verdicts

    def close(self, wait_s: float = -1) -> None:
        """End the child; the next comparison starts another. wait_s: for one under way in another thread."""
        is_free = self._lock.acquire(timeout=wait_s)
        try:
            self._stop()
        finally:
            if is_free:
                self._lock.release()

    def abandon(self) -> None:
        """In a forked process: let go of the child, which is the parent's, without a word to it."""
        child, self._child = self._child, None
        if child is not None:
            _close_pipes(child)
            child.returncode = 0  # not ours to wait for

    def _compare_some(self, pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        retried = -1
        try:
            while len(verdicts) < len(pairs):
                self._start()
                ended = self._ask(pairs[len(verdicts) :], verdicts)
                if ended is None:
                    break
                self._stop()
                if ended == "timeout":
                    verdicts.append("timeout")
                elif retried == len(verdicts):
                    verdicts.append("failed")
                else:
                    retried = len(verdicts)  # perhaps it was killed from outside: once more
        except BaseException:
            self._stop()  # answers under way would be taken for those to the next questions
            raise
        self.counts.update(verdicts)
        return verdicts

    def _start(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        self._stop()
        limits = [str(os.getpid()), str(self.limit_s), str(self.memory_bytes)]
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms follows the hashes
        )
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        self.counts["started"] += 1
        try:
            said = self._next_line(time.monotonic() + _STARTUP_LIMIT_S)
        except TimeoutError:
            said = f"{BROKEN} nothing heard for {_STARTUP_LIMIT_S:.0f} s"
        if said != READY:
            reason = said.removeprefix(BROKEN).strip() if said else f"exit code {self._child.wait()}"
            self._stop()
            raise KVDistillError(
                f"math-verify does not start: {reason}",
                place="comparing LaTeX answers",
                fix="install math-verify into the environment that runs kvdistill, and leave it 1 GB of memory",
            )

    def _stop(self) -> None:
        child, self._child, self._unread, self._unsent = self._child, None, b"", b""
        if child is not None:
            child.kill()
            _close_pipes(child)
            child.wait()

    def _ask(self, pairs: Sequence[Pair], verdicts: list[Verdict]) -> Literal["timeout", "died"] | None:
        """Send all, add the verdicts as they come; None when there is one for each."""
        self._unsent = b"".join(json.dumps(pair).encode() + b"\n" for pair in pairs)
        for _ in pairs:
            try:
                said = self._next_line(time.monotonic() + self.limit_s)
            except TimeoutError:
                return "timeout"
            if said not in ANSWERS:
                return "died"
            verdicts.append(cast(Verdict, said))
        return None

    def _next_line(self, deadline: float) -> str:
        """What the child says next, "" if it is dead; sends what is unsent meanwhile. TimeoutError at the deadline."""
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        stdin, stdout = self._child.stdin, self._child.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if self._unsent:
                selector.register(stdin, selectors.EVENT_WRITE)
            while b"\n" not in self._unread:
                ready = {key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                if not ready and time.monotonic() >= deadline:
                    raise TimeoutError
                if stdin in ready and not self._send():
                    selector.unregister(stdin)
                if stdout in ready:
                    data = os.read(stdout.fileno(), 1 << 16)
                    if not data:
                        return ""
                    self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _send(self) -> bool:
        """Write what goes into the pipe now; whether there is more to send."""
        assert self._child is not None and self._child.stdin is not None
        try:
            self._unsent = self._unsent[os.write(self._child.stdin.fileno(), self._unsent[: 1 << 16]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # it is dead; what it said before is still to be read
            self._unsent = b""
        return bool(self._unsent)


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


_CHECKERS: dict[int, Checker] = {}  # by process: a fork has a copy of its parent's and must not use it


def shared_checker() -> Checker:
    """The checker of this process, made on first use and closed at exit."""
    own = os.getpid()
    if own not in _CHECKERS:
        for other in list(_CHECKERS):
            inherited = _CHECKERS.pop(other, None)
            if inherited is not None:
                inherited.abandon()
        _CHECKERS.setdefault(own, Checker())  # one of two threads that come here at once wins
    return _CHECKERS[own]


def compare_expressions(pairs: Sequence[Pair]) -> list[Verdict]:
    """What math-verify says of each pair of LaTeX expressions (without dollar signs), in order."""
    return shared_checker().compare(pairs)


def count_undecided() -> int:
    """Comparisons of this process so far that ended in a timeout or failed; they count as not equal."""
    counts = shared_checker().counts
    return counts["timeout"] + counts["failed"]


@atexit.register
def _close() -> None:
    checker = _CHECKERS.get(os.getpid())
    if checker is not None:
        checker.close(wait_s=1.0)  # a thread may still be asking
