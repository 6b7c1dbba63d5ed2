"""A question to a process of its own, with a time and a memory limit: what runs on strangers' text may run for ever.

sympy on an expression that a model wrote, or a chat template, may take all time and all memory, and neither can be
stopped from inside. So one child a process is started when it is first needed, asked one question at a time, killed
when an answer takes too long, and started again. Works in any thread, in forked and daemonic workers: every process has
its own child.

The child is a program and no `multiprocessing` pool: a pool's process imports the parent's main program once more
(torch with it, a script without a guard as a whole, and a program read from standard input not at all), and a daemonic
worker may have none. Its loop is `limited_child.py`. Knows no question.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from kvdistill.core.errors import KVDistillError

_STARTUP_LIMIT_S = 600.0  # importing from a slow disk on a busy machine
_END_LIMIT_S = 10.0  # for a child that has closed its channel to end
TIMEOUT = "timeout"


class AbstractLimited(ABC):
    """A child process and the questions to it, for any number of threads of the process that made it.

    limit_s: an answer (starting the child does not count); memory_bytes: address space of the child. Both hold for the
    next child that is started. counts: `started`, how often a child was, and what a subclass counts. pid: of the child,
    None while there is none.
    """

    def __init__(self, limit_s: float, memory_bytes: int) -> None:
        self.limit_s, self.memory_bytes = limit_s, memory_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self.forget()

    @property
    @abstractmethod
    def program(self) -> Path:
        """What the child runs."""

    @abstractmethod
    def not_started(self, reason: str) -> KVDistillError:
        """The error for a child that does not start."""

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

    def ask(self, question: Any) -> Any:
        """The child's answer; TIMEOUT, or None where it died of the question twice.

        KVDistillError where it cannot be started at all.
        """
        with self._lock:
            try:  # perhaps the child was killed from outside: once more
                return self._ask(question) or self._ask(question)
            except BaseException:
                self._stop()  # its answer would be taken for that to the next question
                raise

    def close(self, wait_s: float = -1) -> None:
        """End the child; the next question starts another. wait_s: for one under way in another thread."""
        is_free = self._lock.acquire(timeout=wait_s)
        try:
            self._stop()
        finally:
            if is_free:
                self._lock.release()

    def _ask(self, question: Any) -> Any:
        """The child's answer, None where it died; after both that and a timeout there is no child."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        try:
            self._channel.send(question)
            answer = self._heard(self.limit_s)
        except OSError:
            answer = None
        if answer in (None, TIMEOUT):
            self._stop()
        return answer

    def _heard(self, limit_s: float) -> Any:
        """What the child says next; None if it is dead, TIMEOUT if it says nothing."""
        try:
            return self._channel.recv() if self._channel.poll(limit_s) else TIMEOUT
        except (OSError, EOFError):
            return None

    def _start(self) -> None:
        self._stop()
        self._channel, theirs = Pipe()
        with theirs:
            arguments = [theirs.fileno(), os.getpid(), self.limit_s, self.memory_bytes]
            self._child = subprocess.Popen(
                [sys.executable, "-P", str(self.program), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms follows the hashes
            )
        self.counts["started"] += 1
        said = self._heard(_STARTUP_LIMIT_S)
        if said != "ready":
            reason = f"nothing heard for {_STARTUP_LIMIT_S:.0f} s" if said == TIMEOUT else said
            if reason is None:  # it has closed the channel, so it ends now, or it never will
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(_END_LIMIT_S)
                code = self._child.returncode  # None: it has not ended, as on a machine that is very busy
                reason = f"exit code {code}" if code is not None else "it closed its channel and did not end"
            self._stop()
            raise self.not_started(reason)

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            self._channel.close()
            child.wait()


def one_a_process(limited: AbstractLimited) -> None:
    """End this child with the process, and leave it to the parent in a fork."""
    os.register_at_fork(after_in_child=limited.forget)
    atexit.register(limited.close, wait_s=1.0)  # a thread may still be asking
