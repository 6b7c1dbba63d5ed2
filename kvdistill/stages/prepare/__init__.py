"""The stage `prepare`: sources in; tokenizer, encoded splits, leak report and manifest out. And `validate`, its check.

    check.py     what is learned from against what is held out
    encoding.py  problems to encoded examples, in chunks
    teacher_texts.py  the same problems as teachers with their own tokenizer or chains read them

Everything that can be wrong with the data is found before the first file is written. The manifest comes last, so a
run folder with one is finished; the same data section then returns at once, another one is refused.
Knows no weights and no arm: one split serves all arms and seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError, RunFolderError
from kvdistill.core.files import read_json, replacing_folder, sha256_file, sha256_of, write_json
from kvdistill.core.layout import data_folder, tokenizer_folder
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import DataRecipe, Recipe
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import SPLITS
from kvdistill.data.splits import Splits, load_splits, refuse_empty
from kvdistill.data.tables import MANIFEST, check_file, read_split, split_path
from kvdistill.data.tokenizers import fingerprint_tokenizer
from kvdistill.stages.prepare.check import (
    checked_splits,
    count_leaks,
    drop_leaks,
    find_split_leaks,
    report_as_dict,
    require_checked,
)
from kvdistill.stages.prepare.encoding import Encoded, encode_splits, make_tokenizer
from kvdistill.stages.prepare.teacher_texts import prepare_teacher_texts

_FORMAT = 2
REPORT = "validation_report.json"


def prepare(recipe: Recipe, run: Path, progress: Progress | None = None) -> None:
    """Write `run/tokenizer` and `run/data` for the recipe's data section, or return at once where they are there.

    Then, for each teacher with a tokenizer or chains of its own, what it reads (`teacher_texts.py`).
    Raises DataError (source, row, split, leak, tokenizer) before anything is written, RunFolderError where the folder
    was prepared for another data section.
    """
    run, progress = Path(run), progress or silent
    if not _is_finished(recipe.data, run):
        _prepare_data(recipe, run, progress)
    prepare_teacher_texts(recipe, run, progress)


def _prepare_data(recipe: Recipe, run: Path, progress: Progress) -> None:
    data = recipe.data
    splits, report, dropped = checked_splits(recipe, progress, beside=run)
    tokenizer, id_map = make_tokenizer(data, splits)
    existing = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    encoded = encode_splits(splits, data, tokenizer, beside=existing, progress=progress)
    counts = _count(splits, encoded, dropped)
    for task, per_split in counts.items():
        _refuse_all_too_long(task, per_split, data.max_length)
    _save_tokenizer(run, tokenizer, id_map)
    fingerprints = {split: encoded.tables[split].fingerprint() for split in SPLITS}
    found = report_as_dict(report, dropped, data.leaks, num_left=len(report.leaks) if data.leaks == "allow" else 0)
    manifest = {
        "format": _FORMAT,
        "section": _section(data),
        "fingerprint": {"all": sha256_of(fingerprints), **fingerprints},
        "tokenizer": _describe_tokenizer(data, tokenizer, id_map, encoded),
        "tasks": counts,
        "table": {task: {style: dict(n) for style, n in styles.items()} for task, styles in encoded.rows.items()},
        "duplicates_dropped": splits.duplicates,
        "num_leaks": found["num_leaks"],
        "max_tokens": max(table.max_tokens for table in encoded.tables.values()),
        "sources": [asdict(source) for source in splits.sources],
        "files": {split_path(run, split).name: encoded.tables[split].keep(split_path(run, split)) for split in SPLITS},
    }
    write_json(data_folder(run) / REPORT, found)
    write_json(data_folder(run) / MANIFEST, manifest)


def validate(recipe: Recipe, run: Path, progress: Progress | None = None, *, fix: bool = False) -> dict[str, Any]:
    """Hold what is learned from against what is held out, anew from the sources; the report, which is also written.

    Where the run is prepared, its tables are held against the sources too, and what counts is whether a leak is in
    them. fix: leaks are taken out of training (as `data.leaks: drop` does) and the data is prepared without them.
    `num_leaks` of the report are those that stay.
    """
    run, progress = Path(run), progress or silent
    if fix:
        return _fix(recipe, run, progress)
    data = recipe.data
    finished = _is_finished(data, run)
    splits = load_splits(data, progress, beside=run)
    leaks = find_split_leaks(recipe, splits, progress)
    if data.leaks != "allow":
        require_checked(splits, leaks)
    if finished:
        tables = _hold_tables(splits, run)
        staying = [leak for leak in leaks.leaks if question_hash(leak.question) in tables[leak.first.split]]
        dropped = count_leaks(splits, leaks, without=tables)
    else:
        dropped = drop_leaks(splits, leaks) if data.leaks == "drop" else {}
        staying = [] if data.leaks == "drop" else leaks.leaks
    found = report_as_dict(leaks, dropped, data.leaks, num_left=len(staying))
    write_json(data_folder(run) / REPORT, found)
    return found


def _fix(recipe: Recipe, run: Path, progress: Progress) -> dict[str, Any]:
    manifest = data_folder(run) / MANIFEST
    if manifest.is_file() and read_json(manifest).get("num_leaks"):
        used = [name for name in ("teachers", "store", "fit", "arms") if (run / name).exists()]
        if used:
            raise RunFolderError(
                f"models were already trained on this data ({', '.join(used)} are there)",
                place=str(run),
                fix="give another run_dir: what was learned from leaked problems cannot be taken back",
            )
        manifest.unlink()
    prepare(recipe.model_copy(update={"data": recipe.data.model_copy(update={"leaks": "drop"})}), run, progress)
    return read_json(data_folder(run) / REPORT)


def _hold_tables(splits: Splits, run: Path) -> dict[str, set[str]]:
    """Split -> hashes of the questions in its prepared table.

    RunFolderError where a table holds a problem that the sources do not put into that split.
    """
    tables: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        there = {question_hash(problem.question) for problem in splits.problems[split]}
        for example in read_split(run, split):
            tables[split].add(example.doc_hash)
            if example.doc_hash not in there:
                raise RunFolderError(
                    f"{example.task} / {example.id} stands in the prepared {split} table, and the sources do not put "
                    "it there",
                    place=str(split_path(run, split)),
                    fix="delete the run's data/ folder and run `kvdistill prepare` again",
                )
    return tables


def _section(data: DataRecipe) -> dict[str, Any]:
    """The data section as the manifest keeps it, without what does not change what it says: where a copy lies, and what
    to do about leaks (the manifest has how many there are)."""
    return data.model_dump(mode="json", exclude={"root", "leaks"})


def _is_finished(data: DataRecipe, run: Path) -> bool:
    path = data_folder(run) / MANIFEST
    if not path.is_file():
        return False
    manifest = read_json(path)
    ours, theirs = _section(data), manifest.get("section", {})
    if manifest.get("format") != _FORMAT or ours != theirs:
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        named = ", ".join(f"data.{key}" for key in differing) or "the manifest's format"
        raise RunFolderError(
            f"this run folder was prepared for another data section ({named} differ)",
            place=str(path),
            fix="give the recipe another run_dir or name, or set the data section back",
        )
    if manifest["num_leaks"] and data.leaks != "allow":
        raise RunFolderError(
            f"this run folder was prepared with {manifest['num_leaks']} leaks (data.leaks=allow)",
            place=str(path),
            fix="`kvdistill validate RECIPE --fix` takes them out, or give the recipe another run_dir",
        )
    for name, sha256 in manifest["files"].items():
        check_file(path.with_name(name), sha256)
    if not (tokenizer_folder(run) / "tokenizer.json").is_file():
        raise RunFolderError(
            "the tokenizer is missing",
            place=str(tokenizer_folder(run)),
            fix="delete data/ and run `kvdistill prepare` again",
        )
    _check_sources(data, manifest["sources"], path)
    return True


def _check_sources(data: DataRecipe, sources: Sequence[dict[str, str]], manifest: Path) -> None:
    """Source files that are still there must be those the run was made from; the run does not need them otherwise."""
    own_files = {task.file for task in data.tasks if task.file}
    for source in sources:
        if source["kind"] != "file":
            continue
        folder = Path() if source["place"] in own_files else Path(data.root or "").expanduser()
        path = folder / Path(source["place"]).expanduser()
        if (data.root or source["place"] in own_files) and path.is_file() and sha256_file(path) != source["sha256"]:
            raise RunFolderError(
                f"{path} has changed since this run folder was prepared from it",
                place=str(manifest),
                fix="give the recipe another run_dir, or put the file back",
            )


def _count(
    splits: Splits, encoded: Encoded, dropped: dict[str, dict[str, int]]
) -> dict[str, dict[str, dict[str, int]]]:
    """task -> split -> asked, problems, rows, too_long, dropped (as leaks)."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for task, asked in splits.asked.items():
        counts[task] = {}
        for split in SPLITS:
            rows = sum(styles[split] for styles in encoded.rows.get(task, {}).values())
            counts[task][split] = {
                "asked": asked[split],
                "problems": encoded.problems.get(task, Counter())[split],
                "rows": rows,
                "too_long": encoded.too_long.get(task, Counter())[split],
                "dropped": dropped.get(split, {}).get(task, 0),
            }
    return counts


def _refuse_all_too_long(task: str, counts: dict[str, dict[str, int]], max_length: int) -> None:
    for split, count in counts.items():
        if count["problems"] == 0 and count["too_long"]:
            raise DataError(
                f"all {count['too_long']} problems of split {split} of task {task} are longer than {max_length} tokens",
                place="data.max_length",
                fix="raise data.max_length",
            )
    refuse_empty({s: c["problems"] for s, c in counts.items()}, {s: c["asked"] for s, c in counts.items()}, task)


def _save_tokenizer(run: Path, tokenizer: PreTrainedTokenizerFast, id_map: dict[int, int] | None) -> None:
    with replacing_folder(tokenizer_folder(run)) as folder:
        tokenizer.save_pretrained(str(folder))
        if id_map is not None:
            write_json(folder / "id_map.json", id_map)


def _describe_tokenizer(
    data: DataRecipe, tokenizer: PreTrainedTokenizerFast, id_map: dict[int, int] | None, encoded: Encoded
) -> dict[str, Any]:
    return {
        "name": data.tokenizer,
        "fingerprint": fingerprint_tokenizer(tokenizer),
        "size": len(tokenizer),
        "trimmed": id_map is not None,
        "unknown_tokens": {split: encoded.unknown[split] for split in SPLITS},
    }
