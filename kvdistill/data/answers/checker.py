"""Two LaTeX expressions compared by math-verify, in a process of its own with a time and a memory limit (`limited.py`).

Knows no task and folds nothing; `latex.py` says what is worth asking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, final

from kvdistill.core.errors import KVDistillError
from kvdistill.data.limited import AbstractLimited, one_a_process

# timeout: not answered within the limit; failed: out of memory, or the child died of it twice
Verdict = Literal["equal", "different", "timeout", "failed"]

LIMIT_S = 5.0  # a comparison; starting the child does not count
MEMORY_BYTES = 4 << 30  # address space of the child
_CHILD = Path(__file__).with_name("math_verify_child.py")


@final
class Checker(AbstractLimited):
    """math-verify, for any number of threads of the process that made it. counts: verdicts given, and `started`."""

    def __init__(self, limit_s: float = LIMIT_S, memory_bytes: int = MEMORY_BYTES) -> None:
        super().__init__(limit_s, memory_bytes)

    @property
    def program(self) -> Path:
        return _CHILD

    def not_started(self, reason: str) -> KVDistillError:
        return KVDistillError(
            f"math-verify does not start: {reason}",
            place="comparing LaTeX answers",
            fix="install math-verify into the environment that runs kvdistill, and leave it 1 GB of memory",
        )

    def compare(self, first: str, second: str) -> Verdict:
        """What math-verify says of two LaTeX expressions without dollar signs.

        KVDistillError where it cannot be started at all.
        """
        said = self.ask((first, second))
        verdict: Verdict = said if said in ("equal", "different", "timeout") else "failed"
        self.counts[verdict] += 1
        return verdict


CHECKER = Checker()  # of this process
one_a_process(CHECKER)


def count_undecided() -> int:
    """Comparisons of this process so far that ended in a timeout or failed; they count as not equal."""
    return CHECKER.counts["timeout"] + CHECKER.counts["failed"]
