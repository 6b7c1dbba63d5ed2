"""The loop of a program that `limited.py` runs beside us: limits on time and memory, and an end with its parent.

Such a program is started by its path, with nothing of ours imported: that would load torch. It gets this file by its
path too (`runpy.run_path`). Its clock and its look at the parent end it where nobody is left to do so.

    python -P PROGRAM CHANNEL PARENT_PID LIMIT_S MEMORY_BYTES
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_LOOK_S = 1.0  # how often an idle child looks whether its parent is still there
_GRACE_S = 1.0  # the parent kills at the limit; who is still computing this long after it has no parent


def serve(load: Callable[[], Callable[[Any], Any]]) -> None:
    """Say `ready` (or why `load` fails), then answer each question that comes by what `load` gave."""
    channel, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    limit_s, memory_bytes = float(sys.argv[3]), int(sys.argv[4])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # to a whole group: the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS has no such limit; the clock remains
        wanted = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    with suppress(OSError, EOFError):  # nobody is there any more
        try:
            answer = load()
        except (ImportError, MemoryError) as error:
            channel.send(f"{type(error).__name__}: {error}".replace("\n", " "))
            return
        channel.send("ready")
        while True:
            while not channel.poll(_LOOK_S):  # a fork of the parent may hold the channel open
                if os.getppid() != parent:
                    return
            question = channel.recv()
            signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
            said = answer(question)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.send(said)
