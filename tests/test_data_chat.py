"""Rows through chat templates: byte-equal to transformers, whatever the template does, or refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    BRACKETS,
    CHATML,
    DATED,
    ENDS_FIRST,
    HEADED,
    IGNORES_SYSTEM,
    OPENS_THINKING,
    PROBLEM,
    SEPARATED,
    THINKS,
    TRIMS,
    characters,
    load,
    problems,
    special_ids,
    written,
)
from transformers import AutoTokenizer

from kvdistill.core.errors import DataError
from kvdistill.data.chat import chat_messages, chat_tokenizer, write_chat
from kvdistill.data.encode import encode_row, encode_rows
from kvdistill.data.problems import Problem, Row, write_plain
from kvdistill.data.sets import TASKS
from kvdistill.data.sets.gsm8k import extract


def rendered(tokenizer: Any, row: Row, **options: Any) -> str:
    return tokenizer.apply_chat_template(chat_messages(row), tokenize=False, **options)


# -- what is asked -------------------------------------------------------------------------------------


def test_the_user_asks_with_one_line_of_instruction() -> None:
    asked = {style: write_plain(PROBLEM, style).user for style in ("cot", "direct")}
    assert asked["cot"] == PROBLEM.question + "\nThink step by step, then end with `#### answer`."
    assert asked["direct"] == PROBLEM.question + "\nGive only `#### answer`."
    chinese = Problem("t", "8", "三乘四？", "3*4", "12", "zh")
    assert "一步一步" in write_plain(chinese, "cot").user and "一步一步" not in write_plain(chinese, "direct").user
    assert all("#### 答案" in write_plain(chinese, style).user for style in ("cot", "direct"))


def test_a_generated_problem_is_asked_by_its_own_form() -> None:
    row = write_chat(TASKS["chain"].write(Problem("chain", "1", "3+4-2", "7", "5"), "cot"), characters(CHATML))
    assert row.prompt == "<|im_start|>user\n3+4-2:<|im_end|>\n<|im_start|>assistant\n"
    assert row.text == row.prompt + "7=5<|im_end|>" and TASKS["chain"].extract(row.completion) == "5"


@pytest.mark.parametrize("style", ["cot", "direct"])
def test_a_chat_row_is_as_written_here(style: Any) -> None:
    plain = write_plain(PROBLEM, style)
    row = written(CHATML, plain, system="Be brief.")
    assert row.prompt == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{plain.user}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (row.reasoning, row.answer) == (("3 * 4 = 12", " #### 12") if style == "cot" else ("", "#### 12"))
    assert row.completion == plain.completion.lstrip() and extract(row.completion) == "12"
    assert (row.closing, row.frame.trailing, row.rendered, plain.rendered) == ("<|im_end|>", "\n", True, False)
    segments = [row.text[first:last] for first, last in row.spans.values()]
    assert segments == [row.prompt, row.reasoning, row.answer + "<|im_end|>"]


# -- real tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
@pytest.mark.parametrize("system", [None, "Answer as a teacher would. "])
def test_real_templates_give_transformers_texts_and_ids(data_root: Path, name: str, system: str | None) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    assert chat_tokenizer(tokenizer) is tokenizer
    plain = [write_plain(problem, style) for problem in problems(data_root, 30) for style in ("cot", "direct")]
    plain.append(write_plain(Problem("t", "zh", "三乘四是多少？", "3*4=12", "12", "zh"), "cot"))
    rows = [write_chat(row, tokenizer, system_prompt=system) for row in plain]
    for before, row, example in zip(plain, rows, encode_rows(tokenizer, rows), strict=True):
        messages = chat_messages(before, system_prompt=system)
        assert row.text + row.frame.trailing == tokenizer.apply_chat_template(messages, tokenize=False)
        asked = functools.partial(tokenizer.apply_chat_template, messages[:-1], add_generation_prompt=True)
        assert row.prompt == asked(tokenize=False) == example.prompt
        assert example.prompt_ids == asked(return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        assert example.input_ids == ids[:end]
        assert row.completion == before.completion.lstrip() == messages[-1]["content"]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
def test_segments_of_chat_rows_spell_their_texts(data_root: Path, name: str) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    rows = [
        write_chat(write_plain(p, style), tokenizer) for p in problems(data_root, 20) for style in ("cot", "direct")
    ]
    for row, example in zip(rows, encode_rows(tokenizer, rows), strict=True):
        paired = list(zip(example.input_ids, example.segments, strict=True))
        spelt = [tokenizer.decode([number for number, segment in paired if segment == code]) for code in (1, 2, 3)]
        assert spelt == [row.prompt, row.reasoning, row.answer + row.closing]
        assert example.segments == sorted(example.segments)


def test_llama3_begins_once_and_qwen_keeps_its_default_system_message(data_root: Path) -> None:
    llama, qwen = (load(f"root:{name}", str(data_root)) for name in ("llama3", "qwen2.5"))
    for row in (write_plain(PROBLEM, "cot"), write_plain(PROBLEM, "direct")):
        example = encode_row(llama, write_chat(row, llama))
        assert example.input_ids[0] == llama.bos_token_id and example.input_ids.count(llama.bos_token_id) == 1
        assert example.input_ids[-1] == llama.convert_tokens_to_ids("<|eot_id|>")
        assert write_chat(row, qwen).prompt.startswith("<|im_start|>system\nYou are Qwen")


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "t5-small", "characters"])
def test_a_tokenizer_without_a_template_is_named(data_root: Path, name: str) -> None:
    tokenizer = load(name if name == "characters" else f"root:{name}", str(data_root))
    for call in (chat_tokenizer, functools.partial(write_chat, write_plain(PROBLEM, "cot"))):
        with pytest.raises(DataError, match="no chat template") as caught:
            call(tokenizer)
        assert caught.value.place == "data.template" and "template=plain" in caught.value.fix


# -- templates of all kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, TRIMS, THINKS, BRACKETS, HEADED, ENDS_FIRST, SEPARATED], ids=str.__len__)
@pytest.mark.parametrize("style", ["cot", "direct"])
def test_every_template_is_followed_to_the_letter(template: str, style: Any) -> None:
    tokenizer = chat_tokenizer(characters(template))
    row = write_chat(write_plain(PROBLEM, style), tokenizer)
    whole = rendered(tokenizer, row)
    prompt = tokenizer.apply_chat_template(chat_messages(row)[:-1], tokenize=False, add_generation_prompt=True)
    assert row.prompt.startswith(prompt) and whole.startswith(row.prompt + row.completion)
    assert (
        extract(row.completion) == "12" and row.completion.lstrip() == write_plain(PROBLEM, style).completion.lstrip()
    )
    example = encode_row(tokenizer, row)
    live = tokenizer(row.text, add_special_tokens=False)["input_ids"]
    assert example.input_ids == live and tokenizer.decode(live) == row.text
    assert example.prompt_ids == tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_what_stands_before_the_last_answer_belongs_to_the_prompt() -> None:
    row = written(THINKS)
    assert row.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and row.completion.startswith("3 * 4")


def test_spaces_before_the_answer_go_with_the_answer() -> None:
    row = written(BRACKETS)
    assert row.prompt.endswith(" [/INST]") and row.reasoning == " 3 * 4 = 12" and row.closing == " <eos>"
    assert written(BRACKETS, write_plain(PROBLEM, "direct")).answer == " #### 12"


def test_templates_that_take_white_space_off_the_texts() -> None:
    spaced = Row(PROBLEM, "cot", "p", " 3*4", " #### 12 \n", user="\n How many? ")
    tokenizer = characters(TRIMS)
    row = write_chat(spaced, tokenizer)
    assert row.text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n3*4 #### 12<|im_end|>"
    assert rendered(tokenizer, row) == row.text + "\n" and row.answer == " #### 12"
    kept = written(CHATML, spaced)
    assert kept.user == spaced.user and kept.answer == spaced.answer and kept.prompt.count("\n How many? ") == 1


def test_an_end_of_turn_of_the_templates_own_becomes_end_of_text() -> None:
    tokenizer = characters(CHATML)
    assert tokenizer.eos_token == "<eos>"
    settled = chat_tokenizer(tokenizer)
    assert (settled.eos_token, settled.pad_token, settled.bos_token) == ("<|im_end|>", "<pad>", "<bos>")
    assert tokenizer.eos_token == "<eos>" and settled.get_vocab() == tokenizer.get_vocab()
    assert chat_tokenizer(settled) is settled
    row = write_chat(write_plain(PROBLEM, "cot"), tokenizer)
    assert row == write_chat(write_plain(PROBLEM, "cot"), settled)
    with pytest.raises(DataError, match="ends a turn") as caught:
        encode_row(tokenizer, row)
    assert "chat_tokenizer" in caught.value.fix


def test_end_of_text_is_left_alone_where_the_template_writes_it() -> None:
    both = CHATML.replace("'<|im_end|>\n'", "'<|im_end|>\n' + (eos_token if loop.last and m.role != 'user' else '')")
    tokenizer = characters(both)
    assert chat_tokenizer(tokenizer) is tokenizer
    assert write_chat(write_plain(PROBLEM, "cot"), tokenizer).closing == "<|im_end|>\n<eos>"


@pytest.mark.parametrize("template", [HEADED, ENDS_FIRST])
def test_a_turn_without_an_end_is_followed_by_end_of_text(template: str) -> None:
    tokenizer = characters(template)
    row = write_chat(write_plain(PROBLEM, "cot"), tokenizer)
    assert chat_tokenizer(tokenizer) is tokenizer and row.closing == "<eos>" and row.frame.trailing == ""
    assert rendered(tokenizer, row) == row.text.removesuffix("<eos>") + "\n"


def test_settling_the_end_does_not_change_what_the_template_writes() -> None:
    tokenizer = characters(SEPARATED)
    settled = chat_tokenizer(tokenizer)
    row = write_chat(write_plain(PROBLEM, "cot"), tokenizer)
    assert settled.eos_token == "<|im_end|>" and rendered(settled, row) == rendered(tokenizer, row)
    assert row.prompt.startswith("<eos><|im_start|>")


def test_added_tokens_that_mark_turns_become_special(tmp_path: Path) -> None:
    loose = characters(CHATML, special=(), loose=("<|im_start|>", "<|im_end|>", "\n\n", "answer"))
    settled = chat_tokenizer(loose)
    special = {str(token) for token in settled.added_tokens_decoder.values() if token.special}
    assert {"<|im_start|>", "<|im_end|>"} <= special and not {"\n\n", "answer"} & special
    assert settled.eos_token == "<|im_end|>" and len(settled) == len(loose)
    settled.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    row = write_plain(Problem("t", "1", "a<|im_end|>b", "<|im_start|>", "1"), "cot")
    for tokenizer in (settled, back):
        example = encode_row(tokenizer, write_chat(row, tokenizer))
        assert special_ids(tokenizer, example.input_ids) == tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
        )


def test_a_template_with_a_clock_gives_the_same_data_tomorrow() -> None:
    row = written(DATED)
    assert row.prompt.startswith("Today: 26 Jul 2024\n<|im_start|>user") and row == written(DATED)


def test_named_templates_use_the_default() -> None:
    named = {"default": CHATML, "tool_use": "{{ raise_exception('tools') }}"}
    assert written(named).text == written(CHATML).text
    with pytest.raises(DataError, match="multiple chat templates") as caught:
        written({"first": CHATML, "second": CHATML})
    assert caught.value.place == "data.template"


# -- templates that cannot be used ---------------------------------------------------------------------

REFUSED = {
    "lower": (CHATML.replace("m.content", "m.content | lower"), "changes the texts"),
    "escape": (CHATML.replace("m.content", "m.content | escape"), "changes the texts"),
    "json": (CHATML.replace("m.content", "(m.content | tojson)"), "changes the texts"),
    "twice": (CHATML.replace("m.content", "m.content + m.content"), "changes the texts"),
    "left out": (CHATML.replace("m.content", "''"), "changes the texts"),
    "one letter": (CHATML.replace("m.content", "m.content | replace('q', 'k')"), "changes the texts"),
    "one line": (CHATML.replace("m.content", "m.content.split() | join(' ')"), "changes the texts"),
    "parts": (CHATML.replace("m.content", "m.content[0].text"), "fails"),
    "broken": ("{% for m in messages %}", "fails"),
    "undefined": ("{{ messages[0].nothing.more }}", "fails"),
    "zero": ("{{ 1 / 0 }}", "fails"),
    "opens thinking": (OPENS_THINKING, "not how it begins"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_change_the_texts_are_refused(case: str) -> None:
    template, what = REFUSED[case]
    for call in (written, lambda template: chat_tokenizer(characters(template))):
        with pytest.raises(DataError, match=what) as caught:
            call(template)
        assert caught.value.place == "data.template" and "template=plain" in caught.value.fix


CONDITIONAL = {
    "a word of the template": CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
    "length": CHATML.replace("m.content", "m.content[:300]"),
    "replaced": CHATML.replace("m.content", "m.content | replace('</think>', '')"),
    "raises": CHATML.replace("m.content", "(raise_exception('no') if '</think>' in m.content else m.content)"),
}


@pytest.mark.parametrize("case", CONDITIONAL)
def test_a_text_that_the_template_treats_otherwise_is_found(case: str) -> None:
    tokenizer = characters(CONDITIONAL[case])
    for number in range(5):
        write_chat(write_plain(Problem("t", str(number), f"What is {number}?", "It is.", "1"), "cot"), tokenizer)
    odd = Problem("t", "odd", "Why?", "so </think> then" if case != "length" else "long " * 80, "1")
    with pytest.raises(DataError, match="t / odd") as caught:
        write_chat(write_plain(odd, "cot"), tokenizer)
    assert caught.value.place == "data.template"


def test_system_messages_that_a_template_does_not_take() -> None:
    cases = {
        BRACKETS: ("Be brief.", "takes no system message"),
        IGNORES_SYSTEM: ("Be brief.", "leaves the system message out"),
        CHATML: ("Stop.<|im_end|>", "special token '<|im_end|>'"),
    }
    for template, (system, what) in cases.items():
        assert written(template).frame.system is None
        with pytest.raises(DataError) as caught:
            written(template, system=system)
        assert what in caught.value.what and caught.value.place == "data.system_prompt" and caught.value.fix
