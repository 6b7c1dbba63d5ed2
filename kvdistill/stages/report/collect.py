"""Reads what the stages left in a run folder into tables in memory, and writes the report's JSON files.

Knows the files' names and fields (records, logs, ledgers, matches, manifests) and nothing of statistics or pages.
What an unfinished study lacks is noted, not fatal; a file that contradicts itself is an error naming file and line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvdistill.core.budgets import differences, read_budgets
from kvdistill.core.config import asked_hash
from kvdistill.core.costs import count_sharers, student_flops, total_flops
from kvdistill.core.declared import family_of
from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import finite, read_json_lines, write_text
from kvdistill.core.layout import (
    LATENTS,
    data_folder,
    evaluated_mark,
    layers_folder,
    replicate_folder,
    teacher_folder,
    teacher_texts_folder,
    trained_mark,
)
from kvdistill.core.marks import check_marked, read_mark, read_sealed
from kvdistill.core.recipe import Recipe
from kvdistill.core.records import Record, read_records
from kvdistill.core.tuning import trials_of
from kvdistill.stages.report.compare import SeedRun
from kvdistill.stages.report.models import read_models
from kvdistill.stages.report.tail import degenerate_kind

Row = dict[str, Any]
Alike = dict[tuple[Any, ...], tuple[Any, ...]]


@dataclass
class RunTables:
    """One study: per arm (recipe order) and seed, what evaluation and training left behind.

    arms: those that stand side by side. runs, logs, matches: also of arms that are only points of a curve of cost.
    """

    path: Path
    arms: list[str]
    seeds: list[int]
    runs: dict[str, dict[int, SeedRun]] = field(default_factory=dict)
    logs: dict[str, dict[int, list[Row]]] = field(default_factory=dict)
    matches: dict[str, dict[int, Row]] = field(default_factory=dict)
    latents: dict[str, dict[int, Row]] = field(default_factory=dict)  # where a study has latent arms
    teachers: dict[str, Row] = field(default_factory=dict)
    models: dict[str, Row] = field(default_factory=dict)  # teachers by name, the student as "": what they are
    tokenizers: dict[str, Row] = field(default_factory=dict)  # manifests of teachers that read texts of their own
    layers: dict[str, Row] = field(default_factory=dict)  # by teacher: similarity [student layer][teacher layer], map
    samples: dict[str, dict[str, Record]] = field(default_factory=dict)  # arm -> task -> first answer of its first seed
    manifest: Row = field(default_factory=dict)
    validation: Row = field(default_factory=dict)
    leaks_of_seeds: int = 0  # in training problems that each seed has of its own
    provenance: Row = field(default_factory=dict)
    missing: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        return sorted(
            {task for runs in self.runs.values() for run in runs.values() for task in run.by_task("accuracy")}
        )

    def seed_folder(self, arm: str, seed: int) -> Path:
        return self.path / "arms" / arm / f"seed-{seed}"


def collect_tables(recipe: Recipe, run: Path) -> RunTables:
    """All tables of a run folder. Raises RunFolderError if no run has records, or a file is damaged."""
    compared = {arm for pair in family_of(recipe).pairs for arm in pair}
    shown = [arm for arm in recipe.every_arm if arm in recipe.arms or arm in compared]
    tables = RunTables(run, shown, list(recipe.seeds))
    unmarked = _collect_runs(recipe, tables)
    price(recipe, tables)
    tables.notes += budget_notes(tables)
    if not any(tables.runs.values()):
        raise RunFolderError("no run has been evaluated", place=str(run / "arms"), fix="train and evaluate first")
    _collect_models(recipe, run, tables)
    tables.notes += _layer_notes(recipe, run)
    manifest = run / "data" / "manifest.json"
    tables.manifest = read_sealed(manifest, fix="run `kvdistill prepare` again") if manifest.is_file() else {}
    validation = run / "data" / "validation_report.json"
    tables.validation = read_sealed(validation, fix="run `kvdistill validate`") if validation.is_file() else {}
    if recipe.varies_data:
        _collect_data_of_seeds(recipe, run, tables)
    tables.provenance = _read_object(run / "provenance.json")
    if unmarked:
        tables.notes.append(
            "Not counted, since no mark vouches for these records: " + ", ".join(unmarked) + ". Run the study again."
        )
    if tables.missing:
        tables.notes.append(
            "Not evaluated yet: " + ", ".join(f"{arm} seed {seed}" for arm, seed in tables.missing) + "."
        )
    known = {*tables.runs, *trials_of(recipe)}
    strays = sorted(p.name for p in (run / "arms").iterdir() if p.is_dir() and p.name not in known)
    if strays:
        tables.notes.append("In the folder but not in the recipe, and left out: " + ", ".join(strays) + ".")
    return tables


def _collect_runs(recipe: Recipe, tables: RunTables) -> list[str]:
    """Records, logs and matches of all arms and seeds, held against their marks. Returns in words which records nobody
    vouches for: these count as missing."""
    now, unmarked = asked_hash(recipe), list[str]()
    alike: Alike = {}
    for arm in recipe.every_arm:
        tables.runs[arm], tables.logs[arm], tables.matches[arm], tables.latents[arm] = {}, {}, {}, {}
        for seed in tables.seeds:
            folder = tables.seed_folder(arm, seed)
            marks = {"train": trained_mark(folder), "evaluate": evaluated_mark(folder)}
            for verb, mark in marks.items():
                fix = f"delete {mark} and {verb} again"
                check_marked(mark, fix=fix)
                said = read_mark(mark)
                if mark.exists() and said is None:
                    raise RunFolderError("this mark is damaged", place=str(mark), fix=fix)
                if said is not None and verb == "evaluate" and said.get("asked", now) != now:
                    what = "these answers are to another `evaluate` section than the recipe's"
                    raise RunFolderError(what, place=str(mark), fix="run `kvdistill evaluate RECIPE`, or set it back")
            if rows := read_log(folder / "log.jsonl"):
                tables.logs[arm][seed] = rows
            unvouched = [mark.name for mark in marks.values() if not mark.exists()]
            if marks["train"].exists() and (match := _read_object(folder / "match.json")):
                tables.matches[arm][seed] = match
            if not unvouched:
                records = run_records(folder, arm, seed)
                tables.runs[arm][seed] = as_run(records, folder, alike)
                if LATENTS in (read_mark(marks["evaluate"]) or {"files": ()})["files"]:
                    tables.latents[arm][seed] = _read_object(folder / LATENTS)
                if arm not in tables.samples:
                    tables.samples[arm] = {one.task: one for one in reversed(records)}
                continue
            tables.missing.append((arm, seed))
            if (folder / "records.jsonl").is_file():
                unmarked.append(f"{arm} seed {seed} (no {' and no '.join(unvouched)})")
    return unmarked


def _collect_models(recipe: Recipe, run: Path, tables: RunTables) -> None:
    """What is noted of teachers and student: sizes, accuracies, layers, tokenizers."""
    for teacher in recipe.teachers:
        folders = {teacher.name: teacher_folder(run, teacher.name)}
        if recipe.varies_teachers and teacher.scratch is not None:
            own = {seed: teacher_folder(replicate_folder(run, seed), teacher.name) for seed in recipe.seeds}
            folders = {f"{teacher.name}, seed {seed}": folder for seed, folder in own.items()}
        for name, folder in folders.items():
            check_marked(trained_mark(folder), fix=f"delete {folder} and teach it again")
            if trained_mark(folder).exists() and (found := _read_object(folder / "report.json")):
                tables.teachers[name] = found
    # where seeds have data or teachers of their own, the first seed's are looked at
    varies = recipe.varies_data or recipe.varies_teachers
    place = replicate_folder(run, recipe.seeds[0]) if varies else run
    tables.models = read_models(recipe, run, place if recipe.varies_teachers else run)
    tables.layers = _read_layers(recipe, place)
    for teacher in recipe.teachers:
        for where in (run, place):
            if found := _read_object(teacher_texts_folder(where, teacher.name) / "manifest.json"):
                tables.tokenizers[teacher.name] = found


def _read_layers(recipe: Recipe, run: Path) -> dict[str, Row]:
    """By teacher what `map-layers` measured, of what the recipe compares layers by."""
    found, kind = {}, recipe.align.cka_on
    for teacher in recipe.teachers:
        measured = _read_object(layers_folder(run) / f"{teacher.name}.json")
        if similarity := (measured.get("similarity") or {}).get(kind):
            layer_map = (measured.get("layer_map") or {}).get(kind) or {}
            found[teacher.name] = {"similarity": similarity, "map": layer_map, "kind": kind}
    return found


def _collect_data_of_seeds(recipe: Recipe, run: Path, tables: RunTables) -> None:
    """Leaks in any seed's training problems, and how many of these two seeds have in common."""
    drawn: list[set[str]] = []
    for seed in recipe.seeds:
        folder = data_folder(replicate_folder(run, seed))
        if not (folder / "manifest.json").is_file():
            continue
        manifest = read_sealed(folder / "manifest.json", fix="run `kvdistill prepare` again")
        tables.leaks_of_seeds += int(manifest.get("num_leaks") or 0)
        drawn.append({row["doc_hash"] for row in pq_rows(folder / "train.parquet", "doc_hash")})
    shares = [len(a & b) / max(1, min(len(a), len(b))) for i, a in enumerate(drawn) for b in drawn[:i]]
    if shares:
        common = 100 * sum(shares) / len(shares)
        tables.notes.append(
            f"Each seed drew its own training problems; two seeds have {common:.0f} % of them in common."
        )


def pq_rows(path: Path, *columns: str) -> list[Row]:
    """These columns of a table, row by row."""
    import pyarrow.parquet as pq

    rows: list[Row] = pq.ParquetFile(path).read(columns=list(columns)).to_pylist()
    return rows


def price(recipe: Recipe, tables: RunTables) -> None:
    """What each run spent, with what it shares with others whole and divided among all runs that are there."""
    shared = {}
    for arm, runs in tables.runs.items():
        for seed, run in runs.items():
            known = run.ledger.get("shared")
            if known is None and recipe.capture.source == "store":  # a ledger of before 0.2
                names = (run.ledger.get("flops") or {}).get("teachers") or {}
                known = {"teachers": {name: name for name, flops in names.items() if flops}}
            shared[arm, seed] = known or {}
    sharers = count_sharers(shared.values())
    for arm, runs in tables.runs.items():
        for seed, run in runs.items():
            ledger, flops = run.ledger, run.ledger.get("flops") or {}
            costs = {name: ledger.get(key) for name, key in _COUNTS.items()}
            if flops:
                costs |= {"student_flops": student_flops(flops), "total_flops": total_flops(flops)}
                costs["amortised_flops"] = total_flops(flops, shared[arm, seed], sharers)
            known_costs = {name: float(cost) for name, cost in costs.items() if cost is not None}
            runs[seed] = replace(run, costs=known_costs)


def budget_notes(tables: RunTables) -> list[str]:
    """Where runs spent something else than was planned before training."""
    planned, notes = read_budgets(tables.path), []
    for arm, runs in tables.runs.items():
        of_seeds: dict[str, list[int]] = {}
        for seed, run in runs.items():
            if found := differences(planned.get(arm, {}), run.costs):
                of_seeds.setdefault("; ".join(found), []).append(seed)
        notes += [f"{arm} seed {', '.join(map(str, seeds))}: {said}." for said, seeds in of_seeds.items()]
    return notes


_COUNTS = {
    "steps": "optimiser_steps",
    "data": "problems_seen",
    "distinct": "problems_distinct",
    "tokens": "tokens_nonpadding",
}


def _layer_notes(recipe: Recipe, run: Path) -> list[str]:
    """What speaks against the layer maps that arms read by similarity."""
    kinds: dict[str, set[str]] = {}  # teacher -> what its layers are compared by
    for spec in recipe.arms.values():
        changes: Row = spec.get("align") or {}
        if changes.get("layers", recipe.align.layers) == "cka":
            names = spec.get("teachers")
            for name in [one.name for one in recipe.teachers] if names is None else names:
                kinds.setdefault(name, set()).add(changes.get("cka_on", recipe.align.cka_on))
    notes = []
    varies = recipe.varies_data or recipe.varies_teachers  # then the first seed's are looked at
    place = replicate_folder(run, recipe.seeds[0]) if varies else run
    for name, on in kinds.items():
        found = _read_object(layers_folder(place) / f"{name}.json").get("notes") or {}
        notes += [f"Layers of {name} by CKA of {kind}: {note}." for kind in sorted(on) for note in found.get(kind, ())]
    return notes


def read_log(path: Path) -> list[Row]:
    """Rows of a log.jsonl by step; after a resume the later row of a step counts. [] if there is no file.

    A last line cut short by a kill is left out.
    """
    rows: dict[tuple[int, bool], Row] = {}
    for row in read_json_lines(path) if path.is_file() else ():
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise RunFolderError("a logged row needs an integer `step`", place=str(path), fix="run this seed again")
        rows[row["step"], "val" in row] = row
    return [rows[key] for key in sorted(rows)]


def _read_object(path: Path) -> Row:
    if not path.is_file():
        return {}
    fix = "run the stage that writes it again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"not JSON ({error})", place=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise RunFolderError("should be a JSON object", place=str(path), fix=fix)
    return value


def run_records(folder: Path, arm: str, seed: int) -> list[Record]:
    """Records of one run, sorted by (task, id, style): of this run alone, and each question once."""
    path, found = folder / "records.jsonl", dict[tuple[str, str, str], Record]()
    for record in read_records(path):
        what = None
        if (record.arm or arm, seed if record.seed is None else record.seed) != (arm, seed):
            what = f"a record of arm {record.arm!r} seed {record.seed!r} in the folder of {arm!r} seed {seed}"
        elif record.question in found:
            what = f"question {record.question} is recorded twice"
        if what is not None:
            raise RunFolderError(what, place=str(path), fix="evaluate again")
        found[record.question] = record
    return [found[key] for key in sorted(found)]


def _once(alike: Alike, column: tuple[Any, ...]) -> tuple[Any, ...]:
    return alike.setdefault(column, column)


def as_run(records: list[Record], folder: Path, alike: Alike) -> SeedRun:
    """One run's records as columns, with the ledger that lies beside them.

    alike: questions and hashes of earlier runs, so that runs with the same ones hold them once.
    """
    if not records:
        raise RunFolderError("no records in it", place=str(folder / "records.jsonl"), fix="evaluate again")
    return SeedRun(
        keys=_once(alike, tuple(one.question for one in records)),
        doc_hashes=_once(alike, tuple(one.doc_hash for one in records)),
        prompt_hashes=_once(alike, tuple(one.prompt_hash for one in records)),
        correct_Q=np.array([one.score for one in records], dtype=np.float64),  # a score may be a share
        nll_Q=np.array([one.nll for one in records], dtype=np.float64),  # None: NaN
        tokens_out_Q=np.array([one.tokens_out for one in records], dtype=np.float64),
        ledger=_read_object(folder / "ledger.json"),
        nll_reasoning_Q=np.array([one.nll_reasoning for one in records], dtype=np.float64),
        degenerate_Q=np.array([degenerate_kind(one) for one in records], dtype=np.int8),
    )


def read_questions(run: Path) -> dict[tuple[str, str, str], Row]:
    """(task, id, style) -> prompt, reasoning and answer of the test split; {} if the prepared data are not there."""
    path = run / "data" / "test.parquet"
    if not path.is_file():
        return {}
    parts = ("prompt", "reasoning", "answer")
    rows = pq_rows(path, "task", "id", "style", *parts)
    return {(r["task"], r["id"], str(r["style"] or "")): {part: r[part] or "" for part in parts} for r in rows}


def write_json(path: Path, value: Any) -> None:
    """JSON with NaN and infinities as null: who needs the reason finds it in the neighbouring `reasons`."""
    text = json.dumps(finite(value), indent=1, allow_nan=False)  # ASCII: safe for any reader's encoding
    write_text(path, text + "\n")
