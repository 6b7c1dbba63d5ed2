"""StrategyQA (Geva et al. 2021): yes/no questions with implicit steps; the reasoning is the annotators' facts."""

from __future__ import annotations

import re

from kvdistill.core.quoting import quoted
from kvdistill.data.answers.numbers import fold_width, normalise_text, text_after, unwrap
from kvdistill.data.problems import ANSWER_MARK, Problem
from kvdistill.data.sets.held_out import with_own_template
from kvdistill.data.sets.published import Layout, Published
from kvdistill.data.sources import RawRow

_TRUTH = {"true": True, "false": False}  # as tables without types write it
_YES, _NO = ("yes", "true", "是的", "是", "对"), ("no", "false", "不是", "否", "不", "错")
_WORDS = dict.fromkeys(_YES, "yes") | dict.fromkeys(_NO, "no")
# The word alone, before a punctuation mark or before what gives a reason; "no one knows" and "not" are not answers.
_WORD = re.compile(
    rf"[\"'(\[*_]*({'|'.join(_WORDS)})(?=$|\s*[\"')\]*_.,;:!。、<—–]|\s+(?:[-—–(]|(?:because|since|as|it|they|he|she|this|that|these"
    r"|those|there)\b))"
)
# "yes and no", "yes, no": both, which is neither
_BOTH = re.compile(rf"[\W_]*(?:and|or|but)?[\W_]*(?P<word>{'|'.join(_WORDS)})(?![a-z])")


def read_row(row: RawRow, id: str) -> Problem:
    """Columns `question`, `answer` (true or false) and `facts` (a list, or one text as on the hub)."""
    answer = row.columns.get("answer")
    answer = _TRUTH.get(answer.strip().casefold(), answer) if isinstance(answer, str) else answer
    if not isinstance(answer, bool):
        raise row.error(f"field 'answer' is {quoted(answer)}, not true or false", fix="write true or false")
    is_text = isinstance(row.columns.get("facts"), str)
    facts = [row.text("facts")] if is_text else row.texts("facts")
    if is_text and facts[0].startswith("[") and facts[0].endswith("]"):
        raise row.error(
            "field 'facts' is a list that was written as text",
            fix="use a copy that keeps lists (JSONL or Parquet), or write the facts as one text",
        )
    reasoning = " ".join(fact if fact.endswith((".", "!", "?")) else f"{fact}." for fact in facts)
    if ANSWER_MARK in reasoning:
        raise row.error(f"`{ANSWER_MARK}` marks the answer and stands in a fact", fix="take it out")
    return Problem("strategyqa", id, row.text("question"), reasoning, "yes" if answer else "no")


def extract(completion: str) -> str | None:
    """`yes` or `no` where the line after the first `####` begins with such a word; else that line as it is."""
    answer = text_after(ANSWER_MARK, completion)
    if answer is None:
        return None
    text = fold_width(unwrap(answer)).casefold()
    match = _WORD.match(text)
    if match is None:
        return answer
    second = _BOTH.match(text, match.end())
    return _WORDS[match[1]] if second is None or _WORDS[second["word"]] == _WORDS[match[1]] else answer


_DATA = Published(
    name="strategyqa",
    hub="ChilleD/StrategyQA",
    layouts=(Layout(train="strategyqa/train.json", test="strategyqa/dev.json"),),
    problem=read_row,
)
STRATEGYQA = with_own_template(_DATA, "StrategyQA", extract, lambda a, b: normalise_text(a) == normalise_text(b))
