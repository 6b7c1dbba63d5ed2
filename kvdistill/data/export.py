"""Rows in the forms other trainers read: `prompt-completion`, `messages`, `text`; one JSON object a row.

`text` is what a plain row trains on, or what the chat template gives for the whole conversation; prompt and completion
together are the text. Where a chat template ends a turn without a token of its own, the tokenizer's end-of-text stands
there, as in our own training. A plain text carries no end-of-text: trainers add their own. Knows no file.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.data.chat import chat_messages, write_chat
from kvdistill.data.problems import Row

FORMATS = ("prompt-completion", "messages", "text")


def export_row(
    row: Row, format: str, tokenizer: PreTrainedTokenizerFast | None = None, *, system_prompt: str | None = None
) -> dict[str, Any]:
    """One row in one of FORMATS, with its task, id, style and language alongside.

    row: plain, or through a chat template already. tokenizer: its chat template is used for a row that is plain.
    system_prompt: the first message of a plain row's conversation; a rendered row has its own.
    Raises DataError for an unknown format, and what `write_chat` raises.
    """
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}", place="--format", fix=f"use {', '.join(FORMATS)}")
    problem = row.problem
    about = {"task": problem.task, "id": problem.id, "style": row.style, "language": problem.language}
    if format == "messages":
        return {"messages": chat_messages(row, system_prompt=system_prompt), **about}
    if tokenizer is not None and not row.rendered:
        row = write_chat(row, tokenizer, system_prompt=system_prompt)
    trailing = row.frame.trailing if row.frame is not None else ""
    if format == "text":
        return {"text": row.text + trailing, **about}
    return {"prompt": row.prompt, "completion": row.completion + row.closing + trailing, **about}
