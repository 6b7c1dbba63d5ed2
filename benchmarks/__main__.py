"""`python -m benchmarks [NAME …]`: run them all, or the named ones. Exit code 1 where a bar is missed."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "step_cost": "benchmarks.step_cost",
    "parts": "benchmarks.parts",
    "formatting": "benchmarks.formatting",
    "leaks": "benchmarks.leaks",
    "alignment": "benchmarks.alignment",
    "report_speed": "benchmarks.report_speed",
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}: one of {', '.join(BENCHMARKS)}")
        return 2
    met = [importlib.import_module(BENCHMARKS[name]).run() for name in names or BENCHMARKS]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
