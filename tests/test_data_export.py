"""Rows for other trainers: the three formats say the same."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from kvdistill.core.errors import DataError
from kvdistill.data.chat import chat_tokenizer, write_chat
from kvdistill.data.problems import Problem, Row, write_plain
from kvdistill.data.tokenizers import character_tokenizer, load_tokenizer
from kvdistill.stages.prepare.export import FORMATS, export_row

_load = functools.cache(load_tokenizer)
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
SPACED = (
    "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content }}"
    "{% endfor %}"
)
PROBLEM = Problem("svamp", "chal-3", "How many is 3 times 4?", "3 * 4 = 12", "12")
ABOUT = {"task": "svamp", "id": "chal-3", "style": "cot", "language": "en"}
ABOUT |= {"question": PROBLEM.question, "reasoning": PROBLEM.reasoning, "answer": PROBLEM.answer}


@functools.cache
def characters(template: str) -> Any:
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = template
    return chat_tokenizer(tokenizer)


def test_a_plain_row_is_as_written_here() -> None:
    row = write_plain(PROBLEM, "cot")
    asked, answered = "Question: How many is 3 times 4?\nAnswer:", " 3 * 4 = 12 #### 12"
    user = "How many is 3 times 4?\nThink step by step, then end with `#### answer`."
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "3 * 4 = 12 #### 12"}]
    assert export_row(row, "prompt-completion") == {"prompt": asked, "completion": answered, **ABOUT}
    assert export_row(row, "text") == {"text": asked + answered, **ABOUT}
    assert export_row(row, "messages") == {"messages": messages, **ABOUT}
    system = {"role": "system", "content": "Be brief."}
    assert export_row(row, "messages", system_prompt="Be brief.")["messages"] == [system, *messages]


def test_a_chat_row_is_as_written_here() -> None:
    tokenizer = characters(CHATML)
    plain = write_plain(Problem("math23k", "5", "三乘四？", "3*4", "12", "zh"), "direct")
    row = write_chat(plain, tokenizer, system_prompt="简短。")
    user = "<|im_start|>user\n三乘四？\n只写出 `#### 答案`。<|im_end|>\n"
    asked = f"<|im_start|>system\n简短。<|im_end|>\n{user}<|im_start|>assistant\n"
    about = {"task": "math23k", "id": "5", "style": "direct", "language": "zh"}
    about |= {"question": "三乘四？", "reasoning": "3*4", "answer": "12"}
    expected = {"prompt": asked, "completion": "#### 12<|im_end|>\n", **about}
    assert export_row(row, "prompt-completion") == expected
    assert export_row(plain, "prompt-completion", tokenizer, system_prompt="简短。") == expected
    assert [m["role"] for m in export_row(row, "messages")["messages"]] == ["system", "user", "assistant"]


_words = st.text(alphabet="abc 12#<>|中\n", max_size=20)
_problems = st.builds(
    Problem,
    st.just("t"),
    st.just("1"),
    _words,
    _words,
    st.sampled_from(["12", "yes", "B"]),
    st.sampled_from(["en", "zh"]),
)


@pytest.mark.parametrize("template", [None, CHATML, TRIMS, SPACED], ids=["plain", "chatml", "trims", "spaced"])
@given(problem=_problems, style=st.sampled_from(["cot", "direct"]), system=st.sampled_from([None, "Be brief."]))
def test_prompt_and_completion_are_the_text_and_messages_render_to_it(
    template: str | None, problem: Problem, style: Any, system: str | None
) -> None:
    tokenizer = characters(template) if template is not None else None
    system = None if template == SPACED else system
    row = write_plain(problem, style)
    made = {form: export_row(row, form, tokenizer, system_prompt=system) for form in FORMATS}
    back = {form: json.loads(json.dumps(line, ensure_ascii=False)) for form, line in made.items()}
    assert back == made
    text = back["text"]["text"]
    assert back["prompt-completion"]["prompt"] + back["prompt-completion"]["completion"] == text
    if tokenizer is None:
        assert text == row.text
    else:
        rendered = tokenizer.apply_chat_template(back["messages"]["messages"], tokenize=False)
        assert rendered == (text.removesuffix("<eos>") if template == SPACED else text)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_messages_render_to_the_text_with_real_templates(data_root: Path, name: str) -> None:
    tokenizer = _load(f"root:{name}", str(data_root))
    for style in ("cot", "direct"):
        row: Row = write_plain(PROBLEM, style)  # type: ignore[arg-type]
        messages = export_row(row, "messages")["messages"]
        text = export_row(row, "text", tokenizer)["text"]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
        prompt = export_row(row, "prompt-completion", tokenizer)["prompt"]
        assert tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True) == prompt


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(DataError, match="unknown format 'jsonl'") as caught:
        export_row(write_plain(PROBLEM, "cot"), "jsonl")
    assert "prompt-completion, messages, text" in caught.value.fix
