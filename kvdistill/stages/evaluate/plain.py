"""Exams with prompts of our own: lettered multiple choice, the training tasks' templates, a run's own test split.

Every answer is generated and read by the evaluation's (or task's) own mark. Knows no model and nothing of lm-eval but
its request type.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from kvdistill.core.errors import RecipeError
from kvdistill.core.files import sha256_of
from kvdistill.core.runtime import derive_seed
from kvdistill.data.encode import Example
from kvdistill.data.grading import extract_answer, is_correct
from kvdistill.data.leaks import question_hash
from kvdistill.data.sets import Evaluation, Lettered, Member
from kvdistill.stages.evaluate.exams import AbstractExam, Judgement, Question, Render, SuiteOptions

DEFAULT_NEW_TOKENS = 256
_STOPS = {"en": "Question:", "zh": "问题："}  # where a model goes on with a problem of its own


class EncodedPrompt(str):
    """A prompt that was tokenized before, with the ids a run's students have seen."""

    ids: list[int]

    def __new__(cls, text: str, ids: Sequence[int]) -> EncodedPrompt:
        prompt = super().__new__(cls, text)
        prompt.ids = list(ids)
        return prompt


def _generation(name: str, number: int, row: Any, prompt: str, stops: Sequence[str], new_tokens: int) -> list[Instance]:
    settings = {"until": list(stops), "do_sample": False, "max_gen_toks": new_tokens}
    return [Instance("generate_until", row, (prompt, settings), 0, (name, number, 1))]


def gold_request(
    evaluation: Evaluation, member: Member, row: Any, asked: Instance, options: SuiteOptions
) -> Instance | None:
    """The published answer after the prompt of a generated one, to be scored; None where that is not wanted."""
    if not options.gold_nll or asked.request_type != "generate_until":
        return None
    answer = evaluation.published_gold(member, row)
    space = "" if answer[:1].isspace() or evaluation.language == "zh" or options.chat else " "
    return Instance("loglikelihood", row, (asked.args[0], space + answer), 0, asked.metadata)


def token_limit_note(max_new_tokens: int) -> str:
    return f"answers of at most {max_new_tokens} tokens (evaluate.max_new_tokens)"


def _as_chat(prompt: str, render: Render, system_prompt: str | None) -> str:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return render([*system, {"role": "user", "content": prompt}], add_generation_prompt=True)


class LetteredExam(AbstractExam):
    """Multiple choice by generation: the choices stand in the prompt with letters, and a letter is to be written."""

    def __init__(self, evaluation: Evaluation, member: Member, options: SuiteOptions) -> None:
        self.evaluation, self.name, self.mode = evaluation.name, member.name, "generation"
        self._rules, self._member, self._options = evaluation, member, options
        self.note = token_limit_note(options.max_new_tokens) if options.max_new_tokens else ""
        rows = evaluation.load(member, options.root, "test")
        self._rows = rows
        self._asked = [self._lettered(row) for row in rows]
        wanted = evaluation.num_fewshot if options.num_fewshot is None else options.num_fewshot
        shots = [self._lettered(row) for row in self._shots(wanted)]
        self._shown = "".join(f"{shot.prompt}{self._space}{shot.gold}\n\n" for shot in shots)
        self._num_fewshot = len(shots)
        self._data_hash = sha256_of(
            [[one.prompt for one in self._asked], [one.gold for one in self._asked], self._shown]
        )

    @property
    def _space(self) -> str:
        return "" if self._rules.language == "zh" else " "

    def _lettered(self, row: dict[str, Any]) -> Lettered:
        lettered = self._rules.lettered(self._member, row)
        assert lettered is not None, f"{self.name} has no lettered form"
        return lettered

    def _shots(self, wanted: int) -> list[dict[str, Any]]:
        """The same examples before every question: the first ones, or drawn once where there are many."""
        if not wanted or self._rules.fewshot_from != "rows":
            return []
        rows = self._rules.load(self._member, self._options.root, "fewshot")
        if wanted > len(rows):
            raise RecipeError(
                f"{self.name} has {len(rows)} examples for the prompt, {wanted} were asked for",
                place="--num-fewshot (evaluate.num_fewshot)",
                fix=f"ask for at most {len(rows)}",
            )
        if len(rows) <= 4 * wanted:
            return rows[:wanted]
        return random.Random(derive_seed(0, "evaluate", self.name)).sample(rows, wanted)

    def __len__(self) -> int:
        return len(self._asked)

    def identity(self) -> dict[str, Any]:
        return {
            "definition": "lettered",
            "data": self._data_hash,
            "mode": self.mode,
            "num_fewshot": self._num_fewshot,
            "max_new_tokens": self._options.max_new_tokens,
        }

    def questions(self, limit: int | None, render: Render | None) -> Iterator[Question]:
        style = f"{'chat' if render else 'fewshot'}-{self._num_fewshot}"
        for number, (row, asked) in enumerate(zip(self._rows[:limit], self._asked[:limit], strict=True)):
            prompt = self._shown + asked.prompt
            if render is not None:
                prompt = _as_chat(prompt, render, self._options.system_prompt)
            # after examples a base model goes on with the next question; a chat model may write a paragraph first
            stops = [] if render is not None or not self._num_fewshot else ["\n\n"]
            new_tokens = self._options.max_new_tokens or DEFAULT_NEW_TOKENS
            requests = _generation(self.name, number, row, prompt, stops, new_tokens)
            doc_hash = question_hash(self._rules.question(row))
            gold = gold_request(self._rules, self._member, row, requests[0], self._options)
            yield Question(number, str(number), style, doc_hash, prompt, requests, gold)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        asked = self._asked[question.number]
        answer = asked.read(responses[0])
        correct = answer == asked.gold
        return Judgement(answer, responses[0], asked.gold, correct, float(correct))


class TemplateExam(AbstractExam):
    """A training task's held-out rows, in the template that students are trained on."""

    def __init__(self, evaluation: Evaluation, member: Member, options: SuiteOptions) -> None:
        self.evaluation, self.name, self.mode = evaluation.name, member.name, "generation"
        self._rules, self._member, self._options = evaluation, member, options
        self.note = token_limit_note(options.max_new_tokens) if options.max_new_tokens else ""
        self._rows = evaluation.load(member, options.root, "test")
        self._data_hash = sha256_of(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def identity(self) -> dict[str, Any]:
        return {
            "definition": "own template",
            "data": self._data_hash,
            "mode": self.mode,
            "style": self._options.style,
            "max_new_tokens": self._options.max_new_tokens,
        }

    def questions(self, limit: int | None, render: Render | None) -> Iterator[Question]:
        stops = [_STOPS.get(self._rules.language, _STOPS["en"])]
        for number, row in enumerate(self._rows[:limit]):
            assert self._rules.rules is not None, f"{self.name} has no template of its own"
            written = self._rules.rules.write(self._rules.problem(row), self._options.style)
            prompt = written.prompt
            if render is not None:  # as students are trained with data.template: chat
                prompt = _as_chat(written.user or written.prompt, render, self._options.system_prompt)
            new_tokens = self._options.max_new_tokens or DEFAULT_NEW_TOKENS
            requests = _generation(self.name, number, row, prompt, stops, new_tokens)
            doc_hash = question_hash(self._rules.question(row))
            gold = gold_request(self._rules, self._member, row, requests[0], self._options)
            yield Question(number, str(row["id"]), self._options.style, doc_hash, prompt, requests, gold)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        gold = self._rules.gold(self._member, self._rows[question.number])
        answer = self._rules.extract(self._member, responses[0])
        correct = answer is not None and self._rules.same(self._member, answer, gold)
        return Judgement(answer, responses[0], gold, correct, float(correct))


class RunTestExam(AbstractExam):
    """One task of a run's prepared test split, asked exactly as the stage `evaluate` asks it."""

    mode = "generation"
    evaluation = "own"

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
        for number, example in enumerate(self._examples[:limit]):
            prompt = EncodedPrompt(example.prompt, example.prompt_ids)
            doc = {"task": example.task, "id": example.id, "style": example.style, "answer": example.answer}
            requests = _generation(self.name, number, doc, prompt, [], self._max_new_tokens)
            yield Question(number, example.id, example.style, example.doc_hash, example.prompt, requests)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        gold = self._examples[question.number].answer
        correct = is_correct(self.name, responses[0], gold)
        return Judgement(extract_answer(self.name, responses[0]), responses[0], gold, correct, float(correct))
