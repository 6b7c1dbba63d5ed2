"""A study so small that all of it runs in seconds, for the tests of errors, resuming, training and the command line.

Two tasks, two teachers of unlike size (six steps each), a student of two layers; arms of every kind. `base_run`
prepares, teaches, captures and fits once a process; tests copy it. `invoke` calls the command line in this process,
with the jobs of a study run here one after another instead of in workers.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvdistill.core.config import make_recipe
from kvdistill.core.recipe import Recipe

SEED = 7
PROGRESS = re.compile(r".+: \d+% after \d")
TREE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [SEED],
    "data": {
        "max_length": 48,
        "tasks": [
            {"name": "chain", "train": 48, "val": 16, "test": 16},
            {"name": "product", "train": 48, "val": 16, "test": 16},
        ],
    },
    "teachers": [
        {
            "name": "one",
            "train_on": ["chain"],
            "scratch": {"hidden_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2},
            "optimiser": {"steps": 6, "batch_size": 8},
        },
        {
            "name": "two",
            "train_on": ["product"],
            "scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
            "optimiser": {"steps": 6, "batch_size": 8},
        },
    ],
    "student": {"scratch": {"hidden_size": 16, "num_layers": 2, "num_heads": 2}},
    "train": {"steps": 6, "batch_size": 8, "log_every": 1, "eval_every": 0, "eval_examples": 4, "save_every": 100},
    "loss": {"kv_weight": 5.0},
    "evaluate": {"max_new_tokens": 6, "batch_size": 32, "match_examples": 8},
    "arms": {"ce": {"teachers": []}, "fixed": {}},
}
IN_STUDENT = {"match_in": "student", "init": "ridge"}
# every kind of arm
ARMS: dict[str, dict[str, Any]] = {
    "ce": {"teachers": []},
    "logit": {"fuse": {"fusion_strategy": "competence"}, "loss": {"kv_weight": 0, "logit_weight": 1.0}},
    "kv-and-logit": {"loss": {"logit_weight": 0.5}},
    "single": {"teachers": ["one"]},
    "fixed": {},
    "weighted": {"fuse": {"weights": [0.8, 0.2]}},
    "fixed-at-kv": {"fuse": {"fuse_at": "kv"}, "align": IN_STUDENT},
    "competence": {"fuse": {"fusion_strategy": "competence", "temperature": 0.5}},
    "similarity": {"fuse": {"fusion_strategy": "similarity"}},
    "similarity-k-means": {"fuse": {"fusion_strategy": "similarity", "prototype": "k-means", "num_prototypes": 2}},
    "placebo": {"control": "placebo"},
    "untrained": {"control": "untrained"},
    "shuffled": {"control": "shuffled"},
    "noise": {"control": "noise"},
    "in-student": {"align": IN_STUDENT},
    "structured": {"align": {"projection": "structured", "init": "uniform"}},
    "rotated": {"align": {"keys": "rotated"}},
    "right": {"compress": {"kv_compression": "right", "keep": 3}},
    "crop": {"compress": {"kv_compression": "crop", "keep": 3}},
    "steps": {"compress": {"kv_compression": "steps", "step_mark": ","}},
    "smooth_l1": {"loss": {"kind": "smooth_l1"}},
    "l1": {"loss": {"kind": "l1"}},
    "mercator": {"loss": {"kind": "mercator"}},
    "hybrid": {"loss": {"kind": "hybrid"}},
    "top-layer": {"loss": {"distill_layers": "1"}},
    "v-only": {"loss": {"k_weight": 0}},
    # with one tokenizer, lengths differ only where the text does: the placebo's
    "index": {"control": "placebo", "align": {"time": "index"}},
    "proportional": {"control": "placebo", "align": {"time": "proportional"}},
    "segment": {"control": "placebo", "align": {"time": "segment"}},
    "interpolate": {"align": {"layers": "interpolate"}},
    "terminal": {"align": {"layers": "terminal"}},
    "explicit": {"align": {"layers": "explicit", "layer_map": {0: [0, 1], 1: [1]}}},
    "shared": {"align": {"share_layers": True}},
    "reasoning": {"loss": {"kv_on": "reasoning", "ce_on": "answer"}},
}


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` laid over `tree`, section by section; `arms` is replaced whole."""
    out = copy.deepcopy(dict(tree))
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(out.get(key), Mapping) and key != "arms"
        out[key] = merged(out[key], value) if deeper else copy.deepcopy(value)
    return out


def tiny_tree(**changes: Any) -> dict[str, Any]:
    return merged(TREE, changes)


def tiny_recipe(run: Path, **changes: Any) -> Recipe:
    return make_recipe(tiny_tree(run_dir=str(run), **changes))


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A YAML recipe whose run folder is `folder/run`."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(run_dir=str(folder / "run"), **changes), sort_keys=False))
    return path


def run_jobs_here(recipe: Recipe, jobs: Any, progress: Any, **options: Any) -> None:
    """In place of `study.run_jobs`: the same jobs in this process, one after another, without a word."""
    from kvdistill.core.progress import silent
    from kvdistill.core.runtime import quiet_libraries
    from kvdistill.study.local import run_jobs

    quiet_libraries()  # as a worker does
    run_jobs(recipe, jobs, silent, here=True)


class Answer:
    """What a command left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\nstdout: {self.out}\nstderr: {self.err}"


def invoke(monkeypatch: Any, *words: object, work: Any = run_jobs_here) -> Answer:
    """`kvdistill WORDS…` in this process; anything but a clean exit is raised as it is."""
    from typer.testing import CliRunner

    import kvdistill.study.run
    from kvdistill.cli.app import app

    monkeypatch.setattr(kvdistill.study.run, "run_jobs", work)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def no_work(recipe: Recipe, jobs: Any, progress: Any, **options: Any) -> None:
    """In place of `study.run_jobs` where nothing may run: a mistake must be found before any job."""
    raise AssertionError("work began before the mistake was found")


def no_training(recipe: Recipe, jobs: Any, progress: Any, **options: Any) -> None:
    """In place of `study.run_jobs` where preparing and checking may run, and nothing after them."""
    run_jobs_here(recipe, [job for job in jobs if job.verb in ("prepare", "check")], progress)
    for job in jobs:
        if job.verb not in ("prepare", "check"):
            raise AssertionError(f"{job.id} began before the mistake was found")


def assert_one_message(answer: Answer, *parts: str) -> None:
    """Exit code 2 and a single message on stderr with these words, its place and its fix; no traceback, no more."""
    assert answer.code == 2, answer
    assert answer.out.strip() == "", answer
    lines = [line for line in answer.err.strip().splitlines() if not PROGRESS.match(line)]
    assert lines and lines[0].startswith("kvdistill: "), answer
    assert lines[-1].startswith("  fix: ") and len(lines[-1]) > len("  fix: "), answer
    assert "Traceback" not in answer.err and answer.err.count("fix: ") == 1, answer
    for part in parts:
        assert part in "\n".join(lines), (part, answer)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "kvdistill", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def call(*words: object, timeout: float = 300) -> Answer:
    """`kvdistill WORDS…` in a process of its own."""
    done = subprocess.run(
        command(*words), capture_output=True, text=True, env=environment(), timeout=timeout, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@functools.cache
def base_run() -> Path:
    """A run folder with data, teachers, targets and fits for `ARMS`; made once a process, never written to again."""
    import atexit

    root = Path(tempfile.mkdtemp(prefix="kvdistill-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    run = root / "run"
    recipe = tiny_recipe(run, arms=ARMS)
    made_ready(recipe, run)
    return run


def made_ready(recipe: Recipe, run: Path, *goals: str) -> None:
    """Everything before training, or these stages and what comes before them."""
    from kvdistill.study.folder import claimed
    from kvdistill.study.plan import plan

    with claimed(recipe, run):
        run_jobs_here(recipe, plan(recipe, run, goals or ("teach", "fit")), None)


def copy_base(folder: Path) -> Path:
    """A copy of `base_run` as `folder/run`, ready to train."""
    run = folder / "run"
    shutil.copytree(base_run(), run)
    tree = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**tree, "run_dir": str(run)}))
    return run


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]
