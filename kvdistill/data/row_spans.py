"""Which characters every token of an encoded row stands for, in the text that all tokenizers of a study share.

The shared text of a row is what the problem says: the prompt (through a chat template: the user's own words) and the
completion, reasoning and answer. What a template or a tokenizer puts around it differs from model to model: those
tokens stand for no character, and have a role instead: at the beginning, between the turns, at the end.
Knows rows and tokenizers, no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from kvdistill.core.segments import END, START, TEXT, TURN, UNKNOWN
from kvdistill.data.encode import Example, Plan, plan_of
from kvdistill.data.problems import Row
from kvdistill.data.spans import TokenSpans, token_spans


class RowSpans(NamedTuple):
    """spans: float32 [T, 2], [start, end) in the shared text; both 0 for tokens that stand for none of it.

    roles: int8 [T]. unknown: how many tokens say only that something stands there.
    """

    spans: np.ndarray
    roles: np.ndarray
    unknown: int


def row_spans(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], examples: Sequence[Example]) -> list[RowSpans]:
    """Spans of every token of `examples`, which are `rows` encoded by this tokenizer."""
    plans = [plan_of(tokenizer, row.frame) for row in rows]
    texts = [text for plan, row in zip(plans, rows, strict=True) for text, _ in plan.texts(row)]
    found = token_spans(tokenizer, texts)
    return [
        _join(plan, row, example, asked, completion)
        for plan, row, example, asked, completion in zip(plans, rows, examples, found[::2], found[1::2], strict=True)
    ]


def _join(plan: Plan, row: Row, example: Example, asked: TokenSpans, completion: TokenSpans) -> RowSpans:
    """The same pieces in the same order as `encode.py` joins them: head, what is asked, middle, completion, tail."""
    first, second = plan.shared(row)
    behind_prompt = first[1] - first[0]
    parts = [
        _around(len(plan.head), START),
        _shared(asked, len(plan.user_anchor), first, 0, (START, TURN)),
        _around(len(plan.middle), TURN),
        _shared(completion, len(plan.completion_anchor), second, behind_prompt, (TURN, END)),
        _around(len(plan.tail), END),
    ]
    spans, roles = (np.concatenate([part[i] for part in parts]) for i in range(2))
    assert len(roles) == len(example.input_ids), "spans are made for the tokens that were encoded"
    return RowSpans(spans, roles, int(asked.is_unknown.sum() + completion.is_unknown.sum()))


def _around(number: int, role: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((number, 2), np.float32), np.full(number, role, np.int8)


def _shared(
    found: TokenSpans, num_anchor: int, place: tuple[int, int], offset: int, around: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a stretch, behind those of its anchor. Characters [start, end) of it are shared text, from `offset` on.

    around: roles of tokens that lie before and behind it altogether (words and spaces of the template).
    """
    (start, end), spans = place, np.stack([found.start, found.end], axis=1)[num_anchor:]
    roles = np.where(found.is_unknown[num_anchor:], UNKNOWN, TEXT).astype(np.int8)
    roles[(spans[:, 1] <= start) & (spans[:, 0] < start)] = around[0]
    roles[(spans[:, 0] >= end) & (spans[:, 1] > end)] = around[1]
    inside = np.clip(spans, start, end) - start + offset
    inside[(roles == around[0]) | (roles == around[1])] = 0
    return inside.astype(np.float32), roles
