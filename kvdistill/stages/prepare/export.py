"""The prepared splits as JSONL for other trainers: the same problems, split the same way, in the forms they read.

Reads the prepared tables and writes `data/export/SPLIT.FORM.jsonl` in the run folder, streaming.
"""

from __future__ import annotations

import json
from pathlib import Path

from kvdistill.core.errors import DataError
from kvdistill.core.files import replacing
from kvdistill.core.layout import data_folder, tokenizer_folder
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import Recipe
from kvdistill.data.chat import write_chat
from kvdistill.data.export import FORMATS, export_row
from kvdistill.data.problems import SPLITS, Problem
from kvdistill.data.sets import find_rules
from kvdistill.data.tables import read_split
from kvdistill.data.tokenizers import load_tokenizer


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
