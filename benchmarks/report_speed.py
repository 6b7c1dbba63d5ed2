"""The report of a large study: 200 runs x 7 tasks x 1,000 questions, from the records to the page.

A run folder as the other stages leave it (40 arms, 5 seeds, records with the answers, logs, ledgers, KV matches) is
made of random numbers in a temporary folder. `kvdistill.stages.report.report` then runs in a process of its own, whose
CPU and wall time and peak memory are measured. All other arms are compared with the first: 39 comparisons. One thread
does it all, so the bar is on CPU time, which is wall time on an idle machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import save
from kvdistill.core.marks import write_mark
from kvdistill.core.recipe import Recipe
from kvdistill.core.records import Record

ARMS, SEEDS, TASKS, QUESTIONS = 40, 5, 7, 1000
STEPS, LOG_EVERY, EVAL_EVERY = 2000, 20, 100
BARS = {"cpu_s": 60.0, "peak_bytes": 4 << 30, "page_bytes": 5 << 20}
TEACHERS = ("first", "second")
_CHILD = """
import json, resource, sys, time
from pathlib import Path
begun = time.perf_counter()
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report import report
parts, last = {}, ["start", begun]
def tell(what, done, total):
    now = time.perf_counter()
    parts[last[0]] = round(now - last[1], 2)
    last[:] = [what, now]
page = report(Recipe.model_validate_json(Path(sys.argv[1], "recipe.json").read_text()), Path(sys.argv[1]), tell)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"wall_s": time.perf_counter() - begun, "cpu_s": used.ru_utime + used.ru_stime,
                  "peak_bytes": used.ru_maxrss * 1024, "page_bytes": page.stat().st_size, "parts_s": parts}))
"""


def run() -> bool:
    """Make the folder, report on it, and hold time, memory and page against the bars."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        write_study(Path(folder), ARMS, SEEDS, TASKS, QUESTIONS)
        print(f"report_speed: {ARMS * SEEDS} runs x {TASKS} tasks x {QUESTIONS} questions")
        print(f"  made in {time.perf_counter() - begun:.0f} s")
        found = measure(Path(folder))
    met = {key: found[key] <= bar for key, bar in BARS.items()}
    load = round(os.getloadavg()[0], 1)
    print(f"  CPU {found['cpu_s']:.1f} s, at most {BARS['cpu_s']:.0f} s; wall {found['wall_s']:.1f} s at load {load}")
    print("    " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in found["parts_s"].items()))
    print(f"  peak memory {found['peak_bytes'] / 2**30:.2f} GiB, at most {BARS['peak_bytes'] / 2**30:.0f}")
    print(f"  page {found['page_bytes'] / 2**20:.2f} MiB, at most {BARS['page_bytes'] / 2**20:.0f}")
    settings = {
        "arms": ARMS,
        "seeds": SEEDS,
        "tasks": TASKS,
        "questions": QUESTIONS,
        "comparisons": ARMS - 1,
        "load": load,
    }
    save("report_speed", settings, {"measured": found, "bars": BARS, "met": met}, torch.device("cpu"))
    return all(met.values())


def measure(folder: Path) -> dict[str, Any]:
    """Seconds, bytes and the parts' seconds of one report, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def study_recipe(arms: int, seeds: int, tasks: int) -> Recipe:
    names = ["ce", *[f"arm-{i:02d}" for i in range(1, arms)]]
    specs: dict[str, Any] = {name: {"loss": {"kv_weight": float(i)}} for i, name in enumerate(names)}
    specs["ce"] = {"teachers": []}
    task_names = [f"task-{i}" for i in range(tasks)]
    return Recipe.model_validate(
        {
            "name": "large",
            "seeds": list(range(42, 42 + seeds)),
            "data": {"tasks": [{"name": name} for name in task_names]},
            "teachers": [{"name": name, "scratch": {}, "train_on": task_names[:1]} for name in TEACHERS],
            "student": {"scratch": {}},
            "arms": specs,
            "report": {"comparisons": [[name, "ce"] for name in names[1:]]},
        }
    )


def write_study(folder: Path, arms: int, seeds: int, tasks: int, questions: int) -> Recipe:
    """A run folder of random figures, with the marks that the report holds its files against."""
    recipe = study_recipe(arms, seeds, tasks)
    (folder / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    rng = np.random.default_rng(0)
    for number, arm in enumerate(recipe.arms):
        for seed in recipe.seeds:
            run = folder / "arms" / arm / f"seed-{seed}"
            run.mkdir(parents=True)
            share = min(0.9, 0.2 + 0.015 * number) + rng.normal(0, 0.02)
            _write_lines(run / "records.jsonl", _records(arm, seed, share, tasks, questions, rng))
            _write_lines(run / "log.jsonl", _log(share, [t.name for t in recipe.data.tasks], number, rng))
            (run / "ledger.json").write_text(json.dumps(_ledger(seed, number)), encoding="utf-8")
            match = {key: 0.5 + rng.normal(0, 0.05) for key in ("r2", "centred_cosine", "retrieval_top1", "cosine")}
            kv = {teacher: {"k": match, "v": match, "by_layer": []} for teacher in TEACHERS}
            (run / "match.json").write_text(json.dumps(kv if number else {}), encoding="utf-8")
            write_mark(run / "trained.json", {}, ["log.jsonl", "ledger.json", "match.json"])
            write_mark(run / "evaluated.json", {}, ["records.jsonl"])
    return recipe


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _records(arm: str, seed: int, share: float, tasks: int, questions: int, rng: Any) -> list[dict[str, Any]]:
    one = Record(
        arm=arm, seed=seed, evaluation="own", task="", id="", number=0, style="cot", doc_hash="", prompt_hash="",
        mode="generation", prediction="12", completion="12+7=19,19-5=14,14*3=42\n#### 42", gold="42", correct=True,
        score=1.0, nll=0.5, nll_reasoning=0.7, tokens_in=60, tokens_out=40, forward_passes=41, truncated=False,
        unspelled=0.0, seconds=0.01,
    )  # fmt: skip
    form, rows = asdict(one), []
    for task in range(tasks):
        right = rng.random(questions) < share
        nll = rng.gamma(2.0, 0.4, questions)
        for i in range(questions):
            known = {"task": f"task-{task}", "id": f"{i:06d}", "number": i, "doc_hash": f"{task:08x}{i:024x}",
                     "prompt_hash": f"{task:08x}{i:024x}", "correct": bool(right[i]), "score": float(right[i]),
                     "nll": float(nll[i])}  # fmt: skip
            rows.append(form | known)
    return rows


def _log(share: float, tasks: list[str], number: int, rng: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY):
        loss = float(0.3 + np.exp(-step / 500) + rng.normal(0, 0.02))
        row: dict[str, Any] = {"step": step, "loss": loss, "terms": {"ce": {"raw": loss, "weight": 1.0}}}
        if number:
            row["terms"] |= {f"kv/{teacher}/{side}": {"raw": loss} for teacher in TEACHERS for side in "kv"}
            even = dict.fromkeys(TEACHERS, 0.5)
            row["routing"] = {
                "mean": even,
                "entropy": 0.6,
                "by_task": dict.fromkeys(tasks, even),
                "by_layer": [even] * 4,
            }
        rows.append(row)
        if step % EVAL_EVERY == 0:
            by_task = {task: float(share * (1 - np.exp(-step / 500))) for task in tasks}
            kv = loss if number else None
            rows.append({"step": step, "train": {"ce": loss, "kv_loss": kv},
                         "val": {"kv_loss": kv, "ce": loss, "nll": loss, "accuracy": sum(by_task.values()) / len(tasks),
                                 "accuracy_by_task": by_task}})  # fmt: skip
    return rows


def _ledger(seed: int, number: int) -> dict[str, Any]:
    return {
        "optimiser_steps": STEPS, "tokens_nonpadding": 10**6, "tokens_loss": 6 * 10**5, "seconds": 60.0,
        "cpu_seconds": 60.0, "peak_memory_bytes": 2**29, "data_fingerprint": "d", "init_fingerprint": f"i{seed}",
        "order_fingerprint": f"o{seed}",
        "flops": {"student_forward": 2e11, "student_backward": 4e11, "aligner": 1e9 * (number > 0),
                  "teachers": dict.fromkeys(TEACHERS if number else (), 3e11)},
    }  # fmt: skip
