"""Questions without their reasoning.

`Questions` is what a student that thinks in latents reads, `Directly` the texts of one that answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.data.encode import Example
from kvdistill.data.tables import ExampleRows
from kvdistill.models.generate import left_padded, right_padded


@dataclass(frozen=True)
class Questions:
    """B questions without their reasoning: prompts [B, P] padded on the left, answers [B, A] on the right."""

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    answer_ids_BA: Tensor
    answer_mask_BA: Tensor

    @classmethod
    def of(cls, rows: Sequence[Example], pad_id: int) -> Questions:
        """The prompt's and the answer's tokens of each example."""
        answers = [[i for i, code in zip(row.input_ids, row.segments, strict=True) if code == ANSWER] for row in rows]
        return cls.of_ids([row.prompt_ids for row in rows], answers, pad_id)

    @classmethod
    def of_ids(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int) -> Questions:
        prompt_ids_BP, prompt_mask_BP = left_padded(prompts, pad_id, torch.device("cpu"))
        mask_BA = right_padded([[1] * len(answer) for answer in answers], 0)
        return cls(prompt_ids_BP, prompt_mask_BP, right_padded(answers, pad_id), mask_BA)

    def to(self, device: torch.device | str) -> Questions:
        return Questions(*(getattr(self, name).to(device) for name in [one.name for one in fields(self)]))


def question_sizes(rows: Sequence[Example]) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the answer of each."""
    return [(row.segments.count(PROMPT), row.segments.count(ANSWER)) for row in rows]


def as_read(rows: Sequence[Example], reasoning: str) -> Sequence[Example]:
    """Rows as the student of an arm with this `reasoning` reads them: one that answers directly gets none."""
    return Directly(rows) if reasoning == "none" else rows


class Directly(ExampleRows):
    """The same rows with nothing between question and answer."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Example:
        row = self._rows[number]
        kept = [place for place, code in enumerate(row.segments) if code != REASONING]
        ids, segments = ([values[place] for place in kept] for values in (row.input_ids, row.segments))
        return replace(row, input_ids=ids, segments=segments)
