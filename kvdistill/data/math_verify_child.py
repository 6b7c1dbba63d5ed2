"""The program that `checker.py` runs beside us: math-verify in a process that may be killed at any time.

Reads one JSON line `[first, second]` after another and answers each with one of the words of `ANSWERS`. Started by its
path, with the standard library and math-verify only: importing the package would load torch. Its clock and its look
at the parent end it where nobody is left to do so. Knows no task and no rule of ours.

    python -P math_verify_child.py PARENT_PID LIMIT_S MEMORY_BYTES
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

ANSWERS = ("equal", "different", "failed")
READY, BROKEN = "ready", "broken"
_LOOK_S = 1.0  # how often an idle child looks whether its parent is still there
_GRACE_S = 1.0  # the parent kills at the limit; who is still computing this long after it has no parent
_LONGEST = 20_000  # characters: what is longer is no answer
_DIGITS = 12  # decimals that count: 0.3333333 is not 1/3


def main() -> None:
    parent, limit_s, memory_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _limit_memory(memory_bytes)
    try:
        try:
            compare = _load()
        except (ImportError, MemoryError) as error:
            _say(answers, f"{BROKEN} {type(error).__name__}: {error}".replace("\n", " "))
            return
        _say(answers, READY)
        while (line := _next_line(parent)) is not None:
            first, second = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, limit_s + _GRACE_S)
            answer = compare(first, second)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _say(answers, answer)
    except BrokenPipeError:  # nobody listens any more
        os._exit(0)


def _limit_memory(num_bytes: int) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS has no such limit; the clock remains
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _say(channel: int, word: str) -> None:
    os.write(channel, word.encode() + b"\n")


_unread = bytearray()


def _next_line(parent: int) -> bytes | None:
    """The next line of standard input; None at its end, or when the parent is gone (a fork may hold the pipe open)."""
    while (end := _unread.find(b"\n")) < 0:
        if not select.select([0], [], [], _LOOK_S)[0]:
            if os.getppid() != parent:
                return None
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return None
        _unread.extend(data)
    line = bytes(_unread[:end])
    del _unread[: end + 1]
    return line


def _load() -> Any:
    """math-verify, and its first comparison, which builds its tables; both take seconds on a busy machine."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig
    from sympy import Expr, Rational, Set, Tuple
    from sympy.core.random import seed
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import And

    # no guessing: neither units (`3m` is not 3), nor boxes, nor the numbers inside a text that is no expression
    folding = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=folding)

    @lru_cache(maxsize=1024)
    def read(text: str) -> Any:
        found = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
        return found[0] if found else None

    def value(expression: Any) -> complex:
        # one point, on which the names of the variables agree; big enough to stand under most roots
        names = sorted(symbol.name for symbol in expression.free_symbols)
        point = {symbol: Rational(1000 + 7 * sum(map(ord, symbol.name)), 97) for symbol in expression.free_symbols}
        assert len(set(names)) == len(names)
        return complex(expression.subs(point).evalf(15))

    def differ(one: Any, two: Any) -> bool:
        """Whether two expressions plainly differ at one point: what spares sympy the search for a proof."""
        if not (isinstance(one, Expr) and isinstance(two, Expr)):
            return False
        try:
            a, b = value(one), value(two)
        except (TypeError, ValueError, OverflowError, AttributeError, ArithmeticError, AssertionError):  # no number
            return False
        return math.isfinite(abs(a)) and math.isfinite(abs(b)) and abs(a - b) > 1e-6 * max(1.0, abs(a), abs(b))

    def same(first: Any, second: Any) -> bool:
        return verify(first, second, float_rounding=_DIGITS, timeout_seconds=None, raise_on_error=True)

    def compare(first: str, second: str) -> str:
        if max(len(first), len(second)) > _LONGEST:
            return "different"
        random.seed(0)
        seed(0)  # sympy tries random points
        try:
            one, two = read(first), read(second)
            if one is None or two is None:
                return "different"
            if differ(one, two):
                return "different"
            is_ordered = isinstance(one, Set | Tuple | Relational | And) or isinstance(
                two, Set | Tuple | Relational | And
            )
            # verify() takes its arguments as gold and answer and follows the gold one's shape
            return "equal" if same(one, two) or (is_ordered and same(two, one)) else "different"
        except MemoryError:
            return "failed"
        except Exception:  # its own word for "no expression", "cannot compare": many kinds, none of them ours
            return "different"

    assert compare("\\frac{x}{2}", "0.5x") == "equal"
    return compare


if __name__ == "__main__":
    main()
