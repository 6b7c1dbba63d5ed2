"""A finished study, a file of it damaged, and what one more arm in the same folder then makes of it.

The next command must name the damaged file (exit 2), or end as it does without the damage because the file is made
anew or holds no result. `tests/test_damages.py` tries one damage of every kind of file, `docs/try_mistakes.py` all.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tiny_recipe import invoke, write_recipe

import kvdistill.stages.report.canvas
from kvdistill.core.files import sha256_file, sha256_of
from kvdistill.data.tokenizers import character_tokenizer

HOWS = ("flipped", "truncated", "deleted", "swapped")
MORE = "arms.more.align={layers: cka, projection: structured, init: uniform}"
# of a call (times, versions), drawn from what is compared itself, or a note that is checked against the files
NOTES = ("provenance", "summary", "recipe", "fingerprint", "check", "trained", "evaluated", "ledger", "report")
NO_RESULT = re.compile(rf"(^|/)(({'|'.join(NOTES)})\.json|log\.jsonl|report\.html|figures/.*|\.locks?(/.*)?)$")


def make_study(folder: Path, patch: Any) -> Path:
    """A whole study in `folder/run`: two teachers (one with a tokenizer of its own), three arms, of which one is tuned
    and one reads what teachers wrote. Returns the recipe."""
    character_tokenizer("àé").save_pretrained(folder / "letters")
    optimiser = {"steps": 2, "batch_size": 8}
    scratch = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
    recipe = write_recipe(
        folder,
        teachers=[
            {"name": "one", "train_on": ["chain"], "optimiser": optimiser, "scratch": {**scratch, "hidden_size": 24}},
            {"name": "two", "train_on": ["product"], "optimiser": optimiser, "scratch": scratch}
            | {"tokenizer": str(folder / "letters")},
        ],
        align={"cka_texts": 16},
        train={"steps": 2},
        data={"tasks": [{"name": name, "train": 24, "val": 8, "test": 8} for name in ("chain", "product")]},
        arms={
            "ce": {"teachers": []},
            "alike": {"align": {"layers": "cka"}},
            "solved": {"texts": "written", "loss": {"kv_weight": 0}},
        },
        write={"questions": "train", "limit": 4},
        tune={"arms": ["ce"], "grid": {"train": {"learning_rate": [1e-3, 2e-3]}}, "seeds": [5], "examples": 4},
    )
    answer = invoke(patch, "run", recipe)
    assert answer.code == 0, answer
    return recipe


def kinds(run: Path) -> dict[str, list[Path]]:
    """Kind of file (its path without names, hashes and numbers) -> the files, all that a run leaves but locks."""
    found: dict[str, list[Path]] = {}
    for file in sorted(run.rglob("*")):
        name = file.relative_to(run).as_posix()
        if file.is_file() and not re.search(r"(^|/)\.lock", name):
            kind = re.sub(r"^(store|fit)/(aligner|targets-\w+?)-.*?/", r"\1/\2-…/", name)
            kind = re.sub(r"^(teachers|arms|data/teachers|written)/[^/]+/", r"\1/…/", kind)
            kind = re.sub(r"seed-\d+", "seed-…", re.sub(r"^layers/\w+", "layers/…", kind))
            kind = re.sub(r"(spans-)?(train|val|test|teach)\.(parquet|safetensors)", r"\1SPLIT.\3", kind)
            found.setdefault(re.sub(r"^figures/.*", "figures/…", kind), []).append(file)
    return found


def damage(run: Path, file: Path, how: str) -> bool:
    """Do it; False where there is no such damage (nothing to swap with, an empty file)."""
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
        return True
    if how == "swapped":  # with another of its name, or at least of its kind
        others = [o for o in sorted(run.rglob(f"*{file.suffix}")) if o.is_file() and o.read_bytes() != content]
        others.sort(key=lambda other: other.name != file.name)
        if not others:
            return False
        file.write_bytes(others[0].read_bytes())
        return True
    if not content:
        return False
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
        return True
    changed = bytearray(content)
    digits = [i for i, byte in enumerate(changed) if byte in b"123456"]
    if file.suffix in (".json", ".jsonl") and digits:  # another number, still JSON: the worst kind
        changed[digits[len(digits) // 2]] ^= 1
    else:
        changed[2 * len(changed) // 3] ^= 0x40
    file.write_bytes(changed)
    return True


def results(run: Path) -> dict[str, str]:
    """Path -> checksum of all that is a result; what tells of a call is left out."""
    files = {file.relative_to(run).as_posix(): file for file in sorted(run.rglob("*")) if file.is_file()}
    return {name: _checksum(file) for name, file in files.items() if not NO_RESULT.search(name)}


def _checksum(file: Path) -> str:
    if file.name != "records.jsonl":
        return sha256_file(file)
    return sha256_of(
        [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in file.read_text().splitlines()]
    )


def one_more_arm(patch: Any, recipe: Path, run: Path, *words: str) -> tuple[int, str]:
    """`kvdistill run` with one more arm: exit code and message; a traceback is exit code 1."""
    patch.setattr(kvdistill.stages.report.canvas, "printed", lambda _: (b"", b""))  # half of the time, and no result
    try:
        answer = invoke(patch, "run", recipe, MORE, f"run_dir={run}", *words)
    except Exception as error:
        return 1, f"{type(error).__name__}: {error}"
    return answer.code, answer.err.strip()


def copy_study(study: Path, folder: Path) -> Path:
    """The run folder of a study in another place."""
    run = folder / "run"
    shutil.copytree(study, run)
    tree = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**tree, "run_dir": str(run)}))
    return run


def judge(run: Path, file: Path, code: int, said: str, right: dict[str, str]) -> str:
    """`named`, `made anew`, `said`, or what is wrong."""
    name = file.relative_to(run).as_posix()
    if code == 2:
        places = {str(file), str(file.parent), name, *(str(p) for p in file.parents if p != run and run in p.parents)}
        return "named" if any(place in said for place in places) else f"NOT NAMED: {said.splitlines()[0]}"
    if code != 0:
        return f"TRACEBACK: {said.splitlines()[0]}"
    now = results(run)
    differing = sorted(key for key in {*now, *right} if now.get(key) != right.get(key))
    differing = [key for key in differing if key != name]
    if name == "declared.json" and not file.exists():  # nobody can make it anew: page and terminal say what is unknown
        declared = json.loads((run / "summary.json").read_text())["declared"]
        return "said" if declared["time"] is None and differing == ["statistical_results.json"] else "IN SILENCE"
    if differing:
        return f"IN SILENCE: {', '.join(differing[:4])} differ"
    return "made anew" if now.get(name) == right.get(name) else "holds no result"
