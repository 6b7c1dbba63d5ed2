"""A study's students on the recipe's public evaluations, and their records in the form that the report reads.

The suite's own files are in the student's folder, under `evaluated/`; the rows that go into its records.jsonl carry the
evaluation as their task, so BBH's 27 tasks count once in the macro average over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvdistill.core.errors import DataError, RunFolderError
from kvdistill.core.files import read_json_lines
from kvdistill.core.layout import tokenizer_folder
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import Recipe
from kvdistill.stages.evaluate.exams import SuiteOptions
from kvdistill.stages.evaluate.harness import quiet_harness
from kvdistill.stages.evaluate.identity import identify
from kvdistill.stages.evaluate.lm import MeteredLM
from kvdistill.stages.evaluate.records import RECORDS
from kvdistill.stages.evaluate.results import SCORED_BY
from kvdistill.stages.evaluate.suite import Exams, evaluate_suite, plan_suite

FOLDER = "evaluated"
_KEPT = ("style", "doc_hash", "prompt_hash", "prediction", "completion", "gold", "correct", "score", "nll", "tokens_in",
         "tokens_out", "forward_passes", "seconds", "truncated")  # fmt: skip


def recipe_options(recipe: Recipe) -> SuiteOptions:
    """How a recipe wants its public evaluations asked. NLL of the gold answers comes with them: it tells arms apart
    where no answer is right yet."""
    asked, data = recipe.evaluate, recipe.data
    return SuiteOptions(
        root=Path(data.root).expanduser() if data.root else None,
        num_fewshot=asked.num_fewshot,
        choice=asked.choice,
        chat=asked.chat,
        system_prompt=data.system_prompt if asked.chat else None,
        limit=asked.limit,
        max_new_tokens=asked.max_new_tokens if "max_new_tokens" in asked.model_fields_set else None,
        batch_size=asked.batch_size,
        style="direct" if data.style == "direct" else "cot",
        gold_nll=True,
    )


def check_public(recipe: Recipe, run: Path) -> Exams:
    """The recipe's evaluations, their data read and checked: DataError or RecipeError before anything is trained."""
    quiet_harness()
    if recipe.evaluate.chat and not AutoTokenizer.from_pretrained(tokenizer_folder(run)).chat_template:
        raise DataError("the tokenizer has no chat template", place="evaluate.chat", fix="set evaluate.chat=false")
    return plan_suite(recipe.evaluate.tasks, recipe_options(recipe))


def public_records(
    recipe: Recipe, run: Path, folder: Path, model: Any, tokenizer: Any, progress: Progress
) -> list[dict[str, Any]]:
    """Ask one trained student every public evaluation of the recipe (or what is left of them); rows for the report.

    folder: the student's, with its model. progress: over the questions of all evaluations together.
    """
    exams, options = check_public(recipe, run), recipe_options(recipe)
    chat = options.chat
    lm = MeteredLM(model, tokenizer, batch_size=options.batch_size, bos_in_front=not chat, chat=chat)
    asker = identify(str(folder / "model"), model.config, tokenizer, recipe.student.dtype, begins_with_bos=not chat)
    counts = {f"evaluate {name}": sum(len(exam) for exam in members) for name, members in exams.items()}

    def show(what: str, done: float, total: float) -> None:
        earlier = [*counts][: [*counts].index(what)]
        progress("evaluate", sum(counts[name] for name in earlier) + counts[what] * done / total, sum(counts.values()))

    try:
        evaluate_suite(lm, exams, options, folder / FOLDER, show, asker=asker)
    except RunFolderError as error:
        raise RunFolderError(
            error.what, place=error.place, fix=f"delete {folder / FOLDER} and give the command again"
        ) from error
    own = {task.key for task in recipe.data.tasks}
    return report_rows(read_json_lines(folder / FOLDER / RECORDS), exams, own)


def report_rows(records: Sequence[Mapping[str, Any]], exams: Exams, own_tasks: set[str]) -> list[dict[str, Any]]:
    """Records of the suite as the report reads them. own_tasks: names that mean a split of the run there."""
    rows = []
    for record in records:
        name, member = record["evaluation"], record["task"]
        if name not in exams or member not in {SCORED_BY.get(name, member)}:
            continue  # MC1 stays in the suite's own folder: one figure for the same questions
        alone = len(exams[name]) == 1 or name in SCORED_BY
        task = name if name not in own_tasks else f"{name} ({_how(record['style'])})"
        id = record["id"] if alone else f"{member}/{record['id']}"
        rows.append({"task": task, "id": id, **{key: record[key] for key in _KEPT}})
    return rows


def _how(style: str) -> str:
    kind, _, shots = style.partition("-")
    if kind == "fewshot":
        return f"{shots}-shot"
    return f"{shots}-shot, chat" if kind == "chat" else "public"
