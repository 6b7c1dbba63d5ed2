"""Tasks: GSM8K as published, local JSONL files, and everything that can be wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe
from kvdistill.data import sources
from kvdistill.data.grading import is_correct
from kvdistill.data.problems import Problem, write_plain
from kvdistill.data.sets import EVALUATIONS, TASKS, find_rules
from kvdistill.data.sets.gsm8k import read_row
from kvdistill.data.splits import load_multi_task_dataset, load_splits, share_out

ROW = {"question": "How many?", "reasoning": "Two and two.", "answer": "4"}


def _data(*tasks: dict[str, Any], **section: Any) -> DataRecipe:
    return DataRecipe.model_validate({"tasks": list(tasks), **section})


def _jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {n}+1?", "reasoning": f"{n} and 1.", "answer": str(n + 1)} for n in range(count)]


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_row_parses_and_its_gold_is_right(data_root: Path, split: str, count: int) -> None:
    asked = {"train": 0, "val": 0, "test": 0} | {split: 10_000}
    problems = load_splits(_data({"name": "gsm8k", **asked}, root=str(data_root))).problems[split]
    assert len(problems) == count and len({problem.id for problem in problems}) == count
    published = [json.loads(line)["answer"] for line in (data_root / f"gsm8k/{split}.jsonl").open(encoding="utf-8")]
    for problem in problems:
        raw = published[int(problem.id.rpartition("-")[2]) - 1]
        assert problem.answer == raw.rpartition("#### ")[2].replace(",", "")
        assert "<<" not in problem.reasoning and "####" not in problem.reasoning
        for row in (write_plain(problem, "cot"), write_plain(problem, "direct")):
            assert is_correct("gsm8k", row.completion, problem.answer)
            assert not is_correct("gsm8k", row.completion, problem.answer + "1")
            assert not is_correct("gsm8k", row.completion.replace(" #### ", " #### 1"), problem.answer)


def test_gsm8k_text_is_as_written_here() -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>1,072.\n#### 1,072"
    row = sources.RawRow({"question": " How many? ", "answer": answer}, "f:1", 1)
    problem = read_row(row, "train-1")
    written = TASKS["gsm8k"].write(problem, "cot")
    assert written.text == ("Question: How many?\nAnswer: She sold 48/2 = 24 clips.\nIn all 48+24 = 1,072. #### 1072")
    assert TASKS["gsm8k"].write(problem, "direct").text == "Question: How many?\nFinal answer: #### 1072"
    assert [written.text[a:b] for a, b in written.spans.values()] == [written.prompt, written.reasoning, written.answer]


@pytest.mark.parametrize("answer", ["no mark 72", "text #### many", "#### 72", "text ####"])
def test_gsm8k_row_without_a_marked_number_is_named(tmp_path: Path, answer: str) -> None:
    (tmp_path / "gsm8k").mkdir()
    good = {"question": "q", "answer": "r #### 1"}
    _jsonl(tmp_path / "gsm8k/train.jsonl", good, {"question": "q2", "answer": answer})
    with pytest.raises(DataError) as caught:
        load_splits(_data({"name": "gsm8k", "train": 1, "val": 0, "test": 0}, root=str(tmp_path)))
    assert caught.value.place.endswith("gsm8k/train.jsonl:2") and caught.value.fix


def test_gsm8k_splits_keep_to_the_publishers_files(data_root: Path) -> None:
    splits = load_splits(_data({"name": "gsm8k", "train": 9000, "val": 300, "test": 50}, root=str(data_root)))
    sizes = {split: len(problems) for split, problems in splits.problems.items()}
    assert sizes["train"] + sizes["val"] == 7473 and sizes["val"] == 241 and sizes["test"] == 50
    assert all(problem.id.startswith("test-") for problem in splits.problems["test"])
    assert all(problem.id.startswith("train-") for s in ("train", "val") for problem in splits.problems[s])
    assert [source.place for source in splits.sources] == ["gsm8k/train.jsonl", "gsm8k/test.jsonl"]


def test_hub_out_of_reach_names_the_local_alternative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.hub, "hub_reachable", lambda: False)
    with pytest.raises(DataError, match="cannot be reached") as caught:
        load_splits(_data({"name": "gsm8k"}))
    assert "data.root=DIR" in caught.value.fix and "DIR/gsm8k/train.jsonl" in caught.value.fix

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sources.hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="no route") as caught:
        load_splits(_data({"name": "gsm8k"}))
    assert "data.root=DIR" in caught.value.fix


def test_hub_rows_and_local_rows_are_the_same_problems(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(sources.hub, "hub_reachable", lambda: True)
    calls = []

    def load(path: str, config: str, split: str) -> list[dict[str, str]]:
        calls.append((path, config, split))
        return [json.loads(line) for line in (data_root / f"gsm8k/{split}.jsonl").open(encoding="utf-8")]

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = {"name": "gsm8k", "train": 30, "val": 7, "test": 11}
    assert load_splits(_data(task)).problems == load_splits(_data(task, root=str(data_root))).problems
    assert calls == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_jsonl_with_a_field_mapping(tmp_path: Path) -> None:
    rows = [{"problem": f"q{n}", "why": "since", "sol": n / 2, "key": n, "lang": "zh"} for n in range(6)]
    file = _jsonl(tmp_path / "mine.jsonl", *rows)
    fields = {"question": "problem", "reasoning": "why", "answer": "sol", "id": "key", "language": "lang"}
    task = {"name": "jsonl", "file": str(file), "fields": fields, "train": 6, "val": 0, "test": 0}
    problems = load_splits(_data(task)).problems["train"]
    assert sorted(problems, key=lambda p: p.id)[3] == Problem("mine", "3", "q3", "since", "1.5", "zh")


def test_jsonl_without_reasoning_goes_with_style_direct_only(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": "yes"} for n in range(4)]
    task = {"name": "jsonl", "file": str(_jsonl(tmp_path / "mine.jsonl", *rows)), "train": 4, "val": 0, "test": 0}
    assert len(load_splits(_data(task, style="direct")).problems["train"]) == 4
    with pytest.raises(DataError, match="'reasoning' is missing") as caught:
        load_splits(_data(task))
    assert "data.style=direct" in caught.value.fix and caught.value.place.endswith("mine.jsonl:1")


GOOD = json.dumps(ROW).encode()
BAD_FILES = {
    "broken row": (GOOD + b"\n{oops\n", ":2", "broken JSON"),
    "array": (b"[" + GOOD + b"]\n", ":1", "not an object"),
    "pretty array": (b"[\n" + GOOD + b"\n]\n", ":1", "broken JSON"),
    "not an object": (GOOD + b'\n"text"\n', ":2", "not an object"),
    "nan": (b'{"question": "q", "reasoning": "r", "answer": NaN}\n', ":1", "NaN is not JSON"),
    "deep": (b"[" * 100_000 + b"\n", ":1", "broken JSON"),
    "huge integer": (b'{"answer": ' + b"9" * 5000 + b"}\n", ":1", "broken JSON"),
    "missing field": (GOOD + b'\n\n{"reasoning": "r", "answer": "4"}\n', ":3", "'question' is missing"),
    "near field": (b'{"questoin": "q", "reasoning": "r", "answer": "4"}\n', ":1", "did you mean 'questoin'"),
    "null": (b'{"question": null, "reasoning": "r", "answer": "4"}\n', ":1", "NoneType"),
    "wrong type": (b'{"question": ["q"], "reasoning": "r", "answer": "4"}\n', ":1", "is list"),
    "number question": (b'{"question": 4, "reasoning": "r", "answer": "4"}\n', ":1", "is int"),
    "bool answer": (b'{"question": "q", "reasoning": "r", "answer": true}\n', ":1", "is bool"),
    "empty answer": (b'{"question": "q", "reasoning": "r", "answer": " "}\n', ":1", "'answer' is empty"),
    "empty question": (b'{"question": "", "reasoning": "r", "answer": "4"}\n', ":1", "'question' is empty"),
    "mark inside": (b'{"question": "q", "reasoning": "r #### 3", "answer": "4"}\n', ":1", "must not stand"),
    "two lines": (b'{"question": "q", "reasoning": "r", "answer": "4\\n5"}\n', ":1", "one line"),
    "surrogate": (b'{"question": "\\ud800", "reasoning": "r", "answer": "4"}\n', ":1", "surrogate"),
    "utf-16": ('{"a": 1}\n'.encode("utf-16"), ":1", "byte order mark"),
    "latin-1": (GOOD + b'\n{"question": "caf\xe9"}\n', ":2", "not UTF-8"),
    "empty": (b"", "", "no rows"),
    "blank": (b"\n \n", "", "no rows"),
    "repeated id": (b'{"id": 7, ' + GOOD[1:] + b'\n{"id": "7", ' + GOOD[1:] + b"\n", ":2", "used before, at"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_error_with_place_and_fix(tmp_path: Path, case: str) -> None:
    data, where, what = BAD_FILES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_splits(_data({"name": "jsonl", "file": str(path), "train": 1, "val": 0, "test": 0}))
    assert caught.value.place == f"{path}{where}" and what in caught.value.what and caught.value.fix


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path, what in ((tmp_path, "is a folder"), (tmp_path / "none.jsonl", "file not found")):
        with pytest.raises(DataError, match=what) as caught:
            load_splits(_data({"name": "jsonl", "file": str(path)}))
        assert "file" in caught.value.place and caught.value.fix
    with pytest.raises(DataError, match="no such folder") as caught:
        load_splits(_data({"name": "gsm8k"}, root=str(tmp_path / "none")))
    assert caught.value.place == "data.root"
    with pytest.raises(DataError, match="file not found"):
        load_splits(_data({"name": "gsm8k"}, root=str(tmp_path)))


def test_rows_may_hold_line_separators_control_characters_and_windows_line_ends(tmp_path: Path) -> None:
    row = {"question": "a\u2028b\x07c", "reasoning": "r", "answer": "4"}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    problems = load_splits(_data({"name": "jsonl", "file": str(path), "train": 1, "val": 0, "test": 0})).problems
    assert problems["train"][0].question == "a\u2028b\x07c"


def test_names_that_do_not_go_together(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "rows.jsonl", *_rows(5))
    own = _jsonl(tmp_path / "chain.jsonl", *_rows(5))
    mistakes = [
        ([{"name": "gsm8"}], "unknown task", "did you mean 'gsm8k'"),
        ([{"name": "zzz"}], "unknown task", "there are: chain, product, digits, quotient, affine, permute, gsm8k"),
        ([{"name": "jsonl"}], "needs a file", "file:"),
        ([{"name": "chain", "file": str(file)}], "does not go with", "jsonl"),
        ([{"name": "gsm8k", "file": str(file)}], "does not go with", "jsonl"),
        ([{"name": "chain"}, {"name": "chain"}], "two tasks are called", "merge"),
        ([{"name": "jsonl", "file": str(own)}], "built-in", "rename"),
        ([{"name": "jsonl", "file": str(file), "fields": {"anser": "x"}}], "unknown field", "did you mean 'answer'"),
    ]
    for tasks, what, fix in mistakes:
        with pytest.raises(DataError, match=what) as caught:
            load_splits(_data(*tasks))
        assert fix in caught.value.fix and caught.value.place.startswith("data.tasks")


def test_splits_are_disjoint_seeded_and_held_out_ones_do_not_move(tmp_path: Path) -> None:
    file = str(_jsonl(tmp_path / "rows.jsonl", *_rows(40)))

    def split(seed: int = 0, **counts: int) -> dict[str, list[str]]:
        tasks = [{"name": "jsonl", "file": file, **counts}, {"name": "chain", **counts}]
        problems = load_splits(_data(*tasks, seed=seed)).problems
        return {name: [problem.question for problem in chosen] for name, chosen in problems.items()}

    small, same, large = split(train=10, val=5, test=7), split(train=10, val=5, test=7), split(train=20, val=5, test=7)
    assert small == same != split(seed=1, train=10, val=5, test=7)
    assert (small["test"], small["val"]) == (large["test"], large["val"])
    assert {name: len(chosen) for name, chosen in large.items()} == {"train": 40, "val": 10, "test": 14, "teach": 0}
    assert len({q for chosen in large.values() for q in chosen}) == 64


def test_fewer_rows_than_asked_for_are_shared_out(tmp_path: Path) -> None:
    file = str(_jsonl(tmp_path / "rows.jsonl", *_rows(20)))
    problems = load_splits(_data({"name": "jsonl", "file": file, "train": 700, "val": 150, "test": 150})).problems
    assert {name: len(chosen) for name, chosen in problems.items()} == {"train": 14, "val": 3, "test": 3, "teach": 0}


@pytest.mark.parametrize("available", range(0, 14))
def test_share_out_adds_up_and_starves_nobody(available: int) -> None:
    asked = {"test": 100, "val": 1, "train": 1000, "none": 0}
    shares = share_out(asked, available)
    assert sum(shares.values()) == available and shares["none"] == 0
    assert all(shares[name] <= asked[name] for name in asked)
    assert available < 3 or all(shares[name] > 0 for name in ("test", "val", "train"))


def test_an_empty_split_that_was_asked_for_is_named(tmp_path: Path) -> None:
    file = str(_jsonl(tmp_path / "rows.jsonl", *_rows(1)))
    with pytest.raises(DataError, match="split test of task rows is empty"):
        load_splits(_data({"name": "jsonl", "file": file, "train": 10, "val": 0, "test": 1}))


def test_a_repeated_question_is_kept_once(tmp_path: Path) -> None:
    rows = [*_rows(6), {**_rows(1)[0], "question": "  what IS 0+1？"}]
    splits = load_splits(_data({"name": "jsonl", "file": str(_jsonl(tmp_path / "r.jsonl", *rows)), "train": 9}))
    assert sum(map(len, splits.problems.values())) == 6 and splits.duplicates == {"r": 1}


def test_load_multi_task_dataset_gives_rows_of_each_task_and_style(data_root: Path) -> None:
    rows = load_multi_task_dataset(["gsm8k", "chain"], ["cot", "direct"], num_problems=3, root=data_root)
    assert [(row.problem.task, row.style) for row in rows] == [
        (task, style) for task in ("gsm8k", "chain") for _ in range(3) for style in ("cot", "direct")
    ]
    with pytest.raises(DataError, match="unknown style"):
        load_multi_task_dataset(["chain"], ["both"])  # type: ignore[list-item]


def test_a_data_set_is_found_by_training_and_by_evaluation_under_one_name() -> None:
    both = [name for name in TASKS if name in EVALUATIONS]
    assert both == ["gsm8k", "svamp", "strategyqa", "math23k", "math", "arc_challenge", "hotpotqa"]
    for name in both:
        rules = EVALUATIONS[name].rules
        assert rules is None or rules is TASKS[name]  # an own template is the task's own
    assert find_rules("gsm8k") is TASKS["gsm8k"] and find_rules("my_rows") is TASKS["jsonl"]
