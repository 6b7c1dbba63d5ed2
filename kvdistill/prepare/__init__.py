"""The stage `prepare`: sources in; tokenizer, encoded splits, leak report and manifest out.

Everything that can be wrong with the data is found before the first file is written. The manifest comes last, so a
run folder with one is finished; the same data section then returns at once, another one is refused.
Knows no model and no arm: one split serves all arms and seeds.
"""

from __future__ import annotations

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
from kvdistill.data.encode import Example, encode_rows
from kvdistill.data.leaks import Leak, find_leaks, refuse_leaks
from kvdistill.data.problems import SPLITS, Row, styles_of
from kvdistill.data.splits import Splits, load_splits, refuse_empty
from kvdistill.data.tables import MANIFEST, check_file, fingerprint_examples, split_path, write_split
from kvdistill.data.tokenizers import CHARACTERS, fingerprint_tokenizer, load_tokenizer, trim_tokenizer

_FORMAT = 1
_ENCODE_CHUNK = 2000
Encoded = dict[str, list[Example]]
Counts = dict[str, dict[str, dict[str, int]]]


def prepare(recipe: Recipe, run: Path, progress: Progress | None = None) -> None:
    """Write `run/tokenizer` and `run/data` for the recipe's data section, or return at once where they are there.

    Raises DataError (source, row, split, leak, tokenizer) before anything is written, RunFolderError where the folder
    was prepared for another data section.
    """
    data, run, progress = recipe.data, Path(run), progress or silent
    if _is_finished(data, run):
        return
    splits = load_splits(data, progress)
    leaks = find_leaks(splits.problems)
    if not data.allow_leaks:
        refuse_leaks(leaks)
    rows = _write_rows(splits, data.style)
    tokenizer, id_map = _make_tokenizer(data, rows)
    encoded = {split: _encode(tokenizer, rows[split], split, progress) for split in SPLITS}
    encoded, too_long = _leave_out_long(encoded, data.max_length)
    counts = _count(splits, encoded, too_long)
    for task, per_split in counts.items():
        _refuse_all_too_long(task, per_split, data.max_length)
    _save_tokenizer(run, tokenizer, id_map)
    files = {split_path(run, split).name: write_split(run, split, encoded[split]) for split in SPLITS}
    write_json(data_folder(run) / "validation_report.json", _validation_report(splits, leaks))
    manifest = {
        "format": _FORMAT,
        "section": _section(data),
        "fingerprint": _fingerprints(encoded),
        "tokenizer": _describe_tokenizer(data, tokenizer, id_map, encoded),
        "tasks": counts,
        "duplicates_dropped": splits.duplicates,
        "max_tokens": max((len(example.input_ids) for split in SPLITS for example in encoded[split]), default=0),
        "sources": [asdict(source) for source in splits.sources],
        "files": files,
    }
    write_json(data_folder(run) / MANIFEST, manifest)


def _section(data: DataRecipe) -> dict[str, Any]:
    """The data section as the manifest keeps it. Without `root`: where a copy lies does not change what it says."""
    return data.model_dump(mode="json", exclude={"root"})


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


def _write_rows(splits: Splits, style: str) -> dict[str, list[Row]]:
    """Every problem in every style asked for; the styles of a problem stand together, in one split.

    Also the check that each task reads its own gold answers back: otherwise no student could ever be right.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for problem in splits.problems[split]:
            rules = splits.rules[problem.task]
            for row in (rules.write(problem, name) for name in styles_of(style)):
                answer = rules.extract(row.completion)
                if answer is None or not rules.same(answer, problem.answer):
                    raise DataError(
                        f"the gold answer {problem.answer!r} reads back as {answer!r}",
                        place=f"{problem.task} / {problem.id}",
                        fix="take the task's answer mark out of the reasoning, or take the row out",
                    )
                rows[split].append(row)
    return rows


def _make_tokenizer(
    data: DataRecipe, rows: dict[str, list[Row]]
) -> tuple[PreTrainedTokenizerFast, dict[int, int] | None]:
    """The tokenizer of the data section; trimmed over the texts of all splits, as they will be tokenized.

    Test texts count too: what a pretrained teacher reads must be the pieces it was trained on.
    """
    texts = [text for split in SPLITS for row in rows[split] for text in (row.prompt, row.completion)]
    tokenizer = load_tokenizer(data.tokenizer, data.root, texts=texts if data.tokenizer == CHARACTERS else ())
    return trim_tokenizer(tokenizer, texts) if data.trim_vocabulary else (tokenizer, None)


def _encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row], split: str, progress: Progress) -> list[Example]:
    examples: list[Example] = []
    for start in range(0, len(rows), _ENCODE_CHUNK):
        examples.extend(encode_rows(tokenizer, rows[start : start + _ENCODE_CHUNK]))
        progress(f"encoding {split}", len(examples), len(rows))
    return examples


def _leave_out_long(encoded: Encoded, max_length: int) -> tuple[Encoded, dict[str, dict[str, int]]]:
    """Without the problems of which any style is longer than `max_length` tokens, and how many of each task."""
    kept: Encoded = {}
    counts: dict[str, dict[str, int]] = {}
    for split, examples in encoded.items():
        long = {(e.task, e.doc_hash) for e in examples if len(e.input_ids) > max_length}
        kept[split] = [e for e in examples if (e.task, e.doc_hash) not in long]
        for task, _ in long:
            counts.setdefault(task, {}).setdefault(split, 0)
            counts[task][split] += 1
    return kept, counts


def _count(
    splits: Splits, encoded: Encoded, too_long: dict[str, dict[str, int]]
) -> dict[str, dict[str, dict[str, int]]]:
    """task -> split -> asked, problems, rows, too_long."""
    counts: Counts = {}
    for task, asked in splits.asked.items():
        counts[task] = {}
        for split in SPLITS:
            own = [example for example in encoded[split] if example.task == task]
            counts[task][split] = {
                "asked": asked[split],
                "problems": len({example.doc_hash for example in own}),
                "rows": len(own),
                "too_long": too_long.get(task, {}).get(split, 0),
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


def _validation_report(splits: Splits, leaks: Sequence[Leak]) -> dict[str, Any]:
    return {
        "method": "exact: SHA-256 of the question with case, whitespace and width of punctuation folded",
        "problems": {split: len(splits.problems[split]) for split in SPLITS},
        "num_leaks": len(leaks),
        "leaks": [leak.as_dict() for leak in leaks],
    }


def _fingerprints(encoded: Encoded) -> dict[str, str]:
    each = {split: fingerprint_examples(encoded[split]) for split in SPLITS}
    return {"all": sha256_of(each), **each}


def _describe_tokenizer(
    data: DataRecipe, tokenizer: PreTrainedTokenizerFast, id_map: dict[int, int] | None, encoded: Encoded
) -> dict[str, Any]:
    unk = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token_id  # GPT-2: one token for all
    return {
        "name": data.tokenizer,
        "fingerprint": fingerprint_tokenizer(tokenizer),
        "size": len(tokenizer),
        "trimmed": id_map is not None,
        "unknown_tokens": {
            split: sum(example.input_ids.count(unk) for example in encoded[split]) if unk is not None else 0
            for split in SPLITS
        },
    }
