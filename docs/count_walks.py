"""How far does a value walk through the code? Counted by running it, on tiny data.

    python docs/count_walks.py

Three walks: the recipe through one training and through a study of which only the report is left (stages and workers
left out), one problem row through `prepare`. For the recipe a stop is a function of
the package that is handed the recipe, a section of it, or an object that holds it (an Experiment, Arm or Teacher),
counted once for each function that hands it on. For the row a stop is any function entered for its sake: entries with
nine rows less entries with eight. A change of room is a stop in another file than the stop before.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent.parent
PACKAGE = str(HERE / "kvdistill")
sys.path[:0] = [str(HERE), str(HERE / "tests")]
HOLDERS = {"Experiment", "Teacher", "Arm"}
Entry = tuple[str, str, str]  # file, function, caller


def entries(work: Callable[[], Any], carries: Callable[[dict[str, Any]], bool]) -> list[Entry]:
    """Every entry into a function of the package whose arguments (but `self`) carry the value, in order."""
    seen: list[Entry] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if carries({name: frame.f_locals.get(name) for name in names if name != "self"}):
            back = frame.f_back
            caller = f"{back.f_code.co_filename}:{back.f_code.co_qualname}" if back else ""
            seen.append((code.co_filename.removeprefix(PACKAGE), code.co_qualname, caller))

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def changes(seen: list[Entry]) -> int:
    return sum(a[0] != b[0] for a, b in itertools.pairwise(seen))


def with_recipe(arguments: dict[str, Any]) -> bool:
    from kvdistill.core.recipe import Section

    return any(isinstance(value, Section) or type(value).__name__ in HOLDERS for value in arguments.values())


def recipe_in_study() -> dict[str, int]:
    from tiny_recipe import ARMS, SEED, copy_base, tiny_recipe

    from kvdistill.core.layout import arm_folder, evaluated_mark
    from kvdistill.core.progress import silent
    from kvdistill.study import run as study

    with tempfile.TemporaryDirectory() as folder:
        run = copy_base(Path(folder))
        recipe = tiny_recipe(run, arms=ARMS)
        for arm in recipe.arms:
            mark = evaluated_mark(arm_folder(run, arm, SEED))
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text("{}")
        with mock.patch.object(study, "run_jobs"):
            seen = entries(lambda: study.run_study(recipe, silent), with_recipe)
    once = list(dict.fromkeys(seen))
    return {"stops": len(once), "rooms": len({file for file, _, _ in once}), "changes of room": changes(once)}


def recipe_in_training() -> dict[str, int]:
    from tiny_recipe import ARMS, SEED, copy_base, tiny_recipe

    from kvdistill.arms.experiment import Experiment
    from kvdistill.stages.train import train_student

    with tempfile.TemporaryDirectory() as folder:
        run = copy_base(Path(folder))
        recipe = tiny_recipe(run, arms=ARMS)
        seen = entries(lambda: train_student(Experiment(recipe, run).arm("competence", SEED)), with_recipe)
    once = list(dict.fromkeys(seen))
    return {"stops": len(once), "rooms": len({file for file, _, _ in once}), "changes of room": changes(once)}


def row_in_prepare() -> dict[str, int]:
    from kvdistill.core.config import make_recipe
    from kvdistill.stages.prepare import prepare

    def seen(num_rows: int) -> list[Entry]:
        words = ["seven", "nine", "four", "blue", "red", "tall", "grey", "wide", "long"][:num_rows]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = [
                {"question": f"{word} apples and 3 pears cost how much in shop {i}?", "reasoning": f"{i}+3={i + 3}"}
                | {"answer": str(i + 3)}
                for i, word in enumerate(words)
            ]
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            task = {"name": "jsonl", "file": str(folder / "rows.jsonl"), "train": num_rows - 2, "val": 1, "test": 1}
            scratch = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
            tree = {"name": "walk", "data": {"tasks": [task]}, "student": {"scratch": scratch}}
            recipe = make_recipe(tree | {"arms": {"ce": {"teachers": []}}})
            return entries(lambda: prepare(recipe, folder / "run"), lambda _: True)

    seen(6)  # what is made once is made
    fewer, more = seen(8), seen(9)
    return {"stops": len(more) - len(fewer), "changes of room": changes(more) - changes(fewer)}


if __name__ == "__main__":
    print("recipe in a study:", recipe_in_study())
    print("recipe in training:", recipe_in_training())
    print("one row in prepare:", row_in_prepare())
