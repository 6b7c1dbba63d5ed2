"""The write stage: a teacher's own solutions, for arms that learn from them as text (sequence-level distillation).

Reads the run's data and one teacher; leaves `written/NAME/`: answers.jsonl, all that was generated, a line an answer;
solutions.parquet, what is kept of it as the student reads it; and last written.json, with counts, tokens, FLOPs and
checksums. A kill loses at most one batch of questions.

A teacher is asked the problems of the tasks that it was trained on (`train_on`), all where that is not known, through
its own tokenizer and template. Kept is an answer that is right by its task's rule, and that the student can read: its
reasoning, up to the answer's mark, is written as the task writes a solution, with the gold answer behind it. So a
student learns one form, and no right answer behind a wrong mark. Knows no arm.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvdistill.arms.lessons import SOLUTIONS
from kvdistill.arms.teacher import Teacher
from kvdistill.core.files import append_text, as_json, read_json_lines, sha256_of, write_json_lines
from kvdistill.core.layout import folder_lock, written_folder, written_mark
from kvdistill.core.marks import read_mark, write_mark
from kvdistill.core.progress import Progress, silent
from kvdistill.core.runtime import derive_seed
from kvdistill.core.stopping import give_in, put_off
from kvdistill.data.chat import write_chat_rows
from kvdistill.data.encode import Example, encode_rows
from kvdistill.data.grading import check_answers
from kvdistill.data.problems import Problem, Row
from kvdistill.data.sets import find_rules
from kvdistill.data.tables import SplitWriter
from kvdistill.models import batch_geometry, forward_flops
from kvdistill.models.generate import Rows, Sampled, generate_greedy

ANSWERS = "answers.jsonl"


def write(teacher: Teacher, progress: Progress = silent) -> None:
    """Write and check a teacher's solutions. Returns at once where that is done; asked to end, it does after the batch
    it is at."""
    folder = written_folder(teacher.experiment.own_run, teacher.name)
    with folder_lock(folder, wait=True):
        if read_mark(written_mark(folder)) is not None:
            return
        numbers = asked_numbers(teacher)
        answers = _generate(teacher, numbers, folder / ANSWERS, progress)
        kept, counts = right_solutions(teacher, answers)
        writer = SplitWriter(folder)
        writer.write(kept)
        writer.keep(folder / SOLUTIONS)
        asked = teacher.lessons(teacher.experiment.recipe.write.questions)
        # what was generated is run through once more than it is long, less its last token
        lengths = [asked[one["row"]].num_prompt_tokens + one["tokens"] - 1 for one in answers]
        facts = {
            "teacher": teacher.name,
            "questions": len(numbers),
            "answers": len(answers),
            **counts,
            "kept": len(kept),
            "tokens": sum(one["tokens"] for one in answers),
            "flops": forward_flops(teacher.shape, *batch_geometry(lengths)),
        }
        write_mark(written_mark(folder), facts, [ANSWERS, SOLUTIONS])


def asked_numbers(teacher: Teacher) -> list[int]:
    """Rows of the asked split that are this teacher's: of its tasks, the first `limit` problems of each."""
    recipe = teacher.experiment.recipe
    tasks, problems = teacher.recipe.train_on, dict[str, dict[str, None]]()
    found: list[int] = []
    for number, row in enumerate(teacher.experiment.split(recipe.write.questions)):
        if tasks and row.task not in tasks:
            continue
        mine = problems.setdefault(row.task, {})
        if row.doc_hash in mine or recipe.write.limit is None or len(mine) < recipe.write.limit:
            mine[row.doc_hash] = None
            found.append(number)
    return found


def _generate(teacher: Teacher, numbers: Sequence[int], path: Path, progress: Progress) -> list[dict[str, Any]]:
    """All answers, in a fixed order: {row, sample, text, tokens}, tokens with the one that ends it.

    A first line says what the others are of; those of another writing, and of a batch that a kill cut, are dropped.
    """
    experiment, recipe = teacher.experiment, teacher.experiment.recipe.write
    questions, tokenizer = teacher.lessons(recipe.questions), teacher.tokenizer
    most = recipe.max_new_tokens or experiment.recipe.evaluate.max_new_tokens
    lengths = {number: questions[number].num_prompt_tokens for number in numbers}
    order = [(n, s) for n in sorted(numbers, key=lambda n: (lengths[n], n)) for s in range(recipe.per_question)]
    head = as_json(
        {
            "teacher": teacher.fingerprint,
            "questions": sha256_of([[questions[n].prompt_ids, s] for n, s in order]),
            "max_new_tokens": most,
            **recipe.model_dump(mode="json", include={"temperature", "seed", "batch_size"}),
        }
    )
    lines = read_json_lines(path) if path.exists() else []
    found = lines[1:] if lines[:1] == [head] else []
    found = found[: len(found) if len(found) == len(order) else len(found) // recipe.batch_size * recipe.batch_size]
    write_json_lines(path, [head, *found])
    if len(found) == len(order):
        return found
    with put_off():
        model = teacher.load()
        for start in range(len(found), len(order), recipe.batch_size):
            part = order[start : start + recipe.batch_size]
            seeds = [derive_seed(recipe.seed, "write", teacher.name, questions[n].prompt_hash, s) for n, s in part]
            made = generate_greedy(
                model,
                [questions[number].prompt_ids for number, _ in part],
                tokenizer,
                max_new_tokens=most,
                rows=Rows(recipe.batch_size),
                progress=partial(_show, progress, f"write {teacher.name}", start, len(order)),
                draw=partial(_sampled, recipe.temperature, seeds) if recipe.temperature else None,
            )
            rows = [
                {"row": number, "sample": sample, "text": one.text, "tokens": one.forward_passes}
                for (number, sample), one in zip(part, made, strict=True)
            ]
            append_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), flushed=True)
            found += rows
            progress(f"write {teacher.name}", len(found), len(order))
            give_in()
    return found


def _show(progress: Progress, what: str, before: int, total: int, done: float) -> None:
    progress(what, before + done, total)


def _sampled(temperature: float, seeds: Sequence[int], chosen: Sequence[int]) -> Sampled:
    return Sampled(temperature, [seeds[i] for i in chosen])


def right_solutions(teacher: Teacher, answers: Sequence[dict[str, Any]]) -> tuple[list[Example], dict[str, int]]:
    """What is kept, as the student reads it, and counts: `right` answers, and right ones that are left out, being
    `repeated`, without `reasoning`, or too `long` or `unspelled` for the student."""
    experiment = teacher.experiment
    data, tokenizer = experiment.recipe.data, experiment.tokenizer
    questions = experiment.split(experiment.recipe.write.questions)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(answers):
        question = questions[one["row"]]
        groups.setdefault((question.task, question.rule), []).append(place)
    right: list[int] = []
    for (task, rule), places in groups.items():
        pairs = [(answers[place]["text"], questions[answers[place]["row"]].answer) for place in places]
        checked = check_answers(task, pairs, rule)
        right += [place for place, found in zip(places, checked, strict=True) if found.is_correct]
    counts = Counter(right=len(right), repeated=0, without_reasoning=0, too_long=0, unspelled=0)
    rows: list[Row] = []
    seen: set[tuple[int, str]] = set()
    for place in sorted(right, key=lambda place: (answers[place]["row"], answers[place]["sample"])):
        number = answers[place]["row"]
        row = solution_row(questions[number], answers[place]["text"])
        if row is None:
            counts["without_reasoning"] += 1
        elif (number, row.completion) in seen:
            counts["repeated"] += 1
        else:
            seen.add((number, row.completion))
            rows.append(row)
    if data.template == "chat":
        rows = write_chat_rows(rows, tokenizer, system_prompt=data.system_prompt)
    unk: Any = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token_id
    kept: list[Example] = []
    for example in encode_rows(tokenizer, rows):
        if len(example.input_ids) > data.max_length:
            counts["too_long"] += 1
        elif unk is not None and unk in example.input_ids[example.num_prompt_tokens :]:
            counts["unspelled"] += 1
        else:
            kept.append(example)
    return kept, dict(counts)


def solution_row(question: Example, text: str) -> Row | None:
    """A right answer to a problem as its task writes one; None where no reasoning stands before the answer, or where
    the answer could not be read out of it again."""
    task, style = find_rules(question.task, question.rule), question.style
    known = Problem(
        question.task, question.id, question.question, question.reasoning, question.answer, question.language,
        question.rule,
    )  # fmt: skip
    mark = task.write(known, "cot" if style == "cot" else "direct").answer.split(question.answer)[0].strip()
    reasoning = (text.split(mark)[0] if mark else text).strip() if style == "cot" else ""
    row = task.write(replace(known, reasoning=reasoning), "cot" if style == "cot" else "direct")
    answer = task.extract(row.completion)
    if (style == "cot" and not reasoning) or answer is None or not task.same(answer, question.answer):
        return None
    return row
