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
from kvdistill.arms.texts import (
    load_prepared_tokenizer,
    load_tokenizer_of,
    may_have_own_text,
    own_table_path,
    own_tokenizer_folder,
    spans_path,
    teacher_place,
)
from kvdistill.core.errors import AlignmentError, DataError
from kvdistill.core.files import read_json, replacing_folder, sha256_file, write_json, write_tensors
from kvdistill.core.layout import teacher_texts_folder
from kvdistill.core.marks import sealed
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import DataRecipe, Recipe, TeacherRecipe
from kvdistill.data.chat import chat_tokenizer, write_chat_rows
from kvdistill.data.encode import Example, RowSpans, encode_rows, row_spans, texts_of
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import SPLITS, Problem, Row
from kvdistill.data.sets import find_rules
from kvdistill.data.sources.jsonl import read_jsonl
from kvdistill.data.tables import MANIFEST, SplitWriter, read_manifest, read_split
from kvdistill.data.tokenizers import fingerprint_tokenizer, load_tokenizer, require_covered, trim_tokenizer

_CHUNK = 1000  # rows
_LEARNED = ("train", "val")  # splits whose teacher targets are matched: traces must cover them


def prepare_teacher_texts(recipe: Recipe, run: Path, progress: Progress, shared: Path | None = None) -> None:
    """Write `data/teachers/NAME` for every teacher that has something of its own; finished ones are left alone.

    shared: the run folder, where `run` is the folder of one seed's data.
    Raises DataError and ModelError naming the teacher, before anything of it is written.
    """
    data = recipe.data
    for teacher in filter(may_have_own_text, recipe.teachers):
        place = teacher_place(recipe, teacher.name)
        folder = teacher_texts_folder(run, teacher.name)
        section = _section(run, teacher, place)
        if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST)["section"] == section:
            continue
        students = load_tokenizer_of(run)
        assert isinstance(students, PreTrainedTokenizerFast)
        own = _own_tokenizer(data, run, teacher, place, students)
        traces = _read_traces(teacher, place)
        if own is None and traces is None:
            write_json(
                folder / MANIFEST,
                sealed({"section": section, "own_text": False, "one_text": True, "tokenizer": None}),
            )
            continue
        texts = _Texts(data, run, teacher, own or students, traces, place)
        if own is not None and data.trim_vocabulary and teacher.scratch is not None:
            if shared is None or recipe.varies_teachers:
                texts.tokenizer, _ = trim_tokenizer(own, texts)
            else:  # it was trained with the pieces of the run's texts
                said = read_json(teacher_texts_folder(shared, teacher.name) / MANIFEST)["tokenizer"]
                texts.tokenizer = load_prepared_tokenizer(own_tokenizer_folder(shared, teacher.name), said)
                require_covered(texts.tokenizer, own, texts, f"{place}.tokenizer")
        tokenizer = texts.tokenizer
        with replacing_folder(folder) as part:
            unknown, lost = _write_splits(part, texts, students, progress)
            if own is not None:
                tokenizer.save_pretrained(str(part / "tokenizer"))
            files = {path.name: sha256_file(path) for path in sorted(part.iterdir()) if path.is_file()}
            described = {"fingerprint": fingerprint_tokenizer(tokenizer), "size": len(tokenizer), "unknown": unknown}
            manifest = {
                "section": section,
                "own_text": True,
                "one_text": traces is None,
                "tokenizer": described if own is not None else None,
                "pad_id": tokenizer.pad_token_id,
                "lost": lost,
                "files": files,
            }
            write_json(part / MANIFEST, sealed(manifest))


def check_teachers_templates(recipe: Recipe) -> None:
    """Look at the chat templates of teachers with tokenizers of their own; the error names whose it is."""
    data = recipe.data
    for teacher in recipe.teachers if data.template == "chat" else ():
        name = teacher.tokenizer or teacher.path
        if name is not None and name != data.tokenizer:
            place = teacher_place(recipe, teacher.name)
            where = f"{place}.tokenizer" if teacher.tokenizer else place
            found = load_tokenizer(name, data.root if teacher.tokenizer else None, where)
            _through_template(found, where)


def _through_template(tokenizer: PreTrainedTokenizerFast, where: str) -> PreTrainedTokenizerFast:
    """`chat_tokenizer`, with the teacher named in what it refuses."""
    try:
        return chat_tokenizer(tokenizer)
    except DataError as error:
        fix = "name a `tokenizer` of the same pieces that has a chat template, or set data.template=plain"
        raise DataError(f"{error.what} (data.template=chat goes through it)", place=where, fix=fix) from error


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


def _own_tokenizer(
    data: DataRecipe, run: Path, teacher: TeacherRecipe, place: str, students: PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast | None:
    """This teacher's tokenizer, or None where it cuts text as the student's does."""
    if teacher.scratch is not None and teacher.tokenizer in (None, data.tokenizer):
        return None
    if teacher.tokenizer == data.tokenizer and not data.trim_vocabulary:  # said to be the same, piece by piece
        return None
    if teacher.tokenizer is not None:
        found = load_tokenizer(teacher.tokenizer, data.root, f"{place}.tokenizer")
    else:
        assert teacher.path is not None
        theirs = load_model_tokenizer(teacher.path, place, teacher.gguf_file)
        if tokenizer_difference(students, theirs, read_split(run, "train")[:COMPARED_EXAMPLES]) is None:
            return None
        if not theirs.is_fast:
            raise DataError(
                "the model's tokenizer is not a fast one: it does not say which characters its tokens stand for",
                place=place,
                fix="name a fast tokenizer of the same pieces with `tokenizer`",
            )
        found = load_tokenizer(teacher.path, None, place)
    where = f"{place}.tokenizer" if teacher.tokenizer else place
    return _through_template(found, where) if data.template == "chat" else found


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
    """A teacher's rows beside the student's, chunk by chunk, written anew each time they are gone through.

    Iterating gives the stretches of text that a trimmed tokenizer must be able to write.
    """

    def __init__(
        self,
        data: DataRecipe,
        run: Path,
        teacher: TeacherRecipe,
        tokenizer: PreTrainedTokenizerFast,
        traces: Mapping[str, str] | None,
        place: str,
    ) -> None:
        self.data, self.run, self.teacher = data, run, teacher
        self.tokenizer, self.traces, self.place = tokenizer, traces, place

    def __iter__(self) -> Iterator[str]:
        for split in SPLITS:
            for _, rows in self.chunks(split):
                yield from texts_of(self.rendered(rows, self.tokenizer))

    def chunks(self, split: str) -> Iterator[tuple[list[Example], list[Row]]]:
        """The student's examples, and the same problems with this teacher's chains, as plain rows.

        A row with a chain of the teacher's own is read back: DataError where the gold answer does not come out of it.
        """
        examples = read_split(self.run, split)
        for start in range(0, len(examples), _CHUNK):
            part, rows = examples[start : start + _CHUNK], []
            for example in part:
                rules, reasoning = find_rules(example.task, example.rule), example.reasoning
                if self.traces is not None and example.style == "cot":
                    own = self.traces.get(example.doc_hash)
                    if own is None and split in _LEARNED:
                        raise DataError(
                            f"there is no trace for {example.task}/{example.id} of {split}: {example.question[:60]!r}",
                            place=f"{self.place}.traces",
                            fix="give a row for every train and val question, or take those problems out of the data",
                        )
                    reasoning = own or reasoning
                problem = Problem(
                    example.task,
                    example.id,
                    example.question,
                    reasoning,
                    example.answer,
                    example.language,
                    example.rule,
                )
                row = rules.write(problem, "direct" if example.style == "direct" else "cot")
                answer = rules.extract(row.completion) if reasoning is not example.reasoning else problem.answer
                if answer is None or not rules.same(answer, problem.answer):
                    raise DataError(
                        f"with this trace the gold answer {problem.answer!r} reads back as {answer!r}",
                        place=f"{self.place}.traces: {example.task}/{example.id}",
                        fix="take the task's answer mark out of the trace",
                    )
                rows.append(row)
            yield list(part), rows

    def rendered(self, rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
        """Through the chat template of this tokenizer, where the recipe says so."""
        if self.data.template != "chat":
            return rows
        return write_chat_rows(rows, tokenizer, system_prompt=self.data.system_prompt)


def _write_splits(
    part: Path, texts: _Texts, students: PreTrainedTokenizerFast, progress: Progress
) -> tuple[dict[str, int], dict[str, Any] | None]:
    """Tables of every split, and spans where targets are matched.

    Returns unknown tokens per split, and what of the training texts has no counterpart (None for other texts).
    """
    name, unknown = texts.teacher.name, {}
    lost: dict[str, Any] | None = None
    for split in SPLITS:
        writer = SplitWriter(part)
        own: list[RowSpans] = []
        theirs: list[RowSpans] = []  # the student's
        total = len(read_split(texts.run, split))
        matched = texts.traces is None and split in _LEARNED
        for examples, plain in texts.chunks(split):
            rows = texts.rendered(plain, texts.tokenizer)
            try:  # whoever is trained on these texts must be able to write them, not only to read them
                encoded = encode_rows(texts.tokenizer, rows, spell_answers=texts.teacher.scratch is not None)
            except DataError as error:  # said of data.tokenizer, the student's
                raise DataError(error.what, place=f"{texts.place}.tokenizer", fix=error.fix) from None
            writer.write(encoded)
            if matched:
                own += row_spans(texts.tokenizer, rows, encoded)
                theirs += row_spans(students, texts.rendered(plain, students), examples)
            progress(f"texts of {name}: {split}", writer.num_rows, total)
        writer.keep(part / own_table_path(texts.run, name, split).name)
        if matched:
            unknown[split] = sum(row.unknown for row in own)
            tensors: dict[str, torch.Tensor] = {}
            for side, found in (("own", own), ("students", theirs)):  # packed, as `arms.texts` reads them
                lengths = np.asarray([0, *(len(row.roles) for row in found)], np.int64)
                spans = np.concatenate([np.zeros((0, 2), np.float32), *(row.spans for row in found)])
                roles = np.concatenate([np.zeros(0, np.int8), *(row.roles for row in found)])
                packed = {"offsets": np.cumsum(lengths), "spans": spans, "roles": roles}
                tensors |= {f"{side}.{key}": torch.from_numpy(values) for key, values in packed.items()}
            write_tensors(part / spans_path(texts.run, name, split).name, tensors)
        if matched and split == "train":
            lost = _lost(own, theirs, texts.place)
    return unknown, lost


def _lost(own: Sequence[RowSpans], students: Sequence[RowSpans], place: str) -> dict[str, Any] | None:
    """What of the texts has no counterpart on the other side, as shares of characters and tokens.

    Raises AlignmentError where nothing has: a teacher whose tokenizer cannot write these texts.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    without = 0
    for theirs, mine in zip(own, students, strict=True):
        sides = [torch.from_numpy(side[part])[None] for part in (0, 1) for side in (theirs, mine)]
        counts = token_coverage(sides[0], sides[1], sides[2].long(), sides[3].long())
        sums += torch.cat(list(counts)).double()
        without += bool(counts.target_tokens_B == counts.empty_tokens_B)
    if not own:
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
