"""Being asked to end, by SIGTERM or SIGUSR1 (how clusters preempt) or by Ctrl-C, with nothing lost.

A command listens (`listening`). Where it is asked, it is interrupted on the spot, as by Ctrl-C: every file is whole or
absent, so that costs what was being made. Work that has something to save puts it off (`put_off`) until it can give in
(`give_in`): at the next checkpoint, shard or chunk; for GRACE_S seconds, then it is interrupted there too. Knows no
stage; state is of the process, and only its main thread is ever interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, ClassVar

GRACE_S = 10.0  # how long work may go on towards a safe place; clusters wait 30 s before they kill
LAST_S = 17.0  # a process that is stuck (in one long call of a library) ends itself
EXIT_CODE, EXIT_CODE_CTRL_C = 75, 130  # 75: EX_TEMPFAIL, "try again"
ALWAYS = None  # limit of `put_off` for what must not be cut: a checkpoint that is being written
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_REMINDING = threading.Lock()


class Stopped(BaseException):
    """The process was asked to end, and ends with nothing lost.

    Not an Exception, as KeyboardInterrupt is none: whoever catches mistakes must not take it for one.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)

    @property
    def exit_code(self) -> int:
        return EXIT_CODE_CTRL_C if self.number == signal.SIGINT else EXIT_CODE

    def message(self) -> str:
        by = "" if self.number == signal.SIGINT else f" by {signal.Signals(self.number).name}"
        return f"stopped{by}. The same command goes on where this one ended."


class _State:
    asked: int | None = None  # the signal
    since_s = 0.0
    limits: ClassVar[list[float | None]] = []  # of the stretches of work we are in, innermost last; 0: at once
    asking = 0  # how many times this process has listened: an old timer has nothing to say to a new one


def is_asked() -> bool:
    return _State.asked is not None


def is_idle() -> bool:
    """Nothing is being done: no `put_off` is under way."""
    return len(_State.limits) <= 1


def ask_for_patience() -> None:
    """Who pressed Ctrl-C hears that it takes a moment."""
    if _State.asked == signal.SIGINT and sys.stderr.isatty():
        print("\nstopping at the next safe place (Ctrl-C again: at once)", file=sys.stderr)


def give_in() -> None:
    """Raise Stopped here, a safe place, where the process was asked to end."""
    if _State.asked is not None:
        raise Stopped(_State.asked)


class put_off(AbstractContextManager[None]):
    """Work in here is not interrupted for so long after the process was asked to end; 0: it is, on the spot.

    Asked already, it is not begun, unless with ALWAYS. Where the work is done, what was put off is made up for.

    No generator: a signal may come between any two calls, and `_hear` raises nothing inside of these two methods, so
    that a stretch of work is never left on the list (the next one would be cut too early) nor taken off it twice.
    """

    def __init__(self, limit_s: float | None = GRACE_S) -> None:
        self._limit_s = limit_s

    def __enter__(self) -> None:
        if self._limit_s is not ALWAYS:
            give_in()
        self._outer = _State.limits
        _State.limits = [*self._outer, self._limit_s]
        if self._limit_s == 0 and _State.asked is not None:  # just now
            _State.limits = self._outer
            raise Stopped(_State.asked)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        _State.limits = self._outer
        if kind is None and _State.limits and _State.limits[-1] == 0:
            give_in()


_ENDS = (put_off.__enter__.__code__, put_off.__exit__.__code__)


@contextmanager
def listening(signals: Sequence[signal.Signals] = SIGNALS, limit_s: float | None = 0.0) -> Iterator[None]:
    """Within it this process can be asked to end. Of a thread that is not the main one: nothing.

    limit_s: of work that says nothing else. What is ignored (nohup, a shell's background jobs) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {one: signal.getsignal(one) for one in signals}
    before = {one: handler for one, handler in before.items() if handler is not signal.SIG_IGN}
    outer = _State.asked, _State.since_s, _State.limits
    _State.asked, _State.limits = None, [limit_s]
    _State.asking += 1
    hook = sys.unraisablehook

    def not_lost(lost: Any) -> None:
        """Where nothing can be raised (a weak reference's callback, `__del__`), Python drops it: ask again soon."""
        if lost.exc_type is Stopped:
            threading.Timer(0.02, _remind, (_State.asking,)).start()
        else:
            hook(lost)

    try:
        sys.unraisablehook = not_lost
        for one in before:
            signal.signal(one, _hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # where we were started in a `held_back`
        yield
    finally:
        _State.limits = [ALWAYS]  # what is put back here is put back whole
        with _REMINDING:  # nobody is reminded of what is over: that would end the process, or whoever listens next
            _State.asking += 1
        for one, handler in before.items():
            signal.signal(one, handler)
        sys.unraisablehook = hook
        _State.asked, _State.since_s, _State.limits = outer


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until this is over, also in processes that are started in it, which let them in when they listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with put_off(ALWAYS):  # other threads of ours may hear it for us
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hear(number: int, frame: FrameType | None) -> None:
    now, impatient = time.monotonic(), _State.asked is not None and number == signal.SIGINT
    if _State.asked is None:
        _State.asked, _State.since_s = number, now
        threading.Thread(target=_insist, args=(_State.asking,), daemon=True).start()
        if _State.limits[-1] != 0:
            ask_for_patience()
    limit_s = _State.limits[-1]
    over = impatient or (limit_s is not ALWAYS and now - _State.since_s >= limit_s)
    if over and not impatient and frame is not None and frame.f_code in _ENDS:
        threading.Timer(0.02, _remind, (_State.asking,)).start()
    elif over:
        raise Stopped(_State.asked)


def _insist(asking: int) -> None:
    """Remind the main thread when its time is over, and end a process whose main thread does not hear."""
    time.sleep(GRACE_S)
    _remind(asking)
    time.sleep(LAST_S - GRACE_S)
    if _State.asking == asking and _State.limits[-1] is not ALWAYS and _State.asked is not None:
        stopped = Stopped(_State.asked)
        print(f"kvdistill: {stopped.message()}", file=sys.stderr, flush=True)
        os._exit(stopped.exit_code)


def _remind(asking: int) -> None:
    """Signal the main thread once more, if it still listens as it did then."""
    main = threading.main_thread().ident
    with _REMINDING:
        if _State.asking == asking and main is not None:
            signal.pthread_kill(main, signal.SIGTERM)
