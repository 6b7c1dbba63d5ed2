"""Kills a tiny study at random moments of all its stages, again and again, and compares what is left with a study that
was never disturbed: `python docs/try_kills.py [KILLS] [SEED] [--write]`; --write: the table into docs/reliability.md.

Each attempt is the command `run` in a process of its own (forked, so that torch is imported once; its jobs run in it,
one after another) which gets SIGKILL, SIGTERM, SIGUSR1 or Ctrl-C at a random moment of the stage that was met least so
far; then the same command is given again. One in five is a single verb or one training (`capture`, `train --arm …`).
Every eighth attempt is a real `kvdistill run` with two workers, and the signal goes to its whole process group. Asked
to end, a command must do so within 20 seconds, with one line and its own exit code. When a study is finished, every
file of the undisturbed one must be there with the same content (but for seconds and dates), and no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from kvdistill.core.marks import check_marked, read_mark

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny_recipe import tiny_tree

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- kills: made by docs/try_kills.py -->", "<!-- end of kills -->"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
PROGRESS = re.compile(r".+: \d+% after \d|^$")
# what differs between two runs that were never disturbed
TIMES = {
    "declared",
    "seconds",
    "cpu_seconds",
    "peak_memory_bytes",
    "written_at",
    "frozen_at",
    "started",
    "finished",
    "time",
}
SHOWN = ("provenance.json", "report.html", "summary.json", "ledger.json", "fingerprint.json", "declared.json")
MARKS = ("trained.json", "evaluated.json")  # they vouch for files with times in them: checked, and compared by names
# the tests' tiny study, long enough to be met in training, with adapters and accumulation
RECIPE: dict[str, Any] = tiny_tree(
    teachers=[{**one, "optimiser": {"steps": 30, "batch_size": 8}} for one in tiny_tree()["teachers"]],
    student={"lora": {"r": 4, "alpha": 8, "dropout": 0.2}},
    train={"steps": 40, "batch_size": 4, "accumulation": 2, "log_every": 3, "eval_every": 10, "eval_examples": 8}
    | {"save_every": 7},
    evaluate={"batch_size": 4},
    hardware={"workers": 2, "device": "cpu"},
    arms={
        "ce": {"teachers": []},
        "kv": {"fuse": {"fusion_strategy": "competence"}, "align": {"layers": "cka", "init": "ridge"}},
        "written": {"texts": "written", "loss": {"kv_weight": 0}},
    },
    write={"questions": "train", "limit": 6, "batch_size": 2},
    tune={"arms": ["ce"], "grid": {"train": {"learning_rate": [1e-3, 2e-3]}}, "seeds": [5], "examples": 4},
)
VERBS = (
    ["prepare"],
    ["teach"],
    ["map-layers"],
    ["capture"],
    ["fit"],
    ["train", "--arm", "kv", "--seed", "7"],
    ["train", "--arm", "ce", "--seed", "7"],
)


def main(kills: int, seed: int) -> dict[str, Any]:
    """Do it; what is said in the table. AssertionError where anything differs."""
    chance, root = random.Random(seed), Path(tempfile.mkdtemp(prefix="kvdistill-kills-"))
    try:
        (root / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "run_dir": str(root / "run")}))
        begun = time.monotonic()
        lasts_s, whole = undisturbed(root)
        found: Counter[tuple[str, str]] = Counter()
        slowest_s, studies, attempt = 0.0, 0, 0
        while sum(found.values()) < kills:
            attempt += 1
            number = SIGNALS[(attempt + attempt // 8) % len(SIGNALS)]
            if attempt % 8 == 0:
                where, took_s = disturb_workers(root, number, chance)
            else:
                words = chance.choice(VERBS) if chance.random() < 0.2 else ["run"]
                met = Counter(stage for stage, _ in found)
                aim = min(chance.sample(sorted(lasts_s), len(lasts_s)), key=lambda stage: met[stage])
                where, took_s = disturb(root, words, number, aim, chance.uniform(0, lasts_s[aim]))
            if where is not None:
                found[where, number.name] += 1
                slowest_s = max(slowest_s, took_s)
            if (root / "run" / "study.json").exists():
                compare(root / "run", whole)
                shutil.rmtree(root / "run")
                studies += 1
        if (root / "run").exists():  # the last one is let to its end
            code, said = wait_for(begin(root, ["run"]), root)
            assert code == 0, said
            compare(root / "run", whole)
            studies += 1
        return {
            "kills": sum(found.values()),
            "by_stage": found,
            "studies": studies,
            "files": len(whole),
            "slowest_s": slowest_s,
            "minutes": (time.monotonic() - begun) / 60,
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)


def undisturbed(root: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds that the jobs of each stage take at most, and the files of a study; the folder is empty afterwards."""
    code, said = wait_for(begin(root, ["run"]), root)
    assert code == 0, said
    whole, lasts_s = contents(root / "run"), {"starting": 0.2}
    jobs = [line.split() for line in (root / "at").read_text().splitlines()] + [["", repr(time.time())]]
    for (verb, begun), (_, ended) in pairwise(jobs):
        lasts_s[verb] = max(lasts_s.get(verb, 0.0), float(ended) - float(begun))
    shutil.rmtree(root / "run")
    return lasts_s, whole


# -- attempts -----------------------------------------------------------------------------------------


def begin(root: Path, words: list[str]) -> int:
    """The command in a forked process, whose output goes to `root/said` and whose job to `root/at`."""
    for name in ("at", "said"):
        (root / name).write_text("")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[1:])  # until it listens
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 1
    try:
        out = os.open(root / "said", os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(out, number)
        code = command_here(root, [words[0], str(root / "tiny.yaml"), *words[1:]])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def command_here(root: Path, words: list[str]) -> int:
    """`kvdistill WORDS…` in this process, jobs and all; its exit code."""
    import kvdistill.study.local as local
    import kvdistill.study.run as verbs
    from kvdistill.cli.app import main as command

    perform: Callable[..., None] = local.perform
    run_jobs: Callable[..., None] = local.run_jobs

    def noted(job: Any, *args: Any) -> None:
        with open(root / "at", "a") as at:
            at.write(f"{job.verb} {time.time()}\n")
        perform(job, *args)

    local.perform = noted
    verbs.run_jobs = lambda *args, **options: run_jobs(*args, **{**options, "here": True})
    sys.argv[1:] = words
    try:
        command()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def stage_of(root: Path) -> str:
    """Of the job that was begun last."""
    return (["starting"] + [line.split()[0] for line in (root / "at").read_text().splitlines() if line])[-1]


def wait_for(pid: int, root: Path) -> tuple[int, str]:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (root / "said").read_text()


def disturb(root: Path, words: list[str], number: signal.Signals, aim: str, s: float) -> tuple[str | None, float]:
    """Begin, wait until it is so far into a stage, and send the signal.

    The stage that was met, None where it came too late; seconds to the end.
    """
    pid = begin(root, words)
    deadline = time.monotonic() + s if aim == "starting" else float("inf")
    fine = (0,) if words == ["run"] else (0, 2)  # a single verb may come before its turn
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            said = (root / "said").read_text()
            assert os.waitstatus_to_exitcode(status) in fine, said
            return None, 0.0
        if deadline == float("inf") and stage_of(root) == aim:
            deadline = time.monotonic() + s
        time.sleep(0.001)
    where = stage_of(root)
    os.kill(pid, number)
    begun = time.monotonic()
    code, said = wait_for(pid, root)
    if code in fine:  # it was finished in the meantime
        return None, 0.0
    return _checked(where, number, code, said, time.monotonic() - begun)


def disturb_workers(root: Path, number: signal.Signals, chance: random.Random) -> tuple[str | None, float]:
    """The real command with its workers; the signal goes to all of them, as a cluster or a terminal sends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvdistill", "run", str(root / "tiny.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # its imports come first: wait until it is at work
    before = _newest(root / "run")
    deadline = time.monotonic() + 120
    while _newest(root / "run") == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 6))
    if process.poll() is not None:
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return None, 0.0
    begun = time.monotonic()
    os.killpg(process.pid, number)
    said = process.communicate()[0]
    return _checked("workers", number, process.returncode, said, time.monotonic() - begun)


def _newest(run: Path) -> float:
    return max((file.stat().st_mtime for file in run.glob(".locks/*")), default=0.0) if run.exists() else 0.0


def _checked(where: str, number: signal.Signals, code: int, said: str, took_s: float) -> tuple[str | None, float]:
    if code == 0:  # it was finished in the meantime
        return None, 0.0
    assert code == CODES[number], (where, number, code, said)
    lines = [line for line in said.splitlines() if not PROGRESS.match(line)]
    by = "" if number == signal.SIGINT else f" by {number.name}"
    wanted = (
        [] if number == signal.SIGKILL else [f"kvdistill: stopped{by}. The same command goes on where this one ended."]
    )
    assert lines == wanted, (where, number, said)
    assert took_s < 20, (where, number, took_s)
    return where, took_s


# -- comparing ----------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, str]:
    """File -> hash of what is in it, less seconds and dates; empty for pages and for what is made of times."""
    found: dict[str, str] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name, content = file.relative_to(run).as_posix(), file.read_bytes()
        if name.startswith(".locks/") or file.name == ".lock":
            continue
        if file.name in SHOWN or (name.startswith(("figures/", "layers/")) and not name.endswith(".json")):
            content = b""
        elif file.name in MARKS:
            check_marked(file, fix="")
            content = json.dumps(sorted((read_mark(file) or {"files": []})["files"])).encode()
        elif file.suffix == ".json":
            content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
        elif file.suffix == ".jsonl":
            content = json.dumps([_timeless(json.loads(line)) for line in content.splitlines()]).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def compare(run: Path, whole: dict[str, str]) -> None:
    mine = contents(run)
    assert mine.keys() == whole.keys(), f"left over or missing: {sorted(mine.keys() ^ whole.keys())}"
    assert mine == whole, f"other content: {[name for name in mine if mine[name] != whole[name]]}"
    leftovers = [str(path) for path in run.rglob("*") if re.search(r"\.(part|old)-\d+", path.name)]
    assert not leftovers, leftovers


# -- the page -----------------------------------------------------------------------------------------


def table(told: dict[str, Any]) -> str:
    from kvdistill.stages.table import STAGES

    stages = [stage for stage in ("starting", *STAGES, "workers") if any(stage == met for met, _ in told["by_stage"])]
    names = [number.name for number in SIGNALS]
    rows = [f"| {s} | " + " | ".join(str(told["by_stage"][s, name]) for name in names) + " |" for s in stages]
    return "\n".join(
        [
            BEGIN,
            f"`python docs/try_kills.py {told['kills']}`: {told['kills']} kills and requests to end over all stages, "
            f"{told['studies']} studies brought to their end.",
            f"All {told['files']} files of each are those of an undisturbed study (but for seconds and dates); nothing "
            f"is left over. Asked to end, the slowest took {told['slowest_s']:.1f} s. "
            f"{told['minutes']:.0f} minutes.",
            "",
            f"| met in | {' | '.join(names)} |",
            "|---|" + "---|" * len(names),
            *rows,
            END,
        ]
    )


def write_page(text: str) -> None:
    page = HERE / "reliability.md"
    old = page.read_text() if page.exists() else "# What a world that kills and fills does to a run folder\n"
    if BEGIN in old:
        before, _, rest = old.partition(BEGIN)
        page.write_text(before + text + rest.partition(END)[2])
    else:
        page.write_text(f"{old.rstrip()}\n\n## Killed at any moment\n\n{text}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from kvdistill.study.local import prepare_process

    prepare_process(1)
    import kvdistill.stages.evaluate
    import kvdistill.stages.prepare
    import kvdistill.stages.report
    import kvdistill.stages.train  # noqa: F401  (once, before the first fork)

    given = [word for word in sys.argv[1:] if not word.startswith("--")]
    outcome = main(int(given[0]) if given else 60, int(given[1]) if len(given) > 1 else 1)
    print(json.dumps({**outcome, "by_stage": len(outcome["by_stage"])}) if "--json" in sys.argv else table(outcome))
    if "--write" in sys.argv:
        write_page(table(outcome))
