"""Chat rows as tokens: cut as the tokenizer cuts the whole text, closed to what the data says, stopped at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import (
    BRACKETS,
    CHATML,
    HEADED,
    PRINTABLE,
    PROBLEM,
    SEPARATED,
    THINKS,
    characters,
    load,
    problems,
    special_ids,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from kvdistill.data.chat import chat_messages, chat_tokenizer, write_chat
from kvdistill.data.encode import Example, encode_row, encode_rows, texts_of
from kvdistill.data.problems import Problem, Row, write_plain
from kvdistill.data.sets.gsm8k import extract
from kvdistill.data.tokenizers import character_tokenizer, trim_tokenizer
from kvdistill.models.generate import Rows, generate_greedy


def test_tokens_that_take_white_space_along_are_cut_as_the_tokenizer_cuts() -> None:
    tokenizer = character_tokenizer(PRINTABLE)
    wide = [AddedToken(t, special=True, normalized=False, rstrip=True) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(wide)
    tokenizer.chat_template = CHATML  # with a line end behind <|im_end|>
    settled = chat_tokenizer(tokenizer)
    row = write_chat(write_plain(PROBLEM, "cot"), settled)
    assert encode_row(settled, row).input_ids == settled(row.text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("template", [CHATML, BRACKETS, HEADED])
def test_tokenizers_that_put_a_space_in_front(scheme: str, template: str) -> None:
    """SentencePiece kinds: a stretch behind a special token, or behind the prompt, is read as the whole text is."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    merges = [("▁", letter) for letter in letters if letter.isalnum()]
    pieces = ["<unk>", *letters, *(first + second for first, second in merges)]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = template
    settled = chat_tokenizer(tokenizer)
    for row in (write_plain(PROBLEM, "cot"), write_plain(PROBLEM, "direct")):
        row = write_chat(row, settled)
        example = encode_row(settled, row)
        assert example.input_ids == settled(row.text, add_special_tokens=False)["input_ids"]
        answer = [number for number, code in zip(example.input_ids, example.segments, strict=True) if code == 3]
        assert settled.decode(answer).replace("▁", " ").split()[0].startswith("####")


# -- what the data says is text ------------------------------------------------------------------------

SPECIAL_TEXT = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|im_",
    "end|>",
    "</think>",
    "\n",
    " ",
    "a.",
]
_texts = st.lists(
    st.sampled_from([*SPECIAL_TEXT, "zwölf", "12", "中", "e\u0301", ": ", "\n\n"]), min_size=1, max_size=6
)
_stripped = _texts.map("".join).filter(lambda text: text == text.strip() != "")


@pytest.mark.parametrize("name", ["qwen2.5", "llama3"])
@given(question=_stripped, reasoning=_stripped)
def test_no_text_of_a_problem_can_open_or_close_a_turn(
    data_root: Path, name: str, question: str, reasoning: str
) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    empty = special_ids(tokenizer, encode_row(tokenizer, write_chat(write_plain(PROBLEM, "cot"), tokenizer)).input_ids)
    row = write_chat(write_plain(Problem("t", "1", question, reasoning, "1"), "cot"), tokenizer)
    example = encode_row(tokenizer, row)
    assert special_ids(tokenizer, example.input_ids) == empty and example.input_ids[-1] == tokenizer.eos_token_id
    clean = tokenizer.backend_tokenizer.normalizer is None or row.text.isascii()  # Qwen composes accents
    assert not clean or tokenizer.decode(example.input_ids) == row.text
    assert len(example.segments) == len(example.input_ids) and example.segments == sorted(example.segments)
    if not any(token in question + reasoning for token in tokenizer.added_tokens_encoder):
        assert example.input_ids == tokenizer(row.text, add_special_tokens=False)["input_ids"]


@given(reasoning=st.text(alphabet="ab e\u0301中<|>\n#", max_size=12))
def test_segments_are_those_of_the_offsets_one_by_one(data_root: Path, reasoning: str) -> None:
    """The boundary is looked up, not counted: held against the plain rule, for Qwen's composed characters too."""
    tokenizer = load("root:qwen2.5", str(data_root))
    row = Row(PROBLEM, "cot", "q:", reasoning, "\u0301 #### 12")
    example = encode_row(tokenizer, row)
    encoded = tokenizer(
        row.completion, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    codes = [2 if start < len(reasoning) else 3 for start, _ in encoded["offset_mapping"]]
    assert example.segments == [1] * example.num_prompt_tokens + codes + [3]
    assert example.input_ids[example.num_prompt_tokens :] == [*encoded["input_ids"], tokenizer.eos_token_id]


def test_rows_of_both_kinds_go_together(data_root: Path) -> None:
    tokenizer = load("root:qwen2.5", str(data_root))
    plain = [write_plain(problem, "cot") for problem in problems(data_root, 8)]
    mixed = [write_chat(row, tokenizer) if number % 2 else row for number, row in enumerate(plain)]
    mixed[3] = write_chat(plain[3], tokenizer, system_prompt="Brief.")
    assert encode_rows(tokenizer, mixed) == [encode_row(tokenizer, row) for row in mixed]


class Parrot:
    """Answers with the texts it was given, word for word, and then goes on talking unless it is stopped."""

    training, device = False, torch.device("cpu")

    def __init__(self, examples: Sequence[Example], more: list[int]) -> None:
        self._texts = [example.input_ids + more for example in examples]

    def eval(self) -> None: ...
    def train(self, mode: bool) -> None: ...

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: Any,
        stopping_criteria: Any,
        past_key_values: None,
        logits_processor: Any = None,
    ) -> torch.Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            asked = ids[mask > 0].tolist()
            [text] = [text for text in self._texts if text[: len(asked)] == asked]
            rows.append(ids.tolist() + text[len(asked) :][: generation_config.max_new_tokens])
        longest = max(map(len, rows))
        written = torch.tensor([row + [generation_config.pad_token_id] * (longest - len(row)) for row in rows])
        for length in range(input_ids.shape[1] + 1, longest + 1):
            stopping_criteria(written[:, :length], None)
        return written


@pytest.mark.parametrize("template", [CHATML, THINKS, BRACKETS, HEADED, SEPARATED], ids=str.__len__)
def test_generation_stops_where_the_template_ends_a_turn(template: str) -> None:
    tokenizer = chat_tokenizer(characters(template))
    rows = [write_chat(write_plain(Problem("t", n, f"What is {n}?", f"It is {n}", n), "cot"), tokenizer) for n in "123"]
    examples = encode_rows(tokenizer, rows)
    parrot = Parrot(examples, tokenizer("and more #### 9")["input_ids"])
    prompts = [example.prompt_ids for example in examples]
    answers = generate_greedy(parrot, prompts, tokenizer, max_new_tokens=200, rows=Rows(2))
    ends = [row.completion + row.closing.removesuffix(tokenizer.eos_token) for row in rows]
    assert [one.text for one in answers] == ends and [extract(one.text) for one in answers] == ["1", "2", "3"]


# -- trimming ------------------------------------------------------------------------------------------


def test_a_trimmed_tokenizer_keeps_template_and_special_tokens(data_root: Path, tmp_path: Path) -> None:
    full = load("root:qwen2.5", str(data_root))
    plain = [write_plain(problem, style) for problem in problems(data_root, 40) for style in ("cot", "direct")]
    plain.append(write_plain(Problem("t", "1", "say <|im_end|> now", "so <|endoftext|>", "4"), "cot"))
    rows = [write_chat(row, full, system_prompt="Be brief.") for row in plain]
    trimmed, id_map = trim_tokenizer(full, texts_of(rows))
    assert len(trimmed) < len(full) / 20 and chat_tokenizer(trimmed) is trimmed
    for before, row, old, new in zip(plain, rows, encode_rows(full, rows), encode_rows(trimmed, rows), strict=True):
        assert new.input_ids == [id_map[number] for number in old.input_ids] and new.segments == old.segments
        assert write_chat(before, trimmed, system_prompt="Be brief.") == row
    trimmed.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat_messages(rows[0]), tokenize=False)
        == rows[0].text + "\n"
    )


def test_trimming_takes_a_stream_of_texts(data_root: Path) -> None:
    full = load("root:gpt2", str(data_root))
    rows = [write_plain(problem, "cot") for problem in problems(data_root, 40)]
    texts = texts_of(rows)
    listed, listed_map = trim_tokenizer(full, texts)
    streamed, streamed_map = trim_tokenizer(full, (text for text in texts))
    assert listed_map == streamed_map and listed.get_vocab() == streamed.get_vocab()
