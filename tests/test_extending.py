"""docs/extending.md: every example is put into a copy of the package as the page says, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"```(\w+) (new|edit|run)(?:=(\S+))?\n(.*?)```", re.S)
SECTION = re.compile(r"^## (.+?): (\d+) lines in 1 new file, (\d+) lines? elsewhere\n(.*?)(?=^## |\Z)", re.S | re.M)


def sections() -> list[tuple[str, int, int, str]]:
    return [(name, int(new), int(other), text) for name, new, other, text in SECTION.findall(PAGE.read_text())]


def edited(text: str, diff: str, file: str) -> tuple[str, int]:
    """`text` after a diff without line numbers: lines with a minus make place for those with a plus.

    Lines without a sign are context. Returns the number of lines with a plus too.
    """
    old = [line[1:] for line in diff.splitlines() if line[:1] in (" ", "-")]
    new = [line[1:] for line in diff.splitlines() if line[:1] in (" ", "+")]
    before, after = "\n".join(old) + "\n", "\n".join(new) + "\n"
    assert text.count(before) == 1, f"docs/extending.md does not fit {file} any more:\n{before}"
    return text.replace(before, after), sum(line.startswith("+") for line in diff.splitlines())


def test_the_page_has_an_example_of_each_kind() -> None:
    names = [name for name, *_ in sections()]
    assert names == ["A data set", "A projector", "A loss", "A fusion strategy", "A kind of student", "A stage"]
    assert len(re.findall(r"^## ", PAGE.read_text(), re.M)) == len(names)


@pytest.mark.parametrize("name", [name for name, *_ in sections()])
def test_an_example_does_what_the_page_says_in_as_many_lines(name: str, tmp_path: Path) -> None:
    _, num_new, num_elsewhere, text = next(section for section in sections() if section[0] == name)
    shutil.copytree(ROOT / "kvdistill", tmp_path / "kvdistill", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    new_lines, other_lines, program = 0, 0, ""
    for _, kind, place, body in BLOCK.findall(text):
        if kind == "new":
            assert not (tmp_path / place).exists()
            (tmp_path / place).write_text(body)
            new_lines += len(body.splitlines())
        elif kind == "edit":
            path = tmp_path / place
            changed, added = edited(path.read_text(), body, place)
            path.write_text(changed)
            other_lines += added
        else:
            program += body
    assert (new_lines, other_lines) == (num_new, num_elsewhere)
    assert "assert" in program
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
