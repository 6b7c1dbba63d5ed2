"""The command line: help, a whole study, single stages, what it prints, and that finished work is not done twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import (
    ARMS,
    SEED,
    assert_one_message,
    call,
    copy_base,
    environment,
    invoke,
    no_work,
    rows_of,
    run_jobs_here,
    tiny_recipe,
    write_recipe,
)

from kvdistill.core.config import load_recipe
from kvdistill.core.files import sha256_file
from kvdistill.stages.table import Job

pytestmark = pytest.mark.slow

VERBS = ["demo", "run", "prepare", "teach", "capture", "fit", "train", "evaluate", "report", "doctor"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """The folder of a whole tiny study, its recipe beside it."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        answer = invoke(patch, "run", write_recipe(folder))
    assert answer.code == 0, answer
    return folder


def test_help_names_every_verb_and_imports_nothing_heavy():
    script = (
        "import sys\nfrom kvdistill.cli.app import app\nfrom typer.testing import CliRunner\n"
        "r = CliRunner().invoke(app, ['--help'])\nprint(r.output)\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules]\nassert not heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(monkeypatch, verb):
    answer = invoke(monkeypatch, verb, "--help")
    assert answer.code == 0 and "--json" in answer.out


@pytest.mark.parametrize("words", [["rnu"], ["run"], ["run", "x.yaml", "--jsno"], ["train", "x.yaml", "--seed", "x"]])
def test_wrong_usage_is_exit_code_2(monkeypatch, words):
    answer = invoke(monkeypatch, *words)
    assert answer.code == 2 and answer.err and answer.out == ""


def test_the_parent_of_a_study_does_not_import_torch(studied):
    script = (
        "import sys\nimport kvdistill.study.run, kvdistill.study.folder, kvdistill.core.config\n"
        "from kvdistill.core.config import load_recipe\n"
        "import kvdistill.study.early\n"
        f"kvdistill.study.early.refuse_early(load_recipe({str(studied / 'tiny.yaml')!r}))\n"
        f"kvdistill.study.folder.check_run_folder(__import__('pathlib').Path({str(studied / 'run')!r}), begins=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_whole_study_leaves_what_it_promises(studied):
    run = studied / "run"
    for name in ("report.html", "summary.json", "statistical_results.json", "provenance.json", "study.json"):
        assert (run / name).stat().st_size > 0, name
    for arm in ("ce", "fixed"):
        folder = run / "arms" / arm / f"seed-{SEED}"
        records = rows_of(folder / "records.jsonl")
        assert len(records) == 32 and all(row["arm"] == arm and row["seed"] == SEED for row in records)
        assert not (folder / "checkpoints").exists() and (folder / "model/config.json").exists()
    first, second = ([r["prompt_hash"] for r in rows_of(f)] for f in sorted(run.glob("arms/*/*/records.jsonl")))
    assert first == second
    assert "<script src" not in (run / "report.html").read_text()
    assert not list(run.rglob("*.part-*")) and not list(run.rglob("*.bin")) and not list(run.rglob("*.pt"))


def times_of(run: Path) -> dict[Path, int]:
    """When each file was written, but for the lock and the provenance, which counts every call."""
    kept = [f for f in run.rglob("*") if f.is_file() and f.name not in (".lock", "provenance.json")]
    return {f: f.stat().st_mtime_ns for f in kept}


def test_the_same_command_again_does_nothing(studied, monkeypatch):
    before = times_of(studied / "run")
    answer = invoke(monkeypatch, "run", studied / "tiny.yaml", work=no_work)
    assert answer.code == 0 and "already finished" in answer.out
    assert before == times_of(studied / "run")


def test_json_is_one_object_on_stdout(studied, monkeypatch):
    answer = invoke(monkeypatch, "run", studied / "tiny.yaml", "--json")
    said = json.loads(answer.out)
    assert answer.err == "" and said["run"] == str(studied / "run")
    assert set(said["summary"]["arms"]) == {"ce", "fixed"} and Path(said["page"]).exists()


def test_stages_one_by_one_make_the_same_study(studied, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    for verb in ("prepare", "teach", "capture", "fit", "train", "evaluate", "report"):
        answer = invoke(monkeypatch, verb, recipe)
        assert answer.code == 0, (verb, answer)
    for model in (studied / "run").rglob("*.safetensors"):
        assert sha256_file(model) == sha256_file(tmp_path / "run" / model.relative_to(studied / "run")), model
    assert (tmp_path / "run/report.html").exists()
    assert invoke(monkeypatch, "run", recipe).code == 0  # nothing is left to do but to say so


def test_only_one_arm_and_seed(tmp_path, monkeypatch):
    run = copy_base(tmp_path)
    recipe = write_recipe(tmp_path, arms=ARMS)
    answer = invoke(monkeypatch, "train", recipe, "--arm", "single", "--seed", SEED, "--json")
    assert json.loads(answer.out) == {"run": str(run), "finished": [f"single seed {SEED}"]} and answer.err == ""
    assert [f.parent.name for f in run.glob("arms/*/*")] == ["single"]
    answer = invoke(monkeypatch, "evaluate", recipe, "--arm", "single", "--seed", SEED)
    assert answer.code == 0 and (run / f"arms/single/seed-{SEED}/records.jsonl").exists()
    other = invoke(monkeypatch, "evaluate", recipe, "--arm", "fixed", "--seed", SEED)
    assert_one_message(other, "not trained yet", "kvdistill train")


def test_the_data_may_lie_elsewhere_and_the_title_may_change(studied, monkeypatch):
    answer = invoke(monkeypatch, "run", studied / "tiny.yaml", "title=Another", "hardware.workers=3", work=no_work)
    assert answer.code == 0 and "already finished" in answer.out


def test_the_version_and_completion(monkeypatch):
    import kvdistill

    assert invoke(monkeypatch, "--version").out.strip() == f"kvdistill {kvdistill.__version__}"
    assert "--install-completion" in invoke(monkeypatch, "--help").out


def test_a_recipe_is_printed_as_it_is_understood_and_reads_back_as_the_same(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, arms=ARMS)
    answer = invoke(monkeypatch, "recipe", recipe, "train.steps=9")
    printed = tmp_path / "printed.yaml"
    printed.write_text(answer.out)
    assert load_recipe(printed) == load_recipe(recipe, ["train.steps=9"])
    assert load_recipe(printed).train.steps == 9 and "projection: flat" in answer.out, "defaults are written out"
    assert_one_message(invoke(monkeypatch, "recipe", recipe, "train.stesp=9"), "'train.stesp'")


@pytest.mark.parametrize("verb", ["teach", "capture", "fit", "train", "evaluate", "report"])
def test_a_mistyped_run_folder_is_named_and_not_made(studied, monkeypatch, verb):
    slip = studied / "rum"
    answer = invoke(monkeypatch, verb, studied / "tiny.yaml", f"run_dir={slip}", work=no_work)
    assert_one_message(answer, "there is no run folder", str(slip), f"did you mean {studied / 'run'}?")
    assert not slip.exists()


def test_another_evaluate_section_asks_anew_in_the_same_folder(studied, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(studied / "run", run)
    recipe, kept = write_recipe(tmp_path), f"run_dir={run}"
    (run / "recipe.json").write_text((run / "recipe.json").read_text().replace(str(studied / "run"), str(run)))
    weights = {file: sha256_file(file) for file in run.rglob("*.safetensors")}
    answer = invoke(monkeypatch, "report", recipe, kept, "evaluate.limit=5", work=run_jobs_here)
    assert_one_message(answer, "another `evaluate` section", "evaluated.json", "kvdistill evaluate")
    begun: list[str] = []

    def note(recipe: Any, jobs: Any, progress: Any, **options: Any) -> None:
        begun.extend(job.verb for job in jobs)
        run_jobs_here(recipe, jobs, progress)

    assert invoke(monkeypatch, "run", recipe, kept, "evaluate.limit=5", work=note).code == 0
    assert {*begun} == {"prepare", "check", "evaluate", "report"}
    assert len(rows_of(run / f"arms/ce/seed-{SEED}/records.jsonl")) == 10
    assert {file: sha256_file(file) for file in run.rglob("*.safetensors")} == weights
    assert invoke(monkeypatch, "run", recipe, kept, "evaluate.limit=5", work=no_work).code == 0
    answer = invoke(monkeypatch, "run", recipe, kept, "evaluate.match_examples=9", work=no_work)
    assert_one_message(answer, "evaluate.match_examples", "another recipe")  # match.json was measured on so many


def test_doctor_and_the_module_run_as_processes():
    answer = call("doctor", "--json")
    assert answer.code == 0 and answer.err == ""
    facts: dict[str, Any] = json.loads(answer.out)
    assert {"machine", "versions", "gpus", "findings"} <= facts.keys()


def test_a_bug_of_ours_is_not_dressed_up_as_the_users(studied, tmp_path, monkeypatch):
    def broken(recipe: Any, jobs: Any, progress: Any, **options: Any) -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        invoke(monkeypatch, "run", write_recipe(tmp_path), work=broken)


@pytest.mark.parametrize(
    ("named", "gpus", "workers"),
    [("0,2,5", ["0", "2", "5"], 3), ("", [], None), ("-1", [], None), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"], 2)],
)
def test_one_worker_per_visible_gpu(monkeypatch, named, gpus, workers):
    from kvdistill.core.recipe import HardwareRecipe
    from kvdistill.study.local import num_workers, visible_gpus

    def workers_for(num_jobs: int, **hardware: Any) -> int:
        jobs = [Job(f"teach:{n}", "teach", {}, (), 1.0, None) for n in range(num_jobs)]
        return num_workers(HardwareRecipe(**hardware), jobs)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus
    cores = len(os.sched_getaffinity(0))
    assert workers_for(100) == (workers or cores)
    assert workers_for(1) == 1 and workers_for(100, workers=2) == 2 and workers_for(100, device="cpu") == cores


@pytest.mark.skipif(bool(os.environ.get("KVDISTILL_TEST_GPU")), reason="GPUs are asked for")
def test_neither_tests_nor_their_child_processes_see_a_gpu():
    words = [sys.executable, "-c", "from kvdistill.study.local import visible_gpus; print(visible_gpus())"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert subprocess.run(words, capture_output=True, text=True, env=environment(), check=True).stdout == "[]\n"


def test_every_worker_sees_a_gpu_of_its_own(tmp_path, monkeypatch):
    """Which one it took is told by the environment; no GPU is needed to ask."""
    from kvdistill.study.local import Workers

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    with Workers(2, tiny_recipe(tmp_path)) as pool:
        seen = {pool._pool.submit(_own_gpu).result(60) for _ in range(12)}
    assert seen <= {"3", "7"} and seen


def _own_gpu() -> str:
    import time

    time.sleep(0.05)
    return os.environ["CUDA_VISIBLE_DEVICES"]
