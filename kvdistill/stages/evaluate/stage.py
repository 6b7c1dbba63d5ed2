"""The evaluate stage: greedy answers of a trained student on the test problems, one record per question.

Reads a model folder with plain transformers, exactly as anybody else would; knows nothing of how it was trained.
Writes records.jsonl and, last, evaluated.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdistill.arms.answering import greedy_answers
from kvdistill.arms.arm import Arm
from kvdistill.arms.student import CausalStudent
from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import write_json, write_text
from kvdistill.core.layout import evaluated_mark, trained_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import Recipe
from kvdistill.core.runtime import DTYPES, Stopwatch, pick_device
from kvdistill.core.segments import ANSWER
from kvdistill.data.encode import Example
from kvdistill.data.grading import extract_answer, is_correct
from kvdistill.data.tables import read_split
from kvdistill.models.generate import segment_nll


def evaluate(of: Arm, progress: Progress = silent) -> None:
    """Answer and score every test problem with one trained student. Returns at once where that is done."""
    recipe, run, arm, seed, folder = of.experiment.recipe, of.experiment.run, of.name, of.seed, of.folder
    if evaluated_mark(folder).exists():
        return
    if not trained_mark(folder).exists():
        raise RunFolderError(
            "this student is not trained yet", place=str(folder), fix="run `kvdistill train RECIPE` first"
        )
    device = pick_device(recipe.hardware.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=DTYPES[recipe.student.dtype], use_safetensors=True
        ).to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` loses self
    except (OSError, ValueError, SafetensorError) as error:
        raise RunFolderError(
            f"the trained student cannot be loaded ({str(error).strip().splitlines()[0]})",
            place=str(folder / "model"),
            fix=f"delete {folder} and run `kvdistill train RECIPE` again",
        ) from None
    examples = test_examples(recipe, run)
    records = answer(model, tokenizer, examples, recipe, lambda done, total: progress("evaluate", done, total))
    if recipe.evaluate.tasks:
        from kvdistill.stages.evaluate.public import public_records  # lm-eval takes seconds to import

        records += public_records(recipe, run, folder, model, tokenizer, progress)
    lines = [json.dumps({"arm": arm, "seed": seed, **record}, ensure_ascii=False) for record in records]
    write_text(folder / "records.jsonl", "\n".join(lines) + "\n")
    write_json(evaluated_mark(folder), {"arm": arm, "seed": seed, "questions": len(records)})


def test_examples(recipe: Recipe, run: Path) -> list[Example]:
    """The test problems in order, at most `evaluate.limit` of each task."""
    limit = recipe.evaluate.limit
    seen: dict[str, int] = {}
    chosen: list[Example] = []
    for example in read_split(run, "test"):
        seen[example.task] = seen.get(example.task, 0) + 1
        if limit is None or seen[example.task] <= limit:
            chosen.append(example)
    return chosen


def answer(model: Any, tokenizer: Any, examples: list[Example], recipe: Recipe, progress: Any) -> list[dict[str, Any]]:
    """One record per example: greedy prediction, whether it is right, and the NLL of the gold answer tokens."""
    watch = Stopwatch()
    answers = greedy_answers(
        CausalStudent(model),
        tokenizer,
        examples,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        batch_size=recipe.evaluate.batch_size,
        progress=progress,
    )
    seconds = watch.wall_s() / max(1, len(examples))
    nll = segment_nll(
        model,
        [e.input_ids for e in examples],
        [[s == ANSWER for s in e.segments] for e in examples],
        pad_id=tokenizer.pad_token_id,
        batch_size=recipe.evaluate.batch_size,
    )
    records = []
    for example, (text, num_tokens), gold_nll in zip(examples, answers, nll, strict=True):
        records.append(
            {
                "task": example.task,
                "id": example.id,
                "style": example.style,
                "doc_hash": example.doc_hash,
                "prompt_hash": example.prompt_hash,
                "prediction": extract_answer(example.task, text),
                "completion": text,
                "gold": example.answer,
                "correct": is_correct(example.task, text, example.answer),
                "nll": gold_nll,
                "tokens_out": num_tokens,
                "seconds": seconds,
            }
        )
    return records
