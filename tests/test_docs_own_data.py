"""docs/own-data.md, step by step in an empty folder: rows, the recipe that comes with the package, a run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import call, command, environment

from kvdistill.core.config import load_recipe, recipes_folder

PAGE = Path(__file__).resolve().parent.parent / "docs/own-data.md"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SHORT = ["teachers.0.optimiser.steps=3", "train.steps=3", "hardware.workers=1", "evaluate.limit=4"]
SHORT += ["seeds=[1,2]", "report.comparisons=[]"]


def steps() -> list[list[str]]:
    """The page's commands, in words."""
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [line.split() for line in lines if line.startswith("kvdistill ")]


def test_the_page_runs_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [made] = [text for kind, text in BLOCKS if kind == "python"]
    subprocess.run([sys.executable, "-c", made], check=True, cwd=tmp_path, timeout=60)
    copied = next(line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if "own.yaml" in line)
    inner = re.search(r'-c "(.*)" > own.yaml', copied)
    assert inner is not None
    wrote = subprocess.run(
        [sys.executable, "-c", inner[1]], check=True, capture_output=True, text=True, env=environment(), timeout=60
    )
    assert wrote.stdout.rstrip("\n") == (recipes_folder() / "own-data.yaml").read_text().rstrip("\n")
    (tmp_path / "own.yaml").write_text(wrote.stdout)
    prepare, run = steps()
    shown = call(*prepare[1:])
    assert shown.code == 0 and re.search(r"rows +cot +160 +20 +20 +0", shown.out), shown
    assert "as a model reads it:" in shown.out and re.search(r"answer +\| #### \d+\n", shown.out)
    done = call(*run[1:], *SHORT)
    assert done.code == 0 and (tmp_path / "runs/own-data/report.html").is_file(), done


def test_the_message_of_the_page_is_the_one_that_comes(tmp_path: Path) -> None:
    words = ["run", str(recipes_folder() / "own-data.yaml"), "train.stesp=3", "data.max_length=long"]
    said = subprocess.run(command(*words), capture_output=True, text=True, env=environment(), timeout=60, check=False)
    lines = [line.strip() for line in said.stderr.splitlines()]
    assert said.returncode == 2 and lines[0].endswith("own-data.yaml: 2 mistakes")
    for line in next(text for _, text in BLOCKS if "2 mistakes" in text).splitlines()[1:]:
        begun = line.strip().partition("…")[0]
        assert any(found.startswith(begun) for found in lines), (line, lines)


def test_the_recipe_is_sound_and_small() -> None:
    recipe = load_recipe(recipes_folder() / "own-data.yaml")
    assert recipe.data.tasks[0].key == "rows" and recipe.train.steps <= 100
