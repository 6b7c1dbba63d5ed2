"""The folder of an evaluation: whose answers are in it, the records, appended chunk by chunk, and the scores.

    identity.json   the model, and per evaluation its options, versions and how far it was asked
    records.jsonl   one line a question
    results.json    scores, written from the records when everything asked for is answered

A kill leaves whole lines and perhaps a torn one, which is dropped. What was asked otherwise, or of another model, is
refused by name. Scores are plain means over questions: an evaluation of many members (BBH, CMMLU, C-Eval) is the mean
over all its questions, as lm-eval weighs them; TruthfulQA is reported as MC2, the figure that leaderboards show, with
MC1 beside it. The macro average gives every finished evaluation the same weight. Knows no question and no model.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import read_json, sha256_file, sha256_of, write_json
from kvdistill.core.layout import folder_lock, refuse_foreign
from kvdistill.core.leftovers import sweep_temporary
from kvdistill.core.quoting import first_difference
from kvdistill.core.records import Record, read_records, write_records
from kvdistill.data.tokenizers import fingerprint_tokenizer
from kvdistill.stages.evaluate.exams import AbstractExam, SuiteOptions

IDENTITY, RECORDS, RESULTS = "identity.json", "records.jsonl", "results.json"
HEADLINES = ("math_verify,none",)  # lm-eval's figure to show beside ours where it is not the definition's first
SCORED_BY = {"truthfulqa": "truthfulqa_mc2"}  # the member whose score is the evaluation's; else all its questions
_FORMAT = 1


def identify(model: str, config: Any, tokenizer: Any, dtype: str, *, begins_with_bos: bool) -> dict[str, Any]:
    """What identifies a model in the folder of its answers, without a path.

    Checksums of a folder's weights and config, or hub id and commit; the tokenizer's pieces, rules, roles and chat
    template (which a fingerprint of the pieces leaves out); the dtype; how prompts begin.
    """
    folder = Path(model)
    weights: dict[str, Any] = {"hub": model, "revision": getattr(config, "_commit_hash", None)}
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
        weights = {"sha256": sha256_of({file.name: sha256_file(file) for file in files})}
    pieces = (
        fingerprint_tokenizer(tokenizer)
        if tokenizer.is_fast
        else sha256_of([tokenizer.get_vocab(), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])
    )
    return {
        "model": weights,
        "tokenizer": sha256_of([pieces, tokenizer.chat_template]),
        "dtype": dtype,
        "begins_with_bos": begins_with_bos,
    }


class AnswerBook:
    """The records of one model in one folder. `answered`: key -> record, in the order they were written.

    asked: what identifies the model. evaluations: name -> {options, limits, and of its last call: limit, members,
    questions, notes}.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.asked, self.evaluations = folder, identity["asked"], identity["evaluations"]
        self.answered: dict[tuple[str, str, str, str], Record] = {}
        path = folder / RECORDS
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # what follows the last line end: a kill while appending
                os.truncate(path, whole)
            self.answered = {record.key: record for record in read_records(path)}

    def limits(self, evaluation: str) -> list[int | None]:
        """Up to where it was ever asked, rising, as far as the last call goes. None: all questions."""
        entry = self.evaluations[evaluation]
        return entry["limits"][: entry["limits"].index(entry["limit"]) + 1]

    def rows(self, evaluation: str) -> list[Record]:
        """The records of what its last call asked for."""
        entry = self.evaluations[evaluation]
        members, limit = {*entry["members"]}, entry["limit"]
        return [
            one
            for one in self.answered.values()
            if one.evaluation == evaluation
            and one.task in members
            and (limit is None or one.number is None or one.number < limit)
        ]

    def append(self, records: Sequence[Record]) -> None:
        """Records at the end of the file, on the disk when this returns."""
        write_records(self.folder / RECORDS, records, append=True)
        self.answered |= {record.key: record for record in records}


@contextmanager
def open_book(
    folder: Path, asker: Mapping[str, Any], exams: Mapping[str, Sequence[AbstractExam]], options: SuiteOptions
) -> Iterator[AnswerBook]:
    """The folder's records, after checking that they answer the same questions, asked alike, of the same model.

    asker: what identifies the model. exams: evaluation -> its members.
    Raises RunFolderError that names what differs, before anything is written.
    """
    check_folder(exams, options, folder, asker)
    with folder_lock(folder, wait=False):
        sweep_temporary(folder)
        identity, limit = check_folder(exams, options, folder, asker), options.limit
        for name, members in exams.items():
            entry = identity["evaluations"][name]
            limits = {*entry["limits"], limit}
            entry["limits"] = [*sorted(one for one in limits if one is not None), *([None] if None in limits else [])]
            entry["limit"] = limit
            entry["members"] = [exam.name for exam in members]
            entry["questions"] = sum(len(exam) if limit is None else min(limit, len(exam)) for exam in members)
            entry["notes"] = sorted({exam.note for exam in members if exam.note})
        if not (folder / IDENTITY).exists() or read_json(folder / IDENTITY) != identity:
            write_json(folder / IDENTITY, identity)
        yield AnswerBook(folder, identity)


def check_folder(
    exams: Mapping[str, Sequence[AbstractExam]], options: SuiteOptions, folder: Path, asker: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity that the folder will have. RunFolderError, which names the key, where it answers something else."""
    prompts = {"choice": options.choice, "chat": options.chat, "system_prompt": options.system_prompt}
    identity: dict[str, Any] = {"format": _FORMAT, "asked": _plain(asker), "evaluations": {}}
    if (folder / IDENTITY).exists():
        identity = read_json(folder / IDENTITY)
        _refuse_difference(folder, "model", identity.get("asked"), _plain(asker))
    else:
        refuse_foreign(folder, IDENTITY, fix="give an empty or new folder with --out")
    for name, members in exams.items():
        now = _plain({**prompts, "members": {exam.name: exam.identity() for exam in members}})
        there = identity["evaluations"].setdefault(name, {"options": now, "limits": []})
        _refuse_difference(folder, name, there["options"], now)
        there["options"] = {**now, "members": {**there["options"]["members"], **now["members"]}}
    return identity


def _refuse_difference(folder: Path, where: str, there: Any, now: Any) -> None:
    # a member that only one of the two has (a file more, or less, below data.root) is asked or left as it is
    if found := first_difference(there, now, where, length=70):
        raise RunFolderError(
            f"this folder holds answers to something else: {found}",
            place=str(folder),
            fix="give another folder with --out, or delete this one to start over",
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


# -- scores -------------------------------------------------------------------------------------------


def summarise_book(book: AnswerBook) -> dict[str, Any]:
    """{asked, evaluations: name -> figures, macro_average, in_macro_average}; figures that are unknown are None."""
    evaluations: dict[str, Any] = {}
    for name, entry in book.evaluations.items():
        rows, scored_by = book.rows(name), SCORED_BY.get(name)
        by_member = {member: [row for row in rows if row.task == member] for member in entry["members"]}
        scored = by_member.get(scored_by, []) if scored_by else rows
        evaluations[name] = {
            **(figures(scored) if scored else {"questions": 0, "score": None, "stderr": None}),
            "complete": len(rows) == entry["questions"] > 0,
            "asked_questions": entry["questions"],
            "limit": entry["limit"],
            **({"scored_by": scored_by} if scored_by else {}),
            "notes": entry["notes"],
            "members": {member: figures(found) for member, found in by_member.items() if found},
        }
    finished = {name: found["score"] for name, found in evaluations.items() if found["complete"]}
    return {
        "asked": book.asked,
        "evaluations": evaluations,
        "macro_average": statistics.fmean(finished.values()) if finished else None,
        "in_macro_average": list(finished),
    }


def figures(rows: Sequence[Record]) -> dict[str, Any]:
    """Score, standard error and cost of some records (at least one).

    stderr: standard deviation (n - 1) / sqrt(n), lm-eval's; None for one question. Tokens, passes and seconds are means
    per answer; truncated is a share of questions, unspelled of the prompts' characters.
    """
    scores = [float(row.score) for row in rows]
    metrics = [*dict.fromkeys(name for row in rows for name in row.metrics)]
    costs = ("tokens_in", "tokens_out", "forward_passes", "seconds", "truncated", "unspelled")
    return {
        "questions": len(rows),
        "score": statistics.fmean(scores),
        "stderr": statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        "mode": "/".join(sorted({row.mode for row in rows})),
        "style": "/".join(sorted({row.style for row in rows})),
        "no_answer": sum(row.prediction is None for row in rows) / len(rows),
        **{key: _mean([getattr(row, key) for row in rows]) for key in costs},
        "metric": next((name for name in HEADLINES if name in metrics), metrics[0] if metrics else None),
        "metrics": {name: _mean([row.metrics.get(name) for row in rows]) for name in metrics},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.fmean(known) if known else None
