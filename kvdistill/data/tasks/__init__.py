"""The tasks, by name. A new task is one small file here and one entry below."""

from __future__ import annotations

import difflib

from kvdistill.core.errors import DataError
from kvdistill.core.quoting import quoted
from kvdistill.data.tasks.arc_challenge import ARC_CHALLENGE
from kvdistill.data.tasks.base import Layout, Loaded, Published, Task
from kvdistill.data.tasks.generated import CHAIN, PRODUCT
from kvdistill.data.tasks.gsm8k import GSM8K
from kvdistill.data.tasks.hotpotqa import HOTPOTQA
from kvdistill.data.tasks.math import MATH
from kvdistill.data.tasks.math23k import MATH23K
from kvdistill.data.tasks.own_file import CSV, JSONL, PARQUET
from kvdistill.data.tasks.strategyqa import STRATEGYQA
from kvdistill.data.tasks.svamp import SVAMP

_ALL = (
    CHAIN,
    PRODUCT,
    GSM8K,
    JSONL,
    CSV,
    PARQUET,
    SVAMP,
    STRATEGYQA,
    MATH23K,
    MATH,
    ARC_CHALLENGE,
    HOTPOTQA,
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str, *, place: str) -> Task:
    """The task of that name; DataError with the nearest name otherwise."""
    if name not in TASKS:
        folded = name.casefold().replace("-", "_")
        near = difflib.get_close_matches(folded, TASKS, n=1, cutoff=0.5) or [t for t in TASKS if t.startswith(folded)]
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown task {quoted(name)}", place=place, fix=f"{meant}there are: {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["CHAIN", "GSM8K", "JSONL", "PRODUCT", "TASKS", "Layout", "Loaded", "Published", "Task", "find_task"]
