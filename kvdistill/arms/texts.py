"""What each model reads: the run's examples, and for a teacher with its own tokenizer or its own chains, the same
problems in its own tokens, row by row, with the characters that every token of either side stands for.

`stages/prepare/teacher_texts.py` writes these; everything later reads them through `arms/teacher.py`. A teacher that
reads what the student reads has no texts of its own, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import RunFolderError
from kvdistill.core.layout import teacher_texts_folder, tokenizer_folder
from kvdistill.core.recipe import Recipe, TeacherRecipe
from kvdistill.data.encode import Example
from kvdistill.data.tables import ExampleRows, check_file, read_manifest
from kvdistill.data.tokenizers import fingerprint_tokenizer, load_tokenizer

SPAN_NAMES = ("offsets", "spans", "roles")


@dataclass(frozen=True)
class SpanTable:
    """Characters of every token of a split's rows, packed: row i is `offsets[i]:offsets[i + 1]` of the other two.

    spans: float32 [tokens, 2], [start, end) in the text that both sides share; empty where a token stands for none of
    it. roles: int8 [tokens], codes of `core.segments`.
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
        """Of the teacher's tokens: spans [S, 2] and roles [S]."""
        assert self.own is not None
        return self.own.row(self.numbers[number])

    def student_spans(self, number: int) -> tuple[Tensor, Tensor]:
        """Of the student's tokens: spans [T, 2] and roles [T]."""
        assert self.students is not None
        return self.students.row(self.numbers[number])


class PickedRows(ExampleRows):
    """Some rows of a table."""

    def __init__(self, table: Sequence[Example], numbers: Sequence[int]) -> None:
        self._table, self._numbers = table, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def row(self, number: int) -> Example:
        return self._table[self._numbers[number]]


def load_tokenizer_of(run: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, as `prepare` left it: the student's. RunFolderError where it is another one now."""
    said = read_manifest(run)["tokenizer"]  # says so where prepare has not finished
    return load_prepared_tokenizer(tokenizer_folder(run), said)


def load_prepared_tokenizer(folder: Path, said: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer of a run, compared with what the manifest beside its texts says of it."""
    for name, sha256 in said.get("files", {}).items():
        check_file(folder / name, sha256)
    found = load_tokenizer(str(folder), place=str(folder))
    if fingerprint_tokenizer(found) != said["fingerprint"]:
        raise RunFolderError(
            "this tokenizer is not the one that the texts were made with: it was altered",
            place=str(folder),
            fix="delete the run's data/ and tokenizer/ folders and run `kvdistill prepare` again",
        )
    return found


def teacher_place(recipe: Recipe, name: str) -> str:
    """What errors call a teacher: `teachers.0 (name)`."""
    return f"teachers.{[t.name for t in recipe.teachers].index(name)} ({name})"


def may_have_own_text(teacher: TeacherRecipe) -> bool:
    """Whether `prepare` has to look: a pretrained model may come with a tokenizer unlike the student's."""
    return bool(teacher.tokenizer or teacher.traces or teacher.path)


def own_tokenizer_folder(run: Path, name: str) -> Path:
    return teacher_texts_folder(run, name) / "tokenizer"


def spans_path(run: Path, name: str, split: str) -> Path:
    return teacher_texts_folder(run, name) / f"spans-{split}.safetensors"


def own_table_path(run: Path, name: str, split: str) -> Path:
    return teacher_texts_folder(run, name) / f"{split}.parquet"


def first_share(examples: Sequence[Example], share: float) -> list[int]:
    """Numbers of the examples (in all styles) of the first `share` of each task's problems, at least one, in order."""
    of_task: dict[str, dict[str, int]] = {}  # task -> problem -> its place
    for example in examples:
        places = of_task.setdefault(example.task, {})
        places.setdefault(example.id, len(places))
    wanted = {task: max(1, round(share * len(places))) for task, places in of_task.items()}
    return [i for i, one in enumerate(examples) if of_task[one.task][one.id] < wanted[one.task]]


def spread(examples: Sequence[Example], number: int) -> list[int]:
    """`number` example numbers, as evenly over the tasks as there are examples, in order."""
    by_task: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_task.setdefault(example.task, []).append(i)
    share = max(1, number // max(1, len(by_task)))
    return sorted(i for numbers in by_task.values() for i in numbers[:share])
