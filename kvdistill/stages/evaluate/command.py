"""`kvdistill evaluate MODEL --tasks …`: any Hugging Face causal model, from its name to the table.

In this order, so that a mistake costs nothing: options, names of evaluations, all data, the model's config and
tokenizer, the folder; then the weights. Knows no command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvdistill.arms.student import CausalStudent
from kvdistill.core.config import make_options
from kvdistill.core.errors import DataError, ModelError, RecipeError
from kvdistill.core.hub import hub_reachable
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import EvaluateRecipe, HardwareRecipe, ModelRecipe, Section
from kvdistill.core.runtime import DTYPES, keep_freed_memory, pick_device, quiet_libraries, set_threads
from kvdistill.models.load import check_model_exists, load_model, model_config, require_causal
from kvdistill.stages.evaluate.book import check_folder, identify
from kvdistill.stages.evaluate.exams import SuiteOptions
from kvdistill.stages.evaluate.own import run_of
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


@dataclass(frozen=True)
class _Subject:
    """The model to evaluate, before its weights are loaded. asker: what identifies it."""

    recipe: ModelRecipe
    tokenizer: Any
    asker: dict[str, Any]
    out: Path


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
    run = run_of(Path(model)) if Path(model).is_dir() else None
    suite = suite_options(options, run)
    exams = plan_suite(options.evaluate.tasks, suite)
    subject = _look_at(model, options, run, out)
    check_folder(exams, suite, subject.out, subject.asker)

    def load() -> Any:
        model = _load(subject.recipe, len(subject.tokenizer), options.hardware.device)
        student = CausalStudent(model) if run is not None else None
        bos = subject.asker["begins_with_bos"]
        return make_lm(model, subject.tokenizer, exams, suite, student=student, begins_with_bos=bos)

    results = evaluate_suite(load, exams, suite, subject.out, progress, asker=subject.asker)
    return {"evaluations": results, "folder": str(subject.out)}


def suite_options(options: ModelOptions, run: Path | None) -> SuiteOptions:
    """What the suite needs of the options; a run's own style where the model lies in a run folder."""
    asked, style = options.evaluate, options.data.style or "cot"
    if run is not None and options.data.style is None:
        section = json.loads((run / "recipe.json").read_text(encoding="utf-8")).get("data", {})
        style = "direct" if section.get("style") == "direct" else "cot"
    return SuiteOptions(
        root=Path(options.data.root).expanduser() if options.data.root else None,
        num_fewshot=asked.num_fewshot,
        choice=asked.choice,
        chat=asked.chat,
        system_prompt=options.data.system_prompt,
        limit=asked.limit,
        max_new_tokens=asked.max_new_tokens if "max_new_tokens" in asked.model_fields_set else None,
        batch_size=asked.batch_size,
        style=style,
        run=run,
    )


# -- the model ----------------------------------------------------------------------------------------


def _look_at(model: str, options: ModelOptions, run: Path | None, out: str | Path | None) -> _Subject:
    """Everything that can be known and checked without the weights."""
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
    asker = identify(model, config, tokenizer, recipe.dtype, begins_with_bos=bos)
    if out is None and run is not None:
        out = Path(model).resolve().parent / "evaluations"
    elif out is None:
        name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")
        out = Path("runs") / "evaluations" / name
    return _Subject(recipe, tokenizer, asker, Path(out))


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"the model's tokenizer cannot be loaded ({reason})", place=model, fix=fix) from error


def _load(recipe: ModelRecipe, vocab_size: int, device: str) -> Any:
    model: Any = load_model(recipe, vocab_size=vocab_size, seed=0, place=_PLACE)
    try:
        return model.to(pick_device(device))
    except (RuntimeError, AssertionError) as error:  # no such device, or too little memory on it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model does not go to device {device} ({reason})",
            place="hardware.device",
            fix="give another device (cpu, cuda:0), or a smaller dtype",
        ) from error
