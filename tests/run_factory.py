"""Writes a synthetic run folder, as the other stages would leave it, for the report's tests. No torch, no models."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from kvdistill.core.arms import arm_recipe
from kvdistill.core.files import write_json
from kvdistill.core.layout import LATENTS
from kvdistill.core.marks import sealed, write_mark
from kvdistill.core.recipe import Recipe
from kvdistill.core.records import Record, read_records
from kvdistill.core.tuning import edges, judged_by, rule_of, trials_of, tuned_path

TASKS = ("chain", "product")
TEACHERS = ("adds", "multiplies")
# arm -> (changes to the recipe, accuracy per task)
ARMS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "competence": ({"fuse": {"fusion_strategy": "competence"}}, (0.96, 0.66)),
    "fixed": ({}, (0.90, 0.51)),
    "teacher-adds": ({"teachers": ["adds"]}, (0.83, 0.20)),
    "logits": ({"loss": {"kv_weight": 0.0, "logit_weight": 1.0}}, (0.81, 0.22)),
    "placebo": ({"control": "placebo"}, (0.72, 0.23)),
    "ce": ({"teachers": []}, (0.75, 0.22)),
}
CHANGES = ("zero", "mean", "shuffle")  # of latents, in causal checks
TOKENS = ["5", " ×", "<script>", "\n"]  # that are read out
COMPARISONS = [["competence", "ce"], ["fixed", "ce"], ["competence", "fixed"], ["placebo", "ce"]]


def make_recipe(arms: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    scratch = {"scratch": {}}
    return Recipe.model_validate(
        {
            "name": "two-teachers",
            "title": "Two teachers, one student: chains and products",
            "data": {"tasks": [{"name": t} for t in TASKS]},
            "teachers": [{"name": n, "train_on": [t], **scratch} for n, t in zip(TEACHERS, TASKS, strict=True)],
            "student": scratch,
            "arms": arms if arms is not None else {name: spec for name, (spec, _) in ARMS.items()},
            "report": {"comparisons": COMPARISONS},
            **changes,
        }
    )


def short_hash(*words: object) -> str:
    return hashlib.sha256("\x1f".join(map(str, words)).encode()).hexdigest()[:16]


def make_record(**known: Any) -> Record:
    """A right answer to an own question, but for what is known otherwise."""
    given: dict[str, Any] = dict.fromkeys(one.name for one in fields(Record) if one.default is MISSING)
    given |= {"metrics": {}, "evaluation": "own", "mode": "generation", "style": "cot", "correct": True}
    return Record(**{**given, "score": float(known.get("correct", True)), **known})


def make_records(arm: str, seed: int, accuracy: tuple[float, ...], questions: int) -> list[dict[str, Any]]:
    """Questions have a difficulty of their own, runs a luck of their own."""
    rng = np.random.default_rng(int(short_hash(arm, seed), 16) % 2**32)
    luck = rng.normal(0, 0.02)
    rows = []
    for task, share in zip(TASKS, accuracy, strict=True):
        hard = np.random.default_rng(len(task)).random(questions)
        for i in range(questions):
            chance = share + luck
            correct = bool(0.6 * hard[i] + 0.4 * rng.random() < chance * (0.4 + 0.6 * chance) + 0.0)
            gold = str(17 + i)
            one = make_record(
                arm=arm, seed=seed, task=task, id=f"{task}-{i:04d}",
                doc_hash=short_hash(task, i), prompt_hash=short_hash("prompt", task, i),
                prediction=f"{i} + 17 = {gold}\n#### {gold}" if correct else f"{i} + 17 = {gold}1",
                gold=gold, correct=correct, nll=float(1.4 - share - luck + 0.3 * hard[i]),
                tokens_out=int(14 + 9 * hard[i]), seconds=0.01,
            )  # fmt: skip
            rows.append(asdict(one))
    return rows


def make_log(arm: str, seed: int, accuracy: tuple[float, ...], spec: dict[str, Any], steps: int = 800) -> list[Any]:
    rng = np.random.default_rng(int(short_hash("log", arm, seed), 16) % 2**32)
    teachers = spec.get("teachers", list(TEACHERS)) if spec.get("loss", {}).get("kv_weight", 1) else []
    rows: list[Any] = []
    for step in range(20, steps + 1, 20):
        done = step / steps
        kv = 0.25 + 0.9 * math.exp(-4 * done) + 0.01 * rng.normal()
        ce = 0.3 + 1.8 * math.exp(-5 * done) + 0.02 * rng.normal()
        terms = {"ce": {"raw": ce, "weight": 1.0, "weighted": ce}}
        for t in teachers:
            terms |= {f"kv/{t}/{p}": {"raw": kv, "weight": 10.0, "weighted": 10 * kv} for p in "kv"}
        row = {"step": step, "loss": ce, "lr": 2e-3, "grad_norm": 0.7, "terms": terms, "tokens": 900 * step,
               "seconds": 0.05 * step}  # fmt: skip
        if len(teachers) > 1:
            own = 0.5 + (0.45 * done if "fuse" in spec else 0.0)
            weights = {"adds": own, "multiplies": 1 - own}
            row["routing"] = {"mean": {"adds": 0.5, "multiplies": 0.5}, "entropy": 0.6,
                              "by_task": {"chain": weights, "product": {"adds": 1 - own, "multiplies": own}},
                              "by_layer": [{"adds": 0.5, "multiplies": 0.5},
                                           {"adds": 0.47, "multiplies": 0.53}]}  # fmt: skip
        rows.append(row)
        if step % 100 == 0:
            by_task = {
                t: a * (1 - math.exp(-4 * done)) + 0.01 * rng.normal() for t, a in zip(TASKS, accuracy, strict=True)
            }
            rows.append({"step": step, "train": {"ce": ce, "kv_loss": kv if teachers else None},
                         "val": {"kv_loss": 1.1 * kv if teachers else None, "ce": ce + 0.1 * done, "nll": ce,
                                 "accuracy": sum(by_task.values()) / len(by_task),
                                 "accuracy_by_task": by_task}})  # fmt: skip
    return rows


def make_ledger(seed: int, spec: dict[str, Any]) -> dict[str, Any]:
    teachers, times = spec.get("teachers", list(TEACHERS)), spec.get("times", 1)
    return {
        "optimiser_steps": 800 * times, "tokens_nonpadding": 712_345 * times, "tokens_loss": 512_345 * times,
        "problems_seen": 25_600 * times,
        "flops": {"student_forward": 2.1e11 * times, "student_backward": 4.2e11 * times,
                  "teachers": {t: 3.3e11 for t in teachers}, "aligner": 2e9 * len(teachers) * times},
        "seconds": 41.2 + 9 * len(teachers), "cpu_seconds": 40.9 + 9 * len(teachers), "peak_memory_bytes": 512 * 2**20,
        "data_fingerprint": "d0", "init_fingerprint": f"i{seed}", "order_fingerprint": f"o{seed}",
    }  # fmt: skip


def write_tuned(run: Path, recipe: Recipe) -> None:
    """`tuned.json` as the search leaves it: the second trial of each arm is the best, its first one diverges."""
    assert recipe.tune is not None
    trials: dict[str, list[dict[str, Any]]] = {}
    for one in trials_of(recipe).values():
        trials.setdefault(one.arm, []).append(one.values)
    arms = {}
    for arm, values in trials.items():
        rows = []
        for number, value in enumerate(values, start=1):
            figures = {"accuracy": 0.9 - 0.1 * number, "nll": 0.2 * number}
            if number == 1:
                figures = {"accuracy": None, "nll": None}
            judged = {"step": 800, **figures, **({"diverged": "at step 3"} if number == 1 else {})}
            seeds = {str(seed): judged for seed in recipe.tune.seeds}
            rows.append({"trial": number, "values": value, **figures, "seeds": seeds})
        arms[arm] = {"chosen": 2, "values": values[1], "at_edge": edges(values, values[1]), "flops": 1.26e12,
                     "trials": rows}  # fmt: skip
    said = {"schema": 1, "rule": rule_of(judged_by(recipe)), "by": judged_by(recipe), "seeds": recipe.tune.seeds}
    write_json(tuned_path(run), sealed({**said, "arms": arms}))


def make_match(spec: dict[str, Any]) -> dict[str, Any]:
    teachers = spec.get("teachers", list(TEACHERS)) if spec.get("loss", {}).get("kv_weight", 1) else []
    if spec.get("control"):
        k = {"r2": 0.02, "centred_cosine": 0.11, "retrieval_top1": 0.03, "cosine": 0.93}
    else:
        k = {"r2": 0.71, "centred_cosine": 0.84, "retrieval_top1": 0.62, "cosine": 0.97}
    v = {key: value * 0.9 for key, value in k.items()}
    return {t: {"k": k, "v": v, "by_layer": []} for t in teachers}


def make_latents(arm: str, folder: Path, kept: dict[str, float], thinks: tuple[int, int] | None) -> dict[str, Any]:
    """kept: change -> the share of right answers that stay right under it."""
    passes, places = (thinks[1] + 3, 30) if thinks else (23, 40)
    cost = {"questions": 120, "forward_passes": passes, "cache_places": places, "cache_bytes": places * 512.0,
            "seconds_alone": 0.002 * passes, "timed": 5, "seconds": 0.0004 * passes, "batch_size": 64}  # fmt: skip
    found: dict[str, Any] = {"schema": 1, "cost": cost}
    if thinks is None:
        return found
    records = read_records(folder / "records.jsonl")
    rng = np.random.default_rng(len(arm))
    right = [one.correct for one in records]
    luck = rng.random((3, len(right)))
    correct = {"none": right}
    correct |= {kind: [r and bool(x < kept.get(kind, 1.0)) for r, x in zip(right, luck[n], strict=True)]
                for n, kind in enumerate(CHANGES)}  # fmt: skip
    M, T = thinks
    slots = [[[[TOKENS[(slot + number + place) % 4], 0.5 / (place + 1)] for place in range(3)] for slot in range(M)]
             for number in range(T + 1)]  # fmt: skip
    questions = {one.task: one for one in reversed(records)}.values()
    readout = [{"question": list(one.question), "completion": one.prediction, "correct": one.correct,
                "passes": [*range(T + 1)], "slots": M, "tokens": slots} for one in questions]  # fmt: skip
    causal = {"questions": [list(one.question) for one in records], "correct": correct}
    return {**found, "latents": M, "passes": T, "causal": causal, "readout": readout}


def write_latents(run: Path, recipe: Recipe, kept: dict[str, dict[str, float]] | None = None) -> None:
    """`latent.json` of every run, as the evaluate stage leaves it. kept: by arm; unset: all answers stay right."""
    for arm in recipe.arms:
        made = arm_recipe(recipe, arm)
        for seed in recipe.seeds:
            folder = run / "arms" / arm / f"seed-{seed}"
            thinks = (made.latent.tokens, made.latent.passes) if made.thinks else None
            write_json(folder / LATENTS, make_latents(arm, folder, (kept or {}).get(arm, {}), thinks))
            write_mark(folder / "evaluated.json", {}, ["records.jsonl", LATENTS])


def mark_again(folder: Path) -> None:
    """Marks of what lies in a folder now, as if the stages had left it so."""
    if folder.name.startswith("seed-"):
        write_mark(folder / "trained.json", {}, ["log.jsonl", "ledger.json", "match.json"])
        write_mark(folder / "evaluated.json", {}, ["records.jsonl"])
    elif folder.parent.name == "teachers":
        write_mark(folder / "trained.json", {}, ["report.json"])


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mark_again(path.parent)


def write_object(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    mark_again(path.parent)


def write_run(
    run: Path,
    recipe: Recipe | None = None,
    *,
    questions: int = 60,
    accuracy: dict[str, tuple[float, float]] | None = None,
) -> Recipe:
    """A complete run folder of the recipe's arms; accuracies default to those of ARMS (0.5 for unknown arms)."""
    recipe = recipe or make_recipe()
    for arm, spec in recipe.every_arm.items():
        shares = (accuracy or {}).get(arm) or ARMS.get(arm, ({}, (0.5, 0.5)))[1]
        for seed in recipe.seeds:
            folder = run / "arms" / arm / f"seed-{seed}"
            write_lines(folder / "records.jsonl", make_records(arm, seed, shares, questions))
            write_lines(folder / "log.jsonl", make_log(arm, seed, shares, spec))
            write_object(folder / "ledger.json", make_ledger(seed, spec))
            if match := make_match(spec):
                write_object(folder / "match.json", match)
    for teacher, task in zip(TEACHERS, TASKS, strict=True):
        by_task = {t: 0.97 if t == task else 0.02 for t in TASKS}
        write_object(
            run / "teachers" / teacher / "report.json", {"accuracy_by_task": by_task, "steps": 700, "seconds": 58.0}
        )
    splits = {"train": 1500, "val": 100, "test": questions}
    counts = {t: {s: {"asked": n, "problems": n, "rows": n, "too_long": 0} for s, n in splits.items()} for t in TASKS}
    write_object(run / "data" / "manifest.json", {
        "format": 2, "section": {}, "num_leaks": 0, "fingerprint": {"all": short_hash("rows")}, "tasks": counts,
        "tokenizer": {"name": "characters", "size": 43}, "sources": [{"task": t, "file": None} for t in TASKS],
    })  # fmt: skip
    write_object(run / "data" / "validation_report.json", {"problems": splits, "num_leaks": 0, "leaks": []})
    write_object(run / "provenance.json", {"recipe_sha256": short_hash("r"),
                 "versions": {"torch": "2.13", "python": "3.11"},
                 "machine": {"cpu": "2 cores", "gpu": None}, "command": "kvdistill study run recipe.yaml",
                 "started": "2026-01-01T10:00:00Z", "finished": "2026-01-01T10:21:00Z",
                 "seconds": 252.5, "cpu_seconds": 451.0})  # fmt: skip
    return recipe
