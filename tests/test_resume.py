"""Killed at any point, started again: the same bits; nobody left behind; nothing logged twice or left out."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe import (
    PROGRESS,
    SEED,
    command,
    copy_base,
    environment,
    invoke,
    rows_of,
    tiny_recipe,
    write_recipe,
)

from kvdistill.arms.experiment import Experiment
from kvdistill.arms.student import CausalStudent
from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import sha256_file
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.stages.capture import capture
from kvdistill.stages.fit import fit
from kvdistill.stages.train import train_student
from kvdistill.stages.train.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

quiet_libraries()
set_threads(1)

# dropout draws from the generators; the windows of the log and the checkpoints do not coincide
CHANGES: dict[str, Any] = {
    "arms": {"competence": {"fuse": {"fusion_strategy": "competence"}, "loss": {"logit_weight": 0.5}}},
    "student": {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}},
    "train": {"steps": 48, "accumulation": 2, "batch_size": 4, "log_every": 2, "save_every": 3, "eval_every": 10},
}
SHORT: dict[str, Any] = {**CHANGES, "train": {**CHANGES["train"], "steps": 18}}
ARM = "competence"
FINAL = ("model/model.safetensors", "adapters.safetensors", "match.json")


def arm_folder(run: Path) -> Path:
    return run / "arms" / ARM / f"seed-{SEED}"


@functools.cache
def captured_run() -> Path:
    """A run folder that is captured and fitted for `CHANGES`; steps matter to neither."""
    folder = Path(tempfile.mkdtemp(prefix="kvdistill-resume-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = copy_base(folder)
    (run / "recipe.json").unlink()
    recipe = tiny_recipe(run, **CHANGES)
    experiment = Experiment(recipe, run)
    for teacher in experiment.teachers.values():
        capture(teacher)
    fit(experiment.arm(ARM, SEED))
    return run


def prepared(folder: Path, changes: dict[str, Any] = SHORT) -> tuple[Path, Any]:
    """A run folder ready to train `ARM`, and its recipe."""
    run = folder / "run"
    shutil.copytree(captured_run(), run)
    return run, tiny_recipe(run, **changes)


def trained_whole(folder: Path, changes: dict[str, Any]) -> Path:
    run, recipe = prepared(folder, changes)
    train_student(Experiment(recipe, run).arm(ARM, SEED))
    return arm_folder(run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The short training, never interrupted."""
    return trained_whole(tmp_path_factory.mktemp("undisturbed"), SHORT)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def ledgers_steps(folder: Path) -> int:
    return json.loads((folder / "ledger.json").read_text())["optimiser_steps"]


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    """Weights, adapters and match figures to the bit; every logged row but its seconds; the ledger's counts."""
    for name in FINAL:
        assert sha256_file(folder / name) == sha256_file(undisturbed / name), name
    mine, theirs = (timeless(rows_of(f / "log.jsonl")) for f in (folder, undisturbed))
    assert [(row["step"], "val" in row) for row in mine] == [(row["step"], "val" in row) for row in theirs]
    assert mine == theirs
    steps = [row["step"] for row in mine if "loss" in row]
    assert steps == [1, *range(2, ledgers_steps(undisturbed) + 1, 2)]
    ledgers = [json.loads((f / "ledger.json").read_text()) for f in (folder, undisturbed)]
    for name in ("tokens_nonpadding", "tokens_loss", "flops", "order_fingerprint", "init_fingerprint"):
        assert ledgers[0][name] == ledgers[1][name]
    assert not (folder / "checkpoints").exists()


def test_killed_at_six_random_moments_it_ends_in_the_same_bits(tmp_path):
    run, _ = prepared(tmp_path, CHANGES)
    changes = tmp_path / "changes.json"
    changes.write_text(json.dumps(CHANGES))
    driver = Path(__file__).with_name("killed_training.py")
    words = [sys.executable, str(driver), str(run), ARM, str(SEED), "6", str(changes)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    killed_at = json.loads(done.stdout.splitlines()[-1])
    assert len(killed_at) == 6 and killed_at[-1] > killed_at[0], killed_at  # it came on between the kills
    assert_same_end(arm_folder(run), trained_whole(tmp_path / "whole", CHANGES))


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[str, float, float], None]:
    def progress(what: str, done: float, total: float) -> None:
        if done == step:
            raise Stopped

    return progress


def interrupted(run: Path, recipe: Any, step: int) -> Path:
    """Train until `step` is done but not logged; its checkpoints folder."""
    with pytest.raises(Stopped):
        train_student(Experiment(recipe, run).arm(ARM, SEED), progress=stop_at(step))
    return arm_folder(run) / "checkpoints"


@pytest.mark.parametrize(
    "damage",
    [
        "truncate trainable.safetensors",
        "truncate state.json",
        "flip trainable.safetensors",
        "half-written folder",
        "all of them",
    ],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, undisturbed, damage):
    run, recipe = prepared(tmp_path)
    checkpoints = interrupted(run, recipe, 14)
    newest, older = checkpoints / "checkpoint-12", checkpoints / "checkpoint-9"
    assert newest_checkpoint(checkpoints) == newest
    how, _, name = damage.partition(" ")
    expected: Path | None = older
    if how == "truncate":
        (newest / name).write_bytes((newest / name).read_bytes()[:-20])
    elif how == "flip":
        content = bytearray((newest / name).read_bytes())
        content[-3] ^= 4
        (newest / name).write_bytes(content)
    elif how == "half-written":
        os.rename(newest, checkpoints / ".checkpoint-12.part-1")
    else:
        for folder in (newest, older):
            (folder / "manifest.json").write_text("{")
        expected = None
    assert newest_checkpoint(checkpoints) == expected
    train_student(Experiment(recipe, run).arm(ARM, SEED))
    assert_same_end(arm_folder(run), undisturbed)


def test_torn_log_lines_and_early_stops(tmp_path, undisturbed):
    """Stopped before the first checkpoint, then with a torn log line, then after the last step."""
    run, recipe = prepared(tmp_path)
    interrupted(run, recipe, 2)
    interrupted(run, recipe, 15)  # the newest checkpoint is of step 12, the newest row of step 14
    log = arm_folder(run) / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(CausalStudent, "save", lambda *a: (_ for _ in ()).throw(Stopped()))
        train_student(Experiment(recipe, run).arm(ARM, SEED))
    assert newest_checkpoint(arm_folder(run) / "checkpoints").name == "checkpoint-18"
    train_student(Experiment(recipe, run).arm(ARM, SEED))
    assert_same_end(arm_folder(run), undisturbed)


def test_time_spent_is_added_up_over_resumptions(tmp_path, monkeypatch):
    run, recipe = prepared(tmp_path)
    interrupted(run, recipe, 15)
    rows = rows_of(arm_folder(run) / "log.jsonl")
    train_student(Experiment(recipe, run).arm(ARM, SEED))
    seconds = [row["seconds"] for row in rows_of(arm_folder(run) / "log.jsonl") if "loss" in row]
    assert seconds == sorted(seconds)
    ledger = json.loads((arm_folder(run) / "ledger.json").read_text())
    assert ledger["seconds"] >= seconds[-1] > [row["seconds"] for row in rows if "loss" in row][-2]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run, recipe = prepared(tmp_path)
    checkpoints = interrupted(run, recipe, 5)
    from safetensors.torch import load_file, save_file

    file = checkpoints / "checkpoint-3" / "trainable.safetensors"
    tensors = load_file(file)
    tensors["stranger"] = torch.zeros(1)
    save_file(tensors, file)
    manifest = file.with_name("manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), file.name: sha256_file(file)}))
    with pytest.raises(RunFolderError, match="stranger"):
        train_student(Experiment(recipe, run).arm(ARM, SEED))


def test_a_teacher_resumes_to_the_same_bits(tmp_path):
    from kvdistill.stages.train import train_teacher

    run = copy_base(tmp_path)
    recipe = tiny_recipe(run)
    whole = sha256_file(run / "teachers/one/model/model.safetensors")
    shutil.rmtree(run / "teachers/one")
    with pytest.raises(Stopped):
        train_teacher(Experiment(recipe, run).teachers["one"], progress=stop_at(4))
    train_teacher(Experiment(recipe, run).teachers["one"])
    assert sha256_file(run / "teachers/one/model/model.safetensors") == whole


def test_a_capture_killed_between_shards_goes_on(tmp_path, monkeypatch):
    import kvdistill.stages.capture as stage

    run = copy_base(tmp_path)
    recipe = tiny_recipe(run, capture={"dtype": "bfloat16", "batch_size": 4})
    monkeypatch.setattr(stage, "SHARD_BYTES", 60_000)
    from kvdistill.store.shards import StoreWriter

    add, count = StoreWriter.add, [0]

    def add_and_stop(self: Any, tensors: Any) -> None:
        add(self, tensors)
        count[0] += 1
        if count[0] == 2:
            raise Stopped

    monkeypatch.setattr(StoreWriter, "add", add_and_stop)
    with pytest.raises(Stopped):
        stage.capture(Experiment(recipe, run).teachers["one"])
    monkeypatch.setattr(StoreWriter, "add", add)
    stage.capture(Experiment(recipe, run).teachers["one"])
    whole = copy_base(tmp_path / "whole")
    stage.capture(Experiment(recipe, whole).teachers["one"])
    digests = [
        {f.name: sha256_file(f) for f in sorted((r / "store").rglob("*.safetensors")) if "-one-" in str(f)}
        for r in (run, whole)
    ]
    assert digests[0] == digests[1] and len(digests[0]) > 2


# -- the whole command ------------------------------------------------------------------------------


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def wait_for(done: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Direct children, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_whole_study_stopped_by_ctrl_c_and_by_kill_9_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Ctrl-C: exit 130, one message. SIGKILL of the parent alone: its workers end by themselves. Then it finishes."""
    changes = {"train": {"steps": 40, "save_every": 5}, "hardware": {"workers": 1}}
    path = write_recipe(tmp_path, **changes)
    run = tmp_path / "run"

    study = start(path)
    wait_for(lambda: (run / "teachers").exists() or study.poll() is not None, "teachers were never begun")
    workers = children_of(study.pid)
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does: to the parent and its workers
    out, err = study.communicate(timeout=60)
    assert study.returncode == 130, err
    said = [line for line in err.strip().splitlines() if line and not PROGRESS.match(line)]
    assert said == ["kvdistill: stopped. The same command goes on where this one ended."] and out == ""
    wait_for(lambda: not any(map(is_alive, workers)), "workers outlived Ctrl-C", 10)

    study = start(path)
    wait_for(lambda: bool(list(run.glob("arms/*/*/log.jsonl"))) or study.poll() is not None, "no student was begun")
    workers = children_of(study.pid)
    assert workers
    os.kill(study.pid, signal.SIGKILL)  # the parent alone
    wait_for(lambda: not any(map(is_alive, workers)), "workers outlived their parent", 10)
    study.communicate(timeout=60)
    assert not (run / "report.html").exists()

    study = start(path)
    out, err = study.communicate(timeout=200)
    assert study.returncode == 0, err
    assert (run / "report.html").exists() and "Traceback" not in err
    seconds = json.loads((run / "provenance.json").read_text())["seconds"]

    (tmp_path / "whole").mkdir()
    whole = write_recipe(tmp_path / "whole", **changes)
    assert invoke(monkeypatch, "run", whole).code == 0  # never interrupted, and without workers
    models = sorted(f.relative_to(run) for f in run.rglob("model.safetensors"))
    assert len(models) == 4
    for model in models:
        assert sha256_file(run / model) == sha256_file(tmp_path / "whole/run" / model), model
    records = "arms/fixed/seed-7/records.jsonl"
    both = [timeless(rows_of(r / records)) for r in (run, tmp_path / "whole/run")]
    assert both[0] == both[1]
    assert seconds > 1
    assert not list(run.rglob("*.part-*"))
