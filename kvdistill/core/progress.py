"""Progress of long work: a `Progress` callable, which draws on a terminal, reports to a queue, or stays silent.

`progress(what, done, total)` may be called as often as one likes; drawing is throttled. Knows no stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Progress = Callable[[str, float, float], None]


def silent(what: str, done: float, total: float) -> None:
    """No progress shown."""


class TerminalProgress:
    """One line on stderr: what, a bar, share done, time taken and time to go. Plain lines where there is no terminal.

    The ETA comes from the rate since the first report of the same `what`, so work already done earlier is not counted.
    """

    def __init__(self, every_s: float = 0.2, plain_every_s: float = 15.0) -> None:
        self._tty = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook draws a line over, too
        self._every_s = every_s if self._tty else plain_every_s
        self._begun: dict[str, tuple[float, float]] = {}
        self._finished: set[str] = set()
        self._last_s = 0.0
        self._open = False
        self._what = ""

    def __call__(self, what: str, done: float, total: float) -> None:
        now = time.monotonic()
        start_s, start_done = self._begun.setdefault(what, (now, done))
        finished = total > 0 and done >= total
        if finished and what in self._finished:
            return
        if now - self._last_s < self._every_s and not finished and what == self._what:
            return
        self._last_s = now
        share = done / total if total else 0.0
        gone_s = now - start_s
        seen = done - start_done  # the first hundredth says nothing yet about the rest
        rate = seen / gone_s if gone_s > 0.5 and seen >= 0.01 * total else 0.0
        eta = f"{_clock((total - done) / rate)} to go" if rate > 0 and not finished else ""
        if finished:
            eta = "done"
        if self._tty:
            if self._open and what != self._what:
                sys.stderr.write("\n")
            bar = ("█" * round(share * 24)).ljust(24, "·")
            count = f"  {done:.0f}/{total}" if isinstance(total, int) else ""  # things; else a share of work
            sys.stderr.write(f"\r\x1b[K{what:<28} {bar} {share:4.0%}{count}  {_clock(gone_s)}  {eta}")
            sys.stderr.write("\n" if finished else "")
            self._open = not finished
        elif gone_s > 2 or what != self._what:
            sys.stderr.write(f"{what}: {share:.0%} after {_clock(gone_s)} {eta}\n".replace(" \n", "\n"))
        sys.stderr.flush()
        self._what = what
        if finished:
            self._finished.add(what)

    def close(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            self._open = False


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
