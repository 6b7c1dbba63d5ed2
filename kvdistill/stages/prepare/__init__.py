"""The stage `prepare`: sources in; tokenizer, encoded splits, leak report and manifest out. And `validate`, its check.

    check.py          what is learned from against what is held out
    lengths.py        which problems are too long, and what takes their place
    teacher_texts.py  the same problems as teachers with their own tokenizer or chains read them
    export.py         the prepared splits in the forms other trainers read

Everything that can be wrong with the data is found before the first file is written. Problems are encoded in chunks,
into files without names, so memory holds one chunk. The manifest comes last, so a run folder with one is finished; the
same data section then returns at once, another one is refused.
Knows no weights and no arm: one split serves all arms, and all seeds unless the recipe has each draw what it learns
from (`replicate`). Then a seed's data stands in a folder of its own, with the run's tokenizer and held-out problems.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from kvdistill.arms.texts import load_tokenizer_of
from kvdistill.core.config import replicate_recipe
from kvdistill.core.errors import DataError, RunFolderError
from kvdistill.core.files import replacing_folder, sha256_file, sha256_of, write_json
from kvdistill.core.layout import data_folder, replicate_folder, tokenizer_folder
from kvdistill.core.marks import read_sealed, sealed
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import DataRecipe, Recipe
from kvdistill.data.encode import encode_rows, texts_of
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import SPLITS, Row, styles_of
from kvdistill.data.splits import Splits, refuse_empty
from kvdistill.data.tables import MANIFEST, SplitWriter, check_file, read_manifest, read_split, split_path
from kvdistill.data.tokenizers import CHARACTERS, fingerprint_tokenizer, load_tokenizer, require_covered, trim_tokenizer
from kvdistill.stages.prepare.check import (
    check_splits,
    count_leaks,
    drop_leaks,
    find_split_leaks,
    report_as_dict,
    require_checked,
)
from kvdistill.stages.prepare.lengths import fits, fitted_splits, plain_tokenizer, write_rows
from kvdistill.stages.prepare.teacher_texts import check_teachers_templates, prepare_teacher_texts

_FORMAT = 2
_CHUNK = 1000  # problems
REPORT = "validation_report.json"


def prepare(recipe: Recipe, run: Path, progress: Progress | None = None, *, seed: int | None = None) -> None:
    """Write `run/tokenizer` and `run/data` for the recipe's data section, or return at once where they are there.

    Then, for each teacher with a tokenizer or chains of its own, what it reads (`teacher_texts.py`).
    seed: whose training problems are prepared, in its own folder, where they vary; unset: what all seeds share.
    Raises DataError (source, row, split, leak, tokenizer) before anything is written, RunFolderError where the folder
    was prepared for another data section.
    """
    run, progress = Path(run), progress or silent
    mine, folder = replicate_recipe(recipe, seed), run if seed is None else replicate_folder(run, seed)
    try:
        if not _is_finished(mine.data, folder):
            _prepare_data(mine, folder, progress, None if seed is None else run)
        prepare_teacher_texts(mine, folder, progress, shared=None if seed is None else run)
    except DataError as error:
        if seed is None:
            raise
        raise DataError(f"{error.what} (the problems of seed {seed})", place=error.place, fix=error.fix) from error


def _prepare_data(recipe: Recipe, run: Path, progress: Progress, shared: Path | None) -> None:
    """shared: the run folder whose tokenizer and held-out problems these are to have; None: its own."""
    data = recipe.data
    reader = None if data.tokenizer == CHARACTERS and data.template != "chat" else plain_tokenizer(data)
    check_teachers_templates(recipe)  # before the minutes that reading rows may take
    splits = fitted_splits(data, progress, beside=run, tokenizer=None if reader is None else lambda: reader)
    report, dropped = check_splits(recipe, splits, progress)
    if shared is None:
        others = _splits_of_seeds(recipe, run, progress) if recipe.varies_data else []
        tokenizer, id_map = _make_tokenizer(data, [splits, *others], reader)
        trimmed = id_map is not None
    else:
        tokenizer, trimmed = load_tokenizer_of(shared), read_manifest(shared)["tokenizer"]["trimmed"]
        if data.tokenizer == CHARACTERS or trimmed:
            require_covered(tokenizer, reader, _Written(splits, data, reader), "data.tokenizer")
    encoded = _encode(splits, data, tokenizer, run, progress)
    counts = _count(splits, encoded, dropped, data.max_length)
    fingerprints = {split: encoded.tables[split].fingerprint() for split in SPLITS}
    if shared is not None:
        _require_held_out(fingerprints, shared)
    with replacing_folder(tokenizer_folder(run)) as folder:
        if shared is not None:
            shutil.copytree(tokenizer_folder(shared), folder, dirs_exist_ok=True)
        else:
            tokenizer.save_pretrained(str(folder))
            if id_map is not None:
                write_json(folder / "id_map.json", id_map)
    found = report_as_dict(report, dropped, data.leaks, num_left=len(report.leaks) if data.leaks == "allow" else 0)
    manifest = {
        "format": _FORMAT,
        "section": _section(data),
        "fingerprint": {"all": sha256_of(fingerprints), **fingerprints},
        "tokenizer": {
            "name": data.tokenizer,
            "fingerprint": fingerprint_tokenizer(tokenizer),
            "files": {file.name: sha256_file(file) for file in sorted(tokenizer_folder(run).iterdir())},
            "size": len(tokenizer),
            "trimmed": trimmed,
            "unknown_tokens": {split: encoded.unknown[split] for split in SPLITS},
        },
        "tasks": counts,
        "table": {task: {style: dict(n) for style, n in styles.items()} for task, styles in encoded.rows.items()},
        "examples": encoded.examples,
        "noticed": {task: said for task, one in splits.noticed.items() if any((said := one.as_dict()).values())},
        "duplicates_dropped": splits.duplicates,
        "num_leaks": found["num_leaks"],
        "max_tokens": max(table.max_tokens for table in encoded.tables.values()),
        "sources": [asdict(source) for source in splits.sources],
        "files": {split_path(run, split).name: encoded.tables[split].keep(split_path(run, split)) for split in SPLITS},
    }
    write_json(data_folder(run) / REPORT, sealed(found))
    write_json(data_folder(run) / MANIFEST, sealed(manifest))


# -- problems to encoded examples, chunk by chunk ------------------------------------------------------


class _Written:
    """The rows of all splits, written anew each time they are gone through.

    Iterating gives the stretches of text that a tokenizer must be able to write. tokenizer: whose chat template to use,
    where the recipe does; None: plain rows.
    """

    def __init__(self, splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self.splits, self.data, self.tokenizer = splits, data, tokenizer

    def chunks(self, split: str, *, read_back: bool = False) -> Iterator[list[Row]]:
        """Each problem of a split in every style asked for, these side by side.

        read_back: every row is read by its task; DataError where the gold answer does not come out of it.
        """
        for problems in self.splits.problems[split].batches(_CHUNK):
            for row in write_rows(problems, self.splits, self.data, None) if read_back else ():
                task, problem = self.splits.rules[row.problem.task], row.problem
                answer = task.extract(row.reasoning + row.answer)
                if answer is None or not task.same(answer, problem.answer):
                    raise DataError(
                        f"the gold answer {problem.answer!r} reads back as {answer!r}",
                        place=f"{problem.task} / {problem.id}",
                        fix="take the task's answer mark out of the reasoning, or take the row out",
                    )
            yield write_rows(problems, self.splits, self.data, self.tokenizer)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(texts_of(rows) for split in SPLITS for rows in self.chunks(split))


class _All:
    """Texts of several, one after another, as often as they are gone through."""

    def __init__(self, parts: Sequence[Iterable[str]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)


def _make_tokenizer(
    data: DataRecipe, splits: Sequence[Splits], reader: PreTrainedTokenizerFast | None
) -> tuple[PreTrainedTokenizerFast, dict[int, int] | None]:
    """The tokenizer of the data section (reader; None: of single characters, made of the texts);
    trimmed over the texts of all splits, as they will be tokenized.

    Test texts count too: what a pretrained teacher reads must be the pieces it was trained on.
    """
    tokenizer = reader or load_tokenizer(CHARACTERS, texts=_All([_Written(one, data, None) for one in splits]))
    if not data.trim_vocabulary:
        return tokenizer, None
    return trim_tokenizer(tokenizer, _All([_Written(one, data, tokenizer) for one in splits]))


# -- data of one seed ----------------------------------------------------------------------------------


def _splits_of_seeds(recipe: Recipe, run: Path, progress: Progress) -> list[Splits]:
    """The problems of every seed, where the tokenizer is made of texts: one serves them all."""
    if recipe.data.tokenizer != CHARACTERS and not recipe.data.trim_vocabulary:
        return []
    return [fitted_splits(replicate_recipe(recipe, seed).data, progress, beside=run) for seed in recipe.every_seed]


def _require_held_out(fingerprints: Mapping[str, str], shared: Path) -> None:
    """Seeds are compared on the same questions: an assertion, whatever a source does."""
    theirs = read_manifest(shared)["fingerprint"]
    for split in ("val", "test"):
        if fingerprints[split] != theirs[split]:
            raise DataError(
                f"the {split} problems differ from the run's",
                place="data.tasks",
                fix="a source has changed since the run was begun: put it back, or use a new run_dir",
            )


@dataclass
class _Encoded:
    """What was written: a finished table per split, and counts. too_long: task -> split -> problems left out.

    rows: task -> style -> split -> rows. problems: task -> split -> problems. unknown: split -> unknown tokens.
    examples: task -> style -> the first row as it will be read: what is asked, reasoning, answer.
    """

    tables: dict[str, SplitWriter]
    problems: dict[str, Counter[str]] = field(default_factory=dict)
    rows: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    too_long: dict[str, Counter[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)


def _encode(
    splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast, run: Path, progress: Progress
) -> _Encoded:
    """Every split encoded; problems that are too long in any style are left out (`lengths.fits`).

    run: need not exist; the files without names lie on its disk.
    """
    existing = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    encoded = _Encoded({split: SplitWriter(existing) for split in SPLITS})
    unk: Any = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token_id  # GPT-2: one for all
    written, num_styles = _Written(splits, data, tokenizer), len(styles_of(data.style))
    for split in SPLITS:
        done, total = 0, len(splits.problems[split]) * num_styles
        for rows in written.chunks(split, read_back=True):
            examples = encode_rows(tokenizer, rows)
            kept = []
            for start in range(0, len(examples), num_styles):
                problem = examples[start : start + num_styles]
                task = problem[0].task
                if not fits(problem, split, data.max_length):
                    encoded.too_long.setdefault(task, Counter())[split] += 1
                    continue
                encoded.problems.setdefault(task, Counter())[split] += 1
                for row, example in zip(rows[start : start + num_styles], problem, strict=True):
                    encoded.rows.setdefault(task, {}).setdefault(example.style, Counter())[split] += 1
                    shown = {"prompt": row.prompt, "reasoning": row.reasoning, "answer": row.answer + row.closing}
                    encoded.examples.setdefault(task, {}).setdefault(example.style, shown)
                kept += problem
            encoded.tables[split].write(kept)
            if unk is not None:
                encoded.unknown[split] += sum(example.input_ids.count(unk) for example in examples)
            done += len(examples)
            progress(f"encoding {split}", done, total)
    return encoded


def _count(
    splits: Splits, encoded: _Encoded, dropped: dict[str, dict[str, int]], max_length: int
) -> dict[str, dict[str, dict[str, int]]]:
    """task -> split -> asked, problems, rows, too_long, replaced (by as many others, for the same reason), dropped (as
    leaks). DataError for a split that is now empty."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for task, asked in splits.asked.items():
        counts[task] = {}
        for split in SPLITS:
            count = counts[task][split] = {
                "asked": asked[split],
                "problems": encoded.problems.get(task, Counter())[split],
                "rows": sum(styles[split] for styles in encoded.rows.get(task, {}).values()),
                "too_long": encoded.too_long.get(task, Counter())[split],
                "replaced": splits.replaced.get(task, Counter())[split],
                "dropped": dropped.get(split, {}).get(task, 0),
            }
            if count["problems"] == 0 and count["too_long"]:
                what = "prompts" if split == "test" else "problems"
                raise DataError(
                    f"all {count['too_long']} {what} of split {split} of task {task} are longer than {max_length} "
                    "tokens",
                    place="data.max_length",
                    fix="raise data.max_length",
                )
        refuse_empty({split: counts[task][split]["problems"] for split in SPLITS}, asked, task)
    return counts


# -- what is prepared already --------------------------------------------------------------------------


def validate(
    recipe: Recipe, run: Path, progress: Progress | None = None, *, fix: bool = False, seed: int | None = None
) -> dict[str, Any]:
    """Hold what is learned from against what is held out, anew from the sources; the report, which is also written.

    Where the run is prepared, its tables are held against the sources too, and what counts is whether a leak is in
    them. fix: leaks are taken out of training (as `data.leaks: drop` does) and the data is prepared without them.
    `num_leaks` of the report are those that stay.
    """
    study, root, progress = recipe, Path(run), progress or silent
    recipe, run = replicate_recipe(recipe, seed), root if seed is None else replicate_folder(root, seed)
    data = recipe.data
    if fix:
        manifest = data_folder(run) / MANIFEST
        if manifest.is_file() and read_manifest(run).get("num_leaks"):
            made = [folder / name for name in ("teachers", "store", "fit", "arms") for folder in {root, run}]
            used = [folder.name for folder in made if folder.exists()]
            if used:
                raise RunFolderError(
                    f"models were already trained on this data ({', '.join(used)} are there)",
                    place=str(run),
                    fix="give another run_dir: what was learned from leaked problems cannot be taken back",
                )
            manifest.unlink()
        dropping = study.model_copy(update={"data": study.data.model_copy(update={"leaks": "drop"})})
        prepare(dropping, root, progress, seed=seed)
        return read_sealed(data_folder(run) / REPORT, fix="run `kvdistill validate` again")
    finished = _is_finished(data, run)
    splits = fitted_splits(data, progress, beside=run)
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
    write_json(data_folder(run) / REPORT, sealed(found))
    return found


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
    kept = data.model_dump(mode="json", exclude={"root", "leaks"})
    if data.train_seed is None:
        del kept["train_seed"]  # as manifests were before there was the key
    return kept


def _section_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The data section that a manifest keeps, with the keys that came into being since at their defaults."""
    kept: dict[str, Any] = manifest.get("section", {})
    try:
        return _section(DataRecipe.model_validate(kept))
    except ValidationError:  # of another version
        return kept


def _is_finished(data: DataRecipe, run: Path) -> bool:
    path = data_folder(run) / MANIFEST
    if not path.is_file():
        return False
    manifest = read_manifest(run)
    ours, theirs = _section(data), _section_of(manifest)
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
