"""What each teacher reads, where that is not what the student reads: the run's rows in its own tokens, or with its own
chains of thought (`traces`), row by row beside the student's, and the characters behind every token of both.

Made from the prepared splits, so a teacher may be added to a run later. A pretrained teacher whose tokenizer cuts every
text as the student's does needs none of this, and the manifest says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from kvdistill.align.tokens import token_coverage
from kvdistill.arms.checks import COMPARED_EXAMPLES, load_model_tokenizer, tokenizer_difference
from kvdistill.arms.texts import load_tokenizer_of, may_have_own_text, own_table_path, spans_path, teacher_place
from kvdistill.core.errors import AlignmentError, DataError
from kvdistill.core.files import read_json, replacing_folder, sha256_file, write_json, write_tensors
from kvdistill.core.layout import teacher_texts_folder
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import DataRecipe, Recipe, TeacherRecipe
from kvdistill.data.chat import chat_tokenizer, write_chat
from kvdistill.data.encode import Example, encode_rows, texts_of
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import SPLITS, Problem, Row, Style
from kvdistill.data.row_spans import row_spans
from kvdistill.data.sets import find_rules
from kvdistill.data.sources.jsonl import read_jsonl
from kvdistill.data.tables import MANIFEST, SplitWriter, read_manifest, read_split
from kvdistill.data.tokenizers import fingerprint_tokenizer, load_tokenizer, trim_tokenizer

_CHUNK = 1000  # rows
_LEARNED = ("train", "val")  # splits whose teacher targets are matched: traces must cover them


def prepare_teacher_texts(recipe: Recipe, run: Path, progress: Progress) -> None:
    """Write `data/teachers/NAME` for every teacher that has something of its own; finished ones are left alone.

    Raises DataError and ModelError naming the teacher, before anything of it is written.
    """
    for teacher in recipe.teachers:
        if may_have_own_text(teacher):
            _prepare_one(recipe.data, run, teacher, teacher_place(recipe, teacher.name), progress)


def _prepare_one(data: DataRecipe, run: Path, teacher: TeacherRecipe, place: str, progress: Progress) -> None:
    folder = teacher_texts_folder(run, teacher.name)
    section = _section(run, teacher, place)
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST)["section"] == section:
        return
    own = _own_tokenizer(data, run, teacher, place)
    traces = _read_traces(teacher, place)
    if own is None and traces is None:
        write_json(folder / MANIFEST, {"section": section, "own_text": False, "one_text": True, "tokenizer": None})
        return
    students = _as_fast(run)
    tokenizer = own or students
    texts = _Texts(data, run, tokenizer, traces, place, writes=teacher.scratch is not None)
    if own is not None and data.trim_vocabulary and teacher.scratch is not None:
        tokenizer, _ = trim_tokenizer(tokenizer, texts)
        texts = _Texts(data, run, tokenizer, traces, place, writes=teacher.scratch is not None)
    with replacing_folder(folder) as part:
        unknown, lost = _write_splits(part, texts, students, progress, teacher.name)
        if own is not None:
            tokenizer.save_pretrained(str(part / "tokenizer"))
        files = {path.name: sha256_file(path) for path in sorted(part.iterdir()) if path.is_file()}
        described = {"fingerprint": fingerprint_tokenizer(tokenizer), "size": len(tokenizer), "unknown": unknown}
        write_json(
            part / MANIFEST,
            {
                "section": section,
                "own_text": True,
                "one_text": traces is None,
                "tokenizer": described if own is not None else None,
                "pad_id": tokenizer.pad_token_id,
                "lost": lost,
                "files": files,
            },
        )


def _section(run: Path, teacher: TeacherRecipe, place: str) -> dict[str, Any]:
    """What these texts are made from: a change of any of it makes them anew."""
    traces = None
    if teacher.traces:
        path = Path(teacher.traces).expanduser()
        if not path.is_file():
            raise DataError(f"no such file: {teacher.traces}", place=f"{place}.traces", fix="give a JSONL file")
        traces = sha256_file(path)
    folders = [Path(place).expanduser() for place in (teacher.tokenizer, teacher.path) if place]
    pieces = [sha256_file(f / "tokenizer.json") for f in folders if (f / "tokenizer.json").is_file()]
    return {
        "pieces": pieces,
        "tokenizer": teacher.tokenizer,
        "path": teacher.path,
        "traces": traces,
        "data": read_manifest(run)["fingerprint"]["all"],
    }


def _own_tokenizer(data: DataRecipe, run: Path, teacher: TeacherRecipe, place: str) -> PreTrainedTokenizerFast | None:
    """This teacher's tokenizer, or None where it cuts text as the student's does."""
    if teacher.scratch is not None and teacher.tokenizer in (None, data.tokenizer):
        return None
    if teacher.tokenizer == data.tokenizer and not data.trim_vocabulary:  # said to be the same, piece by piece
        return None
    if teacher.tokenizer is not None:
        found = load_tokenizer(teacher.tokenizer, data.root, f"{place}.tokenizer")
    else:
        assert teacher.path is not None
        theirs = load_model_tokenizer(teacher.path, place)
        if tokenizer_difference(load_tokenizer_of(run), theirs, read_split(run, "train")[:COMPARED_EXAMPLES]) is None:
            return None
        if not theirs.is_fast:
            raise DataError(
                "the model's tokenizer is not a fast one: it does not say which characters its tokens stand for",
                place=place,
                fix="name a fast tokenizer of the same pieces with `tokenizer`",
            )
        found = load_tokenizer(teacher.path, None, place)
    return chat_tokenizer(found) if data.template == "chat" else found


def _as_fast(run: Path) -> PreTrainedTokenizerFast:
    found = load_tokenizer_of(run)
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def _read_traces(teacher: TeacherRecipe, place: str) -> dict[str, str] | None:
    """Hash of the question -> this teacher's own chain. The first of several for one question counts."""
    if teacher.traces is None:
        return None
    traces: dict[str, str] = {}
    for row in read_jsonl(Path(teacher.traces).expanduser(), place=f"{place}.traces"):
        question, reasoning = row.columns.get("question"), row.columns.get("reasoning")
        if not isinstance(question, str) or not isinstance(reasoning, str) or not reasoning.strip():
            raise DataError(
                "a trace needs `question` and `reasoning`, both text",
                place=row.place,
                fix="write both, or drop the row",
            )
        traces.setdefault(question_hash(question), reasoning.strip())
    return traces


class _Texts:
    """A teacher's rows beside the student's, chunk by chunk, made anew each time they are gone through.

    Iterating gives the stretches of text that a trimmed tokenizer must be able to write.
    """

    def __init__(
        self,
        data: DataRecipe,
        run: Path,
        tokenizer: PreTrainedTokenizerFast,
        traces: Mapping[str, str] | None,
        place: str,
        *,
        writes: bool,
    ) -> None:
        """writes: whether the teacher is trained on these texts, and not only reads them."""
        self.writes = writes
        self.data, self.run, self.tokenizer, self.traces, self.place = data, run, tokenizer, traces, place

    def __iter__(self) -> Iterator[str]:
        for split in SPLITS:
            for _, rows in self.chunks(split):
                for row in rows:
                    yield from texts_of(row)

    def chunks(self, split: str) -> Iterator[tuple[list[Example], list[Row]]]:
        """The student's examples, and the same problems as this teacher reads them."""
        examples = read_split(self.run, split)
        for start in range(0, len(examples), _CHUNK):
            part = list(examples[start : start + _CHUNK])
            yield part, [self._row(example, split, self.tokenizer, self.traces) for example in part]

    def student_rows(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
        return [self._row(example, "", tokenizer, None) for example in examples]

    def _row(
        self, example: Example, split: str, tokenizer: PreTrainedTokenizerFast, traces: Mapping[str, str] | None
    ) -> Row:
        rules = find_rules(example.task)
        reasoning = example.reasoning
        if traces is not None and example.style == "cot":
            own = traces.get(example.doc_hash)
            if own is None and split in _LEARNED:
                raise DataError(
                    f"there is no trace for {example.task}/{example.id} of {split}: {example.question[:60]!r}",
                    place=f"{self.place}.traces",
                    fix="give a row for every train and val question, or take those problems out of the data",
                )
            reasoning = own or reasoning
        problem = Problem(
            example.task, example.id, example.question, reasoning, example.answer, language=example.language
        )
        style: Style = "direct" if example.style == "direct" else "cot"
        row = rules.write(problem, style)
        answer = rules.extract(row.completion)
        if answer is None or not rules.same(answer, problem.answer):
            raise DataError(
                f"with this trace the gold answer {problem.answer!r} reads back as {answer!r}",
                place=f"{self.place}.traces: {example.task}/{example.id}",
                fix="take the task's answer mark out of the trace",
            )
        if self.data.template == "chat":
            row = write_chat(row, tokenizer, system_prompt=self.data.system_prompt)
        return row


def _write_splits(
    part: Path, texts: _Texts, students: PreTrainedTokenizerFast, progress: Progress, name: str
) -> tuple[dict[str, int], dict[str, Any] | None]:
    """Tables of every split, and spans where targets are matched.

    Returns unknown tokens per split, and what of the training texts has no counterpart (None for other texts).
    """
    unknown: dict[str, int] = {}
    lost: dict[str, Any] | None = None
    for split in SPLITS:
        writer = SplitWriter(part)
        spans: dict[str, _Spans] = {"own": _Spans(), "students": _Spans()}
        total = len(read_split(texts.run, split))
        matched = texts.traces is None and split in _LEARNED
        for examples, rows in texts.chunks(split):
            theirs = _encoded(texts, rows)
            writer.write(theirs)
            if matched:
                spans["own"].add(texts.tokenizer, rows, theirs)
                spans["students"].add(students, texts.student_rows(examples, students), examples)
            progress(f"texts of {name}: {split}", writer.num_rows, total)
        writer.keep(part / own_table_path(texts.run, name, split).name)
        if matched:
            unknown[split] = spans["own"].unknown
            tensors = {f"{side}.{key}": value for side, one in spans.items() for key, value in one.tensors().items()}
            write_tensors(part / spans_path(texts.run, name, split).name, tensors)
        if matched and split == "train":
            lost = _lost(spans["own"], spans["students"], texts.place)
    return unknown, lost


def _encoded(texts: _Texts, rows: Sequence[Row]) -> list[Example]:
    try:
        return encode_rows(texts.tokenizer, rows, spell_answers=texts.writes)
    except DataError as error:  # said of data.tokenizer, the student's
        raise DataError(error.what, place=f"{texts.place}.tokenizer", fix=error.fix) from None


def _lost(own: _Spans, students: _Spans, place: str) -> dict[str, Any] | None:
    """What of the texts has no counterpart on the other side, as shares of characters and tokens.

    Raises AlignmentError where nothing has: a teacher whose tokenizer cannot write these texts.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    without = 0
    for theirs, mine in zip(own.rows(), students.rows(), strict=True):
        sides = [torch.from_numpy(side[part])[None] for part in (0, 1) for side in (theirs, mine)]
        counts = token_coverage(sides[0], sides[1], sides[2].long(), sides[3].long())
        sums += torch.cat(list(counts)).double()
        without += bool(counts.target_tokens_B == counts.empty_tokens_B)
    if not len(own.rows()):
        return None
    characters, lost, theirs_all, unread, tokens, empty = sums.tolist()
    if empty == tokens:
        raise AlignmentError(
            "no token of this teacher and no token of the student have a character in common",
            place=f"{place}.tokenizer",
            fix="use a tokenizer that can write these texts (byte-level: Qwen, Llama-3, GPT-2)",
        )
    return {
        "characters": lost / max(characters, 1.0),
        "unread_characters": unread / max(theirs_all, 1.0),
        "tokens": empty / max(tokens, 1.0),
        "examples": without,
    }


class _Spans:
    """Packed spans of a split, as `teachers.texts.SpanTable` reads them."""

    def __init__(self) -> None:
        self._spans, self._roles, self._lengths = [], [], [0]  # type: ignore[var-annotated]
        self.unknown = 0

    def add(self, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], examples: Sequence[Example]) -> None:
        for found in row_spans(tokenizer, rows, examples):
            self._spans.append(found.spans)
            self._roles.append(found.roles)
            self._lengths.append(len(found.roles))
            self.unknown += found.unknown

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(spans, roles) of each row."""
        return list(zip(self._spans, self._roles, strict=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        spans = np.concatenate([np.zeros((0, 2), np.float32), *self._spans])
        roles = np.concatenate([np.zeros(0, np.int8), *self._roles])
        offsets = np.cumsum(np.asarray(self._lengths, np.int64))
        return {
            "offsets": torch.from_numpy(offsets),
            "spans": torch.from_numpy(spans),
            "roles": torch.from_numpy(roles),
        }
