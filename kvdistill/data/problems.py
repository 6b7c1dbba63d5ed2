"""`Problem`: a question, its reasoning and its answer. `Row`: the same problem written out in one style.

A row's three texts concatenate to the training text, so the character offsets of the segments are known
when the text is made and never have to be searched for. Knows no file, no tokenizer, no task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Style = Literal["cot", "direct"]
Split = Literal["train", "val", "test", "teach"]
SPLITS = ("train", "val", "test", "teach")  # teach: what teachers trained on the spot study beside train

ANSWER_MARK = "####"  # GSM8K's own; also used for tasks whose publisher has no mark
# Two styles of one problem must not share a prompt: the model could not know which of them is asked for.
_TEMPLATES: dict[str, tuple[str, dict[Style, str]]] = {
    "en": ("Question: ", {"cot": "Answer:", "direct": "Final answer:"}),
    "zh": ("问题：", {"cot": "解答：", "direct": "最终答案："}),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `answer` is the gold answer in its task's normal form (one line, never empty)."""

    task: str
    id: str
    question: str
    reasoning: str
    answer: str
    language: str = "en"


@dataclass(frozen=True, slots=True)
class Row:
    """A problem in one style. `reasoning` is empty in style `direct`; `answer` carries the task's mark."""

    problem: Problem
    style: Style
    prompt: str
    reasoning: str
    answer: str

    @property
    def completion(self) -> str:
        return self.reasoning + self.answer

    @property
    def text(self) -> str:
        return self.prompt + self.reasoning + self.answer

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Segment -> [start, end) in characters of `text`; an empty segment has start == end."""
        first = len(self.prompt)
        second = first + len(self.reasoning)
        return {"prompt": (0, first), "reasoning": (first, second), "answer": (second, second + len(self.answer))}


def styles_of(style: str) -> tuple[Style, ...]:
    """`cot`, `direct`, or `both` as the styles that each problem is written in."""
    choices: dict[str, tuple[Style, ...]] = {"cot": ("cot",), "direct": ("direct",), "both": ("cot", "direct")}
    return choices[style]


def write_plain(problem: Problem, style: Style) -> Row:
    """`Question: … Answer:`, the reasoning, ` #### answer`; for language zh `问题：… 解答：`; others as English.

    Segments begin with a space rather than end with one: byte-level tokenizers keep a space with the word after it,
    so segment boundaries fall between tokens.
    """
    opening, endings = _TEMPLATES.get(problem.language, _TEMPLATES["en"])
    return Row(
        problem=problem,
        style=style,
        prompt=f"{opening}{problem.question}\n{endings[style]}",
        reasoning=f" {problem.reasoning}" if style == "cot" else "",
        answer=f" {ANSWER_MARK} {problem.answer}",
    )
