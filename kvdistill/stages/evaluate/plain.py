"""Exams with prompts of our own over public rows: lettered multiple choice, and the training tasks' templates.

Every answer is generated and read by the evaluation's own mark. Knows no model and no lm-eval.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from kvdistill.core.errors import RecipeError
from kvdistill.core.files import sha256_of
from kvdistill.core.runtime import derive_seed
from kvdistill.data.leaks import question_hash
from kvdistill.data.sets import Evaluation, Lettered, Member
from kvdistill.stages.evaluate.exams import (
    DEFAULT_NEW_TOKENS,
    AbstractExam,
    Judgement,
    Question,
    Render,
    Request,
    SuiteOptions,
)

_STOPS = {"en": "Question:", "zh": "问题："}  # where a model goes on with a problem of its own


class PublicExam(AbstractExam):
    """One member's rows, whoever writes the prompts."""

    def __init__(self, evaluation: Evaluation, member: Member, options: SuiteOptions) -> None:
        """Reads and checks the rows. Raises DataError for them, RecipeError for more examples than there are."""
        self.evaluation, self.name, self.mode = evaluation.name, member.name, "generation"
        self._rules, self._member, self._options = evaluation, member, options
        if options.max_new_tokens:
            self.note = f"answers of at most {options.max_new_tokens} tokens (evaluate.max_new_tokens)"
        self._rows = evaluation.load(member, options.root, "test")

    def __len__(self) -> int:
        return len(self._rows)

    def gold_request(self, asked: Any, number: int) -> Request | None:
        """The published answer after the prompt of a generated one, to be scored; None where that is not wanted.

        asked: the request that generates, ours or lm-eval's.
        """
        if not self._options.gold_nll or asked.request_type != "generate_until":
            return None
        answer = self._rules.published_gold(self._member, self._rows[number])
        space = "" if answer[:1].isspace() or self._rules.language == "zh" or self._options.chat else " "
        return Request("loglikelihood", self._rows[number], (asked.args[0], space + answer), self.name, number)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        gold = self._rules.gold(self._member, self._rows[question.number])
        answer = self._rules.extract(self._member, responses[0])
        correct = answer is not None and self._rules.same(self._member, answer, gold)
        return Judgement(answer, responses[0], gold, correct, float(correct))

    def _question(
        self, number: int, id: str, style: str, prompt: str, said: str, render: Render | None, stops: Sequence[str]
    ) -> Question:
        """said: what a user says in place of `prompt` where there is a chat template."""
        row, options = self._rows[number], self._options
        if render is not None:
            system = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
            prompt = render([*system, {"role": "user", "content": said}], add_generation_prompt=True)
        new_tokens = options.max_new_tokens or DEFAULT_NEW_TOKENS
        settings = {"until": list(stops), "do_sample": False, "max_gen_toks": new_tokens}
        asked = Request("generate_until", row, (prompt, settings), self.name, number)
        doc_hash = question_hash(self._rules.question(row))
        return Question(number, id, style, doc_hash, prompt, [asked], self.gold_request(asked, number))


class LetteredExam(PublicExam):
    """Multiple choice by generation: the choices stand in the prompt with letters, and a letter is to be written."""

    def __init__(self, evaluation: Evaluation, member: Member, options: SuiteOptions) -> None:
        super().__init__(evaluation, member, options)
        self._asked = [self._lettered(row) for row in self._rows]
        wanted = evaluation.num_fewshot if options.num_fewshot is None else options.num_fewshot
        shots = [self._lettered(row) for row in self._shots(wanted)]
        space = "" if evaluation.language == "zh" else " "
        self._shown = "".join(f"{shot.prompt}{space}{shot.gold}\n\n" for shot in shots)
        self._num_fewshot = len(shots)
        self._data_hash = sha256_of(
            [[one.prompt for one in self._asked], [one.gold for one in self._asked], self._shown]
        )

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
        # after examples a base model goes on with the next question; a chat model may write a paragraph first
        stops = [] if render is not None or not self._num_fewshot else ["\n\n"]
        for number, asked in enumerate(self._asked[:limit]):
            prompt = self._shown + asked.prompt
            yield self._question(number, str(number), style, prompt, prompt, render, stops)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        asked = self._asked[question.number]
        answer = asked.read(responses[0])
        correct = answer == asked.gold
        return Judgement(answer, responses[0], asked.gold, correct, float(correct))


class TemplateExam(PublicExam):
    """A training task's held-out rows, in the template that students are trained on (data.template: chat, too)."""

    def identity(self) -> dict[str, Any]:
        return {
            "definition": "own template",
            "data": sha256_of(self._rows),
            "mode": self.mode,
            "style": self._options.style,
            "max_new_tokens": self._options.max_new_tokens,
        }

    def questions(self, limit: int | None, render: Render | None) -> Iterator[Question]:
        rules, style = self._rules.rules, self._options.style
        assert rules is not None, f"{self.name} has no template of its own"
        stops = [_STOPS.get(self._rules.language, _STOPS["en"])]
        for number, row in enumerate(self._rows[:limit]):
            written = rules.write(self._rules.problem(row), style)
            said = written.user or written.prompt
            yield self._question(number, str(row["id"]), style, written.prompt, said, render, stops)
