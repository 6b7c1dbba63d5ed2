"""`Problem`: a question, its reasoning and its answer. `Row`: the same problem written out in one style.

A row's texts concatenate to the training text, so the character offsets of the segments are known
when the text is made and never have to be searched for. A row is plain (`write_plain`, or a task's own form) or has
been through a chat template (`kvdistill.data.chat`), whose own text is its `Frame`. Knows no file, no tokenizer, no
task.
"""

from __future__ import annotations

import re
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
# What a user adds to the question in a chat; the answer is read after the mark in both styles.
INSTRUCTIONS: dict[str, dict[Style, str]] = {
    "en": {
        "cot": f"Think step by step, then end with `{ANSWER_MARK} answer`.",
        "direct": f"Give only `{ANSWER_MARK} answer`.",
    },
    "zh": {
        "cot": f"请一步一步思考，最后以 `{ANSWER_MARK} 答案` 结尾。",
        "direct": f"只写出 `{ANSWER_MARK} 答案`。",
    },
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `answer` is the gold answer in its task's normal form (one line, never empty).

    rule: by which rule a user's own row is answered; empty: by its task's.
    """

    task: str
    id: str
    question: str
    reasoning: str
    answer: str
    language: str = "en"
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a chat template's own text: plain text, or with `token` the special token that it is."""

    text: str
    token: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a chat template writes around a question and its answer; the rows of a data set share one.

    opening | the user's text | middle | lead | the answer | closing | trailing. lead: spaces, which go with the answer.
    closing ends with the token that ends the turn; trailing is what the template still writes after it, which nobody
    learns. system: the system message that was asked for, None where the template's own default stands.
    """

    opening: tuple[Piece, ...]
    middle: tuple[Piece, ...]
    closing: tuple[Piece, ...]
    lead: str = ""
    trailing: str = ""
    system: str | None = None


def text_of(pieces: tuple[Piece, ...]) -> str:
    return "".join(piece.text for piece in pieces)


@dataclass(frozen=True, slots=True)
class Row:
    """A problem in one style. `reasoning` is empty in style `direct`; `answer` carries the task's mark.

    user: what is asked in a chat (empty: the prompt itself). frame: of a row that went through a chat template; in
    its texts the frame's special tokens are meant as tokens, and nothing else is.
    """

    problem: Problem
    style: Style
    prompt: str
    reasoning: str
    answer: str
    user: str = ""
    frame: Frame | None = None

    @property
    def rendered(self) -> bool:
        """Whether the texts came out of a chat template."""
        return self.frame is not None

    @property
    def closing(self) -> str:
        """The chat template's end of the turn, up to and with its end token; empty in a plain row."""
        return text_of(self.frame.closing) if self.frame is not None else ""

    @property
    def completion(self) -> str:
        return self.reasoning + self.answer

    @property
    def text(self) -> str:
        return self.prompt + self.reasoning + self.answer + self.closing

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Segment -> [start, end) in characters of `text`; an empty segment has start == end."""
        first = len(self.prompt)
        second = first + len(self.reasoning)
        return {"prompt": (0, first), "reasoning": (first, second), "answer": (second, len(self.text))}


_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<said>.*)", re.DOTALL)


def write_thought(thought: str, said: str) -> str:
    """Reasoning of which a part is thought and not said, as models write it down."""
    return f"<think>\n{thought}\n</think>\n\n{said}".rstrip()


def read_thought(reasoning: str) -> tuple[str, str] | None:
    """What is thought and what is said of a reasoning that begins with a `<think>` block; None for any other."""
    match = _THOUGHT.fullmatch(reasoning)
    return (match["thought"].strip(), match["said"].strip()) if match else None


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
    instructions = INSTRUCTIONS.get(problem.language, INSTRUCTIONS["en"])
    return Row(
        problem=problem,
        style=style,
        prompt=f"{opening}{problem.question}\n{endings[style]}",
        reasoning=f" {problem.reasoning}" if style == "cot" else "",
        answer=f" {ANSWER_MARK} {problem.answer}",
        user=f"{problem.question}\n{instructions[style]}",
    )
