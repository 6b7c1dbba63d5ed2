"""Exams from lm-eval's own definitions: its prompts, its few-shot examples, its requests, its metrics.

The definition is the YAML file of the installed lm-eval; rows come from `kvdistill.data.sets` in the columns
that it expects. Whether an answer is right is decided by our rules; lm-eval's metrics stand beside them in the record.
Knows no model.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets  # before lm_eval: its import order is delicate
import lm_eval
import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from kvdistill.core.errors import RecipeError
from kvdistill.core.files import sha256_of
from kvdistill.core.runtime import derive_seed
from kvdistill.data.leaks import question_hash
from kvdistill.data.sets import Evaluation, Member
from kvdistill.stages.evaluate.exams import DEFAULT_NEW_TOKENS, Judgement, PublicExam, Question, Render, SuiteOptions

FEWSHOT_SEED = 1234  # lm-eval's own
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MASS = "truthfulqa_mc2"


class HarnessExam(PublicExam):
    """One lm-eval task over rows of ours."""

    def __init__(self, evaluation: Evaluation, member: Member, options: SuiteOptions) -> None:
        super().__init__(evaluation, member, options)
        config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / member.definition)
        config.pop("tag", None)
        self._num_fewshot = evaluation.num_fewshot if options.num_fewshot is None else options.num_fewshot
        if evaluation.fewshot_from == "none" or config.get("num_fewshot") == 0:  # lm-eval's own rule
            self._num_fewshot = 0
        rows = {"test": self._rows}
        if self._num_fewshot and evaluation.fewshot_from == "rows":
            rows["fewshot"] = evaluation.load(member, options.root, "fewshot")
        self._data_hash = sha256_of(rows)
        self._version = str((config.get("metadata") or {}).get("version", ""))
        for key in evaluation.replaced:
            config.pop(key, None)
        tables = {
            split: datasets.Dataset.from_list(rows.get(kind, rows["test"][:1]))
            for split, kind in evaluation.splits.items()
        }
        config["custom_dataset"] = lambda **_: tables
        state = random.getstate()  # definitions that shuffle do it alike whatever ran before, and leave no trace
        random.seed(derive_seed(0, "evaluate", member.name))
        try:
            self._task = _Task(config=config)
            self._docs = list(self._task.eval_docs)
        finally:
            random.setstate(state)
        assert len(self._docs) == len(self._rows), f"{member.definition} drops rows"
        task, wanted = self._task, self._num_fewshot
        own_split = task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.config.test_split
        if wanted and wanted > (available := len(task.sampler.df) - own_split):
            raise RecipeError(
                f"{self.name} has {available} examples for the prompt, {wanted} were asked for",
                place="--num-fewshot (evaluate.num_fewshot)",
                fix=f"ask for at most {available}, or leave it out: {evaluation.num_fewshot} is usual",
            )
        if self._task.OUTPUT_TYPE == "multiple_choice":
            self.mode = "likelihood"
            self.note = f"{self.name} has no lettered form: by likelihood" if options.choice == "generation" else ""

    def identity(self) -> dict[str, Any]:
        return {
            "definition": self._member.definition,
            "version": self._version,
            "lm_eval": metadata.version("lm_eval"),
            "data": self._data_hash,
            "mode": self.mode,
            "num_fewshot": self._num_fewshot,
            "max_new_tokens": self._options.max_new_tokens if self.mode == "generation" else None,
        }

    def questions(self, limit: int | None, render: Render | None) -> Iterator[Question]:
        task = self._task
        task.set_fewshot_seed(FEWSHOT_SEED)  # examples are drawn in the order of the questions, from the first one on
        chat: dict[str, Any] = {"apply_chat_template": render is not None, "chat_template": render}
        style = f"{'chat' if render else 'fewshot'}-{self._num_fewshot}"
        for number, doc in enumerate(self._docs[:limit]):
            context = task.fewshot_context(
                doc,
                self._num_fewshot,
                system_instruction=self._options.system_prompt,
                fewshot_as_multiturn=render is not None,
                gen_prefix=task.doc_to_prefix(doc),
                **chat,
            )
            made = task.construct_requests(doc=doc, ctx=context, metadata=(self.name, number, 1), **chat)
            requests = made if isinstance(made, list) else [made]
            if self.mode == "generation":
                settings = requests[0].args[1]
                own = [settings.pop(key) for key in _TOKEN_LIMITS if key in settings]
                settings["max_gen_toks"] = self._options.max_new_tokens or (own[0] if own else DEFAULT_NEW_TOKENS)
            doc_hash = question_hash(self._rules.question(self._rows[number]))
            gold = self.gold_request(requests[0], number)
            yield Question(number, str(number), style, doc_hash, context, requests, gold)

    def judge(self, question: Question, responses: Sequence[Any]) -> Judgement:
        """A choice is the likeliest, the first of equals. Nothing is predicted where a log-likelihood is NaN."""
        doc, row = self._docs[question.number], self._rows[question.number]
        for request, response in zip(question.requests, responses, strict=True):
            request.resps, request.filtered_resps = [response], {}
        self._task._instances = list(question.requests)
        self._task.apply_filters()
        metrics: dict[str, float] = {}
        for name in question.requests[0].filtered_resps:
            filtered = [request.filtered_resps[name] for request in question.requests]
            with np.errstate(all="ignore"):  # probabilities that underflow: lm-eval's figure is then NaN, ours is not
                values = self._task.process_results(doc, filtered)
            for metric, value in values.items():
                if isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0):
                    metrics[f"{metric},{name}"] = float(value)
        if self.mode == "generation":
            return dataclasses.replace(super().judge(question, responses), metrics=metrics)
        gold = self._rules.gold(self._member, row)
        likelihoods = [float(response[0]) for response in responses]
        choices, target = self._task.doc_to_choice(doc), self._task.doc_to_target(doc)
        right = int(target) if isinstance(target, int) else choices.index(target)
        best = max(range(len(choices)), key=likelihoods.__getitem__)
        sound = not any(math.isnan(value) for value in likelihoods)
        lettered = self._rules.lettered(self._member, row)
        prediction = str(lettered.natives[best] if lettered else choices[best]) if sound else None
        if self.name == _MASS:  # no single choice is right: the score is the probability mass on the true ones
            mass = _true_mass(likelihoods, row["mc2_targets"]["labels"]) if sound else 0.0
            return Judgement(prediction, None, gold, mass > 0.5, mass, right, metrics)
        correct = sound and best == right
        return Judgement(prediction, None, gold, correct, float(correct), right, metrics)


def _true_mass(likelihoods: Sequence[float], labels: Sequence[int]) -> float:
    """Share of the choices' probability on the true ones (Lin et al. 2022), as lm-eval's, but without underflow."""
    top = max(likelihoods)
    if not math.isfinite(top):
        return 0.0
    weights = [math.exp(value - top) for value in likelihoods]
    return sum(weight for weight, label in zip(weights, labels, strict=True) if label == 1) / sum(weights)


class _Task(ConfigurableTask):
    """lm-eval's task; what it renders of an example for the prompt is rendered once, not once for every question."""

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        return self._once(super().doc_to_text, doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return self._once(super().doc_to_target, doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        return self._once(super().doc_to_choice, doc, doc_to_choice)

    def _once(self, render: Callable[..., Any], doc: Any, template: Any) -> Any:
        if "_kept" not in self.__dict__:  # not yet there while lm-eval's own __init__ looks at the first document
            if not hasattr(self, "sampler") or not hasattr(self, "task_docs"):
                return render(doc, template)
            self._examples = [*self.sampler.df]  # held, so that their ids stay theirs
            self._kept: dict[Any, Any] = {id(example): {} for example in self._examples}
        kept = self._kept.get(id(doc))
        if kept is None:
            return render(doc, template)
        key = (render.__name__, template if isinstance(template, str) else id(template))
        if key not in kept:
            kept[key] = render(doc, template)
        return kept[key]


def quiet_harness() -> None:
    """Keep lm-eval's log lines and datasets' bars off the terminal: progress is ours to show."""
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it says so each time a comparison takes too long
