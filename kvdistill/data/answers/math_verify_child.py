"""The program that `checker.py` runs beside us: math-verify in a process that may be killed at any time.

Says `ready` (or why it cannot start), then answers each pair of expressions that comes with `equal`, `different` or
`failed`. Started by its path, with the standard library and math-verify only: importing the package would load torch.
`limited_child.py` holds its limits and ends it with its parent. Knows no task and no rule of ours.

    python -P math_verify_child.py CHANNEL PARENT_PID LIMIT_S MEMORY_BYTES
"""

from __future__ import annotations

import random
import runpy
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

_LONGEST = 20_000  # characters: what is longer is no answer
_DIGITS = 12  # decimals that count: 0.3333333 is not 1/3
_TOLERANCE = 1e-6  # for what is plainly different; beyond it math-verify is asked


def main() -> None:
    limited = runpy.run_path(str(Path(__file__).parents[1] / "limited_child.py"))

    def load_pairs() -> Callable[[tuple[str, str]], str]:
        compare = load()
        return lambda pair: compare(*pair)

    limited["serve"](load_pairs)


def load() -> Callable[[str, str], str]:
    """math-verify, and its first comparison, which builds its tables; both take seconds on a busy machine."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig
    from sympy import Expr, Float, MatrixBase, Rational, Set, Tuple
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

    # that x < 2 is (-\\infty, 2) is known where allow_set_relation_comp
    same = partial(
        verify, float_rounding=_DIGITS, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
    )

    def at_one_point(expression: Any) -> Any:
        """An exact number: decimals as fractions, and a point for the variables on which their names agree, big enough
        to stand under most roots."""
        exact = expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})
        names = {symbol.name: symbol for symbol in exact.free_symbols}
        assert len(names) == len(exact.free_symbols)
        return exact.subs({symbol: Rational(1000 + 7 * sum(map(ord, name)), 97) for name, symbol in names.items()})

    def differ(one: Any, two: Any) -> bool:
        """Whether two expressions plainly differ at one point: what spares sympy the search for a proof, and what
        math-verify would round to nothing (1/2^{99} and 1/2^{98})."""
        if isinstance(one, MatrixBase) and isinstance(two, MatrixBase) and one.shape == two.shape:
            return any(map(differ, one.flat(), two.flat()))
        if not (isinstance(one, Expr) and isinstance(two, Expr)):
            return False
        try:
            a, b = at_one_point(one), at_one_point(two)
            x, y = complex(a.evalf(15)), complex(b.evalf(15))
            if abs(x - y) > _TOLERANCE * max(1.0, abs(x), abs(y)):
                return True
            gap = (a - b).evalf(2, strict=True)  # raises where it may be nothing at all
            size = _TOLERANCE * max(abs(x), abs(y)) if one.has(Float) or two.has(Float) else 0.0
            return bool(gap.is_finite and gap != 0 and abs(gap) > size)
        except (TypeError, ValueError, AttributeError, ArithmeticError, AssertionError):  # no number
            return False

    def compare(first: str, second: str) -> str:
        if max(len(first), len(second)) > _LONGEST:
            return "different"
        random.seed(0)
        seed(0)  # sympy tries random points
        try:
            one, two = read(first), read(second)
            if one is None or two is None or differ(one, two):
                return "different"
            # verify() takes its arguments as gold and answer and follows the gold one's shape
            ordered = any(isinstance(each, Set | Tuple | Relational | And) for each in (one, two))
            orders = [(one, two), (two, one)] if ordered else [(one, two)]
            return "equal" if any(same(*pair) for pair in orders) else "different"
        except MemoryError:
            return "failed"
        except Exception:  # its own word for "no expression", "cannot compare": many kinds, none of them ours
            return "different"

    assert compare("\\frac{x}{2}", "0.5x") == "equal"
    return compare


if __name__ == "__main__":
    main()
