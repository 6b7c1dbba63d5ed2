"""The evaluate stage: a trained student on its run's test split and on the recipe's public evaluations.

Reads a model folder with plain transformers, exactly as anybody else would; knows nothing of how it was trained. What
it asks and how is the suite's: `kvdistill evaluate MODEL --tasks own` asks the same. Answers wait under `evaluated/`,
so that a kill loses none, until all are there; then records.jsonl is written and, last, evaluated.json. There a public
evaluation is one task, so BBH's 27 tasks count once in the macro average over tasks. Where an arm of the study thinks
in latents, latent.json is measured in between (`latents.py`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvdistill.arms.arm import Arm
from kvdistill.arms.latent_student import student_of
from kvdistill.arms.student import load_saved
from kvdistill.core.config import asked_hash
from kvdistill.core.errors import DataError, RunFolderError
from kvdistill.core.files import write_json
from kvdistill.core.layout import ANSWERS, LATENTS, evaluated_mark, tokenizer_folder, trained_mark
from kvdistill.core.marks import check_marked, read_mark, write_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import Recipe
from kvdistill.core.records import Record, read_records, write_records
from kvdistill.core.runtime import DTYPES, derive_seed
from kvdistill.stages.evaluate.book import RECORDS, SCORED_BY, check_folder, identify
from kvdistill.stages.evaluate.exams import SuiteOptions
from kvdistill.stages.evaluate.latents import measure_answers
from kvdistill.stages.evaluate.own import OWN, RunTest
from kvdistill.stages.evaluate.suite import Exams, evaluate_suite, make_lm, plan_suite


def evaluate(arm: Arm, progress: Progress = silent) -> None:
    """Answer and score every question with one trained student. Returns at once where that is done.

    A student that was asked something else before (another `evaluate` section) is asked anew.
    """
    recipe, run, folder = arm.experiment.recipe, arm.experiment.run, arm.folder
    asked, before = asked_hash(recipe), read_mark(evaluated_mark(folder))
    if before is not None and before.get("asked") == asked:
        return
    if read_mark(trained_mark(folder)) is None:
        raise RunFolderError(
            "this student is not trained yet", place=str(folder), fix="run `kvdistill train RECIPE` first"
        )
    check_marked(trained_mark(folder), "model/", fix=f"delete {folder} and run `kvdistill train RECIPE` again")
    model, tokenizer = load_saved(folder / "model", DTYPES[recipe.student.dtype])
    student = student_of(model).to(arm.device)
    options, public = recipe_options(recipe), check_public(recipe, run)
    exams: Exams = {OWN: [*RunTest(run, arm.recipe.reasoning).exams(OWN, recipe.evaluate.max_new_tokens)], **public}
    bos = not options.chat
    asker = identify(str(folder / "model"), student.model.config, tokenizer, recipe.student.dtype, begins_with_bos=bos)
    lm = make_lm(student.model, tokenizer, exams, options, student=student, begins_with_bos=bos)
    counts = {f"evaluate {name}": sum(map(len, members)) for name, members in exams.items()}

    def show(what: str, done: float, total: float) -> None:
        """One bar over the questions of all evaluations together."""
        earlier = [*counts][: [*counts].index(what)]
        here = counts[what] * done / total if total else 0.0
        progress("evaluate", sum(counts[name] for name in earlier) + here, sum(counts.values()))

    evaluated_mark(folder).unlink(missing_ok=True)  # from here on the records beside it are not what is asked
    if before is not None:
        try:  # answers to public evaluations that are still asked alike are kept
            check_folder(exams, options, folder / ANSWERS, asker)
        except RunFolderError:
            shutil.rmtree(folder / ANSWERS, ignore_errors=True)
    try:
        evaluate_suite(lm, exams, options, folder / ANSWERS, show, asker=asker)
    except RunFolderError as error:
        raise RunFolderError(
            error.what, place=error.place, fix=f"delete {folder / ANSWERS} and give the command again"
        ) from error
    answers = folder / ANSWERS / RECORDS
    found = report_rows(read_records(answers) if answers.exists() else [], exams, {t.key for t in recipe.data.tasks})
    write_records(folder / "records.jsonl", [dataclasses.replace(one, arm=arm.name, seed=arm.seed) for one in found])
    (folder / LATENTS).unlink(missing_ok=True)
    if any(one.thinks for one in arm.experiment.arms.values()):
        measured = measure_answers(
            student,
            tokenizer,
            [one.requests[0].args[0] for exam in exams[OWN] for one in exam.questions(options.limit, None)],
            [record for record in found if record.evaluation == OWN],
            max_new_tokens=recipe.evaluate.max_new_tokens,
            batch_size=recipe.evaluate.batch_size,
            most=recipe.evaluate.match_examples,
            seed=derive_seed(arm.seed, "latents"),
        )
        write_json(folder / LATENTS, measured)
    facts = {"arm": arm.name, "seed": arm.seed, "questions": len(found), "asked": asked}
    write_mark(evaluated_mark(folder), facts, ["records.jsonl", LATENTS, *([ANSWERS] if public else [])])
    if not public:  # else the figures of public evaluations stay beside their answers
        shutil.rmtree(folder / ANSWERS)


def recipe_options(recipe: Recipe) -> SuiteOptions:
    """How a recipe wants its evaluations asked. NLL of the gold answers comes with them: it tells arms apart where no
    answer is right yet."""
    data, system = recipe.data, recipe.data.system_prompt if recipe.evaluate.chat else None
    return SuiteOptions.of(recipe.evaluate, data.root, data.style, system_prompt=system, gold_nll=True)


def check_public(recipe: Recipe, run: Path) -> Exams:
    """The recipe's public evaluations, data read and checked: DataError or RecipeError before anything is trained."""
    if not recipe.evaluate.tasks:
        return {}
    if recipe.evaluate.chat and not AutoTokenizer.from_pretrained(tokenizer_folder(run)).chat_template:
        raise DataError("the tokenizer has no chat template", place="evaluate.chat", fix="set evaluate.chat=false")
    return plan_suite(recipe.evaluate.tasks, recipe_options(recipe))


def report_rows(records: Sequence[Record], exams: Mapping[str, Sequence[Any]], own_tasks: set[str]) -> list[Record]:
    """Records of the suite as the report reads them: the run's own, in the order of tasks and questions, then others.

    own_tasks: names that mean a split of the run, and no public evaluation.
    """
    places = {exam.name: place for place, exam in enumerate(exams.get(OWN, ()))}
    own = [record for record in records if record.evaluation == OWN]
    rows = sorted(own, key=lambda record: (places[record.task], record.number or 0))
    for record in records:
        name, member = record.evaluation, record.task
        if name == OWN or name not in exams or member not in {SCORED_BY.get(name, member)}:
            continue  # MC1 stays in the suite's own folder: one figure for the same questions
        how, _, shots = record.style.partition("-")
        written = {"fewshot": f"{shots}-shot", "chat": f"{shots}-shot, chat"}.get(how, "public")
        task = name if name not in own_tasks else f"{name} ({written})"
        alone = len(exams[name]) == 1 or name in SCORED_BY
        rows.append(dataclasses.replace(record, task=task, id=record.id if alone else f"{member}/{record.id}"))
    return rows
