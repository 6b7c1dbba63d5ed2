"""Words from memory: the same ids and the same boundaries as the tokenizer, or the tokenizer is asked."""

from __future__ import annotations

import gc
import json
import weakref
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
from chat_templates import load
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvdistill.data import words
from kvdistill.data.tokenizers import character_tokenizer, encode_plain, trim_tokenizer
from kvdistill.data.words import find_cutter, read_known

READ = ["qwen2.5", "llama3", "gpt2"]
PLAIN = "".join(map(chr, range(32, 127))) + "\t\n\r"
# what the patterns tell apart: contractions in any case, digits in groups, spaces before and after line ends
_PARTS = ["'s", "'LL", "'Re", "'d", " ", "  ", "\n", " \n", "\r\n", "\t", "1234567", " 12", "the", " The", ".", "!!\n"]
_texts = st.lists(st.sampled_from(_PARTS) | st.text(PLAIN, max_size=6), max_size=12).map("".join)


def read(tokenizer: PreTrainedTokenizerFast, text: str, end: int = 0) -> tuple[list[int], int] | None:
    return read_known(tokenizer, [(text, end)])[0]


def asked(tokenizer: PreTrainedTokenizerFast, text: str, end: int) -> tuple[list[int], int]:
    """By the tokenizer and the plain rule: a token belongs where it begins."""
    [encoding] = encode_plain(tokenizer, [text])
    return encoding.ids, bisect_left([start for start, _ in encoding.offsets], end)


@pytest.mark.parametrize("name", READ)
@given(text=_texts, share=st.floats(0, 1))
def test_plain_texts_are_read_as_the_tokenizer_reads_them(data_root: Path, name: str, text: str, share: float) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    assert find_cutter(tokenizer) is not None and read(tokenizer, text) == (asked(tokenizer, text, 0)[0], 0)
    end = round(share * len(text))
    found = read(tokenizer, text, end)
    assert found is None or found == asked(tokenizer, text, end)


@pytest.mark.parametrize("name", READ)
def test_real_rows_are_read_alike_and_mostly_from_memory(data_root: Path, name: str) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    files = {"gsm8k/test.jsonl": "question", "math500/test.jsonl": "problem"}
    lines = [(json.loads(line), field) for file, field in files.items() for line in (data_root / file).open("rb")]
    texts = [(line[field], line["answer"]) for line, field in lines[:300] + lines[-100:]]
    found = read_known(tokenizer, [(f"{asking} #### {answer}", len(asking)) for asking, answer in texts])
    for (asking, answer), read in zip(texts, found, strict=True):
        assert read is None or read == asked(tokenizer, f"{asking} #### {answer}", len(asking))
    assert sum(read is not None for read in found) > 0.8 * len(texts)


@pytest.mark.parametrize(
    "text", ["é", "中", "a\u00a0b", "\x1c", "\x00", "\u2028", "\x7f", "e\u0301", "\u212a's", "'\u017f"]
)
def test_other_texts_are_left_to_the_tokenizer(data_root: Path, text: str) -> None:
    for name in READ:
        assert read(load(f"root:{name}", str(data_root)), f"a {text} b") is None


def test_special_tokens_are_spelt_and_other_added_tokens_left_to_the_tokenizer(data_root: Path) -> None:
    tokenizer = load("root:qwen2.5", str(data_root))
    special, added = "so <|im_end|> it is", "so <tool_call> it is"
    assert read(tokenizer, special) == (encode_plain(tokenizer, [special])[0].ids, 0)
    assert tokenizer.eos_token_id not in read(tokenizer, special)[0] and read(tokenizer, added) is None


def test_a_boundary_inside_a_word_or_behind_a_space_is_left_to_the_tokenizer(data_root: Path) -> None:
    gpt2 = load("root:gpt2", str(data_root))
    assert read(gpt2, "the end", 3)[1] == 1 and read(gpt2, "the end", 7)[1] == 2
    assert read(gpt2, "the end", 5) is None and read(gpt2, "the end", 4) is None


def test_a_trimmed_tokenizer_is_read_too(data_root: Path) -> None:
    full = load("root:llama3", str(data_root))
    trimmed, id_map = trim_tokenizer(full, ["the quick brown fox", "12345 + 1"])
    text = "the quick 12345 yellow fox"
    assert read(trimmed, text) == (encode_plain(trimmed, [text])[0].ids, 0)
    old_ids, new_ids = read(full, "12345 + 1")[0], read(trimmed, "12345 + 1")[0]
    assert [id_map[number] for number in old_ids] == new_ids


def changed(tokenizer: PreTrainedTokenizerFast, **parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_tokenizers_of_other_kinds_have_no_reader(data_root: Path) -> None:
    gpt2 = load("root:gpt2", str(data_root))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    others = [
        load("root:t5-small", str(data_root)),
        load("root:bert-base-uncased", str(data_root)),
        character_tokenizer(),
        changed(gpt2, normalizer=normalizers.Lowercase()),
        changed(gpt2, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(gpt2, pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), letters])),
        changed(gpt2, pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split("e", "isolated"), letters])),
        changed(gpt2, pre_tokenizer=None),
    ]
    assert [find_cutter(tokenizer) for tokenizer in others] == [None] * len(others)
    assert [read(tokenizer, "1 + 1") for tokenizer in others] == [None] * len(others)
    assert find_cutter(changed(gpt2, normalizer=normalizers.NFC())) is not None


def test_tokens_added_later_are_seen(data_root: Path) -> None:
    gpt2 = changed(load("root:gpt2", str(data_root)))
    assert read(gpt2, "a <step> b") is not None
    gpt2.add_tokens([AddedToken("<step>", normalized=False)])
    assert read(gpt2, "a <step> b") is None


def test_what_is_remembered_is_bounded_and_goes_with_the_tokenizer(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_MOST_WORDS", 5)
    gpt2 = changed(load("root:gpt2", str(data_root)))
    long = " " + "x" * 50
    text = "one two three four five six seven" + long
    assert read(gpt2, text)[0] == encode_plain(gpt2, [text])[0].ids
    assert 0 < len(words._LEARNED[gpt2]) <= 5 and long not in words._LEARNED[gpt2]
    gone = weakref.ref(gpt2)
    del gpt2
    gc.collect()
    assert gone() is None
