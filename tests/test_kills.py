"""A few kills of a whole study at random moments (`docs/try_kills.py` does many): the same files, nothing left over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import environment

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "try_kills.py"


@pytest.mark.slow
def test_a_study_killed_and_asked_to_end_at_random_moments_leaves_what_an_undisturbed_one_does():
    words = [sys.executable, str(SCRIPT), "5", "5", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["kills"] == 5 and told["studies"] >= 1 and told["files"] > 60 and told["slowest_s"] < 20
