"""Pieces of one vocabulary found in another's by the bytes that they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_alignment_arms import byte_level_tokenizer, word_piece_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from kvdistill.data.pieces import piece_bytes, piece_map, tell_pieces
from kvdistill.data.tokenizers import character_tokenizer, load_tokenizer


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama-2's: a mark for the space, bytes for what has no piece."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "é", "好"]
    backend = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [("a", "b"), ("▁", "ab")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_what_pieces_write() -> None:
    tokenizer = sentence_pieces()
    written = piece_bytes(tokenizer)
    numbers = tokenizer.get_vocab()
    assert written[:3] == [None, None, None] and written[numbers["<0x41>"]] == b"A"
    assert written[numbers["▁ab"]] == b" ab" and written[numbers["好"]] == "好".encode()
    letters = character_tokenizer("é")
    assert piece_bytes(letters)[letters.get_vocab()["Ġ"]] == b" "
    assert [letters.decode([i]) for i, text in enumerate(piece_bytes(letters)) if text == b"7"] == ["7"]
    words = word_piece_tokenizer()
    continued = [name for name in words.get_vocab() if name.startswith("##")]
    assert continued and all(piece_bytes(words)[words.get_vocab()[n]] == n[2:].encode() for n in continued)


def test_equal_bytes_are_one_piece_whatever_writes_them(tmp_path: Path) -> None:
    theirs, mine = sentence_pieces(), load_tokenizer(str(byte_level_tokenizer(tmp_path / "bytes")))
    found, a, b = piece_map(theirs, mine), theirs.get_vocab(), mine.get_vocab()
    assert found[a["a"]] == b["a"] and found[a["<0x61>"]] == -1, "the letter, not the byte that stands in for it"
    assert found[a["▁"]] == b["Ġ"] and found[a["<0x00>"]] == b["Ā"] and found[a["ab"]] == -1
    assert found[theirs.eos_token_id] == mine.eos_token_id, "end-of-text, however it is spelt"
    assert found[theirs.bos_token_id] == -1


@pytest.mark.parametrize("kind", ["sentences", "bytes", "characters", "words"])
def test_a_tokenizer_against_itself_is_the_identity_and_no_piece_is_taken_twice(kind: str, tmp_path: Path) -> None:
    known = {
        "sentences": sentence_pieces,
        "bytes": lambda: load_tokenizer(str(byte_level_tokenizer(tmp_path / "bytes"))),
        "characters": lambda: character_tokenizer("abc"),
        "words": word_piece_tokenizer,
    }
    made = known[kind]()
    if made.eos_token_id is None:
        made.eos_token = made.sep_token or "[SEP]"
    found = piece_map(made, made)
    written = piece_bytes(made)
    own = [i for i, j in enumerate(found.tolist()) if i == j]
    assert {written[i] for i in own} == {*written} and found[made.eos_token_id] == made.eos_token_id
    told, folds = tell_pieces(made, made)
    assert told[own, 0].tolist() == own == folds[own].tolist() and not (told[own, 1:] >= 0).any()
    for other in (character_tokenizer("xyz"), sentence_pieces()):
        here = piece_map(made, other)
        taken = here[here >= 0]
        assert len(taken.unique()) == len(taken)
        assert all(written[i] == piece_bytes(other)[j] for i, j in enumerate(here.tolist())
                   if j >= 0 and j != other.eos_token_id and written[i] is not None)  # fmt: skip
        assert torch.equal(here, piece_map(made, other))


def test_pieces_are_told_in_the_others_longest_first(tmp_path: Path) -> None:
    theirs = load_tokenizer(str(byte_level_tokenizer(tmp_path / "bytes")))  # numbers of two digits are pieces
    mine = character_tokenizer("abc")
    written, folds = tell_pieces(theirs, mine)
    a, b = theirs.get_vocab(), mine.get_vocab()
    assert written[a["37"]].tolist() == [b["3"], b["7"]] and written[a["7"]].tolist() == [b["7"], -1]
    assert written[a["Ġ"]].tolist() == [b["Ġ"], -1] and written[a["z"]].tolist() == [-1, -1]
    assert written[theirs.eos_token_id].tolist() == [mine.eos_token_id, -1]
    assert folds[b["3"]] == b["3"] and folds[mine.eos_token_id] == mine.eos_token_id and folds[mine.pad_token_id] == -1
    written, folds = tell_pieces(mine, theirs)  # the student has what the teacher has not
    assert written.shape == (len(mine), 1) and written[b["3"], 0] == a["3"]
    assert folds[a["37"]] == a["3"] and folds[a["z"]] == -1
