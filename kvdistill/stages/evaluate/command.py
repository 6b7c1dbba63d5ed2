"""`kvdistill evaluate MODEL --tasks …`: any Hugging Face causal model, from its name to the table.

In this order, so that a mistake costs nothing: options, names of evaluations, all data, the model's config and
tokenizer, the folder; then the weights. Knows no command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvdistill.arms.latent_student import student_of
from kvdistill.core.config import make_options
from kvdistill.core.errors import DataError, ModelError, RecipeError
from kvdistill.core.hub import hub_reachable
from kvdistill.core.layout import trained_mark
from kvdistill.core.marks import check_marked
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import EvaluateRecipe, HardwareRecipe, ModelRecipe, Section
from kvdistill.core.runtime import DTYPES, keep_freed_memory, pick_device, quiet_libraries, set_threads
from kvdistill.models.load import check_model_exists, load_model, model_config, require_causal
from kvdistill.stages.evaluate.book import check_folder, identify
from kvdistill.stages.evaluate.exams import SuiteOptions
from kvdistill.stages.evaluate.own import reasoning_of, run_of
from kvdistill.stages.evaluate.suite import evaluate_suite, make_lm, plan_suite

_PLACE = "model"
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenization_*.py")


class ModelData(Section):
    """Where evaluations are read from, and how they are put."""

    root: str | None = Field(None, description="folder with local copies of the evaluations; unset: the hub")
    system_prompt: str | None = Field(None, description="with --chat: system message")
    style: Literal["cot", "direct"] | None = Field(
        None, description="template of the training tasks' own evaluations; unset: the run's, else cot"
    )


class ModelOptions(Section):
    """KEY=VALUE of `kvdistill evaluate MODEL`."""

    data: ModelData = ModelData()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    hardware: HardwareRecipe = HardwareRecipe()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the weights are saved"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = Field(False, description="run code that comes with the model: only if you read it")


def evaluate_model(
    model: str,
    overrides: Sequence[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a model folder or hub id; what the command prints: the folder and its results.

    overrides: `key=value` of `ModelOptions`. flags: keys of its section `evaluate` that have a flag of their own; None
    values are left out. out: unset, `evaluations` beside a run's model, else runs/evaluations/NAME.
    """
    quiet_libraries()
    options = make_options(ModelOptions, overrides)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    written = options.evaluate.model_dump(exclude_unset=True) | given
    options = options.model_copy(update={"evaluate": make_options(EvaluateRecipe, (), written)})
    if not options.evaluate.tasks:
        raise RecipeError("no evaluation is named", place="--tasks", fix="for example --tasks gsm8k,math500,bbh")
    if options.data.system_prompt is not None and not options.evaluate.chat:
        raise RecipeError(
            "a system prompt goes with the chat template only", place="data.system_prompt", fix="add --chat"
        )
    set_threads(options.hardware.threads)
    keep_freed_memory()
    device = pick_device(options.hardware.device)
    run = run_of(Path(model)) if Path(model).is_dir() else None
    if run is not None:
        folder = Path(model).resolve()
        fix = f"delete {folder.parent} and train again, or give another model"
        check_marked(trained_mark(folder.parent), f"{folder.name}/", fix=fix)
    reasoning = "written" if run is None else reasoning_of(Path(model), run)
    suite = replace(suite_options(options, run), reasoning=reasoning)
    exams = plan_suite(options.evaluate.tasks, suite)
    recipe, tokenizer, asker = _look_at(model, options, run)
    folder = Path(model)
    if out is None and run is not None:
        out = folder.resolve().parent / "evaluations"
    elif out is None:
        out = Path("runs") / "evaluations" / (folder.resolve().name if folder.is_dir() else model.replace("/", "--"))
    check_folder(exams, suite, Path(out), asker)

    def load() -> Any:
        loaded: Any = load_model(recipe, vocab_size=len(tokenizer), seed=0, place=_PLACE)
        try:
            loaded = loaded.to(device)
        except (RuntimeError, AssertionError) as error:  # too little memory on it
            raise ModelError(
                f"the model does not go to device {options.hardware.device} ({_reason(error)})",
                place="hardware.device",
                fix="give another device (cpu, cuda:0), or a smaller dtype",
            ) from error
        student = student_of(loaded) if run is not None else None
        bos = asker["begins_with_bos"]
        return make_lm(loaded, tokenizer, exams, suite, student=student, begins_with_bos=bos)

    results = evaluate_suite(load, exams, suite, Path(out), progress, asker=asker)
    return {"evaluations": results, "folder": str(out)}


def suite_options(options: ModelOptions, run: Path | None) -> SuiteOptions:
    """What the suite needs of the options; a run's own style where the model lies in a run folder."""
    data, style = options.data, options.data.style
    if run is not None and style is None:
        style = json.loads((run / "recipe.json").read_text(encoding="utf-8")).get("data", {}).get("style")
    return SuiteOptions.of(options.evaluate, data.root, style, system_prompt=data.system_prompt, run=run)


# -- the model ----------------------------------------------------------------------------------------


def _look_at(model: str, options: ModelOptions, run: Path | None) -> tuple[ModelRecipe, Any, dict[str, Any]]:
    """All that can be known and checked without the weights: the model, its tokenizer, and what identifies it."""
    recipe = ModelRecipe(
        path=model, dtype="float32", attention=options.attention, trust_remote_code=options.trust_remote_code
    )
    config = check_model_exists(recipe, _PLACE)
    require_causal(config, model)
    saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
    dtype = (saved if saved in DTYPES else "float32") if options.dtype == "auto" else options.dtype
    recipe = recipe.model_copy(update={"dtype": dtype})
    tokenizer = load_own_tokenizer(model, options.trust_remote_code)
    model_config(recipe, len(tokenizer), _PLACE)  # refuses a tokenizer with more tokens than the model knows
    if options.evaluate.chat and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", place=f"{model} (--chat)", fix="leave out --chat")
    # students of ours have seen beginning-of-text before every plain prompt, whatever their tokenizer does by itself
    bos = run is not None and not options.evaluate.chat
    return recipe, tokenizer, identify(model, config, tokenizer, recipe.dtype, begins_with_bos=bos)


def load_own_tokenizer(model: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model, as `AutoTokenizer` gives it. DataError where there is none."""
    fix = "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder"
    folder = Path(model)
    if folder.is_dir() and not any(file for kind in _TOKENIZER_FILES for file in folder.glob(kind)):
        raise DataError("the model has no tokenizer", place=model, fix=fix)  # transformers makes an empty one up
    local = folder.is_dir() or not hub_reachable()
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, local_files_only=local)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"the model's tokenizer cannot be loaded ({_reason(error)})"
        raise DataError(what, place=model, fix=fix) from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
