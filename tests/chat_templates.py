"""Chat templates that each do one thing differently, and tokenizers that carry them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerFast

from kvdistill.data.chat import write_chat
from kvdistill.data.problems import Problem, Row, write_plain
from kvdistill.data.tokenizers import character_tokenizer, load_tokenizer

load = functools.cache(load_tokenizer)  # the big ones take a second each
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n\t"
PROBLEM = Problem("t", "7", "How many is 3 times 4?", "3 * 4 = 12", "12")

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
THINKS = CHATML.replace(
    "m.role + '\n' + m.content",
    "m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '')"
    " + m.content.lstrip('\n')",
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HEADED = (
    "{% for m in messages %}{{ m.role.title() + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ENDS_FIRST = "{% for m in messages %}{{ eos_token + m.role + '\n' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ eos_token + 'assistant\n' }}{% endif %}"
)
SEPARATED = CHATML.replace("{%- for m in messages -%}", "{{ eos_token }}{%- for m in messages -%}")
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
IGNORES_SYSTEM = CHATML.replace("{%- for m in messages -%}", "{%- for m in messages if m.role != 'system' -%}")
OPENS_THINKING = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")


def characters(template: Any, *, special: Sequence[str] = ("<|im_start|>", "<|im_end|>"), loose: Sequence[str] = ()):
    """A tokenizer of single characters with a chat template. special, loose: added tokens, such and ordinary ones."""
    tokenizer = character_tokenizer(PRINTABLE)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in loose])
    tokenizer.chat_template = template
    return tokenizer


def written(template: str, row: Row | None = None, *, system: str | None = None, **tokens: Any) -> Row:
    return write_chat(row or write_plain(PROBLEM, "cot"), characters(template, **tokens), system_prompt=system)


def problems(data_root: Path, count: int) -> list[Problem]:
    lines = [json.loads(line) for line in (data_root / "gsm8k/test.jsonl").open(encoding="utf-8")][:count]
    parts = [line["answer"].partition("####") for line in lines]
    return [
        Problem("gsm8k", str(i), line["question"].strip(), reasoning.strip(), answer.strip())
        for i, (line, (reasoning, _, answer)) in enumerate(zip(lines, parts, strict=True))
    ]


def special_ids(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [number for number in ids if number in special]
