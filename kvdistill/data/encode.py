"""Text to token ids with a segment code per token (codes of `kvdistill.core.targets`).

Prompt and completion are tokenized apart and joined: the prompt's ids are then the ids that generation starts
from, by construction, whatever the tokenizer would merge across the boundary. Inside the completion the
tokenizer's character offsets tell reasoning from answer; a token across that boundary belongs to the segment in
which it starts. Beginning-of-text (where the tokenizer has one) counts as prompt, end-of-text as answer.
Words in the data that look like special tokens are tokenized as plain text. Knows no file; padding is the collator's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.core.targets import ANSWER, PROMPT, REASONING
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import Row


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row. `answer` is the gold answer, `prompt` the text that generation starts from.

    input_ids, segments: one entry a token, no padding. doc_hash: of the folded question, the same in every style;
    prompt_hash: of the exact prompt text.
    """

    task: str
    id: str
    style: str
    prompt: str
    answer: str
    input_ids: list[int]
    segments: list[int]
    doc_hash: str
    prompt_hash: str
    reasoning: str = ""
    language: str = "en"

    @property
    def num_prompt_tokens(self) -> int:
        return self.segments.count(PROMPT)

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: self.num_prompt_tokens]


def encode_row(tokenizer: PreTrainedTokenizerFast, row: Row) -> Example:
    """One row; see `encode_rows`."""
    return encode_rows(tokenizer, [row])[0]


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[Example]:
    """All rows, batched through the tokenizer, in order.

    Raises DataError for a tokenizer without an end-of-text token or without character offsets, and for a gold answer
    that the tokenizer cannot spell.
    """
    if not rows:
        return []
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise DataError(
            "the tokenizer has no end-of-text token or no character offsets",
            place="data.tokenizer",
            fix="load it with kvdistill.data.tokenizers.load_tokenizer",
        )
    prompts = _tokenize(tokenizer, [row.prompt for row in rows])["input_ids"]
    completions = _tokenize(tokenizer, [row.completion for row in rows], return_offsets_mapping=True)
    encoded = zip(rows, prompts, completions["input_ids"], completions["offset_mapping"], strict=True)
    return [_join(tokenizer, row, prompt, ids, offsets) for row, prompt, ids, offsets in encoded]


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], **options: bool) -> dict[str, list]:
    # split_special_tokens: data must not be able to write an end-of-text into a training text
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
        **options,
    )


def _join(
    tokenizer: PreTrainedTokenizerFast,
    row: Row,
    prompt: list[int],
    completion: list[int],
    offsets: list[tuple[int, int]],
) -> Example:
    bos, eos, unk = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    first = [] if bos is None else [bos]
    boundary = len(row.reasoning)
    segments = [REASONING if start < boundary else ANSWER for start, _ in offsets]
    if unk is not None and unk in completion and unk != eos:
        _refuse_unknown(row, unk, completion, segments)
    problem = row.problem
    return Example(
        task=problem.task,
        id=problem.id,
        style=row.style,
        prompt=row.prompt,
        answer=problem.answer,
        input_ids=[*first, *prompt, *completion, eos],
        segments=[PROMPT] * (len(first) + len(prompt)) + segments + [ANSWER],
        doc_hash=question_hash(problem.question),
        prompt_hash=hashlib.sha256(row.prompt.encode()).hexdigest()[:32],
        reasoning=problem.reasoning,
        language=problem.language,
    )


def _refuse_unknown(row: Row, unk: int, completion: list[int], segments: list[int]) -> None:
    if any(id == unk and segment == ANSWER for id, segment in zip(completion, segments, strict=True)):
        raise DataError(
            f"the tokenizer cannot spell the answer {row.problem.answer!r} of {row.problem.task} / {row.problem.id}",
            place="data.tokenizer",
            fix="use a byte-level tokenizer (Qwen, Llama-3, GPT-2) or `characters`",
        )
