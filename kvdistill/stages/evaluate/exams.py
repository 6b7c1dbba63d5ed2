"""An exam: the questions of one member of an evaluation, asked in one way, and how answers to them are judged.

`AbstractExam` is what the suite runs; exams on public rows with prompts of our own (lettered multiple choice, the
training tasks' templates) follow it: their answers are generated and read by the evaluation's own mark. lm-eval's
definitions are in `harness.py`, a run's own test split in `own.py`. Knows no model, and nothing of lm-eval but the
shape of its requests.
"""

from __future__ import annotations

import abc
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.errors import RecipeError
from kvdistill.core.files import sha256_of
from kvdistill.core.recipe import EvaluateRecipe
from kvdistill.core.runtime import derive_seed
from kvdistill.data.leaks import question_hash
from kvdistill.data.sets import Evaluation, Lettered, Member

Mode = Literal["likelihood", "generation"]
Render = Callable[..., str]  # messages -> prompt, as lm-eval's `LM.apply_chat_template`
DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a definition sets none


@dataclass(frozen=True)
class SuiteOptions:
    """What is asked, and how. None: what each evaluation says of itself.

    root: folder with local copies; None: the hub. num_fewshot: examples in the prompt. limit: first n questions of
    each member. max_new_tokens: of a generated answer. style: of the training tasks' own templates. run: the run folder
    whose prepared test split is the evaluation `own`; reasoning: of the arm whose student reads it. batch_size:
    questions per call of the model. gold_nll: also how likely the model finds the published answer where answers are
    generated.
    """

    root: Path | None = None
    num_fewshot: int | None = None
    choice: Mode = "likelihood"
    chat: bool = False
    system_prompt: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 64
    style: Literal["cot", "direct"] = "cot"
    run: Path | None = None
    reasoning: str = "written"
    gold_nll: bool = False

    @classmethod
    def of(cls, asked: EvaluateRecipe, root: str | None, style: str | None, **more: Any) -> SuiteOptions:
        """From the section `evaluate` of a recipe or command. style: whatever is not `direct` is `cot`."""
        return cls(
            root=Path(root).expanduser() if root else None,
            num_fewshot=asked.num_fewshot,
            choice=asked.choice,
            chat=asked.chat,
            limit=asked.limit,
            max_new_tokens=asked.max_new_tokens if "max_new_tokens" in asked.model_fields_set else None,
            batch_size=asked.batch_size,
            style="direct" if style == "direct" else "cot",
            **more,
        )


@dataclass(frozen=True)
class Request:
    """One thing to ask of a model, in the shape of lm-eval's `Instance`, whose part it plays for exams of our own.

    request_type: the method that answers it: lm-eval's `generate_until` (args: prompt, settings) or `loglikelihood`
    (args: prompt, continuation); `answer_example` or `score_example` (args: example, settings) of `own.StudentLM`.
    """

    request_type: str
    doc: Any
    args: tuple[Any, Any]
    task_name: str
    doc_id: int
    idx: int = 0


@dataclass(frozen=True)
class Usage:
    """What one request took. forward_passes: of this row alone, however many rows ran beside it in the batch.

    truncated: the prompt did not fit in the model's window and was cut from the left. unspelled: characters of the
    prompt (spaces not counted) that the tokenizer cannot write, of `characters`. scored: tokens of a continuation.
    """

    tokens_in: int
    tokens_out: int
    forward_passes: int
    truncated: bool
    unspelled: int
    characters: int
    scored: int = 0


@dataclass(frozen=True)
class Question:
    """One question as it is asked.

    requests: one, or one for each choice; ours or lm-eval's `Instance`s. gold: one more, for how likely the published
    answer is; None where choices are scored anyway.
    """

    number: int
    id: str
    style: str
    doc_hash: str
    prompt: str
    requests: Sequence[Any]
    gold: Any = None

    @property
    def key(self) -> tuple[str, str]:
        return self.id, self.style

    @property
    def prompt_hash(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Judgement:
    """What was answered, and what it is worth. score: in [0, 1]; 1 or 0 but for probability masses.

    right: which request's log-likelihood is the gold choice's. metrics: lm-eval's own, `metric,filter` -> value.
    """

    prediction: str | None
    completion: str | None
    gold: str
    correct: bool
    score: float
    right: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class AbstractExam(abc.ABC):
    """evaluation, name: whose member this is, and which. mode: how it is asked. note: what a reader must know."""

    evaluation: str
    name: str
    mode: Mode
    note: str = ""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Questions that are there."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that a record depends on, JSON-able: the definition and its version, the data, the options."""

    @abc.abstractmethod
    def questions(self, limit: int | None, render: Render | None) -> Iterator[Question]:
        """The first `limit` questions in the publisher's order; the same prompts in every call.

        render: writes messages as a prompt; None: plain text.
        """

    def turn(self, question: Question) -> tuple[Any, ...]:
        """What questions are sorted by before they are asked in chunks: by length, so that there is little padding."""
        characters = sum(len(request.args[0]) for request in question.requests)
        return -characters, question.prompt, self.name, question.number

    @abc.abstractmethod
    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        """responses: one for each request of the question, as the method of its type gives them."""


# -- on public rows, with prompts of our own -------------------------------------------------------------

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
        rows: list[dict[str, Any]] = []
        if wanted and evaluation.fewshot_from == "rows":
            rows = evaluation.load(member, options.root, "fewshot")
            if wanted > len(rows):
                raise RecipeError(
                    f"{self.name} has {len(rows)} examples for the prompt, {wanted} were asked for",
                    place="--num-fewshot (evaluate.num_fewshot)",
                    fix=f"ask for at most {len(rows)}",
                )
            # the same before every question: the first ones, or drawn once where there are many
            drawn = random.Random(derive_seed(0, "evaluate", self.name))
            rows = rows[:wanted] if len(rows) <= 4 * wanted else drawn.sample(rows, wanted)
        shots = [self._lettered(row) for row in rows]
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
