"""A study as a graph of jobs: which there are, their order, what is skipped, what a failure stops, two runs at once."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import (
    PROGRESS,
    SEED,
    base_run,
    command,
    copy_base,
    environment,
    invoke,
    rows_of,
    run_jobs_here,
    tiny_recipe,
    write_recipe,
)

from kvdistill.arms.arm import Arm
from kvdistill.arms.experiment import Experiment
from kvdistill.core.config import asked_hash
from kvdistill.core.errors import JobsFailed, RecipeError, RunFolderError, TrainingStopped
from kvdistill.core.files import sha256_file
from kvdistill.core.layout import LOCK, arm_folder, evaluated_mark, file_lock, folder_lock, locks_folder, trained_mark
from kvdistill.core.marks import write_mark
from kvdistill.core.progress import silent
from kvdistill.core.runtime import set_threads
from kvdistill.stages.table import STAGES, Job, perform
from kvdistill.study.folder import claimed
from kvdistill.study.local import run_jobs
from kvdistill.study.plan import plan

pytestmark = pytest.mark.slow

set_threads(1)  # as in the processes
THREE: dict[str, Any] = {"seeds": [1, 2], "arms": {"ce": {"teachers": []}, "one": {"teachers": ["one"]}, "both": {}}}


def touch(path: Path) -> None:
    write_mark(path, {"asked": asked_hash(tiny_recipe(path.parent))}, [])


# -- the graph ----------------------------------------------------------------------------------------


def test_every_job_of_a_study_and_what_it_comes_after(tmp_path):
    jobs = {job.id: job for job in plan(tiny_recipe(tmp_path, **THREE), tmp_path)}
    pairs = [(arm, seed) for seed in (1, 2) for arm in THREE["arms"]]
    assert list(jobs) == [
        *("prepare", "check", "teach:one", "teach:two", "capture:one", "capture:two"),
        *(f"fit:{arm}:{seed}" for arm, seed in pairs if arm != "ce"),
        *(f"train:{arm}:{seed}" for arm, seed in pairs),
        *(f"evaluate:{arm}:{seed}" for arm, seed in pairs),
        "report",
    ]
    after = {name: job.after for name, job in jobs.items()}
    assert after["prepare"] == () and after["check"] == ("prepare",) and after["teach:two"] == ("check",)
    assert after["capture:one"] == ("check", "teach:one")
    assert after["fit:one:2"] == ("check", "capture:one")
    assert after["fit:both:1"] == ("check", "capture:one", "capture:two")
    assert after["train:ce:1"] == ("check",) and after["train:both:2"] == ("check", "fit:both:2")
    assert after["evaluate:one:1"] == ("check", "train:one:1")
    assert after["report"] == tuple(f"evaluate:{arm}:{seed}" for arm, seed in pairs)


def test_jobs_are_plain_data_and_marks_are_where_stages_leave_them(tmp_path):
    jobs = plan(tiny_recipe(tmp_path, **THREE), tmp_path)
    for job, row in zip(jobs, json.loads(json.dumps([asdict(job) for job in jobs])), strict=True):
        assert Job(**{**row, "after": tuple(row["after"])}) == job
        assert {*job.arguments} == {"run", *STAGES[job.verb].about} and job.cost > 0
    found = {job.id: job for job in jobs}
    assert found["train:both:2"].arguments == {"run": str(tmp_path), "arm": "both", "seed": 2}
    assert found["train:both:2"].mark == "arms/both/seed-2/trained.json" and found["check"].mark is None
    assert (
        found["teach:one"].mark == "teachers/one/trained.json" and (base_run() / "teachers/one/trained.json").exists()
    )
    assert found["train:ce:1"].cost < found["train:one:1"].cost < found["train:both:1"].cost


def test_layers_are_mapped_where_an_arm_needs_it_and_before_anything_is_captured(tmp_path):
    arms = {**THREE["arms"], "alike": {"align": {"layers": "cka"}}}
    after = {job.id: job.after for job in plan(tiny_recipe(tmp_path, arms=arms), tmp_path)}
    assert after["map-layers"] == ("check", "teach:one", "teach:two")
    assert "map-layers" in after["capture:one"] and "map-layers" in after[f"fit:both:{SEED}"]
    asked = plan(tiny_recipe(tmp_path), tmp_path, ("map-layers",))
    assert [job.id for job in asked] == ["prepare", "check", "teach:one", "teach:two", "map-layers"]


def test_what_is_finished_is_skipped_and_what_only_that_needed_too(tmp_path):
    recipe = tiny_recipe(tmp_path, **THREE)
    for name in ("one", "two"):
        touch(tmp_path / "teachers" / name / "trained.json")
    for arm, seed in (("ce", 1), ("ce", 2), ("both", 1), ("both", 2), ("one", 1)):
        touch(evaluated_mark(arm_folder(tmp_path, arm, seed)))  # what of the model is still there does not matter
    left = plan(recipe, tmp_path)
    assert [job.id for job in left] == [
        *("prepare", "check", "capture:one", "fit:one:2", "train:one:2", "evaluate:one:2", "report")
    ]
    assert left[2].after == ("check",) and left[-1].after == ("evaluate:one:2",)
    touch(trained_mark(arm_folder(tmp_path, "one", 2)))
    assert [job.id for job in plan(recipe, tmp_path)] == ["prepare", "check", "evaluate:one:2", "report"]
    touch(evaluated_mark(arm_folder(tmp_path, "one", 2)))
    assert [job.id for job in plan(recipe, tmp_path)] == ["report"]  # nothing is prepared or checked for nothing


@pytest.mark.parametrize(
    ("verb", "verbs"),
    [
        ("prepare", {"prepare"}),
        ("teach", {"check", "teach"}),
        ("capture", {"check", "map-layers", "capture"}),
        ("fit", {"check", "map-layers", "fit"}),
        ("train", {"check", "train"}),
        ("evaluate", {"check", "evaluate"}),
        ("report", {"report"}),
    ],
)
def test_a_single_stage_brings_the_check_and_the_layer_maps_only(tmp_path, verb, verbs):
    arms = {**THREE["arms"], "alike": {"align": {"layers": "cka"}}}
    assert {job.verb for job in plan(tiny_recipe(tmp_path, arms=arms), tmp_path, (verb,), before=False)} == verbs


# -- doing it -----------------------------------------------------------------------------------------


def taken_apart(taken: tuple[Any, ...]) -> tuple[Path, tuple[Any, ...]]:
    """The run folder and what the job is about, from what a stage's function takes (`Stage.takes`)."""
    if len(taken) == 2:  # recipe and run folder
        return taken[1], ()
    (subject,) = taken
    if isinstance(subject, Experiment):
        return subject.run, ()
    about = (subject.name, subject.seed) if isinstance(subject, Arm) else (subject.name,)
    return subject.experiment.run, about


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """Stages that do nothing but leave their marks; what was done, in order."""
    order: list[str] = []

    def stage(verb: str) -> Callable[..., None]:
        def work(*taken: Any, progress: Any) -> None:
            run, about = taken_apart(taken)
            progress(verb, 1, 2)
            time.sleep(0.01)
            order.append(":".join([verb, *map(str, about)]))
            if STAGES[verb].mark is not None:
                touch(STAGES[verb].mark(run, **dict(zip(STAGES[verb].about, about, strict=True))))

        return work

    for verb, row in STAGES.items():
        monkeypatch.setattr(row.function.replace(":", "."), stage(verb))
    return order


def failing(monkeypatch: pytest.MonkeyPatch, verb: str, wrong: dict[Any, Exception]) -> None:
    """The jobs of this verb that are about a key of `wrong` (teacher or arm) raise what it says."""
    place = STAGES[verb].function.replace(":", ".")
    module, _, name = place.rpartition(".")
    real = getattr(__import__(module, fromlist=[name]), name)

    def work(*taken: Any, progress: Any) -> None:
        _, about = taken_apart(taken)
        if about[0] in wrong:
            raise wrong[about[0]]
        real(*taken, progress=progress)

    monkeypatch.setattr(place, work)


def test_the_most_costly_way_comes_first_and_the_bar_rises_to_the_end(tmp_path, done):
    recipe, said = tiny_recipe(tmp_path, **THREE), []
    run_jobs(recipe, plan(recipe, tmp_path), lambda *told: said.append(told), here=True)
    trained = [name for name in done if name.startswith("train:")]
    assert [name.split(":")[1] for name in trained] == ["both", "both", "one", "one", "ce", "ce"]
    assert done[0] == "prepare" and done[-1] == "report"
    assert {what for what, _, _ in said} == {"tiny"} and [share for _, share, _ in said] == sorted(s[1] for s in said)
    assert said[-1][1] == pytest.approx(said[-1][2]) and said[0][1] == 0
    run_jobs(recipe, plan(recipe, tmp_path), silent, here=True)
    assert done[-2:] == ["report", "report"]


def test_a_failing_job_stops_what_waits_for_it_and_not_its_neighbours(tmp_path, done, monkeypatch):
    mistake = TrainingStopped("NaN in a loss", place="arms.one", fix="lower train.lr")
    failing(monkeypatch, "train", {"one": mistake})
    recipe = tiny_recipe(tmp_path, **THREE)
    with pytest.raises(TrainingStopped) as caught:  # the same reason twice (two seeds) is one message, as it was
        run_jobs(recipe, plan(recipe, tmp_path), silent, here=True)
    assert caught.value.message() == mistake.message()
    assert {name for name in done if name.startswith("evaluate")} == {
        f"evaluate:{a}:{s}" for a in ("ce", "both") for s in (1, 2)
    }
    assert "report" not in done


def test_several_reasons_are_listed_with_the_exit_code_of_the_first(tmp_path, done, monkeypatch):
    failing(monkeypatch, "capture", {"two": RecipeError("no such layer", place="capture", fix="name another")})
    failing(monkeypatch, "train", {"ce": ZeroDivisionError("ours")})
    recipe = tiny_recipe(tmp_path, **{**THREE, "seeds": [1]})
    with pytest.raises(JobsFailed) as caught:
        run_jobs(recipe, plan(recipe, tmp_path), silent, here=True)
    said = caught.value.message()
    assert said.startswith("2 of 15 jobs failed\n") and caught.value.exit_code == 2
    assert "capture:two: capture: no such layer\n    fix: name another\n" in said and "train:ce:1: ours\n" in said
    assert "evaluate:one:1" in done and not [name for name in done if "both" in name or "report" in name]


def test_one_mistake_at_several_places_names_them(tmp_path, done, monkeypatch):
    wrong = {a: RunFolderError("not there", place=f"place of {a}", fix="make it") for a in ("ce", "one", "both")}
    failing(monkeypatch, "train", wrong)
    recipe = tiny_recipe(tmp_path, **{**THREE, "seeds": [1]})
    with pytest.raises(RunFolderError) as caught:
        run_jobs(recipe, plan(recipe, tmp_path), silent, here=True)
    assert caught.value.message() == "place of both, place of one, place of ce: not there\n  fix: make it"


def test_a_bug_of_ours_alone_is_raised_as_it_is(tmp_path, done, monkeypatch):
    failing(monkeypatch, "evaluate", {"ce": ZeroDivisionError("ours")})
    recipe = tiny_recipe(tmp_path, arms={"ce": {"teachers": []}})
    with pytest.raises(ZeroDivisionError):
        run_jobs(recipe, plan(recipe, tmp_path), silent, here=True)


def test_in_worker_processes_neighbours_of_a_failing_arm_finish(tmp_path):
    """Two arms whose losses overflow, each for its own reason, and one that is sound; then without them it ends."""
    arms = {"ce": {"teachers": []}, "kv": {"loss": {"kv_weight": 1e39}}}
    arms |= {"logit": {"loss": {"kv_weight": 0, "logit_weight": 1e39}}}
    path = write_recipe(tmp_path, arms=arms, teachers=[tiny_recipe(tmp_path).teachers[0].model_dump(mode="json")])
    words = command("run", path, "hardware.workers=2")
    ended = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    lines = [line for line in ended.stderr.splitlines() if not PROGRESS.match(line)]
    assert ended.returncode == 2 and ended.stdout == "" and lines[0].startswith("kvdistill: 2 of "), ended.stderr
    assert any(line.startswith(f"  train:kv:{SEED}: ") for line in lines), ended.stderr
    assert any(line.startswith(f"  train:logit:{SEED}: ") for line in lines), ended.stderr
    assert lines[-1].startswith("  fix: ") and "Traceback" not in ended.stderr
    assert (tmp_path / f"run/arms/ce/seed-{SEED}/evaluated.json").exists() and not (
        tmp_path / "run/report.html"
    ).exists()


# -- two at once, and locks ---------------------------------------------------------------------------


def test_two_that_plan_the_same_do_each_job_once(tmp_path, done):
    recipe = tiny_recipe(tmp_path, **THREE)
    jobs = plan(recipe, tmp_path)
    both = [threading.Thread(target=run_jobs_here, args=(recipe, jobs, None)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    for job in jobs:
        times = 2 if job.mark is None else 1  # a stage without a mark looks for itself what is left to do
        if job.verb != "fit":
            assert done.count(job.id) == times, job.id


def test_a_job_waits_for_whoever_is_at_it_and_sees_then_that_it_is_done(tmp_path, done):
    job = next(job for job in plan(tiny_recipe(tmp_path), tmp_path) if job.id == f"train:ce:{SEED}")
    with (
        folder_lock(tmp_path, wait=True),
        file_lock(locks_folder(tmp_path) / job.id, wait=False),
    ):  # planning is no hindrance
        waits = threading.Thread(target=perform, args=(job, tiny_recipe(tmp_path)))
        waits.start()
        time.sleep(0.1)
        assert waits.is_alive() and done == []
        touch(tmp_path / str(job.mark))
    waits.join(10)
    assert not waits.is_alive() and done == []


def test_two_real_runs_at_once_end_in_the_bits_of_one(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    words = command("run", path, "hardware.workers=1")
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in err, err
    (tmp_path / "alone").mkdir()
    assert invoke(monkeypatch, "run", write_recipe(tmp_path / "alone")).code == 0
    run, alone = tmp_path / "run", tmp_path / "alone/run"
    files = sorted(f.relative_to(alone) for f in alone.rglob("*.safetensors"))
    assert files and [sha256_file(run / f) for f in files] == [sha256_file(alone / f) for f in files]
    for log in alone.rglob("log.jsonl"):
        steps = [[row["step"] for row in rows_of(where / log.relative_to(alone))] for where in (run, alone)]
        assert steps[0] == steps[1] and steps[0]  # nothing twice, nothing missing
    assert not list(run.rglob("*.part-*")) and (run / "report.html").exists()


def test_a_second_command_may_add_arms_but_not_change_what_is_being_made(tmp_path):
    run = copy_base(tmp_path)
    recipe = tiny_recipe(run, arms={"fixed": {}})
    changed = tiny_recipe(run, arms={"fixed": {"loss": {"kv_weight": 1.0}}})
    more = tiny_recipe(run, arms={"fixed": {}, "new": {"teachers": ["two"]}}, seeds=[7, 8])
    with claimed(recipe, run):
        with pytest.raises(RunFolderError, match=r"another command is working.*: arms\.fixed.*"), claimed(changed, run):
            pass
        with claimed(more, run):
            assert set(json.loads((run / "recipe.json").read_text())["arms"]) == {"fixed", "new"}
    with claimed(changed, run):  # alone, and nothing of that arm was made: the mended recipe is taken
        pass


@pytest.mark.parametrize("lock", [LOCK, f".locks/train:ce:{SEED}", ".locks/working"])
def test_a_link_in_place_of_a_lock_is_refused_and_what_it_points_to_is_left_alone(tmp_path, monkeypatch, lock):
    run = copy_base(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run / lock).parent.mkdir(exist_ok=True)
    (run / lock).unlink(missing_ok=True)
    (run / lock).symlink_to(victim)
    recipe = write_recipe(tmp_path, arms={"ce": {"teachers": []}})
    answer = invoke(monkeypatch, "train", recipe, "--arm", "ce", "--seed", SEED)
    assert answer.code == 2 and "the lock is a link" in answer.err and lock in answer.err, answer
    assert victim.read_text() == "precious"


def test_a_lock_is_made_empty_and_what_is_in_it_stays(tmp_path):
    with folder_lock(tmp_path / "new", wait=False):
        assert (tmp_path / "new" / LOCK).read_bytes() == b""
    (tmp_path / "new" / LOCK).write_text("old")
    held, again = (folder_lock(tmp_path / "new", wait=False) for _ in range(2))
    with held, pytest.raises(RunFolderError, match="another command is working"), again:
        pass
    assert (tmp_path / "new" / LOCK).read_text() == "old"


def test_a_dry_run_does_the_jobs_of_the_graph_and_leaves_nothing(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "run")
    answer = invoke(monkeypatch, "run", write_recipe(tmp_path), "--dry-run", "--json")
    assert answer.code == 0, answer
    jobs = [job.id.replace(":", " ") for job in plan(recipe, tmp_path / "run") if job.verb != "report"]
    assert json.loads(answer.out)["rehearsed"] == jobs and not list((tmp_path / "run").iterdir())
