"""`kvdistill`: the verbs, in the order of the data. Exit codes: 0 done, 2 a mistake a user can mend, 1 a bug of ours;
75 ended by SIGTERM or SIGUSR1, 130 by Ctrl-C: nothing is lost, and the same command goes on.

Imports only typer at start, so that `--help` is instant; everything else is imported by the verb that needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Teach a small language model by matching the key/value caches of bigger ones, and prove that it helped.

    Try it:   kvdistill demo                    two teachers, six arms, five seeds, one page (minutes, no GPU)

    Your own: kvdistill run recipes/demo.yaml train.steps=200 seeds=[1,2,3]

    The single stages, in the order of the data: prepare, teach, capture, fit, train, evaluate, report; and where
    a recipe asks for them write (solutions by teachers) and tune (the same search for every arm). Each reads a recipe,
    works in its run folder, skips what is finished and resumes what was interrupted.""",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"kvdistill {importlib.import_module('kvdistill').__version__}")
        raise typer.Exit()


@app.callback()
def every_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML recipe, e.g. recipes/demo.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, e.g. train.steps=200 run_dir=runs/mine")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout; no progress")]


@app.command()
def demo(overrides: Overrides = None, as_json: Json = False) -> None:
    """The built-in study on generated problems: two specialist teachers, one student, one page."""
    from kvdistill.core.config import recipes_folder

    _with_recipe(str(recipes_folder() / "demo.yaml"), overrides, as_json, "run.run_study")


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Json = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="check everything with random weights at reduced depth; train nothing real"),
    ] = False,
) -> None:
    """Every stage of a study; the same command again goes on where it stopped."""
    _with_recipe(recipe, overrides, as_json, "rehearse.dry_run" if dry_run else "run.run_study")


@app.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 1: Problems into tokenised, fingerprinted, leak-checked splits."""
    _with_recipe(recipe, overrides, as_json, "run.run_study", verb="prepare")


@app.command()
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fix: Annotated[bool, typer.Option("--fix", help="take leaking problems out of training, and prepare")] = False,
    as_json: Json = False,
) -> None:
    """Was the test set seen? Exact and near duplicates across splits and against the public evaluations.

    Reads the sources anew, shows every pair (data/validation_report.json in the run folder has the texts), and ends
    with exit code 2 where a leak is left. `data.leaks=drop` in the recipe, or --fix here, takes them out of training.
    """

    result = _with_recipe(recipe, overrides, as_json, "run.validate_data", fix=fix)
    if result["leaks"]["num_leaks"]:
        raise typer.Exit(2)


@app.command()
def export(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    form: Annotated[
        str, typer.Option("--format", help="prompt-completion, messages (chat), or text: one JSON object a line")
    ] = "prompt-completion",
    as_json: Json = False,
) -> None:
    """The prepared splits as JSONL for other trainers, in the run folder under data/export/."""
    _with_recipe(recipe, overrides, as_json, "run.export_data", form=form)


@app.command()
def teach(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 2: Train the recipe's scratch teachers (teachers with a path need nothing here)."""
    _with_recipe(recipe, overrides, as_json, "run.run_study", verb="teach")


@app.command()
def write(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Solutions that teachers write for arms with `texts: written`, held against the gold answers."""
    _with_recipe(recipe, overrides, as_json, "run.write_solutions")


@app.command("map-layers")
def map_layers(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Which teacher layers are like which student layers? Measured by CKA on the training texts; JSON and heatmap.

    Prepares and teaches first where that is not done. Prints for each teacher the map that `layers: cka` would use:
    behind each student layer the `align.cka_top_k` teacher layers that are most alike, with their shares. 1 is alike
    but for rotation and scale, 0 has nothing in common. `align.cka_on` is what is compared: keys, values or hidden
    states. A student with random weights says little about what its layers will come to mean; then prefer ratio.
    """
    _with_recipe(recipe, overrides, as_json, "run.map_layers")


@app.command()
def capture(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 3: Run each teacher once over the texts and keep its keys and values in the store."""
    _with_recipe(recipe, overrides, as_json, "run.run_study", verb="capture")


@app.command()
def fit(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 4: Channel statistics, closed-form projectors and prototypes from the captured targets."""
    _with_recipe(recipe, overrides, as_json, "run.run_study", verb="fit")


@app.command()
def tune(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """The same small search for every arm (section `tune`), on validation problems; `run` and `train` do it too.

    Prepares, teaches, captures and fits first where that is not done. What is chosen stands in tuned.json.
    """
    _with_recipe(recipe, overrides, as_json, "run.tune_arms")


@app.command("profile-alignment")
def profile_alignment(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="only this arm")] = None,
    as_json: Json = False,
) -> None:
    """Before training: what each arm brings together, what a step costs, how well it matches, and where a NaN begins.

    Prepares, teaches, captures and fits first where that is not done, and trains nothing. For every arm with a KV term:
    sizes and maps; parameters; milliseconds and memory of a step beside a step without teachers; match figures of the
    untrained student, beside what a closed-form map reaches and the same for mismatched texts (a high cosine is
    reached there too); and stage by stage the largest value, dead channels, and the first that is not finite.
    The tables again, with figures for each layer, in the run folder under profile/ARM.json.
    """
    _with_recipe(recipe, overrides, as_json, "run.profile_alignment", arm=arm)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="only this arm")] = None,
    seed: Annotated[int | None, typer.Option(help="only this seed")] = None,
    as_json: Json = False,
) -> None:
    """Step 5: Train students: all arms and seeds, or one (also under torchrun, for one run on several GPUs)."""
    _with_recipe(recipe, overrides, as_json, "run.run_arms", verb="train", arm=arm, seed=seed)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="a recipe; or a model's folder or hub id")],
    overrides: Overrides = None,
    tasks: Annotated[str | None, typer.Option(help="model: evaluations, e.g. gsm8k,math500,bbh,own")] = None,
    limit: Annotated[int | None, typer.Option(help="model: first questions of each task")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="model: examples in the prompt; unset: the usual")] = None,
    choice: Annotated[str | None, typer.Option(help="model: multiple choice by likelihood or by generation")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="model: ask through its chat template")] = False,
    out: Annotated[str | None, typer.Option(help="model: folder for records.jsonl and results.json")] = None,
    arm: Annotated[str | None, typer.Option(help="recipe: only this arm")] = None,
    seed: Annotated[int | None, typer.Option(help="recipe: only this seed")] = None,
    as_json: Json = False,
) -> None:
    """Step 6: Greedy answers of trained students on the test problems; or public evaluations on any model.

    With a recipe: its students, one record per question. With a model (a folder or hub id of any Hugging Face causal
    model) and --tasks: few-shot prompts as lm-eval writes them, a table, and records beside a run's model or in
    runs/evaluations/NAME. KEY=VALUE is then data.root, data.system_prompt, evaluate.*, hardware.*, dtype, attention,
    trust_remote_code. The same command goes on where it stopped.
    """
    flags = {
        "tasks": tasks.split(",") if tasks is not None else None,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "choice": choice,
        "chat": chat or None,
    }
    is_recipe = target.endswith((".yaml", ".yml")) or os.path.isfile(target)

    given = out is not None or any(value is not None for value in flags.values())
    if is_recipe and not given:
        _with_recipe(target, overrides, as_json, "run.run_arms", verb="evaluate", arm=arm, seed=seed)
        return

    def model() -> dict[str, Any]:
        from kvdistill.core.errors import RecipeError

        if is_recipe:
            fix = "leave them out; a recipe has evaluate.tasks, evaluate.limit, evaluate.num_fewshot, …"
            raise RecipeError("--tasks, --limit, … and --out go with a model", place=target, fix=fix)
        if arm is not None or seed is not None:
            raise RecipeError("--arm and --seed go with a recipe", place=target, fix="leave them out, or give a recipe")
        from kvdistill.stages.evaluate.command import evaluate_model

        return _with_bars(
            as_json, lambda bars: evaluate_model(target, overrides or (), flags=flags, out=out, progress=bars)
        )

    _guarded(model, as_json)


@app.command()
def report(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 7: Statistics, figures and the page from the records (no GPU, no model)."""
    _with_recipe(recipe, overrides, as_json, "run.run_study", verb="report")


@app.command()
def recipe(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="a YAML recipe; without one: what keys there are")
    ] = None,
    overrides: Overrides = None,
    expand: Annotated[
        bool, typer.Option("--expand", help="its arms resolved, also those of report.curves, and what they will cost")
    ] = False,
    text_length: Annotated[
        int | None, typer.Option(min=1, help="--expand: tokens of a text, where no data is prepared yet")
    ] = None,
    as_json: Json = False,
) -> None:
    """A recipe as it is understood, with every key, as YAML. Without one: every key there is, its type and meaning.

    What a recipe builds on (`base`) is laid under it. --expand trains and writes nothing: a table of arms, and for each
    the steps, problems, tokens and FLOPs of one seed, from the run folder's plan, else from its texts, else by closed
    form for texts of an assumed length.
    """

    def work() -> dict[str, Any] | None:
        from kvdistill.core.config import load_recipe

        if recipe is None:
            from kvdistill.core.errors import RecipeError
            from kvdistill.core.reference import recipe_reference

            if expand or as_json:
                what = f"{'--expand' if expand else '--json'} is about a recipe, and none is given"
                raise RecipeError(what, place="command line", fix="write kvdistill recipe RECIPE")
            print(recipe_reference())
            return None
        made = load_recipe(recipe, overrides or ())
        if expand:
            from kvdistill.study.expand import expand as expanded

            return expanded(made, text_length=text_length)
        tree = {**made.model_dump(mode="json"), "arms": made.arms}  # as they were written: numbers stay numbers
        if as_json:
            return tree
        import yaml

        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120), end="")
        return None

    _guarded(work, as_json)


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="recipes whose studies are finished")],
    as_json: Json = False,
) -> None:
    """Finished studies side by side: those of an ablation whose data differs, as arms of one study cannot.

    Says in which keys the recipes differ and whether they were asked the same problems. No p-values: seeds are paired
    within a study, and studies with other data are not trained alike in anything else that could be paired.
    """

    def work() -> dict[str, Any]:
        from kvdistill.study.side_by_side import compare_studies

        return compare_studies(recipes)

    _guarded(work, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Is this machine ready? Versions, cores, memory, GPUs, disk; what is missing and how to get it."""
    from kvdistill.study.doctor import examine

    _guarded(examine, as_json)


# -- how every verb runs ------------------------------------------------------------------------------


def _with_recipe(
    recipe: str, overrides: list[str] | None, as_json: bool, function: str, **options: Any
) -> dict[str, Any]:
    """Load the recipe, call `function` (`module.name` in `kvdistill.study`) with it, and print what it returns."""

    def work() -> dict[str, Any]:
        from kvdistill.core.config import load_recipe

        made = load_recipe(recipe, overrides or ())
        module, _, name = function.partition(".")
        call = getattr(importlib.import_module(f"kvdistill.study.{module}"), name)
        return _with_bars(as_json, lambda progress: call(made, progress, **options))

    return _guarded(work, as_json)


def _with_bars(as_json: bool, work: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    from kvdistill.core.progress import TerminalProgress, silent

    if as_json:
        return work(silent)
    bars = TerminalProgress()
    try:
        return work(bars)
    finally:
        bars.close()


def _guarded(work: Callable[[], Any], as_json: bool) -> Any:
    """Run, print the result if there is any, and turn a user's mistake into one message and exit code 2."""
    from kvdistill.core.errors import KVDistillError
    from kvdistill.core.files import disk_full_error, path_error
    from kvdistill.core.quoting import json_line
    from kvdistill.core.stopping import Stopped, listening

    try:
        try:
            with listening():
                result = work()
        except Exception as error:  # raised by a writer that is not ours (core.files turns its own into the clear one)
            if clear := path_error(error) if isinstance(error, OSError) else disk_full_error(error, ""):
                raise clear from None
            raise
    except KVDistillError as error:
        if as_json:
            print(json_line({"error": error.what, "place": error.place, "fix": error.fix}))
        else:
            print(f"kvdistill: {error.message()}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        if as_json:
            print(json_line({"error": stopped.message(), "place": "", "fix": ""}))
        else:
            _say(stopped)
        raise typer.Exit(stopped.exit_code) from None
    if as_json:
        print(json_line(result))
    elif result is not None:
        from kvdistill.cli.tables import as_text

        print(as_text(result))
    return result


def _say(stopped: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # the ranks of a torchrun end together
        print(f"kvdistill: {stopped.message()}", file=sys.stderr)


def main() -> None:
    from kvdistill.core.stopping import Stopped, listening

    try:
        with listening():
            app()
    except Stopped as stopped:  # before the verb began, or after it was done
        _say(stopped)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
