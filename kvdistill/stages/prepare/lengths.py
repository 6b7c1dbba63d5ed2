"""Which problems are too long, and what takes their place.

A row that is learned from is too long with more than `data.max_length` tokens. A test row is too long only where its
prompt is: long solutions are those of hard problems, and without them a test would be easier than it is. Where a source
has more problems than were asked for, the next one that fits takes the place of one that does not. It does so before
the leak check, which then sees what will be learned from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kvdistill.core.progress import Progress
from kvdistill.core.recipe import DataRecipe
from kvdistill.data.chat import chat_tokenizer, write_chat_rows
from kvdistill.data.encode import Example, encode_rows
from kvdistill.data.problems import Problem, Row, styles_of
from kvdistill.data.splits import DEAL_ORDER, Splits, draw_learned, load_splits
from kvdistill.data.tokenizers import load_tokenizer

_CHUNK = 1000  # problems


def fits(examples: Sequence[Example], split: str, max_length: int) -> bool:
    """Whether a problem, in every style that it is written in, is short enough for its split."""
    lengths = (one.num_prompt_tokens if split == "test" else len(one.input_ids) for one in examples)
    return max(lengths) <= max_length


def fitted_splits(
    data: DataRecipe,
    progress: Progress,
    *,
    beside: Path,
    tokenizer: Callable[[], PreTrainedTokenizerFast] | None = None,
) -> Splits:
    """The splits of the data section, with problems that are too long replaced where their source has more.

    tokenizer: as the data will be read with; it is asked for only where there is something to put in their place.
    """
    splits = load_splits(data, progress, beside=beside)
    if not any(spare for tasks in splits.spare.values() for spare in tasks.values()):
        if data.train_seed is not None:
            draw_learned(splits, data.train_seed)
        return splits
    reader = tokenizer() if tokenizer is not None else plain_tokenizer(data)
    for split in DEAL_ORDER:
        if split == "train" and data.train_seed is not None:  # the held-out splits are settled
            draw_learned(splits, data.train_seed)
        chosen, done = splits.problems[split], 0
        for problems in chosen.batches(_CHUNK):
            for place, is_short in enumerate(_short_enough(problems, split, splits, data, reader), start=done):
                task = problems[place - done].task
                if not is_short and (other := _next_that_fits(task, split, splits, data, reader)) is not None:
                    chosen.numbers[place] = other
                    splits.replaced.setdefault(task, Counter())[split] += 1
            done += len(problems)
            progress(f"looking for long {split} problems", done, len(chosen))
    return splits


def plain_tokenizer(data: DataRecipe) -> PreTrainedTokenizerFast:
    """The tokenizer of the data section before it is trimmed or, of single characters, extended: as many tokens."""
    tokenizer = load_tokenizer(data.tokenizer, data.root)
    return chat_tokenizer(tokenizer) if data.template == "chat" else tokenizer


def write_rows(
    problems: Sequence[Problem], splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast | None
) -> list[Row]:
    """Each problem in every style asked for, these side by side; through the chat template of `tokenizer`, where the
    recipe says so and there is one."""
    rows = [splits.rules[problem.task].write(problem, style) for problem in problems for style in styles_of(data.style)]
    if data.template == "chat" and tokenizer is not None:
        return write_chat_rows(rows, tokenizer, system_prompt=data.system_prompt)
    return rows


def _short_enough(
    problems: Sequence[Problem], split: str, splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[bool]:
    """Of each problem; of a task that has no others left nothing is read."""
    could = [problem for problem in problems if splits.spare[problem.task][split]]
    examples = encode_rows(tokenizer, write_rows(could, splits, data, tokenizer), spell_answers=False)
    num_styles = len(styles_of(data.style))
    found = (fits(examples[n : n + num_styles], split, data.max_length) for n in range(0, len(examples), num_styles))
    return iter([not splits.spare[problem.task][split] or next(found) for problem in problems])


def _next_that_fits(
    task: str, split: str, splits: Splits, data: DataRecipe, tokenizer: PreTrainedTokenizerFast
) -> int | None:
    """Held-out problems come from the far end, so that they stay the same however many are trained on."""
    spare = splits.spare[task][split]
    while spare:
        number = spare.pop() if split in ("test", "val") else spare.popleft()
        rows = write_rows(splits.problems[split].spool.read([number]), splits, data, tokenizer)
        if fits(encode_rows(tokenizer, rows, spell_answers=False), split, data.max_length):
            return number
    return None
