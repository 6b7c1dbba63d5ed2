"""Problems, their written form, splits, tokenizers and answers.

    sets/         one small file a data set: where its rows are, what they mean, how answers are written and read
    sources/      rows from files and the hub, with the place of every row
    splits.py     rows -> train / val / test, by problem
    leaks/        the same question in two splits, exactly or nearly
    chat.py       a problem through a tokenizer's chat template
    encode.py     text -> token ids, segment codes, and the characters of every token
    words.py      ids of plain ASCII text from memory
    tokenizers.py built-in, local and hub tokenizers; trimming
    answers/      what a completion answers, and whether it is right
    tables.py     the prepared splits on disk

Everything here is pure but for reading the sources and the tables; the stage is `kvdistill.stages.prepare`.
"""

from __future__ import annotations

from kvdistill.data.encode import Example, encode_row, encode_rows
from kvdistill.data.grading import extract_answer, is_correct
from kvdistill.data.problems import Problem, Row, Style
from kvdistill.data.splits import load_multi_task_dataset
from kvdistill.data.tables import read_manifest, read_split

__all__ = [
    "Example",
    "Problem",
    "Row",
    "Style",
    "encode_row",
    "encode_rows",
    "extract_answer",
    "is_correct",
    "load_multi_task_dataset",
    "read_manifest",
    "read_split",
]
