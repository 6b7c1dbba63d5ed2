"""An exam: the questions of one member of an evaluation, asked in one way, and how answers to them are judged.

`AbstractExam` is what the suite runs; lm-eval's definitions are in `harness.py`, prompts of our own in `plain.py`, a
run's own test split in `own.py`. Knows no model, no file, and nothing of lm-eval but the shape of its requests.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvdistill.core.recipe import EvaluateRecipe

Mode = Literal["likelihood", "generation"]
Render = Callable[..., str]  # messages -> prompt, as lm-eval's `LM.apply_chat_template`
DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a definition sets none


@dataclass(frozen=True)
class SuiteOptions:
    """What is asked, and how. None: what each evaluation says of itself.

    root: folder with local copies; None: the hub. num_fewshot: examples in the prompt. limit: first n questions of
    each member. max_new_tokens: of a generated answer. style: of the training tasks' own templates. run: the run folder
    whose prepared test split is the evaluation `own`. batch_size: questions per call of the model. gold_nll: also how
    likely the model finds the published answer where answers are generated.
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
