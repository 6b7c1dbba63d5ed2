"""Asked to end by SIGTERM, SIGUSR1 or Ctrl-C: nothing is lost, one line, an exit code of its own, and the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_resume import (
    ARM,
    CHANGES,
    SHORT,
    arm_folder,
    assert_same_end,
    children_of,
    is_alive,
    prepared,
    trained_whole,
    wait_for,
)
from tiny_recipe import ARMS, PROGRESS, SEED, command, copy_base, environment, rows_of, tiny_recipe, write_recipe

import kvdistill.core.stopping as stopping
from kvdistill.arms.experiment import Experiment
from kvdistill.core.files import sha256_file
from kvdistill.core.runtime import quiet_libraries, set_threads
from kvdistill.core.stopping import ALWAYS, Stopped, give_in, held_back, listening, put_off
from kvdistill.stages.capture import capture
from kvdistill.stages.evaluate import evaluate
from kvdistill.stages.fit import fit
from kvdistill.stages.train import train_student
from kvdistill.stages.train.checkpoint import newest_checkpoint
from kvdistill.stages.train.curves import LearningCurve
from kvdistill.stages.train.trainer import DistillTrainer

pytestmark = pytest.mark.slow

quiet_libraries()
set_threads(1)


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# -- how work gives in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda x: str(x)
)
def test_work_with_nothing_to_save_is_interrupted_on_the_spot(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, listening():
        ask(number)
        raise AssertionError("went on")
    assert stopped.value.exit_code == code and signal.getsignal(number) is before
    name = "" if number == signal.SIGINT else f" by {number.name}"
    assert stopped.value.message() == f"stopped{name}. The same command goes on where this one ended."
    give_in()  # nobody listens any more


def test_work_that_puts_it_off_goes_on_to_its_safe_place_or_to_its_end():
    done: list[str] = []
    with pytest.raises(Stopped), listening(), put_off():
        ask()
        done.append("before")
        give_in()
        done.append("after")
    with pytest.raises(Stopped), listening():
        with put_off(), put_off(ALWAYS):
            ask()
            ask()  # schedulers send it more than once
            done.append("to the end")
        done.append("beyond")
    with pytest.raises(Stopped), listening(limit_s=ALWAYS):
        ask()
        with put_off(ALWAYS):
            done.append("cleaning up")
        with put_off(0.0):
            done.append("begun anew")
    assert done == ["before", "to the end", "cleaning up"]


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(Stopped) as stopped, listening(), put_off(ALWAYS):
        ask(signal.SIGINT)
        ask(signal.SIGTERM)
        ask(signal.SIGINT)
        raise AssertionError("went on")
    assert stopped.value.exit_code == 130


def test_work_that_comes_to_no_safe_place_is_interrupted_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(Stopped), listening(), put_off(0.2):
        ask()
        while time.monotonic() < begun + 20:
            time.sleep(0.01)
    assert 0.2 <= time.monotonic() - begun < 5


def test_a_process_that_hears_nothing_in_a_long_call_ends_itself():
    program = (
        "import ctypes, os, signal, kvdistill.core.stopping as s\n"
        "s.GRACE_S, s.LAST_S = 0.1, 0.3\n"
        "mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)\n"
        "with s.listening(), s.put_off(0.1):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    libc.pthread_mutex_lock(mutex)\n"
        "    libc.pthread_mutex_lock(mutex)\n"  # for ever
    )
    done = subprocess.run([command()[0], "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75 and done.stderr.count("stopped by SIGTERM") == 1, done


def test_a_signal_that_comes_where_work_begins_or_ends_leaves_no_stretch_of_work_behind(monkeypatch):
    """While somebody holds the exception: the stretch stayed on the list, and was taken off whenever that was let go,
    from whatever list was there by then. So a checkpoint that was being written could be cut."""
    monkeypatch.setattr(stopping, "_insist", lambda asking: None)
    chance, found, held = random.Random(7), [], list[Stopped]()
    for _ in range(400):
        with listening(limit_s=ALWAYS):
            asker = threading.Timer(0, lambda wait_s: (time.sleep(wait_s), ask()), (chance.uniform(0, 5e-4),))
            asker.start()
            while not stopping.is_asked():
                try:
                    with put_off(0.0):
                        sum(range(20))
                except Stopped as stopped:
                    held = [stopped]
            found.append(stopping._State.limits)
            asker.join()
    assert held and found == [[ALWAYS]] * 400


def test_who_stopped_listening_is_not_reminded_and_neither_is_who_listens_next():
    with suppress(Stopped), listening():
        asking = stopping._State.asking
        ask()
    stopping._remind(asking)  # else it would end this process
    with listening():
        stopping._remind(asking)
        assert not stopping.is_asked()


def test_what_is_raised_where_python_drops_it_is_raised_again(capfd):
    class Noisy:
        def __del__(self) -> None:
            ask()
            time.sleep(0.01)

    begun = time.monotonic()
    with pytest.raises(Stopped), listening():
        Noisy()
        while time.monotonic() < begun + 20:
            time.sleep(0.01)
    assert time.monotonic() - begun < 5 and capfd.readouterr().err == ""


def test_signals_wait_while_they_are_held_back_and_what_is_ignored_stays_so():
    heard: list[str] = []
    with pytest.raises(Stopped), listening():
        with held_back():
            ask()
            heard.append("held back")
        raise AssertionError("went on")
    assert heard == ["held back"]
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nohup
    try:
        with listening():
            ask(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_cannot_listen_and_works_all_the_same():
    done: list[int] = []

    def work() -> None:
        with listening(), put_off(), held_back():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert done == [1]


# -- the stages ---------------------------------------------------------------------------------------


def at(done_wanted: float, then: Callable[[], None] = ask) -> Callable[[str, float, float], None]:
    """Progress that asks the process to end when so much is done."""

    def progress(what: str, done: float, total: float) -> None:
        if done == done_wanted:
            then()

    return progress


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return trained_whole(tmp_path_factory.mktemp("undisturbed"), SHORT)


def train(run: Path, recipe: Any, progress: Callable[[str, float, float], None] | None = None) -> None:
    more = {} if progress is None else {"progress": progress}
    with listening():
        train_student(Experiment(recipe, run).arm(ARM, SEED), **more)


def test_training_leaves_a_checkpoint_of_its_last_step_and_goes_on_to_the_same_bits(tmp_path, undisturbed):
    run, _ = prepared(tmp_path)
    recipe = tiny_recipe(run, **{**SHORT, "train": {**SHORT["train"], "save_every": 100_000}})
    checkpoints = arm_folder(run) / "checkpoints"
    for step in (1, 7, 10, 18):  # before and after rows of the log and points of the curve, and at the end
        with pytest.raises(Stopped):
            train(run, recipe, at(step))
        assert newest_checkpoint(checkpoints).name == f"checkpoint-{step}"
    assert not (arm_folder(run) / "trained.json").exists()
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)


def test_a_step_that_is_cut_in_the_middle_is_done_again_from_the_one_before(tmp_path, undisturbed, monkeypatch):
    """Asked in the first and in the second micro-batch of a step, with dropout: generators are those before it."""
    run, _ = prepared(tmp_path)
    recipe = tiny_recipe(run, **{**SHORT, "train": {**SHORT["train"], "save_every": 100_000}})
    compute = DistillTrainer.compute_loss
    calls: list[int] = []  # to come: 1 where one is asked in it

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        if calls and calls.pop(0):
            ask()
        return compute(self, *args, **options)

    monkeypatch.setattr(DistillTrainer, "compute_loss", counted)
    checkpoints = arm_folder(run) / "checkpoints"
    for asked, step in (
        ([0] * 8 + [1], 4),
        ([0, 1], 5),
    ):  # 2 micro-batches a step: in the first; in the last, which ends
        calls[:] = asked
        with pytest.raises(Stopped):
            train(run, recipe)
        assert newest_checkpoint(checkpoints).name == f"checkpoint-{step}"
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)


@pytest.mark.parametrize("step", [10, 18])
def test_a_point_of_the_curve_that_was_cut_is_measured_later(tmp_path, undisturbed, monkeypatch, step):
    run, recipe = prepared(tmp_path)
    losses = LearningCurve._losses
    asked: list[int] = []

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        if len(asked) < 2:  # also when it is made up for
            asked.append(1)
            ask()
        return losses(self, *args, **options)

    point = LearningCurve.point

    def chosen(self: Any, now: int, distiller: Any) -> None:
        monkeypatch.setattr(LearningCurve, "_losses", interrupted if now == step else losses)
        point(self, now, distiller)

    monkeypatch.setattr(LearningCurve, "point", chosen)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(run, recipe)
        assert newest_checkpoint(arm_folder(run) / "checkpoints").name == f"checkpoint-{step}"
        assert not [row for row in rows_of(arm_folder(run) / "log.jsonl") if row["step"] == step and "val" in row]
    train(run, recipe)
    assert_same_end(arm_folder(run), undisturbed)


def test_capture_ends_after_the_shard_it_is_at(tmp_path, monkeypatch):
    import kvdistill.stages.capture as stage

    monkeypatch.setattr(stage, "SHARD_BYTES", 60_000)
    run = copy_base(tmp_path)
    recipe = tiny_recipe(run, capture={"dtype": "bfloat16", "batch_size": 4})
    for shards in (1, 2):
        with pytest.raises(Stopped), listening():
            capture(Experiment(recipe, run).teachers["one"], progress=_ask_once())
        (folder,) = [
            f.parent for f in (run / "store").rglob("shards.jsonl") if not (f.parent / "manifest.json").exists()
        ]
        assert len(rows_of(folder / "shards.jsonl")) == shards
    with listening():
        capture(Experiment(recipe, run).teachers["one"])
    whole = copy_base(tmp_path / "whole")
    capture(Experiment(tiny_recipe(whole, capture={"dtype": "bfloat16", "batch_size": 4}), whole).teachers["one"])
    files = sorted(f.relative_to(whole) for f in (whole / "store").rglob("*.safetensors") if "-one-" in str(f))
    assert len(files) > 4 and [sha256_file(run / f) for f in files] == [sha256_file(whole / f) for f in files]


def _ask_once(after: float = 0) -> Callable[[str, float, float], None]:
    """Progress that asks once, when so much is done."""
    asked: list[int] = []

    def progress(what: str, done: float, total: float) -> None:
        if not asked and done >= after:
            asked.append(1)
            ask()

    return progress


def test_fits_and_answers_that_are_under_way_are_finished_and_kept(tmp_path):
    run = copy_base(tmp_path)
    recipe = tiny_recipe(run, arms=ARMS, evaluate={"batch_size": 5})
    shutil.rmtree(run / "fit")
    with pytest.raises(Stopped), listening():
        fit(Experiment(recipe, run).arm("fixed", SEED), progress=_ask_once())  # after the first of two
    assert len(list((run / "fit").glob("*/manifest.json"))) == 1
    fit(Experiment(recipe, run).arm("fixed", SEED))
    arm = Experiment(recipe, run).arm("fixed", SEED)
    train_student(arm)
    with pytest.raises(Stopped), listening():
        evaluate(arm, progress=_ask_once(after=1))
    answers = rows_of(arm.folder / "evaluated/records.jsonl")
    assert len(answers) == 5 and not (arm.folder / "evaluated.json").exists()
    evaluate(arm)
    records = rows_of(arm.folder / "records.jsonl")
    assert len(records) == 32 and not (arm.folder / "evaluated").exists()
    assert next(row for row in records if row["id"] == answers[0]["id"])["seconds"] == answers[0]["seconds"]


# -- the commands -------------------------------------------------------------------------------------


def stopped_command(process: subprocess.Popen[str], number: signal.Signals, *, group: bool) -> None:
    """Ask it to end; within 20 s it does, says so in one line, and ends with its own code."""
    begun = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    said = [line for line in err.splitlines() if line and not PROGRESS.match(line)]
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert said == [f"kvdistill: stopped{by}. The same command goes on where this one ended."], err
    assert process.returncode == (130 if number == signal.SIGINT else 75) and out == ""


def ready(folder: Path, changes: dict[str, Any]) -> tuple[Path, Path]:
    """A run folder in which everything before training is done, and its recipe's file."""
    run = copy_base(folder)
    recipe = tiny_recipe(run, **changes)
    (run / "recipe.json").write_text(recipe.model_dump_json())
    experiment = Experiment(recipe, run)
    for teacher in experiment.teachers.values():
        capture(teacher)
    fit(experiment.arm("fixed", SEED))
    return run, write_recipe(folder, **changes)


def begin(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def test_workers_leave_checkpoints_too_whoever_is_asked(tmp_path):
    """Two workers train; SIGTERM to the parent alone, then SIGUSR1 to the whole group."""
    run, path = ready(tmp_path, {"train": {"steps": 9000, "save_every": 100_000}, "hardware": {"workers": 2}})
    arms = [run / "arms" / arm / f"seed-{SEED}" for arm in ("ce", "fixed")]
    reached = [0, 0]
    for number, group in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        study = begin("train", path)

        def came_on(before: list[int] = reached, study: subprocess.Popen[str] = study) -> bool:
            steps = [max((row["step"] for row in _whole_rows(arm / "log.jsonl")), default=0) for arm in arms]
            return all(now > then for now, then in zip(steps, before, strict=True)) or study.poll() is not None

        wait_for(came_on, "no student was trained")
        stopped_command(study, number, group=group)
        found = [newest_checkpoint(arm / "checkpoints") for arm in arms]
        now = [int(checkpoint.name.split("-")[1]) for checkpoint in found if checkpoint is not None]
        assert len(now) == 2 and all(new > old for new, old in zip(now, reached, strict=True)), (now, reached)
        reached = now
        assert not list(run.rglob("*.part-*"))


def _whole_rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]] if log.exists() else []


def test_one_training_in_its_own_process_and_as_json(tmp_path):
    run, _ = prepared(tmp_path)
    changes = {**CHANGES, "train": {**CHANGES["train"], "steps": 3000, "save_every": 100_000, "eval_every": 0}}
    path = write_recipe(tmp_path, **changes)
    (run / "recipe.json").write_text(tiny_recipe(run, **changes).model_dump_json())
    training = begin("train", path, "--arm", ARM, "--seed", SEED, "--json")
    log = arm_folder(run) / "log.jsonl"
    wait_for(lambda: len(_whole_rows(log)) > 1 or training.poll() is not None, "nothing was trained")
    os.kill(training.pid, signal.SIGTERM)
    out, err = training.communicate(timeout=60)
    assert training.returncode == 75 and err == "", err
    assert json.loads(out)["error"] == "stopped by SIGTERM. The same command goes on where this one ended."
    assert newest_checkpoint(arm_folder(run) / "checkpoints") is not None


def test_the_ranks_of_a_torchrun_leave_before_the_same_step(tmp_path):
    """SIGTERM to one rank only: both end, and neither waits for the other for ever."""
    run, path = ready(tmp_path, {"train": {"steps": 9000, "batch_size": 4, "save_every": 100_000}})
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kvdistill"]
    words += ["train", str(path), "--arm", "fixed", "--seed", str(SEED)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    agent = subprocess.Popen(words, env=environment(), **quiet)  # type: ignore[call-overload]
    folder = run / "arms" / "fixed" / f"seed-{SEED}"
    wait_for(lambda: len(_whole_rows(folder / "log.jsonl")) > 2 or agent.poll() is not None, "nothing was trained")
    ranks = children_of(agent.pid)
    assert len(ranks) == 2
    begun = time.monotonic()
    os.kill(max(ranks), signal.SIGTERM)
    _, err = agent.communicate(timeout=90)
    assert time.monotonic() - begun < 60 and err.count("kvdistill: stopped by SIGTERM") == 1, err
    assert newest_checkpoint(folder / "checkpoints") is not None and not any(map(is_alive, ranks))
