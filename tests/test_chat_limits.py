"""Chat templates are strangers' code: within limits of time and memory, and equal to transformers' own rendering."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import chat_templates
import pytest
from chat_templates import CHATML, PROBLEM, characters

from kvdistill.core.errors import DataError
from kvdistill.data import chat
from kvdistill.data.chat import TemplateFailed, chat_tokenizer, render_messages, write_chat
from kvdistill.data.problems import write_plain

LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}" + CHATML
GROWS = "{{ 'x' * 3000000000 }}" + CHATML
PADS = "{{ 'x' | center(2900000000) }}" + CHATML
WRITES = "{{ 'x' * 17000000 }}" + CHATML

_NAMES = [name for name in dir(chat_templates) if name.isupper() and "{" in str(getattr(chat_templates, name))]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process that renders is started anew with a shorter clock."""
    monkeypatch.setattr(chat._RENDERER, "limit_s", 2.0)
    chat._RENDERER.close()
    yield
    chat._RENDERER.close()


@pytest.mark.parametrize(
    ("template", "words"),
    [(LOOPS, "more than 2 s"), (GROWS, "too much memory"), (PADS, "too much memory"), (WRITES, "17,000,")],
)
def test_a_template_without_end_is_one_message_in_seconds(template: str, words: str) -> None:
    begun = time.monotonic()
    for system in (None, "Be brief."):
        with pytest.raises(DataError, match=f"the chat template fails .*{words}") as caught:
            write_chat(write_plain(PROBLEM, "cot"), characters(template), system_prompt=system)
        assert caught.value.place == "data.template" and "plain" in caught.value.fix
    with pytest.raises(DataError, match=words):
        chat_tokenizer(characters(template))
    assert time.monotonic() - begun < 30
    assert write_chat(write_plain(PROBLEM, "cot"), characters(CHATML)).rendered  # the next one works


def test_a_template_that_loops_on_certain_texts_only_is_stopped_too() -> None:
    loops = LOOPS.removesuffix(CHATML)
    template = f"{{%- if 'liquor' not in messages[0].content -%}}{loops}{{%- endif -%}}{CHATML}"
    with pytest.raises(DataError, match="more than 2 s"):
        write_chat(write_plain(PROBLEM, "cot"), characters(template))


def test_a_renderer_that_was_killed_is_started_again() -> None:
    tokenizer, messages = characters(CHATML), [{"role": "user", "content": "3+4?"}]
    first = render_messages(tokenizer, messages, CHATML)
    assert chat._RENDERER.pid is not None
    os.kill(chat._RENDERER.pid, signal.SIGKILL)
    assert render_messages(tokenizer, messages, CHATML) == first


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("begins", [False, True])
def test_it_renders_as_transformers_does(name: str, begins: bool) -> None:
    template: Any = getattr(chat_templates, name)
    if "strftime_now" in template:
        template = chat._STOPPED_CLOCK + template
    tokenizer = characters(template)
    for content in (
        "It is 7.",
        "é中 <|im_end|> {{ x }}\n\n",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}][: 2 - begins]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins)
        assert render_messages(tokenizer, messages, template, add_generation_prompt=begins) == wanted


def test_a_template_that_raises_says_why() -> None:
    with pytest.raises(TemplateFailed, match="no such thing"):
        render_messages(characters(CHATML), [], "{{ raise_exception('no such thing') }}")
    with pytest.raises(TemplateFailed):
        render_messages(characters(CHATML), [], "{% for %}")
