"""The house as `docs/design.md` draws it: imports go down only, and start-up stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kvdistill"
RANKS = {
    "core": 0,
    "align": 1,
    "compress": 1,
    "data": 1,
    "fuse": 1,
    "losses": 1,
    "match": 1,
    "models": 1,
    "stats": 1,
    "store": 1,
    "arms": 2,
    "stages": 3,
    "study": 4,
    "cli": 5,
    "__main__": 6,
    "__init__": 6,
}


def rooms() -> list[tuple[Path, str]]:
    files = [file for file in PACKAGE.rglob("*.py")]
    return [(file, file.relative_to(PACKAGE).parts[0].removesuffix(".py")) for file in sorted(files)]


def imported_rooms(file: Path) -> set[str]:
    """Rooms named in import statements anywhere in the file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module != "kvdistill" else [f"kvdistill.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("kvdistill.")}
    return found


def test_every_room_has_a_rank() -> None:
    assert {room for _, room in rooms()} <= set(RANKS)


@pytest.mark.parametrize("file", [file for file, _ in rooms()], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imported_rooms(file) - {room}:
        allowed = RANKS[other] < RANKS[room]
        assert allowed, f"{file.name} (rank {RANKS[room]}) imports {other} (rank {RANKS[other]})"


def imported_files(file: Path) -> set[Path]:
    """Files of the package named in import statements anywhere in `file`: in functions and for annotations, too."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:  # a file, a room, or a name in one of these
            path = PACKAGE.parent.joinpath(*name.split("."))
            places = [p for whole in (path, path.parent) for p in (whole.with_suffix(".py"), whole / "__init__.py")]
            found |= set([place for place in places if place.is_file() and PACKAGE in place.parents][:1])
    return found - {file}


def test_no_file_imports_itself_by_way_of_others() -> None:
    left = {file: imported_files(file) for file, _ in rooms()}
    while True:  # whoever imports nobody, and whoever nobody imports, is in no circle
        wanted = set().union(*left.values())
        inside = {file: needs & left.keys() for file, needs in left.items() if file in wanted and needs & left.keys()}
        if inside == left:
            break
        left = inside
    names = [f"{file.relative_to(PACKAGE)} -> {n.relative_to(PACKAGE)}" for file, needs in left.items() for n in needs]
    assert not names


def loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(out.stdout.split())


def test_importing_the_package_loads_no_torch() -> None:
    assert not {"torch", "transformers", "matplotlib"} & loaded_after("import kvdistill")


def test_help_loads_neither_torch_nor_pydantic() -> None:
    code = "import contextlib, io\nfrom kvdistill.cli.app import app\nfrom typer.testing import CliRunner\n"
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    assert not {"torch", "transformers", "pydantic", "matplotlib"} & loaded_after(code)


def test_report_needs_no_torch() -> None:
    assert not {"torch", "transformers"} & loaded_after("import kvdistill.stages.report, kvdistill.stats")


def test_orchestration_needs_no_torch() -> None:
    assert "torch" not in loaded_after("import kvdistill.study.run, kvdistill.study.local, kvdistill.stages.table")
