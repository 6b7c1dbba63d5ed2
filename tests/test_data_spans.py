"""Spans of tokens: the five real tokenizers byte by byte or piece by piece, and small ones made for one quirk each."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_templates import load
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.data.spans import token_spans
from kvdistill.data.tokenizers import character_tokenizer, encode_plain

BYTES = ["gpt2", "qwen2.5", "llama3"]
NAMES = [*BYTES, "t5-small", "bert-base-uncased"]
_PARTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "12345",
    "x½",
    "ﬁne",
    "é",
    "e\u0301",
    "e\u0302\u0301",
    "\u0327",
    "İ",
    "한국",
    "각",
]
_PARTS += [
    "\u1100\u1161\u11a8",
    "苹果，",
    "𠮷",
    "👩\u200d👧",
    "🤷🏽\u200d♀️",
    "\u00a0",
    "\u200b",
    "\x07",
    "▁",
    "क्षि",
    "ﷺ",
    "the",
    " The",
    ".",
]
_texts = st.lists(st.sampled_from(_PARTS) | st.text("ab Zé中", max_size=4), max_size=10).map("".join)


def spans_of(tokenizer: Any, text: str) -> list[tuple[str, float, float]]:
    """(piece, start, end); unknown pieces as `?`."""
    [found] = token_spans(tokenizer, [text])
    pieces = tokenizer.convert_ids_to_tokens(found.ids)
    named = ["?" if unknown else piece for piece, unknown in zip(pieces, found.is_unknown, strict=True)]
    return list(zip(named, found.start.tolist(), found.end.tolist(), strict=True))


def real_texts(root: Path, each: int = 40) -> list[str]:
    with (root / "gsm8k/test.jsonl").open(encoding="utf-8") as lines:
        english = [json.loads(line)["question"] for line, _ in zip(lines, range(each), strict=False)]
    chinese = json.JSONDecoder().raw_decode
    text = (root / "math23k/math23k_test.json").read_text(encoding="utf-8")
    place, found = 0, []
    for _ in range(each):
        row, place = chinese(text, text.index("{", place))
        found.append(row["original_text"])
    table = (root / "cmmlu/test/agronomy.csv").read_text(encoding="utf-8").splitlines()
    return [*english, *found, *table[1 : each + 1]]


# -- byte-level tokenizers -----------------------------------------------------------------------------


def byte_alphabet() -> dict[str, int]:
    """Letter -> byte as GPT-2 defined it: printable Latin-1 stands for itself, the others come after 255, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def slow_spans(tokenizer: PreTrainedTokenizerFast, text: str) -> list[tuple[float, float]]:
    """Byte by byte through the text. For texts that are not changed before they are cut."""
    alphabet = byte_alphabet()
    places = []
    for number, character in enumerate(text):
        width = len(character.encode())
        places += [number + i / width for i in range(width)]
    places.append(len(text))
    spans, reached, spelt = [], 0, b""
    for piece in tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, [text])[0].ids):
        spelt += bytes(alphabet[letter] for letter in piece)
        spans.append((places[reached], places[len(spelt)]))
        reached = len(spelt)
    assert spelt == text.encode()
    return spans


@pytest.mark.parametrize("name", BYTES)
@given(text=_texts)
def test_byte_level_tokens_have_their_bytes(data_root: Path, name: str, text: str) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    text = unicodedata.normalize("NFC", text) if name == "qwen2.5" else text
    [found] = token_spans(tokenizer, [text])
    expected = np.array(slow_spans(tokenizer, text)).reshape(-1, 2)
    np.testing.assert_allclose(np.stack([found.start, found.end], 1), expected, atol=1e-9)


@pytest.mark.parametrize("name", BYTES)
def test_real_rows_byte_by_byte(data_root: Path, name: str) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    texts = [unicodedata.normalize("NFC", text) for text in real_texts(data_root)]
    for text, found in zip(texts, token_spans(tokenizer, texts), strict=True):
        expected = np.array(slow_spans(tokenizer, text))
        np.testing.assert_allclose(np.stack([found.start, found.end], 1), expected, atol=1e-9)
        assert not found.is_unknown.any() and (found.start[1:] == found.end[:-1]).all()


@pytest.mark.parametrize(
    "text,expected",
    [
        (" cafe\u0301!", [("ĠcafÃ©", 0, 6), ("!", 6, 7)]),  # the library stops in front of the combining mark
        ("\u1100\u1161\u11a8 x", [("ê°ģ", 0, 3), ("Ġx", 3, 5)]),  # three jamo, one syllable
        ("e\u0302\u0302", [("Ãª", 0, 1.5), ("Ì", 1.5, 2.25), ("Ĥ", 2.25, 3)]),  # 2 + 2 bytes over three characters
        ("ก็", [("à¸ģ", 0, 1), ("à¹ĩ", 1, 2)]),  # marks that do not compose keep their own place
        ("\u212b", [("Ãħ", 0, 1)]),
        ("12 345", [("1", 0, 1), ("2", 1, 2), ("Ġ", 2, 3), ("3", 3, 4), ("4", 4, 5), ("5", 5, 6)]),
        ("a\r\n\tb", [("a", 0, 1), ("čĊ", 1, 3), ("ĉb", 3, 5)]),
        ("👩\u200dx", [("ðŁĳ©", 0, 1), ("âĢ", 1, 1 + 2 / 3), ("į", 1 + 2 / 3, 2), ("x", 2, 3)]),
    ],
)
def test_qwen_composes_and_splits(data_root: Path, text: str, expected: list[Any]) -> None:
    assert_spans(spans_of(load("root:qwen2.5", str(data_root)), text), expected)


def assert_spans(found: list[Any], expected: list[Any]) -> None:
    assert [piece for piece, _, _ in found] == [piece for piece, _, _ in expected]
    np.testing.assert_allclose([span for _, *span in found], [span for _, *span in expected], atol=1e-9)


# -- SentencePiece and WordPiece -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,expected",
    [
        ("I have 12345.", [("▁I", 0, 1), ("▁have", 1, 6), ("▁", 6, 7), ("123", 7, 10), ("45", 10, 12), (".", 12, 13)]),
        ("b \r\n\t c", [("▁", 0, 0), ("b", 0, 1), ("▁", 1, 6), ("c", 6, 7)]),  # a run of white space is one mark
        ("  c ", [("▁", 0, 2), ("c", 2, 3)]),  # white space at the end is dropped
        ("小x", [("▁", 0, 0), ("?", 0, 1), ("x", 1, 2)]),
        ("👩\u200d👧", [("▁", 0, 0), ("?", 0, 1), ("▁", 1, 2), ("?", 2, 3)]),  # the joiner becomes a space
        ("x½", [("▁", 0, 0), ("x", 0, 1), ("1", 1, 4 / 3), ("?", 4 / 3, 5 / 3), ("2", 5 / 3, 2)]),  # 1⁄2: three ways
        ("１２３", [("▁", 0, 0), ("123", 0, 3)]),
        ("cafe\u0301 fine", [("▁café", 0, 5), ("▁fine", 5, 10)]),
        ("c▁b", [("▁", 0, 0), ("c", 0, 1), ("▁", 1, 2), ("b", 2, 3)]),
    ],
)
def test_t5(data_root: Path, text: str, expected: list[Any]) -> None:
    assert_spans(spans_of(load("root:t5-small", str(data_root)), text), expected)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("Café cafe\u0301 é", [("cafe", 0, 4), ("cafe", 5, 10), ("e", 11, 12)]),
        ("Has 12345.", [("has", 0, 3), ("123", 4, 7), ("##45", 7, 9), (".", 9, 10)]),
        ("小个 a", [("小", 0, 1), ("?", 1, 2), ("a", 3, 4)]),
        ("가 x", [("ᄀ", 0, 0.5), ("##ᅡ", 0.5, 1), ("x", 2, 3)]),  # BERT spells a syllable in jamo
        ("\u1100\u1161", [("ᄀ", 0, 1), ("##ᅡ", 1, 2)]),
        ("🤷🏽\u200d♀\ufe0f x", [("?", 0, 5), ("x", 6, 7)]),
        ("\u0327a\r\nb", [("a", 1, 2), ("b", 4, 5)]),
        ("[SEP]", [("[", 0, 1), ("sep", 1, 4), ("]", 4, 5)]),
    ],
)
def test_bert(data_root: Path, text: str, expected: list[Any]) -> None:
    assert_spans(spans_of(load("root:bert-base-uncased", str(data_root)), text), expected)


def test_real_rows_piece_by_piece(data_root: Path) -> None:
    """A whole-character span, read back and normalised, is the piece."""
    texts = real_texts(data_root)
    for name, mark in (("t5-small", "▁"), ("bert-base-uncased", "##")):
        tokenizer = load(f"root:{name}", str(data_root))
        compared = 0
        for text in texts:
            for piece, start, end in spans_of(tokenizer, text):
                if piece != "?" and start == int(start) and end == int(end):
                    read = unicodedata.normalize("NFKC" if mark == "▁" else "NFD", text[int(start) : int(end)])
                    if mark == "##":
                        read = "".join(c for c in read.lower() if unicodedata.category(c) != "Mn")
                    assert "".join(read.split()) == piece.replace(mark, ""), text
                    compared += 1
        assert compared > 2500


# -- any tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(text=_texts)
def test_spans_are_ordered_disjoint_and_inside_the_text(data_root: Path, name: str, text: str) -> None:
    tokenizer = load(f"root:{name}", str(data_root))
    [found] = token_spans(tokenizer, [text])
    assert found.ids == encode_plain(tokenizer, [text])[0].ids
    places = np.stack([found.start, found.end], 1).flatten()
    assert (np.diff(places) >= 0).all() and (places >= 0).all() and (places <= len(text)).all()
    assert len(found.ids) == len(found.start) == len(found.end) == len(found.is_unknown)
    if name in BYTES:
        assert (found.end > found.start).all() and (found.end - found.start).sum() == pytest.approx(len(text))
    else:
        empty = [p for p, a, b in spans_of(tokenizer, text) if a == b]
        assert set(empty) <= {"▁"}, "only SentencePiece's mark can stand for nothing"


def test_many_texts_are_as_each_alone(data_root: Path) -> None:
    texts = ["", "a b", "小明", "", "e\u0301"]
    for name in NAMES:
        tokenizer = load(f"root:{name}", str(data_root))
        for text, found in zip(texts, token_spans(tokenizer, texts), strict=True):
            [alone] = token_spans(tokenizer, [text])
            assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))
        assert token_spans(tokenizer, []) == []


def test_a_space_put_in_front_has_no_characters(data_root: Path) -> None:
    backend = Tokenizer.from_str(load("root:gpt2", str(data_root)).backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # RoBERTa: offsets without the spaces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert_spans(spans_of(tokenizer, "I have"), [("ĠI", 0, 1), ("Ġhave", 1, 6)])
    assert_spans(spans_of(tokenizer, " I\n"), [("ĠI", 0, 2), ("Ċ", 2, 3)])
    assert_spans(spans_of(tokenizer, "个"), [("Ġ", 0, 0), ("ä¸", 0, 2 / 3), ("ª", 2 / 3, 1)])
    backend.normalizer = normalizers.Lowercase()  # now the offsets are all there is
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert_spans(
        spans_of(tokenizer, "A B 小"), [("Ġa", 0, 1), ("Ġb", 1, 3), ("Âł", 3, 4), ("å°", 4, 4.5), ("ı", 4.5, 5)]
    )


def test_bytes_for_want_of_a_piece() -> None:
    """Llama-2: spaces written as marks, and characters that are no piece as bytes."""
    pieces = ["<unk>", "▁", "a", "b", "▁a", "▁b", "▁▁", *[f"<0x{byte:02X}>" for byte in range(256)]]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "▁")]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert_spans(spans_of(tokenizer, "a b  a"), [("▁a", 0, 1), ("▁b", 1, 3), ("▁", 3, 4), ("▁a", 4, 6)])
    assert_spans(spans_of(tokenizer, "▁a"), [("▁", 0, 0), ("▁a", 0, 2)])  # one put in front, one the text's own
    thirds = [("<0xE5>", 0, 1 / 3), ("<0xB0>", 1 / 3, 2 / 3), ("<0x8F>", 2 / 3, 1)]
    assert_spans(spans_of(tokenizer, "小a "), [("▁", 0, 0), *thirds, ("a", 1, 2), ("▁", 2, 3)])


def test_letters_the_character_tokenizer_lacks() -> None:
    assert_spans(
        spans_of(character_tokenizer("x"), "1q个x"),
        [("1", 0, 1), ("?", 1, 2), *[("?", 2 + i / 3, 2 + (i + 1) / 3) for i in range(3)], ("x", 3, 4)],
    )


def test_tokens_added_later_are_noticed() -> None:
    tokenizer = character_tokenizer("think<>é")
    assert len(spans_of(tokenizer, "1<think>é2")) == 11
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    assert_spans(spans_of(tokenizer, "1<think>é")[:2], [("1", 0, 1), ("<think>", 1, 8)])


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"data\.tokenizer: SimpleNamespace is no fast tokenizer.*\n  fix: .*tokenizer\.json"
    ):
        token_spans(SimpleNamespace(is_fast=False), ["a"])  # type: ignore[arg-type]
