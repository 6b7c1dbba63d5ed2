"""`kvdistill`: the verbs, in the order of the data. Exit codes: 0 done, 2 a mistake a user can mend, 1 a bug of ours.

Imports only typer at start, so that `--help` is instant; everything else is imported by the verb that needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Teach a small language model by matching the key/value caches of bigger ones, and prove that it helped.

    Try it:   kvdistill demo                    two teachers, seven arms, three seeds, one page (minutes, no GPU)

    Your own: kvdistill run recipes/demo.yaml train.steps=200 seeds=[1,2,3]

    The single stages, in the order of the data: prepare, teach, capture, fit, train, evaluate, report.
    Each reads a recipe, works in its run folder, skips what is finished and resumes what was interrupted.""",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML recipe, e.g. recipes/demo.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, e.g. train.steps=200 run_dir=runs/mine")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout; no progress")]


@app.command()
def demo(overrides: Overrides = None, as_json: Json = False) -> None:
    """The built-in study on generated problems: two specialist teachers, one student, one page."""
    from kvdistill.core.builtin import recipes_folder

    _study(str(recipes_folder() / "demo.yaml"), overrides, as_json)


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
    if dry_run:
        from kvdistill.dryrun import dry_run as rehearse

        _stage(recipe, overrides, as_json, lambda made, progress: rehearse(made, progress))
        return
    _study(recipe, overrides, as_json)


@app.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 1: Problems into tokenised, fingerprinted, leak-checked splits."""
    _study(recipe, overrides, as_json, "prepare")


@app.command()
def teach(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 2: Train the recipe's scratch teachers (teachers with a path need nothing here)."""
    _study(recipe, overrides, as_json, "teachers")


@app.command()
def capture(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 3: Run each teacher once over the texts and keep its keys and values in the store."""
    _study(recipe, overrides, as_json, "capture")


@app.command()
def fit(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 4: Channel statistics, closed-form projectors and prototypes from the captured targets."""
    _study(recipe, overrides, as_json, "fit")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="only this arm")] = None,
    seed: Annotated[int | None, typer.Option(help="only this seed")] = None,
    as_json: Json = False,
) -> None:
    """Step 5: Train students: all arms and seeds, or one (also under torchrun, for one run on several GPUs)."""

    def work(made: Any, progress: Any) -> dict[str, Any]:
        from kvdistill.study import train_runs

        return train_runs(made, progress, arm=arm, seed=seed)

    _stage(recipe, overrides, as_json, work)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="only this arm")] = None,
    seed: Annotated[int | None, typer.Option(help="only this seed")] = None,
    as_json: Json = False,
) -> None:
    """Step 6: Greedy answers of trained students on the test problems, one record per question."""

    def work(made: Any, progress: Any) -> dict[str, Any]:
        from kvdistill.study import evaluate_runs

        return evaluate_runs(made, progress, arm=arm, seed=seed)

    _stage(recipe, overrides, as_json, work)


@app.command()
def report(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Step 7: Statistics, figures and the page from the records (no GPU, no model)."""
    _study(recipe, overrides, as_json, "report")


@app.command()
def recipe() -> None:
    """Every key a recipe can have, with type, default and meaning (Markdown)."""
    from kvdistill.core.reference import recipe_reference

    print(recipe_reference())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Is this machine ready? Versions, cores, memory, GPUs, disk; what is missing and how to get it."""

    def work() -> dict[str, Any]:
        from kvdistill.doctor import examine

        return examine()

    _guarded(work, as_json)


# -- how every verb runs ------------------------------------------------------------------------------


def _study(recipe: str, overrides: list[str] | None, as_json: bool, *stages: str) -> None:
    def work(made: Any, progress: Any) -> dict[str, Any]:
        from kvdistill.study import run_study

        return run_study(made, progress, stages=stages)

    _stage(recipe, overrides, as_json, work)


def _stage(recipe: str, overrides: list[str] | None, as_json: bool, work: Callable[[Any, Any], dict[str, Any]]) -> None:
    def load_and_work() -> dict[str, Any]:
        from kvdistill.core.config import load_recipe
        from kvdistill.core.progress import TerminalProgress, silent

        made = load_recipe(recipe, overrides or ())
        if as_json:
            return work(made, silent)
        bars = TerminalProgress()
        try:
            return work(made, bars)
        finally:
            bars.close()

    _guarded(load_and_work, as_json)


def _guarded(work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Run, print the result, and turn a user's mistake into one message and exit code 2."""
    from kvdistill.core.errors import KVDistillError
    from kvdistill.core.files import disk_full_error

    try:
        try:
            result = work()
        except OSError as error:  # raised by a writer that is not ours (core.files turns its own into the clear error)
            if full := disk_full_error(error, str(error.filename or "")):
                raise full from None
            raise
    except KVDistillError as error:
        if as_json:
            print(json.dumps({"error": error.what, "place": error.place, "fix": error.fix}, ensure_ascii=False))
        else:
            print(f"kvdistill: {error.message()}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("\nkvdistill: stopped. The same command goes on where this one ended.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        from kvdistill.core.summary_text import as_text

        print(as_text(result))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
