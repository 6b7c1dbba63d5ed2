"""What kills leave in a run folder is gone after the next command, and what a living process writes is not touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import ARMS, SEED, copy_base, invoke, tiny_recipe, write_recipe

from kvdistill.arms.experiment import Experiment
from kvdistill.core.files import sha256_file
from kvdistill.core.layout import DRY_RUN, arm_folder, file_lock, folder_lock, locks_folder
from kvdistill.core.leftovers import sweep_run, sweep_temporary
from kvdistill.core.marks import write_mark
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.stages.fit import fit
from kvdistill.store.shards import StoreReader, StoreWriter
from kvdistill.study.folder import claimed

quiet_libraries()
set_threads(1)


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def make(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead, alive = dead_pid(), os.getppid()
    gone = [
        make(tmp_path / f".recipe.json.part-{dead}"),
        make(tmp_path / f"store/x/.shard-00003.safetensors.part-{dead}"),
        make(tmp_path / f"arms/a/seed-1/.model.part-{dead}/config.json"),
        make(tmp_path / f"arms/a/seed-1/checkpoints/.checkpoint-7.part-{os.getpid()}/state.json"),
        make(tmp_path / f".check.part-{dead}-x7_/tokenizer.json"),
        make(tmp_path / f"arms/a/seed-2/.model.old-{dead}/config.json"),
        make(tmp_path / f"arms/a/seed-1/.model.part-{10**15}"),
    ]
    stays = [
        make(tmp_path / "arms/a/seed-2/model/config.json", "new"),
        make(tmp_path / f".report.html.part-{alive}"),
        make(tmp_path / f"arms/a/seed-1/.model.part-{alive}/config.json"),
        make(tmp_path / f"evaluations/.results.json.part-{dead}"),
        make(tmp_path / f"recipe.part-{dead}"),
        make(tmp_path / ".hidden"),
    ]
    outside = make(tmp_path.with_name(f"{tmp_path.name}-outside") / f".a.part-{dead}")
    (tmp_path / "link").symlink_to(outside.parent)
    sweep_temporary(tmp_path, skip=("evaluations",))
    assert not [path for path in gone if path.exists()] and all(path.exists() for path in [*stays, outside])


def test_an_old_folder_comes_back_where_the_new_one_never_took_its_name(tmp_path):
    make(tmp_path / f".model.old-{dead_pid()}/config.json", "old")
    make(tmp_path / f".model.part-{dead_pid()}/config.json", "new")
    sweep_temporary(tmp_path)
    assert files(tmp_path) == {"model/config.json"} and (tmp_path / "model/config.json").read_text() == "old"


def test_what_is_left_beside_marks_goes_and_what_is_still_needed_stays(tmp_path):
    for arm in ("done", "half"):
        make(tmp_path / f"arms/{arm}/seed-1/checkpoints/checkpoint-3/state.json")
        make(tmp_path / f"arms/{arm}/seed-1/evaluated/records.jsonl")
    make(tmp_path / "teachers/one/checkpoints/checkpoint-3/state.json")
    for mark in ("arms/done/seed-1/trained.json", "arms/done/seed-1/evaluated.json", "teachers/one/trained.json"):
        write_mark(tmp_path / mark, {}, [])
    before = files(tmp_path)
    with file_lock(locks_folder(tmp_path) / "working", wait=True, shared=True):  # somebody is at work
        sweep_run(tmp_path, keeps_answers=False)
        assert files(tmp_path) - {".locks/working"} == before
    sweep_run(tmp_path, keeps_answers=True)
    assert (tmp_path / "arms/done/seed-1/evaluated").exists() and (tmp_path / "arms/half/seed-1/checkpoints").exists()
    assert not [*tmp_path.glob("arms/done/*/checkpoints"), *tmp_path.glob("teachers/*/checkpoints")]
    sweep_run(tmp_path, keeps_answers=False)
    assert not (tmp_path / "arms/done/seed-1/evaluated").exists() and (tmp_path / "arms/half/seed-1/evaluated").exists()


def test_a_killed_rehearsal_is_swept_and_does_not_make_the_folder_a_strangers(tmp_path):
    run = tmp_path / "run"
    make(run / DRY_RUN / "run/recipe.json")
    recipe = tiny_recipe(run)
    with folder_lock(run / DRY_RUN, wait=False), claimed(recipe, run):  # it lives
        assert (run / DRY_RUN / "run/recipe.json").exists()
    with claimed(recipe, run):
        assert not (run / DRY_RUN).exists()


def test_the_next_command_tidies_up_and_the_last_to_leave_does(tmp_path, monkeypatch):
    run, dead = copy_base(tmp_path), dead_pid()
    (run / "recipe.json").write_text(tiny_recipe(run).model_dump_json())
    leftover = make(run / f"data/.train.parquet.part-{dead}")
    assert invoke(monkeypatch, "prepare", write_recipe(tmp_path)).code == 0
    assert not leftover.exists()
    with claimed(tiny_recipe(run), run):
        make(leftover)
        with claimed(tiny_recipe(run), run):
            pass
        assert leftover.exists()
    assert not leftover.exists()


def test_a_fit_killed_before_its_last_word_is_made_anew_and_a_second_shard_goes(tmp_path, monkeypatch):
    run = copy_base(tmp_path)
    recipe = tiny_recipe(run, arms=ARMS)
    whole = {f: sha256_file(run / f) for f in files(run) if f.startswith("fit/") and f.endswith(".safetensors")}
    shutil.rmtree(run / "fit")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(StoreWriter, "finish", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        try:
            fit(Experiment(recipe, run).arm("fixed", SEED))
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (journal,) = (run / "fit").glob("*/shards.jsonl")
    fit(Experiment(recipe, run).arm("fixed", SEED))
    assert len(journal.read_text().splitlines()) == 1
    folder = journal.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.copy(folder / "shard-00000.safetensors", folder / "shard-00001.safetensors")  # as it was left before
    second = {**manifest["shards"][0], "file": "shard-00001.safetensors"}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": [*manifest["shards"], second]}))
    fit(Experiment(recipe, run).arm("fixed", SEED))
    assert len(StoreReader(folder).shards) == 1
    made = {f: sha256_file(run / f) for f in files(run) if f.startswith("fit/") and f.endswith(".safetensors")}
    assert len(made) == 2 and made.items() <= whole.items()


@pytest.mark.parametrize("error", ["safetensors", "chained", "quota"])
def test_a_full_disk_in_one_training_is_one_message(tmp_path, monkeypatch, error):
    """`train --arm --seed` works in the command's own process, where a library's words for it came through."""
    from safetensors import SafetensorError

    from kvdistill.arms.student import CausalStudent

    run = copy_base(tmp_path)
    recipe = write_recipe(tmp_path, arms={"ce": {"teachers": []}})
    (run / "recipe.json").write_text(tiny_recipe(run, arms={"ce": {"teachers": []}}).model_dump_json())

    def full(*args: object) -> None:
        if error == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        if error == "quota":
            raise OSError(122, "Disk quota exceeded")
        try:
            raise OSError(28, "No space left on device")
        except OSError as reason:
            raise RuntimeError("writing failed") from reason

    monkeypatch.setattr(CausalStudent, "save", full)
    answer = invoke(monkeypatch, "train", recipe, "--arm", "ce", "--seed", SEED)
    assert answer.code == 2 and "the disk is full" in answer.err and "Traceback" not in answer.err, answer
    assert arm_folder(run, "ce", SEED).exists()
