"""MATH (Hendrycks et al. 2021) and MATH-500 (Lightman et al. 2023): competition problems, the answer in the last box.

A local copy of MATH without a train file is a pool: 30 % of its test rows stay test, and the rest may be trained on
only where MATH500, which is taken from the test rows, is at hand to be taken out (Lightman et al. 2023 split it so).

MATH-500 is asked with lm-eval's four-shot prompt, whose own mark says where the answer is: `Final Answer: The final
answer is $…$. I hope it is correct.` (Lewkowycz et al. 2022); a text without it is read by the data's own mark, the
last `\\boxed{…}`. Answers are compared as mathematics.
"""

from __future__ import annotations

import re

from kvdistill.data.answers.latex import last_boxed, same_latex
from kvdistill.data.answers.numbers import text_after
from kvdistill.data.problems import ANSWER_MARK, Problem
from kvdistill.data.sets.base import DataSet, Evaluation
from kvdistill.data.sets.held_out import with_own_template
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
from kvdistill.data.sources import RawRow

_FINAL = re.compile(r"the final answer is:?[ \t]*(?P<answer>[^\n]*)", re.IGNORECASE)
_ENDING = re.compile(r"[.,]?\s*I hope it is correct.*", re.IGNORECASE)
# A model that goes on to the next problem has ended its answer.
_NEXT_PROBLEM = re.compile(r"\n[ \t]*Problem:")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `problem` and `solution`. DataError at the row for a solution without a boxed answer."""
    problem, solution = row.text("problem"), row.text("solution")
    answer = _boxed(solution, row)
    if ANSWER_MARK in solution:
        raise row.error(f"`{ANSWER_MARK}` marks the answer and stands in the solution", fix="remove it")
    return Problem("math", id, problem, solution, answer)


def read_columns(member: Member, row: RawRow) -> RowDict:
    """The same columns as published, for lm-eval, and `answer`; where that is absent, the box is it."""
    problem, solution = row.published("problem"), row.gold("solution")
    boxed = _boxed(solution, row)  # lm-eval's definition takes the gold answer from there
    answer = row.gold("answer") if "answer" in row.columns else boxed
    return {"problem": problem, "solution": solution, "answer": answer}


def _boxed(solution: str, row: RawRow) -> str:
    answer = last_boxed(solution)
    if answer is None:
        raise row.error("the solution boxes no answer", fix="write the answer as \\boxed{…}")
    return answer


def extract(completion: str) -> str | None:
    """The rest of the line after the first `####`, of which a box's content; without the mark, the last box."""
    answer = text_after(ANSWER_MARK, completion)
    return last_boxed(completion) if answer is None else last_boxed(answer) or answer


def extract_final(completion: str) -> str | None:
    """What follows the first `the final answer is` on its line (of which a box's content), else the last box."""
    text = _NEXT_PROBLEM.split(completion, maxsplit=1)[0]
    for match in _FINAL.finditer(text):
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


_MATH = Published(
    name="math",
    hub="DigitalLearningGmbH/MATH-lighteval",
    hub_config="default",
    layouts=(
        Layout(train="math/train.jsonl", test="math/test.jsonl"),
        Layout(train="math/train.jsonl", test="math/test_first1000.jsonl"),
        Layout(train="math/*/train.parquet", test="math/*/test.parquet"),  # the hub's copies with a folder a subject
        Layout(train="math/train/*/*.json", test="math/test/*/*.json"),  # the publisher's archive, a file a problem
        # 12,000 of the 12,500 rows, test rows among them, are fair to train on where MATH500 is held apart (PRM800K)
        Layout(pool="math/test.jsonl"),
        Layout(pool="math/test_first1000.jsonl"),
    ),
    problem=read_row,
)
MATH = with_own_template(_MATH, "MATH", extract, same_latex, spoils=("math500",))
_MATH500 = Published(
    name="math500",
    hub="HuggingFaceH4/MATH-500",
    layouts=tuple(
        Layout(test=path) for path in ("math500/test.jsonl", "math500/default/test.parquet", "MATH-500/test.jsonl")
    ),
    members=(Member("math500", "minerva_math/minerva_math500.yaml", "default"),),
    columns=read_columns,
)
MATH500 = DataSet(
    evaluation=Evaluation(
        title="MATH-500",
        data=_MATH500,
        num_fewshot=4,
        native="generation",
        fewshot_from="definition",
        question=lambda row: str(row["problem"]),
        gold=lambda member, row: str(row["answer"]),
        extract=lambda member, completion: extract_final(completion),
        same=lambda member, answer, gold: same_latex(answer, gold),
        published_gold=lambda member, row: f" {row['solution']}",
    )
)
