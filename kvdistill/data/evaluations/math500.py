"""MATH-500 (Lightman et al. 2023): 500 competition problems; the four-shot prompt's own mark says where the answer is.

That mark is `Final Answer: The final answer is $…$. I hope it is correct.` (Lewkowycz et al. 2022); a text without it
is read by the data's own mark, the last `\\boxed{…}`. Answers are compared as mathematics.
"""

from __future__ import annotations

import re
from typing import Any

from kvdistill.core.errors import DataError
from kvdistill.data.answers.latex import last_boxed, same_latex
from kvdistill.data.evaluations.base import Evaluation
from kvdistill.data.evaluations.rows import Member, PublishedRows, gold_column, text_column
from kvdistill.data.sources import RawRow

_MARK = re.compile(r"the final answer is:?[ \t]*(?P<answer>[^\n]*)", re.IGNORECASE)
_ENDING = re.compile(r"[.,]?\s*I hope it is correct.*", re.IGNORECASE)
# A model that goes on to the next problem has ended its answer.
_NEXT_PROBLEM = re.compile(r"\n[ \t]*Problem:")


def read_row(member: Member, row: RawRow) -> dict[str, Any]:
    """Columns `problem`, `solution` (which boxes its answer) and `answer`; where that is absent, the box is it."""
    problem, solution = text_column(row, "problem"), gold_column(row, "solution")
    boxed = last_boxed(solution)
    if boxed is None:  # lm-eval's definition takes the gold answer from there
        raise DataError("the solution boxes no answer", place=row.place, fix="write the answer as \\boxed{…}")
    answer = gold_column(row, "answer") if "answer" in row.columns else boxed
    return {"problem": problem, "solution": solution, "answer": answer}


def extract(completion: str) -> str | None:
    """What follows the first `the final answer is` on its line (of which a box's content), else the last box."""
    text = _NEXT_PROBLEM.split(completion, maxsplit=1)[0]
    for match in _MARK.finditer(text):
        answer = _ENDING.sub("", match["answer"]).strip().removesuffix(".").strip()
        answer = last_boxed(answer) or _undollar(answer)
        if answer:
            return answer
    return last_boxed(text)


def _undollar(text: str) -> str:
    """`$\\frac{1}{2}$` and `\\( x \\)` without their signs; a price, `$5`, as it is."""
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            return _undollar(text[len(opening) : -len(closing)].strip())
    return text.strip()


MATH500 = Evaluation(
    name="math500",
    title="MATH-500",
    language="en",
    rows=PublishedRows(
        hub="HuggingFaceH4/MATH-500",
        members=(Member("math500", "minerva_math/minerva_math500.yaml", "default"),),
        hub_splits={"test": "test"},
        paths={"test": ("math500/test.jsonl", "math500/default/test.parquet", "MATH-500/test.jsonl")},
        read=read_row,
    ),
    num_fewshot=4,
    native="generation",
    fewshot_from="definition",
    splits={"test": "test"},
    question=lambda row: str(row["problem"]),
    gold=lambda member, row: str(row["answer"]),
    extract=lambda member, completion: extract(completion),
    same=lambda member, answer, gold: same_latex(answer, gold),
    published_gold=lambda member, row: f" {row['solution']}",
)
