"""What a model answers to examples, as text: shared by learning curves and by evaluation, so that both ask alike.

Rank 2: knows examples and generation, no stage and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvdistill.arms.student import Student
from kvdistill.data.encode import Example


def greedy_answers(
    student: Student,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[str, int]]:
    """The greedy completion of each example's prompt as text, and its number of tokens, in the order given."""
    answers = student.generate(
        [example.prompt_ids for example in examples],
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [(tokenizer.decode(ids, skip_special_tokens=True), len(ids)) for ids in answers]
