"""The record: one question with its answer, one line of a records.jsonl. Made, checked, written and read here alone.

A study's `arms/ARM/seed-N/records.jsonl` and those of `kvdistill evaluate MODEL` hold the same type; `arm` and `seed`
stand in the study's only. Records without `schema` are of version 1: what they lack is filled in.
Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import append_text, write_text

SCHEMA = 2
_FIX = "evaluate again"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was asked, what was answered, what it is worth and what it took. None: not known, or there is none.

    Args:
        evaluation, task: whose question this is: an evaluation (`own`: the run's test split) and its member.
        id, style, number: which question, in which form; its place among the task's questions.
        doc_hash, prompt_hash: of the folded question, the same in every form; of the exact prompt.
        mode: how it was asked (likelihood, generation).
        prediction, completion, gold: the answer that was read, the text it was read from, the published answer.
        correct, score: by our answer rules; the score is 1 or 0 but for probability masses. metrics: lm-eval's own.
        nll: mean nats per token of the published answer (of the right choice). nll_reasoning: of the reasoning that
            stands before it, where there is one; records made before it was kept have none.
        tokens_in, tokens_out, forward_passes: of this question alone. For `own`, tokens_out leaves out the end token.
        truncated: the prompt did not fit into the window. unspelled: share of its characters that the tokenizer lacks.
        seconds: its share of its chunk's time.
    """

    arm: str | None = None
    seed: int | None = None
    evaluation: str
    task: str
    id: str
    number: int | None = None
    style: str
    doc_hash: str | None
    prompt_hash: str | None
    mode: str
    prediction: str | None
    completion: str | None
    gold: str | None
    correct: bool
    score: float
    metrics: dict[str, float | None] = field(default_factory=dict)
    nll: float | None
    nll_reasoning: float | None = None
    tokens_in: int | None
    tokens_out: int | None
    forward_passes: int | None
    truncated: bool | None
    unspelled: float | None
    seconds: float | None
    schema: int = SCHEMA

    def __post_init__(self) -> None:  # JSON has no word for NaN: in memory as it will be read back
        known = self.__dict__
        known["nll"], known["nll_reasoning"] = _finite(self.nll), _finite(self.nll_reasoning)
        if self.metrics:
            known["metrics"] = {name: _finite(value) for name, value in self.metrics.items()}

    @property
    def question(self) -> tuple[str, str, str]:
        return self.task, self.id, self.style

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.evaluation, *self.question


def write_records(path: Path, records: Iterable[Record], *, append: bool = False) -> None:
    """The whole file at once; or more lines at its end, on the disk when this returns."""
    text = ""
    for record in records:
        row = dict(vars(record))
        if record.arm is None:
            del row["arm"], row["seed"]
        text += json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    if append:
        append_text(path, text, flushed=True)
    else:
        write_text(path, text)


def read_records(path: Path) -> list[Record]:
    """All records of a file, in its order. RunFolderError names the line that is not a whole record of ours."""
    records, decode = [], json.JSONDecoder().decode
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decode(line.decode())
        except ValueError as error:
            raise RunFolderError(f"not a JSON line ({error})", place=f"{path}:{number}", fix=_FIX) from error
        if not isinstance(row, dict):
            raise RunFolderError("a line should be a JSON object", place=f"{path}:{number}", fix=_FIX)
        records.append(_checked(row, path, number))
    return records


def _checked(row: dict[str, Any], path: Path, number: int) -> Record:
    """The record of one line. Of version 1 only task, id, and whether the answer is right must be there."""
    schema = row.get("schema", 1)
    if schema not in (1, SCHEMA):
        what = f"a record of schema {schema!r}, and this kvdistill reads up to {SCHEMA}"
        raise RunFolderError(what, place=f"{path}:{number}", fix=f"update kvdistill, or {_FIX}")
    if schema == 1:
        filled: dict[str, Any] = dict.fromkeys(_KINDS)
        filled |= {"evaluation": "own", "style": "", "mode": "generation", "metrics": {}, "score": row.get("correct")}
        row = filled | {key: value for key, value in row.items() if value is not None}
    row = {"arm": None, "seed": None, "nll_reasoning": None, **row, "schema": SCHEMA}
    known = {}
    for name, kinds in _KINDS.items():
        value = known[name] = row.get(name, _MISSING)
        if type(value) not in kinds and not isinstance(value, kinds):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise RunFolderError(f"a record needs `{name}` ({wanted})", place=f"{path}:{number}", fix=_FIX)
    known["score"] = float(known["score"])
    record = object.__new__(Record)  # of a frozen class __init__ sets each field by itself: a third of reading a study
    record.__dict__.update(known)
    record.__post_init__()
    return record


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _kinds(hint: Any) -> tuple[type, ...]:
    """What a field may be: JSON writes whole floats as it likes."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
    return (*parts, int) if float in parts else parts


_MISSING = object()
_KINDS = {name: _kinds(hint) for name, hint in get_type_hints(Record).items()}
