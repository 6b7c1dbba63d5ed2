"""`kvdistill recipe RECIPE --expand`: every arm resolved, also those that report.curves adds, and what it will cost.

What is known of the cost depends on how far the run folder is: where its budgets are planned, they are shown; where
data is prepared, they are computed over its texts, as a study would; before that by the same closed forms for texts of
an assumed length, of the student alone. Nothing is written, no weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvdistill.arms.budget import TrainingBudgetController
from kvdistill.arms.experiment import Experiment
from kvdistill.arms.student import CausalStudent
from kvdistill.core.arms import arm_recipe
from kvdistill.core.budgets import FILE, read_budgets
from kvdistill.core.config import run_folder
from kvdistill.core.errors import KVDistillError, ModelError, RunFolderError
from kvdistill.core.files import read_json
from kvdistill.core.layout import data_folder, replicate_folder
from kvdistill.core.recipe import ArmRecipe, DataRecipe, Recipe, TaskRecipe
from kvdistill.core.runtime import quiet_libraries
from kvdistill.data.encode import encode_rows
from kvdistill.data.problems import styles_of
from kvdistill.data.sets import TASKS
from kvdistill.data.tokenizers import CHARACTERS, character_tokenizer
from kvdistill.models import batch_geometry, model_config
from kvdistill.models.published import published_config
from kvdistill.study.folder import difference

ASSUMED_PIECES = 4096  # of a tokenizer that is not looked at, or not trimmed yet
MEASURED_PROBLEMS = 200  # of each task whose problems are made here
COSTS = ("steps", "data", "tokens", "student_flops", "total_flops", "amortised_flops")


def expand(recipe: Recipe, *, text_length: int | None = None) -> dict[str, Any]:
    """The arms of a recipe, complete, and what each will cost for one seed.

    text_length: tokens of a text, where no data is prepared; unset: measured where problems are made here, else half of
    data.max_length.

    Returns "expanded": {name, basis, seeds, student, arms: {arm: {changes, derived, match, resolved, COSTS}}, notes}.
    A cost that is not known is None. Raises RecipeError for a parity that cannot be reached.
    """
    quiet_libraries()
    run, notes = run_folder(recipe), list[str]()
    planned = _planned(recipe, run)
    student, basis = None, f"as planned ({FILE} in {run})"
    if planned is None and (prepared := _prepared(recipe, run)) is not None:
        controller = TrainingBudgetController(prepared)
        planned = {name: controller.budget(name) for name in recipe.every_arm}
        basis = f"closed forms over the texts prepared in {run}"
    if planned is not None:
        with suppress(KVDistillError):
            student = Experiment(recipe, run).of(recipe.seeds[0]).student_outline
    else:
        length, how = _text_length(recipe.data, text_length)
        student = _assumed_student(recipe, notes)
        planned = {name: _assumed(recipe, name, length, student) for name in recipe.every_arm}
        basis = f"nothing is prepared: closed forms, texts of {length:.3g} tokens ({how}), the student alone"
    arms = {name: _shown_arm(recipe, name, planned[name]) for name in recipe.every_arm}
    if any(arm["steps"] is None for arm in arms.values()):
        notes.append("steps of arms matched by total FLOPs are computed when data is prepared")
    found = {
        "name": recipe.name,
        "basis": basis,
        "seeds": list(recipe.seeds),
        "student": None if student is None else _sizes(student),
        "arms": arms,
        "notes": notes,
    }
    return {"expanded": found}


def _planned(recipe: Recipe, run: Path) -> dict[str, Any] | None:
    """Budgets that were written for this very recipe."""
    budgets = read_budgets(run)
    with suppress(RunFolderError, ValueError):  # a file that is no recipe any more plans nothing
        if set(recipe.every_arm) <= budgets.keys() and Recipe.model_validate(read_json(run / "recipe.json")) == recipe:
            return budgets
    return None


def _prepared(recipe: Recipe, run: Path) -> Experiment | None:
    """The recipe in its run folder, where that holds the data that it asks for."""
    folders = [run, *(replicate_folder(run, seed) for seed in (recipe.seeds if recipe.varies_data else ()))]
    if not all((data_folder(folder) / "manifest.json").is_file() for folder in folders):
        return None
    with suppress(RunFolderError):
        if difference(read_json(run / "recipe.json"), recipe, run) is None:
            return Experiment(recipe, run)
    return None


def _shown_arm(recipe: Recipe, name: str, costs: Mapping[str, Any]) -> dict[str, Any]:
    arm = arm_recipe(recipe, name)
    resolved = arm.model_dump(mode="json")
    resolved["train"]["steps"] = costs["steps"] if arm.match is not None else arm.train.steps
    known = {key: value for key, value in costs.items() if key in ("estimated", "at_most")}
    return {
        "changes": _flat({key: value for key, value in recipe.every_arm[name].items() if key != "match"}),
        "derived": name not in recipe.arms,
        "match": None if arm.match is None else f"{arm.match.arm}, {arm.match}",
        **{key: costs.get(key) for key in COSTS},
        **known,
        "resolved": resolved,
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{align: {time: soft}}` as `{"align.time": "soft"}`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return json.loads(json.dumps(found))


# -- before there is any data ------------------------------------------------------------------------------


def _text_length(data: DataRecipe, asked: int | None) -> tuple[float, str]:
    """Mean tokens of a training text, and how that is known."""
    if asked is not None:
        return float(asked), "as given"
    if data.tokenizer != CHARACTERS or data.template != "plain" or not all(_is_made_here(t) for t in data.tasks):
        return data.max_length / 2, "assumed: half of data.max_length; --text-length sets another"
    tokenizer, total, weight = character_tokenizer(), 0.0, 0.0
    for task in data.tasks:
        rules = TASKS[task.name]
        few = TaskRecipe(name=task.name, train=MEASURED_PROBLEMS, val=0, test=0)
        problems = rules.load(few, data).problems
        rows = [rules.write(problem, style) for problem in problems for style in styles_of(data.style)]
        tokens, _ = batch_geometry(len(example.input_ids) for example in encode_rows(tokenizer, rows))
        share = task.train if data.total is None else 1.0
        total, weight = total + share * tokens / len(rows), weight + share
    return total / max(1.0, weight), f"measured on {MEASURED_PROBLEMS} problems of each task"


def _is_made_here(task: TaskRecipe) -> bool:
    return task.name in TASKS and TASKS[task.name].generated


def _assumed_student(recipe: Recipe, notes: list[str]) -> CausalStudent | None:
    """The student without memory for weights; None, and a note, where its sizes cannot be had."""
    student = recipe.student
    if student.scratch is not None:
        made_here = recipe.data.tokenizer == CHARACTERS
        pieces = student.scratch.vocab_size or (len(character_tokenizer()) if made_here else ASSUMED_PIECES)
        if pieces == ASSUMED_PIECES:
            notes.append(f"the tokenizer's size is known when data is prepared: {pieces:,} pieces are assumed")
        return CausalStudent.outline(student, model_config(student, pieces, "student"))
    try:
        config = published_config(student.path or "") or model_config(student, 1, "student")
    except ModelError as error:
        notes.append(f"the student's sizes are not at hand ({error.what}): its parameters and FLOPs are not known here")
        return None
    return CausalStudent.outline(student, config)


def _assumed(recipe: Recipe, name: str, length: float, student: CausalStudent | None) -> dict[str, Any]:
    """What an arm costs where every text is as long as the mean (its attention then comes out a little too cheap)."""
    arm = arm_recipe(recipe, name)
    steps = _assumed_steps(recipe, name)
    if steps is None:
        return dict.fromkeys(COSTS)
    examples = steps * _batch(arm)
    tokens = round(examples * length)
    flops = None if student is None else sum(student.flops(tokens, round(examples * length**2)))
    return {
        **dict.fromkeys(COSTS),
        "steps": steps,
        "data": examples,
        "tokens": tokens,
        "student_flops": flops,
        **({} if arm.train.patience is None else {"at_most": True}),
        **({} if arm.texts == "own" else {"estimated": True}),
    }


def _assumed_steps(recipe: Recipe, name: str) -> int | None:
    """Steps as given, or of a matched arm by problems seen: the student is the same, so its FLOPs go with them. None
    where all FLOPs are to be equal: what teachers cost is not known yet."""
    arm = arm_recipe(recipe, name)
    if arm.match is None:
        return arm.train.steps
    if arm.match.parity == "total_flops" or (theirs := _assumed_steps(recipe, arm.match.arm)) is None:
        return None
    if arm.match.parity != "steps":
        theirs = round(theirs * _batch(arm_recipe(recipe, arm.match.arm)) / _batch(arm))
    return max(1, round(arm.times * theirs))


def _batch(arm: ArmRecipe) -> int:
    return arm.train.batch_size * arm.train.accumulation


def _sizes(student: CausalStudent) -> dict[str, int]:
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {"parameters": student.shape.num_parameters, "trained": trained}
