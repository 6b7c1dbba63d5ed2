"""Evaluations on a model, chunk by chunk: ask, judge, append; the same call goes on where it stopped.

    plan_suite       names -> exams, with all data read and checked; no model needed
    make_lm          what answers them: a student for a run's test split, lm-eval's LM for public evaluations
    evaluate_suite   exams on that, or on any lm-eval `LM`: records.jsonl and results.json in one folder

Chunks are a function of what was asked for and nothing else: a resumed run forms the same batches as an uninterrupted
one, so it gives the same bits. lm-eval takes seconds to import, and is imported where a public evaluation is asked for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvdistill.arms.student import Student
from kvdistill.core.errors import DataError
from kvdistill.core.files import write_json
from kvdistill.core.progress import Progress, silent
from kvdistill.core.records import Record
from kvdistill.core.stopping import give_in, put_off
from kvdistill.data.sets import EVALUATIONS, Evaluation, Member, find_evaluation
from kvdistill.stages.evaluate.book import RESULTS, AnswerBook, open_book, summarise_book
from kvdistill.stages.evaluate.exams import (
    AbstractExam,
    LetteredExam,
    Question,
    Render,
    SuiteOptions,
    TemplateExam,
    Usage,
)
from kvdistill.stages.evaluate.own import RunTest, RunTestExam, StudentLM

Exams = dict[str, list[AbstractExam]]  # evaluation -> its members
_Asked = tuple[AbstractExam, Question]


def plan_suite(tasks: Sequence[str], options: SuiteOptions) -> Exams:
    """The exams of the named evaluations, in that order; a name twice counts once.

    Every name is looked up before any data is read, and all data is read and checked here. Raises DataError (the
    nearest name; missing files; bad rows) and RecipeError (more few-shot examples than there are).
    """
    test = RunTest(options.run, options.reasoning) if options.run is not None else None
    names = [name.strip() for name in tasks if name.strip()]
    if not names:
        raise DataError("no evaluation is named", place="--tasks", fix=f"choose from: {', '.join(EVALUATIONS)}, own")
    found: dict[str, Evaluation | None] = {}
    for name in names:
        own = test is not None and name not in EVALUATIONS and test.covers(name)
        if not own and name.split(":")[0] == "own":
            if test is None:
                what = f"{name!r} is the test split of a run, and this model is in no run folder"
                fix = "give a model of a run folder (runs/NAME/arms/ARM/seed-N/model), or name public evaluations"
            else:
                what, fix = f"the run has no test split {name!r}", f"there are: own, {test.names()}"
            raise DataError(what, place="--tasks", fix=fix)
        found[name] = None if own else find_evaluation(name, place="--tasks (evaluate.tasks)")
    exams: Exams = {}
    for name, evaluation in found.items():
        if evaluation is None:
            assert test is not None
            exams[name] = list(test.exams(name, options.max_new_tokens))
        else:
            members = evaluation.members(options.root)
            exams[evaluation.name] = [_public_exam(evaluation, member, options) for member in members]
    return exams


def _public_exam(evaluation: Evaluation, member: Member, options: SuiteOptions) -> AbstractExam:
    if not member.definition:
        return TemplateExam(evaluation, member, options)
    if options.choice == "generation" and evaluation.native == "likelihood":
        first = evaluation.load(member, options.root, "test")[0]
        if evaluation.lettered(member, first) is not None:
            return LetteredExam(evaluation, member, options)
    from kvdistill.stages.evaluate.harness import HarnessExam, quiet_harness

    quiet_harness()
    return HarnessExam(evaluation, member, options)


def make_lm(
    model: Any, tokenizer: Any, exams: Exams, options: SuiteOptions, *, student: Student | None, begins_with_bos: bool
) -> Any:
    """What answers the questions of `exams`: `StudentLM` for a run's test split, `MeteredLM` where there are others.

    student: the same model, where a run's test split may be asked for.
    """
    size, chat = options.batch_size, options.chat
    if all(isinstance(exam, RunTestExam) for members in exams.values() for exam in members):
        return StudentLM(student, tokenizer, size)
    from kvdistill.stages.evaluate.lm import MeteredLM

    return MeteredLM(model, tokenizer, batch_size=size, bos_in_front=begins_with_bos, chat=chat, student=student)


def evaluate_suite(
    lm: Any,
    tasks: Sequence[str] | Exams,
    options: SuiteOptions,
    out: Path,
    progress: Progress = silent,
    *,
    asker: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask and return the results. Writes identity.json, records.jsonl and results.json into `out`, and nothing else.

    Args:
        lm: what `make_lm` makes, any lm-eval `LM`, or a function that makes one when there is something to ask.
        tasks: names, or what `plan_suite` made of them.
        asker: what identifies the model; a folder holds answers of one.
    """
    exams = tasks if isinstance(tasks, dict) else plan_suite(tasks, options)
    ready = functools.cache(lm if callable(lm) else lambda: lm)
    with open_book(out, asker or {"model": type(lm).__name__}, exams, options) as book:
        for name, members in exams.items():
            total, done = book.evaluations[name]["questions"], len(book.rows(name))
            progress(f"evaluate {name}", done, total)
            if done < total:
                with put_off():
                    _run_evaluation(ready(), name, members, options, book, progress)
        results = summarise_book(book)
        write_json(out / RESULTS, results)
    return results


def _run_evaluation(
    lm: Any,
    name: str,
    members: Sequence[AbstractExam],
    options: SuiteOptions,
    book: AnswerBook,
    progress: Progress,
) -> None:
    """Ask what is not answered yet. A chunk that was cut by a kill is asked again as it was, whole."""
    total, done = book.evaluations[name]["questions"], len(book.rows(name))
    render: Render | None = lm.apply_chat_template if options.chat and hasattr(lm, "apply_chat_template") else None
    limits = book.limits(name)
    asked = [[*exam.questions(limits[-1], render)] for exam in members]
    for begin, end in zip([0, *limits], limits, strict=False):
        part = [(exam, one) for exam, all_of_it in zip(members, asked, strict=True) for one in all_of_it[begin:end]]
        part.sort(key=lambda pair: pair[0].turn(pair[1]))
        chunks = [part[start : start + options.batch_size] for start in range(0, len(part), options.batch_size)]
        chunks = [
            chunk for chunk in chunks if any((name, exam.name, *one.key) not in book.answered for exam, one in chunk)
        ]
        # published answers of a test split are scored together, sorted by their own length
        gold = [one.gold for _, one in part if one.gold is not None and one.gold.request_type == "score_example"]
        scored = dict(zip(map(id, gold), lm.score_example(gold), strict=True)) if chunks and gold else {}
        for chunk in chunks:

            def show(answered: float, before: int = done) -> None:
                progress(f"evaluate {name}", min(total, before + answered), total)

            if hasattr(lm, "on_answers"):  # a model of ours says how far it is inside a chunk
                lm.on_answers = show if all(len(question.requests) == 1 for _, question in chunk) else lambda _: None
            new = [record for record in _ask(lm, chunk, scored) if record.key not in book.answered]
            book.append(new)
            give_in()  # asked to end, it does after the chunk it is at
            done += len(new)
            progress(f"evaluate {name}", done, total)


def _ask(lm: Any, chunk: Sequence[_Asked], scored: Mapping[int, tuple[float, float]]) -> list[Record]:
    """The records of a chunk. Seconds are shared evenly among its questions; scoring gold answers is not counted.

    scored: id of a request for a published answer -> its NLL and its reasoning's, where they are known already.
    """
    begun = time.perf_counter()
    answers = _answers(lm, [request for _, question in chunk for request in question.requests])
    seconds = (time.perf_counter() - begun) / len(chunk)
    gold = [one.gold for _, one in chunk if one.gold is not None and id(one.gold) not in scored]
    nll = {**scored, **{i: (_nll(*answer), None) for i, answer in _answers(lm, gold).items()}}
    records = []
    for exam, question in chunk:
        found = [answers[id(request)] for request in question.requests]
        judged = exam.judge(question, [response for response, _ in found])
        right = None if judged.right is None else _nll(*found[judged.right])
        nll_answer, nll_reasoning = (right, None) if question.gold is None else nll[id(question.gold)]
        records.append(
            Record(
                evaluation=exam.evaluation,
                task=exam.name,
                id=question.id,
                number=question.number,
                style=question.style,
                doc_hash=question.doc_hash,
                prompt_hash=question.prompt_hash,
                mode=exam.mode,
                prediction=judged.prediction,
                completion=judged.completion,
                gold=judged.gold,
                correct=judged.correct,
                score=judged.score,
                metrics=dict(judged.metrics),
                nll=nll_answer,
                nll_reasoning=nll_reasoning,
                seconds=seconds,
                **_cost([usage for _, usage in found if usage is not None]),
            )
        )
    return records


def _cost(took: Sequence[Usage]) -> dict[str, Any]:
    """What the requests of one question took together; null where the model does not say."""
    characters = sum(one.characters for one in took)
    return {
        "tokens_in": sum(one.tokens_in for one in took) if took else None,
        "tokens_out": sum(one.tokens_out for one in took) if took else None,
        "forward_passes": sum(one.forward_passes for one in took) if took else None,
        "truncated": any(one.truncated for one in took) if took else None,
        "unspelled": sum(one.unspelled for one in took) / max(1, characters) if took else None,
    }


def _answers(lm: Any, requests: Sequence[Any]) -> dict[int, tuple[Any, Usage | None]]:
    """id of a request -> response, and what it took (None where the model does not say)."""
    answers: dict[int, tuple[Any, Usage | None]] = {}
    for kind in sorted({request.request_type for request in requests}):
        chosen = [request for request in requests if request.request_type == kind]
        responses = getattr(lm, kind)(chosen)
        used = getattr(lm, "usage", None) or [None] * len(chosen)
        answers |= dict(zip(map(id, chosen), zip(responses, used, strict=True), strict=True))
    return answers


def _nll(response: Any, usage: Usage | None) -> float | None:
    """Mean nats per token of a scored text; None where the model does not count tokens, or there are none."""
    return -float(response[0]) / usage.scored if usage is not None and usage.scored else None
