"""Marks vouch for the files beside them; a damaged mark vouches for nothing; an altered file is named, never used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_recipe import SEED, assert_one_message, copy_base, invoke, tiny_recipe, write_recipe

from kvdistill.core.errors import RunFolderError
from kvdistill.core.marks import check_marked, read_mark, write_mark
from kvdistill.study.plan import plan

pytestmark = pytest.mark.slow


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"12345678")
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("{}\n")
    write_mark(tmp_path / "trained.json", {"steps": 3}, ["model", "log.jsonl", "not-made.json"])
    return tmp_path / "trained.json"


def test_a_mark_says_what_was_made(marked):
    said = read_mark(marked)
    assert said is not None and said["steps"] == 3
    assert {name: file["bytes"] for name, file in said["files"].items()} == {
        **{"model/weights": 8, "model/config.json": 2},
        "log.jsonl": 3,
    }
    check_marked(marked, fix="none")


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", "3", '{"steps": 3, "sha256": "0"}', b"\xff\xfe\x00"])
def test_a_damaged_mark_is_none(marked, content):
    marked.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_mark(marked) is None


def test_an_edited_mark_is_none(marked):
    tree = json.loads(marked.read_text())
    marked.write_text(json.dumps({**tree, "steps": 4}))
    assert read_mark(marked) is None


def test_missing_altered_and_unknown_files_are_named(marked):
    weights = marked.parent / "model/weights"
    for change in (weights.unlink, lambda: weights.write_bytes(b"12345679"), lambda: weights.write_bytes(b"1234567")):
        change()
        with pytest.raises(RunFolderError, match="weights"):
            check_marked(marked, "model/", fix="none")
        check_marked(marked, "log.jsonl", fix="none")
        weights.write_bytes(b"12345678")
    check_marked(marked, fix="none")
    (marked.parent / "model/other.safetensors").touch()
    with pytest.raises(RunFolderError, match="other"):
        check_marked(marked, "model/", fix="none")


# -- in a study ---------------------------------------------------------------------------------------


def test_a_garbage_mark_is_not_finished(tmp_path, monkeypatch):
    run = copy_base(tmp_path)
    assert invoke(monkeypatch, "run", write_recipe(tmp_path)).code == 0
    mark = run / f"arms/ce/seed-{SEED}/evaluated.json"
    mark.write_text("{}")
    assert [j.id for j in plan(tiny_recipe(run), run)] == ["prepare", "check", f"evaluate:ce:{SEED}", "report"]


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["deleted", "flipped"])
def test_a_student_that_was_altered_after_training_is_not_evaluated(tmp_path, monkeypatch, name, how):
    run = copy_base(tmp_path)
    recipe = write_recipe(tmp_path, arms={"ce": {"teachers": []}})
    assert invoke(monkeypatch, "train", recipe, "--arm", "ce", "--seed", SEED).code == 0
    file = run / f"arms/ce/seed-{SEED}/model" / name
    if how == "deleted":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40
        file.write_bytes(content)
    for asked in (["evaluate", recipe], ["evaluate", file.parent, "--tasks", "own"]):
        answer = invoke(monkeypatch, *asked)
        assert_one_message(answer, name, "missing" if how == "deleted" else "checksum differs")
    assert not (run / f"arms/ce/seed-{SEED}/evaluated.json").exists()


def test_a_scratch_teacher_that_was_altered_is_not_captured(tmp_path, monkeypatch):
    run = copy_base(tmp_path)
    shutil.rmtree(run / "store")
    for name in ("one", "two"):
        (run / "teachers" / name / "fingerprint.json").unlink(missing_ok=True)
    file = run / "teachers/two/model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40
    file.write_bytes(content)
    answer = invoke(monkeypatch, "capture", write_recipe(tmp_path))
    assert_one_message(answer, "teachers/two/model/model.safetensors", "checksum differs")


def test_records_and_ledgers_that_were_edited_give_no_page(tmp_path, monkeypatch):
    run = copy_base(tmp_path)
    recipe = write_recipe(tmp_path)
    assert invoke(monkeypatch, "run", recipe).code == 0
    folder = run / f"arms/ce/seed-{SEED}"
    for name, edit in (
        ("records.jsonl", lambda text: text.replace('"correct": false', '"correct": true', 1)),
        ("records.jsonl", lambda text: text.split("\n", 1)[1]),
        ("ledger.json", lambda text: (run / f"arms/fixed/seed-{SEED}/ledger.json").read_text()),
        ("evaluated.json", lambda text: text.replace('"questions": ', '"questions": 1')),
    ):
        file = folder / name
        before = file.read_text()
        file.write_text(edit(before))
        assert file.read_text() != before
        answer = invoke(monkeypatch, "report", recipe)
        assert_one_message(answer, f"seed-{SEED}/{name}", "damaged" if name == "evaluated.json" else "checksum differs")
        file.write_text(before)
    assert invoke(monkeypatch, "report", recipe).code == 0
    for name in ("evaluated.json", "trained.json"):
        mark = (folder / name).read_bytes()
        (folder / name).unlink()
        assert invoke(monkeypatch, "report", recipe).code == 0
        assert json.loads((run / "summary.json").read_text())["arms"]["ce"]["per_seed"] == [None], name
        assert f"ce seed {SEED} (no {name})" in (run / "report.html").read_text()
        (folder / name).write_bytes(mark)
