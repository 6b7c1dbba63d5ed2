"""A question, its reasoning and its answer out of a conversation or a whole completion, as chat data sets have them.

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …, "reasoning_content": …}]}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}      (ShareGPT)

One question and one answer a row. The answer stands after the first `####`, else in the last `\\boxed{…}`; it is never
guessed. Reasoning that the assistant has apart from what it says is kept between `<think>` and `</think>`, which a chat
template puts where it wants it (`data.chat`). Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvdistill.core.quoting import quoted
from kvdistill.data.answers.latex import last_boxed
from kvdistill.data.answers.numbers import text_after
from kvdistill.data.problems import ANSWER_MARK, INSTRUCTIONS, write_thought
from kvdistill.data.sources import RawRow

CONVERSATIONS = ("messages", "conversations", "conversation")  # columns, the first that is there
_ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system"}
_ROLES |= dict.fromkeys(("assistant", "gpt", "chatbot", "bot", "model"), "assistant")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def read_conversation(row: RawRow, column: str) -> tuple[str, str, str]:
    """Question, reasoning and answer of the one exchange that stands in this column.

    A system message is not learned from (`data.system_prompt` sets one). DataError at the row for anything else.
    """
    turns = row.columns[column]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        fix = "write a list of {role: …, content: …}, or name the columns with question and answer in `fields`"
        raise row.error(f"field {quoted(column)} is no list of messages", fix=fix)
    roles = []
    for turn in turns:
        said = turn.get("role", turn.get("from"))
        role = _ROLES.get(said.casefold()) if isinstance(said, str) else None
        if role is None:
            fix = "a message is from `user` (human), `assistant` (gpt) or `system`"
            raise row.error(f"nobody known speaks in {quoted(column)}: {quoted(said)}", fix=fix)
        roles.append(role)
    spoken = [turn for turn, role in zip(turns, roles, strict=True) if role != "system"]
    if [role for role in roles if role != "system"] != ["user", "assistant"]:
        raise row.error(
            f"the conversation is {', '.join(roles)}, and one question (user) with one answer (assistant) is read",
            fix="keep one question and its answer in a row; leave longer conversations out",
        )
    question = _without_instruction(_text(spoken[0], row))
    thoughts = [spoken[1][name] for name in _THOUGHTS if isinstance(spoken[1].get(name), str)]
    reasoning, answer = split_completion(_text(spoken[1], row), row)
    thought = next((text.strip() for text in thoughts if text.strip()), "")
    return question, write_thought(thought, reasoning) if thought else reasoning, answer


def split_completion(text: str, row: RawRow) -> tuple[str, str]:
    """Reasoning and answer of a text with both. DataError at the row where no answer is marked, or text follows it."""
    before, marked, rest = text.partition(ANSWER_MARK)
    if marked:
        answer = text_after(ANSWER_MARK, text)
        if answer is None:
            raise row.error(f"nothing stands after `{ANSWER_MARK}`", fix="write the answer there, or take the row out")
        if rest.lstrip("# \t\n").partition("\n")[2].strip():
            raise row.error(
                f"the text goes on after the line with `{ANSWER_MARK}`",
                fix="move what follows the answer in front of it, or take it out",
            )
        return before.strip(), answer
    answer = last_boxed(text.rpartition("</think>")[2])
    if answer is None or not answer.strip() or "\n" in answer.strip():
        raise row.error(
            "no answer is marked",
            fix=f"end the text with `{ANSWER_MARK} answer`, box it (\\boxed{{…}}), or give question, reasoning and "
            "answer in columns (`fields` names them)",
        )
    return text.strip(), answer.strip()


def _text(turn: Mapping[str, Any], row: RawRow) -> str:
    """What is said in a message; its parts joined where it is a list of texts."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "\n".join(part["text"] for part in content)
    return RawRow({"content": content}, row.place, row.number).text("content")


def _without_instruction(question: str) -> str:
    """The question without the line that `export` puts under it."""
    for of_language in INSTRUCTIONS.values():
        for instruction in of_language.values():
            if question.endswith(f"\n{instruction}"):
                return question.removesuffix(instruction).rstrip()
    return question
