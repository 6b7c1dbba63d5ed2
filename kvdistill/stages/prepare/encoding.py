"""Problems to encoded examples, chunk by chunk: written, read back, tokenised, measured. Memory holds one chunk.

Knows a split's problems and the tokenizer; writes to files without names (`tables.SplitWriter`) only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.core.progress import Progress
from kvdistill.core.recipe import DataRecipe
from kvdistill.data.chat import chat_tokenizer, write_chat
from kvdistill.data.encode import Example, encode_rows, texts_of
from kvdistill.data.problems import SPLITS, Problem, Row, styles_of
from kvdistill.data.splits import Splits
from kvdistill.data.tables import SplitWriter
from kvdistill.data.tokenizers import CHARACTERS, load_tokenizer, trim_tokenizer

_CHUNK = 1000  # problems


@dataclass
class Encoded:
    """What was written: a finished table per split, and counts. too_long: task -> split -> problems left out.

    rows: task -> style -> split -> rows. problems: task -> split -> problems. unknown: split -> unknown tokens.
    """

    tables: dict[str, SplitWriter]
    problems: dict[str, Counter[str]] = field(default_factory=dict)
    rows: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    too_long: dict[str, Counter[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)


class _Texts:
    """The texts of all splits, made anew each time they are gone through: what a tokenizer must be able to write."""

    def __init__(self, splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self._made_of = (splits, data, tokenizer)

    def __iter__(self) -> Iterator[str]:
        splits, data, tokenizer = self._made_of
        for split in SPLITS:
            for rows in written_problems(splits, split, data, tokenizer):
                for row in rows:
                    yield from texts_of(row)


def make_tokenizer(data: DataRecipe, splits: Splits) -> tuple[PreTrainedTokenizerFast, dict[int, int] | None]:
    """The tokenizer of the data section; trimmed over the texts of all splits, as they will be tokenized.

    Test texts count too: what a pretrained teacher reads must be the pieces it was trained on.
    """
    texts = _Texts(splits, data, None) if data.tokenizer == CHARACTERS else ()
    tokenizer = load_tokenizer(data.tokenizer, data.root, texts=texts)
    if data.template == "chat":
        tokenizer = chat_tokenizer(tokenizer)
    if not data.trim_vocabulary:
        return tokenizer, None
    return trim_tokenizer(tokenizer, _Texts(splits, data, tokenizer))


def written_problems(
    splits: Splits, split: str, data: DataRecipe, tokenizer: PreTrainedTokenizerFast | None
) -> Iterator[list[Row]]:
    """Each problem of a split in every style asked for. tokenizer: whose chat template to use, where the recipe does.

    Every row is read back by its task: DataError where the gold answer does not come out of it.
    """
    for problem in splits.problems[split]:
        rules = splits.rules[problem.task]
        rows = [rules.write(problem, name) for name in styles_of(data.style)]
        for row in rows:
            answer = rules.extract(row.completion)
            if answer is None or not rules.same(answer, problem.answer):
                raise _not_read_back(problem, answer)
        if data.template == "chat" and tokenizer is not None:
            rows = [write_chat(row, tokenizer, system_prompt=data.system_prompt) for row in rows]
        yield rows


def _not_read_back(problem: Problem, answer: str | None) -> DataError:
    return DataError(
        f"the gold answer {problem.answer!r} reads back as {answer!r}",
        place=f"{problem.task} / {problem.id}",
        fix="take the task's answer mark out of the reasoning, or take the row out",
    )


def encode_splits(
    splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast, *, beside: Path, progress: Progress
) -> Encoded:
    """Every split encoded; problems of which any style is longer than `data.max_length` tokens are left out.

    beside: an existing folder on the disk to use.
    """
    encoded = Encoded({split: SplitWriter(beside) for split in SPLITS})
    unk: Any = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token_id  # GPT-2: one for all
    for split in SPLITS:
        done, total = 0, len(splits.problems[split]) * len(styles_of(data.style))
        for chunk in _chunks(written_problems(splits, split, data, tokenizer), _CHUNK):
            examples = encode_rows(tokenizer, [row for rows in chunk for row in rows])
            encoded.tables[split].write(_keep_short(examples, split, data, encoded))
            if unk is not None:
                encoded.unknown[split] += sum(example.input_ids.count(unk) for example in examples)
            done += len(examples)
            progress(f"encoding {split}", done, total)
    return encoded


def _chunks(problems: Iterable[list[Row]], size: int) -> Iterator[list[list[Row]]]:
    stream = iter(problems)
    while chunk := list(islice(stream, size)):
        yield chunk


def _keep_short(examples: list[Example], split: str, data: DataRecipe, encoded: Encoded) -> list[Example]:
    """The styles of a problem stand side by side, and go together."""
    per_problem = len(styles_of(data.style))
    kept: list[Example] = []
    for start in range(0, len(examples), per_problem):
        styles = examples[start : start + per_problem]
        task = styles[0].task
        if any(len(example.input_ids) > data.max_length for example in styles):
            encoded.too_long.setdefault(task, Counter())[split] += 1
            continue
        encoded.problems.setdefault(task, Counter())[split] += 1
        for example in styles:
            encoded.rows.setdefault(task, {}).setdefault(example.style, Counter())[split] += 1
        kept += styles
    return kept
