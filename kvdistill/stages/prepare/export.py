"""The prepared splits as JSONL for other trainers: the same problems, split the same way, in the forms they read.

The forms are `prompt-completion`, `messages`, `text`; one JSON object a row. `text` is what a plain row trains on, or
what the chat template gives for the whole conversation; prompt and completion together are the text. Where a chat
template ends a turn without a token of its own, the tokenizer's end-of-text stands there, as in our own training. A
plain text carries no end-of-text: trainers add their own.

Reads the prepared tables and writes `data/export/SPLIT.FORM.jsonl` in the run folder, streaming.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.core.files import replacing
from kvdistill.core.layout import data_folder, tokenizer_folder
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import Recipe
from kvdistill.data.chat import chat_messages, write_chat
from kvdistill.data.problems import SPLITS, Problem, Row
from kvdistill.data.sets import find_rules
from kvdistill.data.tables import read_split
from kvdistill.data.tokenizers import load_tokenizer

FORMATS = ("prompt-completion", "messages", "text")


def export(recipe: Recipe, run: Path, form: str, progress: Progress) -> list[str]:
    """Write every split that has rows; the files. DataError for a form that is not one of FORMATS."""
    if form not in FORMATS:
        raise DataError(f"unknown format {form!r}", place="--format", fix=f"use {', '.join(FORMATS)}")
    chat = recipe.data.template == "chat"
    tokenizer = load_tokenizer(str(tokenizer_folder(run))) if chat else None
    system = recipe.data.system_prompt
    written: list[str] = []
    for split in SPLITS:
        examples = read_split(run, split)
        if not examples:
            continue
        path = data_folder(run) / "export" / f"{split}.{form}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
            for number, example in enumerate(examples, start=1):
                problem = Problem(
                    example.task, example.id, example.question, example.reasoning, example.answer, example.language
                )
                row = find_rules(example.task).write(problem, example.style)  # type: ignore[arg-type]
                if tokenizer is not None:
                    row = write_chat(row, tokenizer, system_prompt=system)
                file.write(json.dumps(export_row(row, form), ensure_ascii=False) + "\n")
                if number % 500 == 0 or number == len(examples):
                    progress(f"exporting {split}", number, len(examples))
        written.append(str(path))
    return written


def export_row(
    row: Row, format: str, tokenizer: PreTrainedTokenizerFast | None = None, *, system_prompt: str | None = None
) -> dict[str, Any]:
    """One row in one of FORMATS, with its task, id, style, language, question, reasoning and answer alongside, by which
    it can be read back as a file of one's own.

    row: plain, or through a chat template already. tokenizer: its chat template is used for a row that is plain.
    system_prompt: the first message of a plain row's conversation; a rendered row has its own.
    Raises DataError for an unknown format, and what `write_chat` raises.
    """
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}", place="--format", fix=f"use {', '.join(FORMATS)}")
    problem = row.problem
    about = {"task": problem.task, "id": problem.id, "style": row.style, "language": problem.language}
    about |= {"question": problem.question, "reasoning": problem.reasoning, "answer": problem.answer}
    if format == "messages":
        return {"messages": chat_messages(row, system_prompt=system_prompt), **about}
    if tokenizer is not None and not row.rendered:
        row = write_chat(row, tokenizer, system_prompt=system_prompt)
    trailing = row.frame.trailing if row.frame is not None else ""
    if format == "text":
        return {"text": row.text + trailing, **about}
    return {"prompt": row.prompt, "completion": row.completion + row.closing + trailing, **about}
