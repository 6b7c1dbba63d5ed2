"""The stage: what it leaves, that it leaves the same twice, and that it refuses before it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvdistill.core.errors import DataError, RunFolderError, StoreError
from kvdistill.core.marks import read_sealed
from kvdistill.core.recipe import Recipe
from kvdistill.data.leaks import question_hash
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.data.tokenizers import fingerprint_tokenizer
from kvdistill.stages.prepare import prepare, validate

pytestmark = pytest.mark.slow

SMALL = [{"name": "chain", "train": 23, "val": 5, "test": 7}, {"name": "product", "train": 19, "val": 3, "test": 4}]


def _recipe(**data: Any) -> Recipe:
    data = {"tasks": SMALL, **data}
    return Recipe.model_validate(
        {"name": "x", "data": data, "student": {"scratch": {}}, "arms": {"a": {"teachers": []}}}
    )


def _file(path: Path, count: int, word: str = "What") -> dict[str, Any]:
    rows = [{"question": f"{word} {n}?", "reasoning": f"{n} or so.", "answer": str(n)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "jsonl", "file": str(path), "train": 6, "val": 2, "test": 2}


def _report(run: Path) -> dict[str, Any]:
    return read_sealed(run / "data/validation_report.json", fix="none")


def _places(run: Path) -> dict[str, set[str]]:
    return {split: {row.doc_hash for row in read_split(run, split)} for split in ("train", "val", "test")}


def test_what_it_leaves(tmp_path: Path) -> None:
    prepare(_recipe(style="both"), tmp_path)
    manifest = read_manifest(tmp_path)
    splits = {split: read_split(tmp_path, split) for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 84, "val": 16, "test": 22}
    assert manifest["tasks"]["chain"]["train"] == {
        "asked": 23, "problems": 23, "rows": 46, "too_long": 0, "replaced": 0, "dropped": 0
    }  # fmt: skip
    assert manifest["table"]["product"] == {"cot": {"train": 19, "val": 3, "test": 4}} | {
        "direct": {"train": 19, "val": 3, "test": 4}
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert fingerprint_tokenizer(tokenizer) == manifest["tokenizer"]["fingerprint"]
    assert len(tokenizer) == manifest["tokenizer"]["size"]
    for rows in splits.values():
        for row in rows:
            assert tokenizer.decode(row.input_ids, skip_special_tokens=True).startswith(row.prompt)
            assert len(row.input_ids) == len(row.segments) <= manifest["max_tokens"]
    report = json.loads((tmp_path / "data/validation_report.json").read_text())
    assert report["num_leaks"] == 0 and report["problems"] == {"train": 42, "val": 8, "test": 11, "teach": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "tokenizer"]
    assert not list(tmp_path.rglob(".*"))


def test_splits_are_disjoint_and_styles_stay_together(tmp_path: Path) -> None:
    prepare(_recipe(style="both"), tmp_path)
    seen: dict[str, str] = {}
    for split in ("train", "val", "test"):
        styles: dict[str, list[str]] = {}
        for row in read_split(tmp_path, split):
            assert seen.setdefault(row.doc_hash, split) == split
            styles.setdefault(row.doc_hash, []).append(row.style)
        assert all(found == ["cot", "direct"] for found in styles.values())


def test_the_same_section_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(_recipe(), tmp_path / name)
    one, two = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "two")
    assert one == two
    prepare(_recipe(seed=1), tmp_path / "three")
    three = read_manifest(tmp_path / "three")
    assert all(one["fingerprint"][key] != three["fingerprint"][key] for key in ("all", "train", "val", "test"))


def test_finished_work_is_not_done_again_and_another_section_is_refused(tmp_path: Path) -> None:
    prepare(_recipe(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare(_recipe(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(RunFolderError, match=r"data\.seed, data\.style") as caught:
        prepare(_recipe(seed=1, style="direct"), tmp_path)
    assert "run_dir" in caught.value.fix


def test_half_finished_work_is_done_over(tmp_path: Path) -> None:
    prepare(_recipe(), tmp_path)
    manifest = read_manifest(tmp_path)
    (tmp_path / "data/manifest.json").unlink()
    (tmp_path / "data/train.parquet").write_bytes(b"torn")
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(RunFolderError, match="not prepared"):
        read_split(tmp_path, "train")
    prepare(_recipe(), tmp_path)
    assert read_manifest(tmp_path) == manifest and len(read_split(tmp_path, "train")) == 42


def test_an_altered_or_missing_file_is_named(tmp_path: Path) -> None:
    prepare(_recipe(), tmp_path)
    path = tmp_path / "data/val.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for read in (lambda: read_split(tmp_path, "val"), lambda: prepare(_recipe(), tmp_path)):
        with pytest.raises(StoreError, match="checksum") as caught:
            read()
        assert caught.value.place == str(path)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        read_split(tmp_path, "val")


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    task = _file(tmp_path / "mine.jsonl", 12)
    recipe = _recipe(tasks=[task])
    prepare(recipe, tmp_path / "run")
    _file(tmp_path / "mine.jsonl", 13)
    with pytest.raises(RunFolderError, match="has changed"):
        prepare(recipe, tmp_path / "run")
    (tmp_path / "mine.jsonl").unlink()
    prepare(recipe, tmp_path / "run")  # the run folder stands on its own


def test_a_leak_across_tasks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tasks = [_file(tmp_path / "one.jsonl", 10), _file(tmp_path / "two.jsonl", 10, word="WHAT ")]
    with pytest.raises(DataError, match="the same question is learned from and held out") as caught:
        prepare(_recipe(tasks=tasks), tmp_path / "run")
    assert "one" in caught.value.what and "two" in caught.value.what
    assert not (tmp_path / "run").exists()
    prepare(_recipe(tasks=tasks, leaks="allow"), tmp_path / "run")
    report, places = _report(tmp_path / "run"), _places(tmp_path / "run")
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    assert report["num_leaks"] == len(report["leaks"]) == sum(len(places[a] & places[b]) for a, b in pairs) > 0
    with pytest.raises(RunFolderError, match="prepared with"):  # nobody else goes on with it unawares
        prepare(_recipe(tasks=tasks), tmp_path / "run")


def test_leaks_are_dropped_from_what_is_learned_from_and_counted(tmp_path: Path) -> None:
    tasks = [_file(tmp_path / "one.jsonl", 10), _file(tmp_path / "two.jsonl", 10, word="WHAT ")]
    prepare(_recipe(tasks=tasks, leaks="allow"), tmp_path / "leaky")
    prepare(_recipe(tasks=tasks, leaks="drop"), tmp_path / "clean")
    leaky, clean = _places(tmp_path / "leaky"), _places(tmp_path / "clean")
    held_out = leaky["val"] | leaky["test"]
    assert clean["test"] == leaky["test"] and clean["val"] == leaky["val"] - leaky["test"]
    assert clean["train"] == leaky["train"] - held_out != leaky["train"]
    counts, report = read_manifest(tmp_path / "clean")["tasks"], _report(tmp_path / "clean")
    dropped = {split: sum(task[split]["dropped"] for task in counts.values()) for split in ("train", "val", "test")}
    assert dropped["test"] == 0 and report["num_leaks"] == 0 and report["num_pairs_found"] > 0
    assert {split: sum(tasks.values()) for split, tasks in report["dropped"].items()} == {
        split: number for split, number in dropped.items() if number
    }


def test_validate_finds_what_is_there_and_fix_takes_it_out(tmp_path: Path) -> None:
    tasks = [_file(tmp_path / "one.jsonl", 10), _file(tmp_path / "two.jsonl", 10, word="WHAT ")]
    recipe, run = _recipe(tasks=tasks, leaks="allow"), tmp_path / "run"
    prepare(recipe, run)
    found = validate(recipe, run)
    assert found["num_leaks"] == read_manifest(run)["num_leaks"] == len(found["leaks"]) and found == _report(run)
    asked = _recipe(tasks=tasks)
    fixed = validate(asked, run, fix=True)
    assert fixed["num_leaks"] == 0 and sum(sum(tasks.values()) for tasks in fixed["dropped"].values()) > 0
    prepare(asked, run)  # clean now: returns at once
    again = validate(asked, run)
    assert again["num_leaks"] == 0 and again["dropped"] == fixed["dropped"] and again["leaks"] == fixed["leaks"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert validate(asked, run, fix=True)["num_leaks"] == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before


def test_fix_refuses_where_a_model_has_learned_from_it(tmp_path: Path) -> None:
    tasks = [_file(tmp_path / "one.jsonl", 10), _file(tmp_path / "two.jsonl", 10, word="WHAT ")]
    prepare(_recipe(tasks=tasks, leaks="allow"), tmp_path / "run")
    (tmp_path / "run/arms/ce").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="already trained"):
        validate(_recipe(tasks=tasks), tmp_path / "run", fix=True)
    assert read_manifest(tmp_path / "run")["num_leaks"] > 0


def test_validate_notices_tables_that_are_not_what_the_sources_say(tmp_path: Path) -> None:
    prepare(_recipe(), tmp_path)
    manifest, path = read_manifest(tmp_path), tmp_path / "data/manifest.json"
    swapped = {"train.parquet": "test.parquet", "test.parquet": "train.parquet"}
    (tmp_path / "data/train.parquet").rename(tmp_path / "data/x")
    (tmp_path / "data/test.parquet").rename(tmp_path / "data/train.parquet")
    (tmp_path / "data/x").rename(tmp_path / "data/test.parquet")
    files = {name: manifest["files"][swapped.get(name, name)] for name in manifest["files"]}
    path.write_text(json.dumps(manifest | {"files": files}))
    with pytest.raises(RunFolderError, match="do not put it there"):
        validate(_recipe(), tmp_path)


def test_long_problems_are_left_out_in_both_styles_and_counted(tmp_path: Path) -> None:
    tasks = [
        {"name": "chain", "train": 60, "val": 40, "test": 40},
        {"name": "product", "train": 50, "val": 40, "test": 40},
    ]
    prepare(_recipe(tasks=tasks, style="both", max_length=17), tmp_path)
    counts = read_manifest(tmp_path)["tasks"]
    assert all(len(row.input_ids) <= 17 for row in read_split(tmp_path, "train"))
    for task in tasks:
        count = counts[task["name"]]["train"]
        assert count["problems"] + count["too_long"] == task["train"] and count["rows"] == 2 * count["problems"]
    assert counts["chain"]["train"]["too_long"] > 0
    with pytest.raises(DataError, match="longer than 5 tokens"):
        prepare(_recipe(max_length=5), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bad_rows_leave_nothing_behind(tmp_path: Path) -> None:
    task = _file(tmp_path / "mine.jsonl", 12)
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write('{"question": "q"}\n')
    with pytest.raises(DataError, match="missing") as caught:
        prepare(_recipe(tasks=[*SMALL, task]), tmp_path / "run")
    assert caught.value.place.endswith("mine.jsonl:13") and not (tmp_path / "run").exists()


def test_fewer_rows_than_asked_are_recorded(tmp_path: Path) -> None:
    task = _file(tmp_path / "mine.jsonl", 10) | {"train": 60, "val": 20, "test": 20}
    prepare(_recipe(tasks=[task]), tmp_path / "run")
    counts = read_manifest(tmp_path / "run")["tasks"]["mine"]
    assert {split: (c["asked"], c["problems"]) for split, c in counts.items()} == {
        "train": (60, 6),
        "val": (20, 2),
        "test": (20, 2),
        "teach": (0, 0),
    }


def test_gsm8k_with_a_trimmed_tokenizer(gsm8k_root: Path, tmp_path: Path) -> None:
    task = {"name": "gsm8k", "train": 60, "val": 11, "test": 13}
    section = {"tasks": [task], "tokenizer": "root:gpt2", "trim_vocabulary": True, "root": str(gsm8k_root)}
    seen: list[tuple[str, float, float]] = []
    prepare(_recipe(**section), tmp_path, progress=lambda *report: seen.append(report))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    full = AutoTokenizer.from_pretrained(gsm8k_root / "tokenizers/gpt2")
    id_map = json.loads((tmp_path / "tokenizer/id_map.json").read_text())
    old_of = {new: int(old) for old, new in id_map.items()}
    assert sorted(old_of) == list(range(len(tokenizer))) and len(tokenizer) < 5000
    for row in read_split(tmp_path, "test"):
        assert full.decode([old_of[i] for i in row.input_ids]) == tokenizer.decode(row.input_ids)
        assert row.doc_hash == question_hash(row.prompt.removeprefix("Question: ").removesuffix("\nAnswer:"))
    assert seen[0] == ("loading tasks", 0, 1) and seen[-1] == ("encoding test", 13, 13)
    manifest = read_manifest(tmp_path)
    assert str(gsm8k_root) not in json.dumps(manifest)
    prepare(_recipe(**section | {"root": None}), tmp_path)  # where the copy lay makes no difference
