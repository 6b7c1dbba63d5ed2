"""Malformed recipes, values, flags, rows, model folders and run folders: exit code 2, one message, in seconds."""

from __future__ import annotations

import time

import pytest
from mistakes import Mistake, mistakes
from tiny_recipe import PROGRESS, invoke, run_jobs_here

LIMIT_S = 20
CASES = list(mistakes())


def stop_before_training(recipe, jobs, progress, **options):
    """Whatever is wrong is found before any model is trained; teachers of two steps may be, and what they give."""
    run_jobs_here(recipe, [job for job in jobs if job.verb in ("prepare", "check")], progress)
    if recipe.train.steps < 10:
        run_jobs_here(recipe, [job for job in jobs if job.verb in ("capture", "fit", "train")], progress)


def test_there_are_enough():
    assert len(CASES) >= 150 and len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_a_mistake_is_one_message(tmp_path, monkeypatch, case: Mistake):
    words = case.words(tmp_path)
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    answer = invoke(monkeypatch, *words, work=stop_before_training)
    assert answer.code == 2 and answer.out.strip() == "" and "Traceback" not in answer.err, answer
    assert time.monotonic() - started < LIMIT_S
    lines = [line for line in answer.err.strip().splitlines() if not PROGRESS.match(line)]
    assert case.part in "\n".join(lines), answer
    assert all(line.isprintable() for line in lines), "nothing that a terminal would obey"
    if lines[0].startswith("kvdistill: "):  # else typer's own words on usage
        assert answer.err.count("fix: ") == 1 and lines[-1].startswith("  fix: "), answer
    else:
        assert case.group == "flag" and lines[0].startswith("Usage:"), answer
