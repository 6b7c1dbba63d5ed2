"""What each model reads: the run's examples, and for a teacher with its own tokenizer or its own chains, the same
problems in its own tokens, row by row, with the characters that every token of either side stands for.

`prepare` writes these (`prepare/teacher_texts.py`); everything later reads them here. A teacher that reads what the
student reads has no texts of its own, and costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvdistill.core.errors import RunFolderError
from kvdistill.core.files import open_tensors, read_json
from kvdistill.core.layout import data_folder, teacher_texts_folder, tokenizer_folder
from kvdistill.core.recipe import ArmRecipe, Recipe, TeacherRecipe
from kvdistill.data.encode import Example
from kvdistill.data.tables import check_file, read_manifest, read_split, read_table

SPAN_NAMES = ("offsets", "spans", "roles")


@dataclass(frozen=True)
class SpanTable:
    """Characters of every token of a split's rows, packed: row i is `offsets[i]:offsets[i + 1]` of the other two.

    spans: float32 [tokens, 2], [start, end) in the text that both sides share; empty where a token stands for none of
    it. roles: int8 [tokens], codes of `kvdistill.align.tokens`.
    """

    offsets: Tensor
    spans: Tensor
    roles: Tensor

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """spans [T, 2] and roles [T] of one row."""
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        return self.spans[start:end], self.roles[start:end]


@dataclass(frozen=True)
class TeacherText:
    """What one teacher reads where it is not what the student reads, for the examples of one split, row by row.

    own, students: characters behind either side's tokens; None where the teacher has chains of its own, so that there
    is no common text. numbers: the rows' numbers in the span tables.
    """

    examples: Sequence[Example]
    pad_id: int
    own: SpanTable | None
    students: SpanTable | None
    numbers: Sequence[int]

    def spans(self, number: int) -> tuple[Tensor, Tensor]:
        assert self.own is not None
        return self.own.row(self.numbers[number])

    def student_spans(self, number: int) -> tuple[Tensor, Tensor]:
        assert self.students is not None
        return self.students.row(self.numbers[number])


def load_tokenizer_of(run: Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer, as `prepare` left it: the student's."""
    read_manifest(run)  # says so where prepare has not finished
    return AutoTokenizer.from_pretrained(tokenizer_folder(run))


def load_teacher_tokenizer(run: Path, teacher: TeacherRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer of what this teacher reads; the run's where it has none of its own."""
    if not (has_own_text(run, teacher) and (own_tokenizer_folder(run, teacher.name)).is_dir()):
        return load_tokenizer_of(run)
    return AutoTokenizer.from_pretrained(own_tokenizer_folder(run, teacher.name))


def own_tokenizer_folder(run: Path, name: str) -> Path:
    return teacher_texts_folder(run, name) / "tokenizer"


def may_have_own_text(teacher: TeacherRecipe) -> bool:
    """Whether `prepare` has to look: a pretrained model may come with a tokenizer unlike the student's."""
    return bool(teacher.tokenizer or teacher.traces or teacher.path)


def teacher_manifest(run: Path, teacher: TeacherRecipe) -> dict[str, Any] | None:
    """What `prepare` found about this teacher's texts, or None where there was nothing to look for."""
    if not may_have_own_text(teacher):
        return None
    path = teacher_texts_folder(run, teacher.name) / "manifest.json"
    if not path.is_file():
        raise RunFolderError(
            f"the texts of teacher {teacher.name!r} are not prepared",
            place=str(path),
            fix="run `kvdistill prepare` first",
        )
    return dict(read_json(path))


def has_own_text(run: Path, teacher: TeacherRecipe) -> bool:
    manifest = teacher_manifest(run, teacher)
    return manifest is not None and bool(manifest["own_text"])


def has_own_tokenizer(run: Path, teacher: TeacherRecipe) -> bool:
    manifest = teacher_manifest(run, teacher)
    return manifest is not None and manifest["tokenizer"] is not None


def tokenizer_fingerprint(run: Path, teacher: TeacherRecipe) -> str:
    """Of the tokenizer that this teacher's texts were cut by."""
    manifest = teacher_manifest(run, teacher)
    if manifest is not None and manifest["tokenizer"] is not None:
        return str(manifest["tokenizer"]["fingerprint"])
    return str(read_json(data_folder(run) / "manifest.json")["tokenizer"]["fingerprint"])


@functools.lru_cache(maxsize=4)
def student_vocab_size(run: Path) -> int:
    return len(load_tokenizer_of(run))


def teacher_vocab_size(run: Path, teacher: TeacherRecipe) -> int:
    manifest = teacher_manifest(run, teacher)
    own = None if manifest is None else manifest["tokenizer"]
    return student_vocab_size(run) if own is None else int(own["size"])


# -- examples -----------------------------------------------------------------------------------------


def split_examples(recipe: Recipe, run: Path, split: str) -> Sequence[Example]:
    """The examples whose targets are captured: all of train, those of val that curves and match figures use."""
    return _chosen(recipe, split, read_split(run, split))[0]


def read_examples(recipe: Recipe, run: Path, split: str, teacher: TeacherRecipe) -> Sequence[Example]:
    """`split_examples` as this teacher reads them."""
    text = teacher_text(recipe, run, split, teacher)
    return split_examples(recipe, run, split) if text is None else text.examples


def teacher_lessons(run: Path, split: str, teacher: TeacherRecipe) -> Sequence[Example]:
    """The whole split as this teacher reads it: what it is trained and tested on."""
    return _own_table(run, split, teacher) if has_own_text(run, teacher) else read_split(run, split)


def teacher_text(recipe: Recipe, run: Path, split: str, teacher: TeacherRecipe) -> TeacherText | None:
    """This teacher's own texts for `split_examples`, or None where it reads what the student reads."""
    manifest = teacher_manifest(run, teacher)
    if manifest is None or not manifest["own_text"]:
        return None
    students = read_split(run, split)
    _, numbers = _chosen(recipe, split, students)
    theirs = _own_table(run, split, teacher)
    assert len(theirs) == len(students), "texts of teachers stand row by row beside the student's"
    tables: list[SpanTable | None] = [None, None]
    if manifest["one_text"]:
        path = spans_path(run, teacher.name, split)
        check_file(path, manifest["files"][path.name])
        tensors = open_tensors(path)
        tables = [SpanTable(*(tensors[f"{side}.{name}"] for name in SPAN_NAMES)) for side in ("own", "students")]
    pad_id = int(manifest["pad_id"])
    return TeacherText(_Picked(theirs, numbers), pad_id, tables[0], tables[1], numbers)


def teacher_texts(recipe: Recipe, run: Path, arm: ArmRecipe, split: str) -> dict[str, TeacherText]:
    """The texts of those teachers of an arm that read something of their own."""
    teachers = [teacher for teacher in recipe.teachers if teacher.name in arm.teachers]
    found = {teacher.name: teacher_text(recipe, run, split, teacher) for teacher in teachers}
    return {name: text for name, text in found.items() if text is not None}


def spans_path(run: Path, name: str, split: str) -> Path:
    return teacher_texts_folder(run, name) / f"spans-{split}.safetensors"


def own_table_path(run: Path, name: str, split: str) -> Path:
    return teacher_texts_folder(run, name) / f"{split}.parquet"


def _own_table(run: Path, split: str, teacher: TeacherRecipe) -> Sequence[Example]:
    manifest = teacher_manifest(run, teacher)
    assert manifest is not None
    path = own_table_path(run, teacher.name, split)
    return read_table(path, manifest["files"][path.name])


def _chosen(recipe: Recipe, split: str, examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[int]]:
    if split == "train":
        return examples, range(len(examples))
    numbers = spread(examples, max(recipe.train.eval_examples, recipe.evaluate.match_examples))
    return [examples[i] for i in numbers], numbers


def spread(examples: Sequence[Example], number: int) -> list[int]:
    """`number` example numbers, as evenly over the tasks as there are examples, in order."""
    by_task: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_task.setdefault(example.task, []).append(i)
    share = max(1, number // max(1, len(by_task)))
    return sorted(i for numbers in by_task.values() for i in numbers[:share])


class _Picked(Sequence[Example]):
    """Some rows of a table, made when they are asked for."""

    def __init__(self, table: Sequence[Example], numbers: Sequence[int]) -> None:
        self._table, self._numbers = table, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._table[i] for i in self._numbers[index]]
        return self._table[self._numbers[index]]
