"""A run's own prepared test split as an evaluation: `own` for all of its tasks, `own:NAME` or `NAME` for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvdistill.core.files import read_json
from kvdistill.core.recipe import EvaluateRecipe
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.stages.evaluate.exams import SuiteOptions
from kvdistill.stages.evaluate.plain import RunTestExam


class RunTest:
    """The test split of one run folder. Reads the split when it is first asked for."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._tasks = list(read_manifest(run)["tasks"])

    def covers(self, name: str) -> bool:
        return name == "own" or name.removeprefix("own:") in self._tasks

    def names(self) -> str:
        return ", ".join(f"own:{task}" for task in self._tasks)

    def exams(self, name: str, options: SuiteOptions) -> Iterator[RunTestExam]:
        """One exam a task, with answers as long as the run's recipe lets them be."""
        chosen = self._tasks if name == "own" else [name.removeprefix("own:")]
        examples = read_split(self._run, "test")
        length = options.max_new_tokens or self._max_new_tokens()
        for task in chosen:
            mine = [example for example in examples if example.task == task]
            if mine:
                yield RunTestExam(task, mine, length, name)

    def _max_new_tokens(self) -> int:
        path = self._run / "recipe.json"
        section = read_json(path).get("evaluate", {}) if path.exists() else {}
        return int(section.get("max_new_tokens") or EvaluateRecipe().max_new_tokens)


def run_of(model: Path) -> Path | None:
    """The run folder that a model folder lies in (`…/arms/ARM/seed-N/model`, `…/teachers/NAME/model`), or None."""
    for folder in list(model.resolve().parents)[:5]:
        if (folder / "recipe.json").is_file() and (folder / "data" / "manifest.json").is_file():
            return folder
    return None
