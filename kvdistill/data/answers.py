"""What a completion answers, and whether that is right.

A task marks its answer, and only what stands after the first mark counts: never "the last number in the text".
The rules belong to the tasks; a task key that is not built in is a local file and follows `jsonl`'s rules.
"""

from __future__ import annotations

from kvdistill.data.tasks import JSONL, TASKS


def extract_answer(task: str, completion: str) -> str | None:
    """The marked answer of a generated text in the task's normal form, or None where nothing is marked."""
    return TASKS.get(task, JSONL).extract(completion)


def is_correct(task: str, completion: str, gold: str) -> bool:
    """Whether the marked answer of `completion` equals `gold` under the task's own rule (numbers: exact decimals)."""
    rules = TASKS.get(task, JSONL)
    answer = rules.extract(completion)
    return answer is not None and rules.same(answer, gold)
