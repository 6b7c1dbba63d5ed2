"""A run's own prepared test split: `own` for all of its tasks, `own:NAME` or `NAME` for one.

`RunTest` finds the exams of a run folder; `StudentLM` is how their questions are answered, token for token as the
student was trained. A study and `kvdistill evaluate MODEL --tasks own` both ask through these two. Knows no lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvdistill.arms.questions import as_read
from kvdistill.arms.student import Student
from kvdistill.core.files import read_json, sha256_of
from kvdistill.core.recipe import EvaluateRecipe
from kvdistill.core.segments import ANSWER, REASONING
from kvdistill.data.encode import Example
from kvdistill.data.grading import extract_answer, is_correct
from kvdistill.data.tables import read_manifest, read_split
from kvdistill.stages.evaluate.exams import AbstractExam, Judgement, Question, Render, Request, Usage

OWN = "own"


class RunTest:
    """The test split of one run folder. Reads the split when it is first asked for.

    reasoning: of the arm whose student reads it (`arms.ARM.reasoning`).
    """

    def __init__(self, run: Path, reasoning: str = "written") -> None:
        self._run, self._reasoning = run, reasoning
        self._tasks = list(read_manifest(run)["tasks"])

    def covers(self, name: str) -> bool:
        return name == OWN or name.removeprefix("own:") in self._tasks

    def names(self) -> str:
        return ", ".join(f"own:{task}" for task in self._tasks)

    def exams(self, name: str, max_new_tokens: int | None) -> Iterator[RunTestExam]:
        """One exam a task. max_new_tokens: None: answers as long as the run's recipe lets them be."""
        if max_new_tokens is None:
            path = self._run / "recipe.json"
            section = read_json(path).get("evaluate", {}) if path.exists() else {}
            max_new_tokens = int(section.get("max_new_tokens") or EvaluateRecipe().max_new_tokens)
        by_task: dict[str, list[Example]] = {task: [] for task in self._tasks}
        for example in as_read(read_split(self._run, "test"), self._reasoning):
            by_task[example.task].append(example)
        for task in self._tasks if name == OWN else [name.removeprefix("own:")]:
            if by_task[task]:
                yield RunTestExam(task, by_task[task], max_new_tokens, name)


def run_of(model: Path) -> Path | None:
    """The run folder that a model folder lies in (`…/arms/ARM/seed-N/model`, `…/teachers/NAME/model`), or None."""
    for folder in list(model.resolve().parents)[:5]:
        if (folder / "recipe.json").is_file() and (folder / "data" / "manifest.json").is_file():
            return folder
    return None


def reasoning_of(model: Path, run: Path) -> str:
    """`reasoning` of the arm whose student a model folder of this run is; `written` where it is no arm's."""
    where, name, *_ = (*model.resolve().relative_to(run).parts, "")
    arms = read_json(run / "recipe.json").get("arms") or {} if where == "arms" else {}
    spec = arms.get(name, arms.get(name.split("@")[0])) or {}  # ARM@BUDGET: of a curve
    return str(spec.get("reasoning", "written"))


class RunTestExam(AbstractExam):
    """One task of a run's prepared test split."""

    mode = "generation"

    def __init__(self, task: str, examples: Sequence[Example], max_new_tokens: int, evaluation: str) -> None:
        self.evaluation, self.name = evaluation, task
        self._examples, self._max_new_tokens = list(examples), max_new_tokens

    def __len__(self) -> int:
        return len(self._examples)

    def identity(self) -> dict[str, Any]:
        return {
            "definition": "test split",
            "data": sha256_of([[e.id, e.style, e.prompt_hash, e.answer] for e in self._examples]),
            "mode": self.mode,
            "max_new_tokens": self._max_new_tokens,
        }

    def questions(self, limit: int | None, render: Render | None) -> Iterator[Question]:
        settings = {"max_new_tokens": self._max_new_tokens}
        for number, example in enumerate(self._examples[:limit]):
            asked, gold = (
                Request(kind, example, (example, settings), self.name, number)
                for kind in ("answer_example", "score_example")
            )
            yield Question(number, example.id, example.style, example.doc_hash, example.prompt, [asked], gold)

    def turn(self, question: Question) -> tuple[Any, ...]:
        return (self._examples[question.number].num_prompt_tokens,)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        gold, rule = (example := self._examples[question.number]).answer, example.rule
        correct = is_correct(self.name, responses[0], gold, rule)
        return Judgement(extract_answer(self.name, responses[0], rule), responses[0], gold, correct, float(correct))


class StudentLM:
    """Answers questions of a run's test split with a student. `usage` is that of the last call, as `MeteredLM.usage`.

    on_answers: called with the number of requests answered so far in a call.
    """

    def __init__(self, student: Student | None, tokenizer: Any, batch_size: int) -> None:
        """student: None where no such question will come."""
        self.student, self.student_tokenizer, self.student_batch_size = student, tokenizer, batch_size
        self.usage: list[Usage] = []
        self.on_answers: Callable[[float], None] = lambda done: None
        self._spelled: dict[str, bool] = {}

    def answer_example(self, requests: Sequence[Request]) -> list[str]:
        """The greedy answer to each example's prompt. No prompt is cut; the end token does not count."""
        assert self.student is not None
        examples = [request.args[0] for request in requests]
        answers = self.student.generate(
            [example.prompt_ids for example in examples],
            self.student_tokenizer,
            max_new_tokens=requests[0].args[1]["max_new_tokens"],
            batch_size=self.student_batch_size,
            progress=self.on_answers,
        )
        self.usage = [
            Usage(example.num_prompt_tokens, len(one.ids), one.forward_passes, False, *self.unspelled(example.prompt))
            for example, one in zip(examples, answers, strict=True)
        ]
        return [one.text for one in answers]

    def score_example(self, requests: Sequence[Request]) -> list[tuple[float, float]]:
        """Mean NLL (nats per token) of each example's answer and of the reasoning before it, teacher-forced."""
        assert self.student is not None
        examples = [request.args[0] for request in requests]
        parts = {ANSWER: 1, REASONING: 2}
        found = self.student.score(
            [example.input_ids for example in examples],
            [[parts.get(segment, 0) for segment in example.segments] for example in examples],
            pad_id=self.student_tokenizer.pad_token_id,
            batch_size=self.student_batch_size,
            num_parts=len(parts),
        )
        return [(answer, reasoning) for answer, reasoning in found]

    def unspelled(self, text: str) -> tuple[int, int]:
        """Characters of `text` that do not survive encoding and decoding, and all of them; spaces not counted."""
        letters = [letter for letter in text if not letter.isspace()]
        for letter in {*letters} - self._spelled.keys():
            ids = self.student_tokenizer.encode(letter, add_special_tokens=False)
            back = self.student_tokenizer.decode(ids, skip_special_tokens=True)
            self._spelled[letter] = letter.casefold() in back.casefold()
        return sum(not self._spelled[letter] for letter in letters), len(letters)
