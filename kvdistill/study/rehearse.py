"""`kvdistill run RECIPE --dry-run`: the whole study rehearsed with random weights of the true sizes, two layers deep.

Every stage runs on a handful of problems, so that a wrong key, size, map or path shows here and not after hours on a
cluster; beside that it prints what the real run needs: parameters, memory, FLOPs a step, bytes of captured targets.
Works without a hub for models whose sizes are known (`models.published`). Leaves nothing behind.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvdistill.align import parse_layer_range
from kvdistill.arms.experiment import Experiment
from kvdistill.core.arms import arm_recipe
from kvdistill.core.config import make_recipe, run_folder
from kvdistill.core.errors import DataError
from kvdistill.core.layout import DRY_RUN, folder_lock
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import ModelRecipe, Recipe
from kvdistill.core.runtime import DTYPES, derive_seed, quiet_libraries
from kvdistill.data.tokenizers import load_tokenizer
from kvdistill.models import ModelShape, auto_class, check_model_exists, describe_config, forward_flops
from kvdistill.models.published import published_config
from kvdistill.stages.prepare import prepare
from kvdistill.study.early import refuse_early
from kvdistill.study.local import run_jobs
from kvdistill.study.plan import plan

DEPTH = 2
SHORT = {  # of a training, whatever an arm says of its own
    "steps": 2, "batch_size": 2, "accumulation": 2, "eval_every": 0, "eval_examples": 2, "save_every": 2,
    "report_to": [],
}  # fmt: skip
GIB = 1 << 30


def dry_run(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Do the whole graph of jobs with small models, one seed, and return {"rehearsed", "needs", "notes"}."""
    refuse_early(recipe)
    quiet_libraries()
    folder = run_folder(recipe) / DRY_RUN
    notes: list[str] = []
    sources: dict[str, ModelRecipe] = {"student": recipe.student} | {f"teacher {t.name}": t for t in recipe.teachers}
    with folder_lock(folder, wait=False):
        try:
            configs: dict[str, PreTrainedConfig] = {}
            for name, source in sources.items():
                known = published_config(source.path or "")  # first: a hub that does not answer costs minutes
                configs[name] = known or check_model_exists(source, name)
                if known is not None:
                    notes.append(f"{name}: sizes as published for {source.path}; the weights were not looked for")
            depth = configs["student"].num_hidden_layers
            for arm in recipe.arms:
                parse_layer_range(
                    arm_recipe(recipe, arm).loss.distill_layers, depth, f"arms.{arm}: loss.distill_layers"
                )
            small = _prepared(recipe, folder, notes, progress)
            small = _with_small_models(small, folder, configs)
            jobs = plan(small, folder / "run", ("teach", "evaluate"))
            run_jobs(small, jobs, progress, what="dry run", here=True)
            needs = _needs(recipe, sources, configs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return {"rehearsed": [job.id.replace(":", " ") for job in jobs], "needs": needs, "notes": notes}


def _prepared(recipe: Recipe, folder: Path, notes: list[str], progress: Progress) -> Recipe:
    """The recipe cut down to a few problems and steps, data prepared; built-in data where the real is out of reach."""
    tree = recipe.model_dump(mode="json")
    tree["run_dir"] = str(folder / "run")
    tree["seeds"] = recipe.seeds[:1]
    tree["data"]["tasks"] = [
        {**task, "train": 8, "val": 4, "test": 2, "teach": min(8, task["teach"])} for task in tree["data"]["tasks"]
    ]
    asks = any(arm_recipe(recipe, arm).train.asks_validation for arm in recipe.arms)
    points = {"eval_every": 1 if asks else 0}
    tree["train"] |= SHORT | points | {"accumulation": min(2, recipe.train.accumulation)}
    tree["evaluate"] |= {"limit": 2, "max_new_tokens": 4, "match_examples": 2}
    tree["write"] |= {"limit": 2, "per_question": min(2, recipe.write.per_question), "max_new_tokens": 4}
    tree["align"]["calibration_examples"] = 4
    tree["loss"]["distill_layers"] = "all"
    for arm in tree["arms"].values():
        (arm.get("loss") or {}).pop("distill_layers", None)
        arm.pop("match", None)  # a few steps match nothing
        arm["train"] = {key: value for key, value in (arm.get("train") or {}).items() if key not in SHORT}
    tree["report"] |= {"comparisons": [], "curves": None}
    tree["tune"] = None  # trials are the arms once more
    for teacher in tree["teachers"]:
        teacher["optimiser"] |= {"steps": 2, "batch_size": 2}
        teacher["traces"] = None  # of real questions; a rehearsal asks others
        if teacher["path"] is not None and teacher["tokenizer"] is None:
            try:
                load_tokenizer(teacher["path"], recipe.data.root)
            except DataError:
                teacher["tokenizer"] = recipe.data.tokenizer
                notes.append(f"teacher {teacher['name']}: its tokenizer is not at hand; rehearsed with the student's")
    try:
        small = make_recipe(tree)
        prepare(small, folder / "run", progress)
        return small
    except DataError as error:
        if recipe.data.root is not None:  # somebody named local data: what is wrong with it is theirs to know
            raise
        notes.append(f"data: {error.what}; rehearsed on built-in problems with the character tokenizer")
    shutil.rmtree(folder / "run", ignore_errors=True)
    tree["data"] |= {
        "tasks": [{"name": "chain", "train": 8, "val": 4, "test": 2, "teach": 8}],
        "tokenizer": "characters",
        "trim_vocabulary": False,
    }
    for teacher in tree["teachers"]:
        teacher["tokenizer"] = "characters" if teacher["path"] else None
        teacher["train_on"] = ["chain"] if teacher["train_on"] else []
    small = make_recipe(tree)
    prepare(small, folder / "run", progress)
    return small


def _with_small_models(small: Recipe, folder: Path, configs: dict[str, PreTrainedConfig]) -> Recipe:
    """Every pretrained model replaced by a folder with random weights of its layer sizes, DEPTH layers deep."""
    tree, experiment = small.model_dump(mode="json"), Experiment(small, folder / "run")
    teachers = {f"teacher {name}": teacher for name, teacher in experiment.teachers.items()}
    for name, section in [("student", tree["student"]), *zip(teachers, tree["teachers"], strict=True)]:
        if section["path"] is None:
            continue
        tokenizer = experiment.tokenizer if name == "student" else teachers[name].tokenizer
        config = copy.deepcopy(configs[name])
        config.num_hidden_layers = min(DEPTH, config.num_hidden_layers)
        config.vocab_size = len(tokenizer)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, key, getattr(tokenizer, key))
        target = folder / "models" / name.replace(" ", "-")
        torch.manual_seed(derive_seed(0, "dry-run", target.name))
        auto_class(config).from_config(config, dtype=DTYPES[section["dtype"]]).save_pretrained(target)
        tokenizer.save_pretrained(target)
        section["path"] = str(target)
    return make_recipe(tree)


def _needs(recipe: Recipe, sources: dict[str, ModelRecipe], configs: dict[str, PreTrainedConfig]) -> dict[str, str]:
    """What the real run needs, from the true sizes."""
    needs: dict[str, str] = {}
    shapes: dict[str, ModelShape] = {}
    for name, config in configs.items():
        shape = shapes[name] = describe_config(config)
        size = torch.empty(0, dtype=DTYPES[sources[name].dtype]).element_size()
        gib = shape.num_parameters * size / GIB
        kv_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * size
        needs[name] = (
            f"{shape.num_parameters / 1e9:.2f} B parameters, {shape.num_layers} layers, "
            f"{gib:.1f} GiB in {sources[name].dtype}, {kv_bytes / 1000:.1f} kB of KV per token"
        )
    student = shapes["student"]
    tokens = recipe.train.batch_size * recipe.train.accumulation * recipe.data.max_length
    step = 3 * forward_flops(student, tokens, tokens * recipe.data.max_length)
    trained = student.num_parameters if recipe.student.lora is None else 0.02 * student.num_parameters
    needs["student training"] = (
        f"about {(student.num_parameters * 4 + trained * 12) / GIB:.0f} GiB for weights, gradients and Adam in fp32; "
        f"at most {step / 1e12:.3g} TFLOP per step"
    )
    if recipe.capture.source == "store":
        size = torch.empty(0, dtype=DTYPES[recipe.capture.dtype]).element_size()
        problems = sum(task.train for task in recipe.data.tasks)
        per_token = sum(
            2 * min(shape.num_layers, student.num_layers) * shape.num_kv_heads * shape.head_size * size
            for name, shape in shapes.items()
            if name != "student"
        )
        upper = problems * recipe.data.max_length * per_token / GIB
        needs["captured targets"] = (
            f"at most {upper:.1f} GiB ({per_token / 1000:.1f} kB per token, {problems} problems)"
        )
    return needs
