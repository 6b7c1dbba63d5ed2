"""From records to results.json: scores with their standard errors, what answers cost, what went wrong.

Everything is a plain mean over questions. An evaluation of many members (BBH, CMMLU, C-Eval) is the mean over all its
questions, as lm-eval weighs them; TruthfulQA is reported as MC2, the figure that leaderboards show, with MC1 beside it.
The macro average gives every finished evaluation the same weight. Knows records only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvdistill.stages.evaluate.records import AnswerBook

Row = Mapping[str, Any]
HEADLINES = ("math_verify,none",)  # lm-eval's figure to show beside ours where it is not the definition's first
SCORED_BY = {"truthfulqa": "truthfulqa_mc2"}  # the member whose score is the evaluation's; else all its questions


def summarise_book(book: AnswerBook) -> dict[str, Any]:
    """{asked, evaluations: name -> figures, macro_average, in_macro_average}; figures that are unknown are None."""
    evaluations = {name: _evaluation(name, entry, book.rows(name)) for name, entry in book.evaluations.items()}
    finished = {name: found["score"] for name, found in evaluations.items() if found["complete"]}
    return {
        "asked": book.asked,
        "evaluations": evaluations,
        "macro_average": statistics.fmean(finished.values()) if finished else None,
        "in_macro_average": list(finished),
    }


def _evaluation(name: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    by_member: dict[str, list[Row]] = {member: [] for member in entry["members"]}
    for row in rows:
        by_member[row["task"]].append(row)
    members = {member: figures(found) for member, found in by_member.items() if found}
    scored_by = SCORED_BY.get(name)
    scored = by_member.get(scored_by, []) if scored_by else list(rows)
    whole = figures(scored) if scored else {"questions": 0, "score": None, "stderr": None}
    return {
        **whole,
        "complete": len(rows) == entry["questions"] > 0,
        "asked_questions": entry["questions"],
        "limit": entry["limit"],
        **({"scored_by": scored_by} if scored_by else {}),
        "notes": entry["notes"],
        "members": members,
    }


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Score, standard error and cost of some records (at least one).

    stderr: standard deviation (n - 1) / sqrt(n), lm-eval's; None for one question. Tokens, passes and seconds are means
    per answer; truncated is a share of questions, unspelled of the prompts' characters.
    """
    scores = [float(row["score"]) for row in rows]
    metrics = sorted({name for row in rows for name in row["metrics"]}, key=_as_listed(rows))
    return {
        "questions": len(rows),
        "score": statistics.fmean(scores),
        "stderr": statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        "mode": "/".join(sorted({row["mode"] for row in rows})),
        "style": "/".join(sorted({row["style"] for row in rows})),
        "no_answer": sum(row["prediction"] is None for row in rows) / len(rows),
        **{key: _mean(rows, key) for key in ("tokens_in", "tokens_out", "forward_passes", "seconds")},
        **{key: _mean(rows, key) for key in ("truncated", "unspelled")},
        "metric": next((name for name in HEADLINES if name in metrics), metrics[0] if metrics else None),
        "metrics": {name: _mean([row["metrics"] for row in rows], name) for name in metrics},
    }


def _as_listed(rows: Sequence[Row]) -> Any:
    order = [name for row in rows for name in row["metrics"]]
    return order.index


def _mean(rows: Sequence[Row], key: str) -> float | None:
    known = [float(row[key]) for row in rows if row.get(key) is not None]
    return statistics.fmean(known) if known else None
