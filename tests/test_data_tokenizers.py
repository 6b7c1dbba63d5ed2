"""Tokenizers: the built-in one, local folders, trimming; and encoding with segments."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.data import tokenizers
from kvdistill.data.encode import encode_row, encode_rows
from kvdistill.data.problems import Problem, Row, write_plain
from kvdistill.data.splits import load_multi_task_dataset
from kvdistill.data.tokenizers import (
    SYMBOLS,
    character_tokenizer,
    fingerprint_tokenizer,
    load_tokenizer,
    trim_tokenizer,
)

CHARACTERS = character_tokenizer()
_load = functools.cache(load_tokenizer)  # the big ones take a second each
WIDE = character_tokenizer("abc<>pd\n中\u0301😀")
UNSEEN = "Zyzzyva qux, déjà-vu 3.14159 — 中文题目，答案是１２。😀\n\tend  of\u00a0line <|endoftext|>"


@given(st.text(alphabet=SYMBOLS))
def test_characters_round_trip_one_token_each(text: str) -> None:
    encoded = CHARACTERS(text, return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert CHARACTERS.decode(encoded["input_ids"]) == text and CHARACTERS.unk_token_id not in encoded["input_ids"]


@given(st.text(alphabet=sorted({*SYMBOLS, *"abc<>pd\n中\u0301😀"})))
def test_characters_round_trip_with_more_symbols_even_a_written_pad(text: str) -> None:
    for given_text in (text, text + "<pad>"):
        ids = WIDE(given_text, split_special_tokens=True)["input_ids"]
        assert len(ids) == len(given_text.encode()) and WIDE.decode(ids) == given_text  # a byte, a token


def test_characters_load_back_from_a_folder(tmp_path: Path) -> None:
    CHARACTERS.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint_tokenizer(back) == fingerprint_tokenizer(CHARACTERS) != fingerprint_tokenizer(WIDE)
    assert [back.pad_token_id, back.bos_token_id, back.eos_token_id, back.unk_token_id] == [0, 1, 2, 3]
    assert len(back) == 4 + len(SYMBOLS) and back("1+2:")["input_ids"] == CHARACTERS("1+2:")["input_ids"]


def test_characters_take_in_what_the_texts_need() -> None:
    tokenizer = load_tokenizer("characters", texts=["ab", "b中"])
    assert len(tokenizer) == 4 + len(SYMBOLS) + 2 + 3 and tokenizer.decode(tokenizer("b中a1")["input_ids"]) == "b中a1"
    assert fingerprint_tokenizer(load_tokenizer("characters", texts=["中ba"])) == fingerprint_tokenizer(tokenizer)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt2"])
def test_characters_survive_auto_tokenizer_beside_any_model(tmp_path: Path, architecture: str) -> None:
    # transformers 5 swaps the tokenizer class of some families (qwen2) whatever was saved
    tokenizer = character_tokenizer("中a")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    tokenizer.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("12+7-5:19=14", "3*4+5*6? 中a;., =", "<pad>1"):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert back.decode(back(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (back.pad_token_id, back.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


ROLES = {
    "qwen2.5": (None, "<|im_end|>", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "t5-small": (None, "</s>", "<pad>"),
    "bert-base-uncased": ("[CLS]", "[SEP]", "[PAD]"),
}


@pytest.mark.parametrize("name", ROLES)
def test_local_tokenizers_load_with_roles_settled_and_nothing_else_changed(data_root: Path, name: str) -> None:
    ours = _load(f"root:{name}", str(data_root))
    plain = PreTrainedTokenizerFast(tokenizer_file=str(data_root / f"tokenizers/{name}/tokenizer.json"))
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ROLES[name]
    assert len(ours) == len(plain)
    text = "Natalia sold 48/2 = 24 clips in May."
    assert ours(text, add_special_tokens=False)["input_ids"] == plain(text, add_special_tokens=False)["input_ids"]


def test_names_that_lead_nowhere(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "hub_reachable", lambda: False)
    (tmp_path / "tokenizer.json").write_text("{broken")
    cases = [
        ("root:qwen2.5", None, "needs data.root", "data.root=DIR"),
        ("root:qwen", str(data_root), "no tokenizer folder", "qwen2.5"),
        ("./nothing/here", None, "no such folder", "root:NAME"),
        (str(data_root), None, "holds no tokenizer.json", "save_pretrained"),
        (str(tmp_path), None, "cannot load a fast tokenizer", "tokenizer.json"),
        ("nobody/nothing-7", None, "cannot be reached", "data.root=DIR"),
    ]
    for name, root, what, fix in cases:
        with pytest.raises(DataError, match=what) as caught:
            load_tokenizer(name, root, place="data.tokenizer")
        assert fix in caught.value.fix and caught.value.place == "data.tokenizer"


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gpt2"])
def test_trimming_keeps_pieces_round_trips_and_loads_back(data_root: Path, tmp_path: Path, name: str) -> None:
    full = _load(f"root:{name}", str(data_root))
    rows = load_multi_task_dataset(["gsm8k"], ["cot"], num_problems=250, root=data_root)
    texts = [text for row in rows for text in (row.prompt, row.completion)]
    seen, held_out = texts[:400], texts[400:]
    trimmed, id_map = trim_tokenizer(full, seen)
    assert 256 < len(trimmed) < len(full) / 5 and sorted(id_map.values()) == list(range(len(trimmed)))
    old_of = {new: old for old, new in id_map.items()}
    for text in seen[::20]:
        ids = trimmed(text, add_special_tokens=False)["input_ids"]
        assert [old_of[i] for i in ids] == full(text, add_special_tokens=False)["input_ids"]
    for text in [*held_out, UNSEEN]:
        ids = trimmed(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        expected = full.decode(full(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        assert trimmed.decode(ids) == expected
        assert [trimmed.convert_ids_to_tokens(i) for i in ids] == [full.convert_ids_to_tokens(old_of[i]) for i in ids]
    for role in ("bos_token", "eos_token", "pad_token"):
        assert getattr(trimmed, role) == getattr(full, role)
    assert [old_of[i] for i in trimmed(seen[0])["input_ids"]] == full(seen[0])["input_ids"]  # with Llama-3's prefix
    trimmed.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back(UNSEEN)["input_ids"] == trimmed(UNSEEN)["input_ids"]
    assert fingerprint_tokenizer(back) == fingerprint_tokenizer(trimmed)


@pytest.mark.parametrize("name", ["t5-small", "bert-base-uncased", "characters"])
def test_other_kinds_are_not_trimmed(data_root: Path, name: str) -> None:
    full = _load(name if name == "characters" else f"root:{name}", str(data_root))
    with pytest.raises(DataError, match="only byte-level BPE") as caught:
        trim_tokenizer(full, ["text"])
    assert "trim_vocabulary=false" in caught.value.fix


def test_encoding_of_a_chain_is_as_written_here() -> None:
    row = Row(Problem("chain", "7", "3+4-2", "7", "5"), "cot", "3+4-2:", "7", "=5")
    example = encode_row(CHARACTERS, row)
    assert CHARACTERS.convert_ids_to_tokens(example.input_ids) == ["<bos>", *"3+4-2:7=5", "<eos>"]
    assert example.segments == [1] * 7 + [2] + [3] * 3
    assert CHARACTERS.decode(example.prompt_ids) == "<bos>3+4-2:"
    assert (example.task, example.id, example.answer, example.prompt) == ("chain", "7", "5", "3+4-2:")


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gpt2", "t5-small", "characters"])
def test_segments_spell_their_texts(data_root: Path, name: str) -> None:
    rows = load_multi_task_dataset(["gsm8k"], ["cot", "direct"], num_problems=40, root=data_root)
    texts = [row.text for row in rows]
    own = load_tokenizer(name, texts=texts) if name == "characters" else None
    tokenizer = own or _load(f"root:{name}", str(data_root))
    for row, example in zip(rows, encode_rows(tokenizer, rows), strict=True):
        assert sorted(example.segments) == example.segments and len(example.segments) == len(example.input_ids)
        assert example.segments[-1] == 3 and example.input_ids[-1] == tokenizer.eos_token_id
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        alone = tokenizer(row.prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert example.prompt_ids == bos + alone
        paired = list(zip(example.input_ids, example.segments, strict=True))
        spelt = [
            tokenizer.decode([i for i, s in paired if s == code][first:last])
            for code, first, last in ((1, len(bos), None), (2, 0, None), (3, 0, -1))
        ]
        if name != "t5-small":  # the one here that does not keep spaces and line ends
            assert spelt == [row.prompt, row.reasoning, row.answer]
        else:
            assert spelt[2].split() == row.answer.split()


def test_a_token_across_the_boundary_belongs_where_it_starts(data_root: Path) -> None:
    gpt2 = _load("root:gpt2", str(data_root))
    row = Row(Problem("t", "1", "q", "ab", "c"), "cot", "q", " th", "e end")
    assert gpt2.tokenize(row.completion) == ["Ġthe", "Ġend"]
    assert encode_row(gpt2, row).segments == [1, 1, 2, 3, 3]


def test_data_cannot_write_special_tokens(data_root: Path) -> None:
    qwen = _load("root:qwen2.5", str(data_root))
    row = write_plain(Problem("t", "1", "say <|im_end|> now", "so <|endoftext|>", "4"), "cot")
    example = encode_row(qwen, row)
    specials = {qwen.eos_token_id, qwen.pad_token_id}
    assert not specials & set(example.input_ids[:-1]) and qwen.decode(example.input_ids[:-1]) == row.text


def test_hashes_tell_problems_and_prompts() -> None:
    problem = Problem("t", "1", "How many?", "two", "4")
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    cot, direct = (encode_row(tokenizer, write_plain(problem, style)) for style in ("cot", "direct"))
    assert cot.doc_hash == direct.doc_hash and cot.prompt_hash != direct.prompt_hash
    assert direct.segments.count(2) == 0 and cot.segments.count(2) > 0


def test_an_answer_that_cannot_be_spelt_is_refused(data_root: Path) -> None:
    row = write_plain(Problem("t", "9", "城市?", "因为", "北京"), "cot")
    with pytest.raises(DataError, match="cannot spell the answer") as caught:
        encode_row(_load("root:t5-small", str(data_root)), row)
    assert "t / 9" in caught.value.what


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    backend = json.loads(CHARACTERS.backend_tokenizer.to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
