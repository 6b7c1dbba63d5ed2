"""The record: what is written is read back; what is not whole is named; old ones are read; a killed study keeps its."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_factory import make_record
from tiny_recipe import SEED, environment, invoke, rows_of, tiny_recipe, write_recipe

from kvdistill.arms.experiment import Experiment
from kvdistill.core.errors import RunFolderError
from kvdistill.core.records import SCHEMA, read_records, write_records
from kvdistill.stages.evaluate import evaluate
from kvdistill.stages.evaluate.book import AnswerBook
from kvdistill.stages.evaluate.own import StudentLM

RECORD = make_record(task="chain", id="7", completion="2,3=苹\u2028果", gold="11", prediction="11", nll=0.1 + 0.2)
# as written before records had a version
OLD = {"arm": "ce", "seed": 7, "task": "chain", "id": "1", "style": "cot", "doc_hash": "d", "prompt_hash": "p",
       "prediction": None, "completion": "::", "gold": "11", "correct": False, "nll": 3.0, "tokens_out": 6,
       "seconds": 0.1}  # fmt: skip
OLD_SUITE = {"evaluation": "bbh", "task": "bbh_navigate", "id": "0", "number": 0, "style": "fewshot-3", "doc_hash": "d",
             "prompt_hash": "p", "mode": "generation", "prediction": "Yes", "completion": "Yes.", "gold": "Yes",
             "correct": False, "score": 0.4, "metrics": {"acc,none": 1.0}, "nll": None, "seconds": 1,
             "tokens_in": None, "tokens_out": None, "forward_passes": None, "truncated": None,
             "unspelled": None}  # fmt: skip


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    study = make_record(arm="ce", seed=7, task="t", id="1", metrics={"m": math.nan, "n": 1.0}, nll=math.inf)
    write_records(path, [RECORD, study])
    write_records(path, [RECORD], append=True)
    assert read_records(path) == [RECORD, study, RECORD]
    assert study.nll is None and study.metrics == {"m": None, "n": 1.0}  # in memory as in the file
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert [row["schema"] for row in rows] == [SCHEMA] * 3 and "arm" not in rows[0] and rows[1]["arm"] == "ce"
    write_records(path, [])
    assert read_records(path) == []


def test_records_without_a_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(OLD) + "\n" + json.dumps(OLD_SUITE) + "\n\n")
    own, suite = read_records(path)
    assert {key: getattr(own, key) for key in OLD} == OLD and {
        key: getattr(suite, key) for key in OLD_SUITE
    } == OLD_SUITE
    assert (own.evaluation, own.score, own.metrics, own.forward_passes) == ("own", 0.0, {}, None)
    assert suite.arm is None and suite.key == ("bbh", "bbh_navigate", "0", "fewshot-3")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda row: row.pop("prompt_hash"), "`prompt_hash` (str or null)"),
        (lambda row: row.update(correct=1), "`correct` (bool)"),
        (lambda row: row.update(score=None), "`score` (float or int)"),
        (lambda row: row.update(metrics=[1]), "`metrics` (dict)"),
        (lambda row: row.update(tokens_out="6"), "`tokens_out` (int or null)"),
        (lambda row: row.update(schema=SCHEMA + 1), f"schema {SCHEMA + 1}"),
        (lambda row: [row.pop("schema"), row.pop("task")], "`task` (str)"),
    ],
)
def test_a_damaged_record_is_named_with_its_line(tmp_path: Path, spoil: Callable[[Any], Any], words: str) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, [RECORD, RECORD])
    first, second, _ = path.read_text().split("\n")
    row = json.loads(second)
    spoil(row)
    path.write_text(f"{first}\n{json.dumps(row)}\n")
    with pytest.raises(RunFolderError, match=re.escape(words)) as caught:
        read_records(path)
    assert caught.value.place == f"{path}:2" and caught.value.fix


@pytest.mark.parametrize(("line", "words"), [('{"task": "ch', "not a JSON line"), ("[1]", "should be a JSON object")])
def test_a_line_that_is_no_record(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line)
    with pytest.raises(RunFolderError, match=words) as caught:
        read_records(path)
    assert caught.value.place == f"{path}:1"


def test_a_study_that_is_killed_while_it_evaluates_asks_the_rest_only(tmp_path: Path, monkeypatch: Any) -> None:
    changes: dict[str, Any] = {"teachers": [], "arms": {"ce": {"teachers": []}}, "evaluate": {"batch_size": 12}}
    assert invoke(monkeypatch, "run", write_recipe(tmp_path, **changes)).code == 0
    run = tmp_path / "run"
    recipe, folder = tiny_recipe(run, **changes), run / "arms" / "ce" / f"seed-{SEED}"
    whole = rows_of(folder / "records.jsonl")
    assert not (folder / "evaluated").exists()  # everything in it stands in records.jsonl
    assert [(row["task"], row["number"]) for row in whole] == [(t, n) for t in ("chain", "product") for n in range(16)]
    assert all(row["tokens_out"] <= row["forward_passes"] <= row["tokens_out"] + 1 for row in whole)
    for name in ("records.jsonl", "evaluated.json"):
        (folder / name).unlink()
    asked: list[int] = []
    real_append, real_answer = AnswerBook.append, StudentLM.answer_example

    def append(book: AnswerBook, records: Any) -> None:
        real_append(book, records)
        raise KeyboardInterrupt

    def answer(lm: StudentLM, requests: Any) -> list[str]:
        asked.append(len(requests))
        return real_answer(lm, requests)

    monkeypatch.setattr(StudentLM, "answer_example", answer)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerBook, "append", append)
        with pytest.raises(KeyboardInterrupt):
            evaluate(Experiment(recipe, run).arm("ce", SEED))
    assert not (folder / "evaluated.json").exists() and len(rows_of(folder / "evaluated" / "records.jsonl")) == 12
    evaluate(Experiment(recipe, run).arm("ce", SEED))
    assert asked == [12, 12, 8]
    rows = rows_of(folder / "records.jsonl")
    for row in (*whole, *rows):
        del row["seconds"]
    assert rows == whole


def test_a_run_is_evaluated_without_lm_eval() -> None:
    code = "import sys, kvdistill.stages.evaluate.stage, kvdistill.stages.evaluate.command\n"
    code += "assert 'lm_eval' not in sys.modules and 'datasets' not in sys.modules"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
