"""What is too long: learned rows as a whole, test rows by their prompt; and what takes their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvdistill.cli.tables import as_text
from kvdistill.core.config import make_recipe
from kvdistill.core.errors import DataError
from kvdistill.core.recipe import Recipe
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.stages.prepare import prepare, validate
from kvdistill.stages.report.collect import RunTables
from kvdistill.stages.report.summary import not_asked
from kvdistill.study.folder import data_table

MAX_LENGTH = 90  # tokens, which are characters


def recipe(file: Path, *, style: str = "cot", **counts: int) -> Recipe:
    task = {"name": "jsonl", "file": str(file), "train": 0, "val": 0, "test": 0} | counts
    tiny = {"scratch": {"hidden_size": 8, "num_layers": 1, "num_heads": 1}}
    data = {"tasks": [task], "max_length": MAX_LENGTH, "style": style}
    return make_recipe({"name": "t", "data": data, "student": tiny, "arms": {"ce": {"teachers": []}}})


def rows(path: Path, *, short: int, long_solutions: int = 0, long_prompts: int = 0) -> Path:
    lengths = [(8, 4)] * short + [(8, 150)] * long_solutions + [(150, 4)] * long_prompts
    lines = [
        {
            "id": f"{number}-{asked}-{solved}",
            "question": f"{number} " + "q" * asked,
            "reasoning": "r" * solved,
            "answer": "7",
        }
        for number, (asked, solved) in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kinds(run: Path, split: str) -> Sequence[str]:
    return [example.id.partition("-")[2] for example in read_split(run, split)]


def test_test_rows_stay_whatever_their_solution_is_long(tmp_path: Path) -> None:
    file = rows(tmp_path / "mine.jsonl", short=6, long_solutions=5, long_prompts=3)
    prepare(recipe(file, test=14), tmp_path / "run")
    assert sorted(kinds(tmp_path / "run", "test")) == ["8-150"] * 5 + ["8-4"] * 6
    count = read_manifest(tmp_path / "run")["tasks"]["mine"]["test"]
    assert (count["problems"], count["too_long"]) == (11, 3)
    prepare(recipe(file, train=14), tmp_path / "learned")
    assert kinds(tmp_path / "learned", "train") == ["8-4"] * 6
    with pytest.raises(DataError, match="all 3 prompts of split test"):
        prepare(recipe(rows(tmp_path / "long.jsonl", short=0, long_prompts=3), test=3), tmp_path / "none")


def test_what_was_not_asked_stands_beside_the_accuracy(tmp_path: Path) -> None:
    prepare(recipe(rows(tmp_path / "mine.jsonl", short=6, long_prompts=3), test=9), tmp_path / "run")
    tables = RunTables(tmp_path / "run", ["ce"], [1], manifest=read_manifest(tmp_path / "run"))
    [line] = not_asked(tables)
    assert line.startswith("mine: 3 of 9 test questions were not asked")
    shown = as_text({"summary": {"arms": {"ce": {"mean": 0.5, "std": 0.1}}, "not_asked": [line]}})
    assert shown.splitlines()[-1].strip() == line
    assert not_asked(RunTables(tmp_path, ["ce"], [1], manifest={"tasks": {"mine": {"test": {"problems": 9}}}})) == []


@pytest.mark.parametrize("style", ["cot", "both"])
def test_a_row_that_is_too_long_gives_way_to_the_next_one(tmp_path: Path, style: str) -> None:
    file = rows(tmp_path / "mine.jsonl", short=23, long_solutions=9, long_prompts=5)
    prepare(recipe(file, style=style, train=11, val=4, test=3), tmp_path / "run")
    tasks = read_manifest(tmp_path / "run")["tasks"]["mine"]
    assert [tasks[split]["problems"] for split in ("train", "val", "test")] == [11, 4, 3]
    assert sum(tasks[split]["too_long"] for split in tasks) == 0 and tasks["train"]["replaced"] > 0
    ids = [example.id for split in ("train", "val", "test") for example in read_split(tmp_path / "run", split)]
    times = 2 if style == "both" else 1
    assert len(set(ids)) * times == len(ids) == 18 * times
    assert set(kinds(tmp_path / "run", "train")) == {"8-4"}
    validate(recipe(file, style=style, train=11, val=4, test=3), tmp_path / "run")  # finds the same rows in the tables


def test_held_out_rows_stay_the_same_when_more_is_trained_on(tmp_path: Path) -> None:
    file = rows(tmp_path / "mine.jsonl", short=40, long_prompts=20)
    held_out = []
    for train in (5, 11):
        prepare(recipe(file, train=train, val=4, test=6), tmp_path / f"run-{train}")
        held_out.append([read_split(tmp_path / f"run-{train}", split) for split in ("val", "test")])
    assert held_out[0] == held_out[1]


def test_where_nothing_is_left_a_row_is_left_out_and_counted(tmp_path: Path) -> None:
    prepare(recipe(rows(tmp_path / "mine.jsonl", short=6, long_solutions=5), train=10), tmp_path / "run")
    count = read_manifest(tmp_path / "run")["tasks"]["mine"]["train"]
    assert count["problems"] == 6 and count["too_long"] + count["replaced"] in (4, 5)
    assert count["too_long"] == 4


def test_one_finished_row_of_each_task_and_style_is_shown(tmp_path: Path) -> None:
    prepare(recipe(rows(tmp_path / "mine.jsonl", short=6), style="both", train=6), tmp_path / "run")
    data = data_table(tmp_path / "run")["data"]
    shown, first = data["examples"]["mine"], read_split(tmp_path / "run", "train")[0]
    assert shown["cot"]["prompt"] == first.prompt and shown["cot"]["reasoning"] == f" {first.reasoning}"
    assert shown["cot"]["answer"] == " #### 7" and shown["direct"]["reasoning"] == ""
    lines = as_text({"data": data}).splitlines()
    at = lines.index("one mine row, style cot, as a model reads it:")
    assert lines[at + 1] == f"  prompt    |Question: {first.question}" and lines[at + 2] == "            |Answer:"
    assert lines[at + 3] == f"  reasoning | {first.reasoning}" and lines[at + 4] == "  answer    | #### 7"
