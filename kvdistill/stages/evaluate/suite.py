"""Evaluations on a model, chunk by chunk: ask, judge, append; the same call goes on where it stopped.

    plan_suite       names -> exams, with all data read and checked; no model needed
    evaluate_suite   exams on any lm-eval `LM`: records.jsonl and results.json in one folder

Chunks are a function of what was asked for and nothing else: a resumed run forms the same batches as an uninterrupted
one, so it gives the same bits. Knows no Hugging Face model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.core.files import write_json
from kvdistill.core.progress import Progress, silent
from kvdistill.data.sets import EVALUATIONS, Evaluation, Member, find_evaluation
from kvdistill.stages.evaluate.exams import AbstractExam, Judgement, Question, Render, SuiteOptions
from kvdistill.stages.evaluate.harness import HarnessExam
from kvdistill.stages.evaluate.own import RunTest
from kvdistill.stages.evaluate.plain import LetteredExam, TemplateExam
from kvdistill.stages.evaluate.records import RESULTS, AnswerBook, check_book, key_of, open_book
from kvdistill.stages.evaluate.results import summarise_book

Exams = dict[str, list[AbstractExam]]  # evaluation -> its members
_Asked = tuple[AbstractExam, Question]


def plan_suite(tasks: Sequence[str], options: SuiteOptions) -> Exams:
    """The exams of the named evaluations, in that order; a name twice counts once.

    Every name is looked up before any data is read, and all data is read and checked here. Raises DataError (the
    nearest name; missing files; bad rows) and RecipeError (more few-shot examples than there are).
    """
    test = RunTest(options.run) if options.run is not None else None
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise DataError("no evaluation is named", place="--tasks", fix=f"choose from: {', '.join(EVALUATIONS)}, own")
    found: dict[str, Evaluation | None] = {}
    for name in names:
        own = test is not None and name not in EVALUATIONS and test.covers(name)
        if not own and name.split(":")[0] == "own":
            raise _no_test_split(name, test)
        found[name] = None if own else find_evaluation(name, place="--tasks (evaluate.tasks)")
    exams: Exams = {}
    for name, evaluation in found.items():
        if evaluation is None:
            assert test is not None
            exams[name] = list(test.exams(name, options))
        else:
            members = evaluation.members(options.root)
            exams[evaluation.name] = [_exam(evaluation, member, options) for member in members]
    return exams


def _no_test_split(name: str, test: RunTest | None) -> DataError:
    if test is None:
        return DataError(
            f"{name!r} is the test split of a run, and this model is in no run folder",
            place="--tasks",
            fix="give a model of a run folder (runs/NAME/arms/ARM/seed-N/model), or name public evaluations",
        )
    return DataError(f"the run has no test split {name!r}", place="--tasks", fix=f"there are: own, {test.names()}")


def _exam(evaluation: Evaluation, member: Member, options: SuiteOptions) -> AbstractExam:
    if not member.definition:
        return TemplateExam(evaluation, member, options)
    if options.choice == "generation" and evaluation.native == "likelihood":
        first = evaluation.load(member, options.root, "test")[0]
        if evaluation.lettered(member, first) is not None:
            return LetteredExam(evaluation, member, options)
    return HarnessExam(evaluation, member, options)


def prompt_options(options: SuiteOptions) -> dict[str, Any]:
    """What changes the prompts of every evaluation alike, as the folder's identity keeps it."""
    return {"choice": options.choice, "chat": options.chat, "system_prompt": options.system_prompt}


def check_folder(exams: Exams, options: SuiteOptions, out: Path, asker: Mapping[str, Any]) -> None:
    """Refuse, before a model is loaded, a folder that answers something else. RunFolderError names the key."""
    check_book(out, asker, exams, prompt_options(options))


def evaluate_suite(
    lm: Any,
    tasks: Sequence[str] | Exams,
    options: SuiteOptions,
    out: Path,
    progress: Progress = silent,
    *,
    asker: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask `lm` (any lm-eval `LM`, or a function that makes one when there is something to ask) and return the results.

    tasks: names, or what `plan_suite` made of them. asker: what identifies the model; a folder holds answers of one.
    Writes identity.json, records.jsonl and results.json into `out`, and nothing anywhere else.
    """
    exams = tasks if isinstance(tasks, dict) else plan_suite(tasks, options)
    made: list[Any] = []

    def ready() -> Any:
        if not made:
            made.append(lm() if callable(lm) else lm)
        return made[0]

    with open_book(out, asker or {"model": type(lm).__name__}, exams, prompt_options(options), options.limit) as book:
        for name, members in exams.items():
            _run_evaluation(ready, name, members, options, book, progress)
        results = summarise_book(book)
        write_json(out / RESULTS, results)
    return results


def _run_evaluation(
    ready: Callable[[], Any],
    name: str,
    members: Sequence[AbstractExam],
    options: SuiteOptions,
    book: AnswerBook,
    progress: Progress,
) -> None:
    """Ask what is not answered yet. ready: the model, made when there is something to ask."""
    what, total, done = f"evaluate {name}", book.evaluations[name]["questions"], len(book.rows(name))
    progress(what, done, total)
    if done == total:
        return
    lm = ready()
    render: Render | None = lm.apply_chat_template if options.chat else None
    for chunk in _open_chunks(book, name, members, render, options.batch_size):

        def show(answered: float, before: int = done) -> None:
            progress(what, min(total, before + answered), total)

        _follow(lm, show, chunk)
        new = [row for row in _ask(lm, chunk) if key_of(row) not in book.answered]
        book.append(new)
        done += len(new)
        progress(what, done, total)


def _open_chunks(
    book: AnswerBook, name: str, members: Sequence[AbstractExam], render: Render | None, size: int
) -> Iterator[list[_Asked]]:
    """Chunks with a question that is not answered, whole: a chunk that was cut by a kill is asked again as it was."""
    limits = book.limits(name)
    asked = [[*exam.questions(limits[-1], render)] for exam in members]
    for begin, end in zip([0, *limits], limits, strict=False):
        part = [
            (exam, question)
            for exam, questions in zip(members, asked, strict=True)
            for question in questions[begin:end]
        ]
        part.sort(key=lambda pair: (-pair[1].length, pair[1].prompt, pair[0].name, pair[1].number))
        for start in range(0, len(part), size):
            chunk = part[start : start + size]
            if any((name, exam.name, *question.key) not in book.answered for exam, question in chunk):
                yield chunk


def _follow(lm: Any, show: Callable[[float], None], chunk: Sequence[_Asked]) -> None:
    """Let a model that says how far it is (`MeteredLM`) move the bar inside a chunk."""
    if hasattr(lm, "on_answers"):
        lm.on_answers = show if all(len(question.requests) == 1 for _, question in chunk) else lambda answered: None


def _ask(lm: Any, chunk: Sequence[_Asked]) -> list[dict[str, Any]]:
    """The records of a chunk. Seconds are shared evenly among its questions; scoring gold answers is not counted."""
    begun = time.perf_counter()
    answers, usage = _answers(lm, [request for _, question in chunk for request in question.requests])
    seconds = (time.perf_counter() - begun) / len(chunk)
    gold, gold_usage = _answers(lm, [question.gold for _, question in chunk if question.gold is not None])
    rows = []
    for exam, question in chunk:
        ids = [id(request) for request in question.requests]
        judged = exam.judge(question, [answers[i] for i in ids])
        nll = None
        if question.gold is not None:
            nll = _nll(gold[id(question.gold)], gold_usage[id(question.gold)])
        elif judged.right is not None:
            nll = _nll(answers[ids[judged.right]], usage[ids[judged.right]])
        taken = {**_usage([usage[i] for i in ids]), "seconds": seconds}
        rows.append(_record(exam, question, judged, nll, taken))
    return rows


def _answers(lm: Any, requests: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """id of a request -> response, and -> what it took (None where the model does not say)."""
    answers: dict[int, Any] = {}
    usage: dict[int, Any] = {}
    for kind in sorted({request.request_type for request in requests}):
        chosen = [request for request in requests if request.request_type == kind]
        responses = getattr(lm, kind)(chosen)
        used = getattr(lm, "usage", None) or [None] * len(chosen)
        for request, response, one in zip(chosen, responses, used, strict=True):
            answers[id(request)], usage[id(request)] = response, one
    return answers, usage


def _nll(response: Any, usage: Any) -> float | None:
    """Mean nats per token of a scored text; None where the model does not count tokens, or there are none."""
    return -float(response[0]) / usage.scored if usage is not None and usage.scored else None


def _record(
    exam: AbstractExam, question: Question, judged: Judgement, nll: float | None, taken: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "evaluation": exam.evaluation,
        "task": exam.name,
        "id": question.id,
        "number": question.number,
        "style": question.style,
        "doc_hash": question.doc_hash,
        "prompt_hash": question.prompt_hash,
        "mode": exam.mode,
        "prediction": judged.prediction,
        "completion": judged.completion,
        "gold": judged.gold,
        "correct": judged.correct,
        "score": judged.score,
        "metrics": dict(judged.metrics),
        "nll": nll,
        **taken,
    }


def _usage(usage: Sequence[Any]) -> dict[str, Any]:
    """What the requests of one question took together; null where the model does not say."""
    if any(one is None for one in usage):
        keys = ("tokens_in", "tokens_out", "forward_passes", "truncated", "unspelled")
        return dict.fromkeys(keys)
    characters = sum(one.characters for one in usage)
    return {
        "tokens_in": sum(one.tokens_in for one in usage),
        "tokens_out": sum(one.tokens_out for one in usage),
        "forward_passes": sum(one.forward_passes for one in usage),
        "truncated": any(one.truncated for one in usage),
        "unspelled": sum(one.unspelled for one in usage) / characters if characters else 0.0,
    }
