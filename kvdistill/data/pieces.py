"""How the pieces of one tokenizer's vocabulary are told in another's, by the bytes that they write: `tell_pieces`.

A space is a byte like others, so GPT-2's `Ġthe`, Llama-2's `▁the` and a plain ` the` are one piece. Special tokens are
one where they are spelt alike; end-of-text is end-of-text, however it is spelt. Knows tokenizers, not what for.
"""

from __future__ import annotations

import json
import re

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

MOST_PIECES = 16
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """By id what the piece writes; None for special tokens, holes in the numbering, and pieces that write no bytes."""
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=True)
    definition = json.loads(backend.to_str())
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    steps = json.dumps([definition["pre_tokenizer"], definition["decoder"]])
    letters = _byte_letters() if '"ByteLevel"' in steps else {}
    prefix = definition["model"].get("continuing_subword_prefix") or ""
    added = backend.get_added_tokens_decoder()
    for piece, number in vocabulary.items():
        if number in added:
            found[number] = None if added[number].special else added[number].content.encode()
        elif letters:
            known = [letters.get(letter) for letter in piece]
            found[number] = None if None in known else bytes(byte for byte in known if byte is not None)
        elif given := _BYTE.fullmatch(piece):
            found[number] = bytes([int(given[1], 16)])
        else:
            found[number] = (piece.removeprefix(prefix) if prefix else piece).replace("▁", " ").encode()
    return [text or None for text in found]


def piece_map(theirs: PreTrainedTokenizerFast, mine: PreTrainedTokenizerFast) -> Int[Tensor, " V"]:
    """For each of their pieces the number of mine that writes the same bytes, -1 where there is none.

    No two of theirs go to one of mine: of pieces that write the same (a letter, and SentencePiece's byte of it) the
    one with more characters in its name stands behind the other.
    """
    wanted, given = _by_bytes(theirs), _by_bytes(mine)
    found = torch.full((len(piece_bytes(theirs)),), -1, dtype=torch.int64)
    for text, number in wanted.items():
        found[number] = given.get(text, -1)
    found[theirs.eos_token_id] = mine.eos_token_id
    found[(found == mine.eos_token_id) & (torch.arange(len(found)) != theirs.eos_token_id)] = -1
    return found


def tell_pieces(
    theirs: PreTrainedTokenizerFast, mine: PreTrainedTokenizerFast
) -> tuple[Int[Tensor, "V L"], Int[Tensor, " W"]]:
    """Their pieces in mine, and mine in theirs.

    written: for each of theirs the pieces of mine that it is written with, the longest that fits first, -1 behind the
    last (and where mine has nothing to write it with); a piece that both have is itself, a special token is its
    counterpart (`piece_map`). At most `MOST_PIECES`: the beginning of longer ones.
    folds: for each of mine itself if theirs has it, else the longest piece of both that begins it; -1 where none does.
    """
    same, their_bytes, my_bytes = piece_map(theirs, mine), piece_bytes(theirs), piece_bytes(mine)
    numbers = {text: number for text, number in _by_bytes(mine).items() if isinstance(text, bytes)}
    both = {text: numbers[text] for text in numbers.keys() & {text for text in their_bytes if text is not None}}
    rows: list[list[int]] = []
    for number, text in zip(same.tolist(), their_bytes, strict=True):
        row: list[int] = [number] if number >= 0 else []
        while not row or number < 0:
            found = _longest(text or b"", numbers)
            if found is None or len(row) == MOST_PIECES:
                break
            row.append(numbers[found])
            text = (text or b"")[len(found) :]
        rows.append(row)
    written = torch.full((len(rows), max(1, *map(len, rows))), -1, dtype=torch.int64)
    for place, row in zip(written, rows, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int64)
    begins = [_longest(text or b"", both) for text in my_bytes]
    folds = torch.tensor([-1 if text is None else both[text] for text in begins], dtype=torch.int64)
    special = same[[number for number, text in enumerate(their_bytes) if text is None]]
    folds[special[special >= 0]] = special[special >= 0]
    return written, folds


def _longest(text: bytes, known: dict[bytes, int]) -> bytes | None:
    """The longest beginning of a text that is known."""
    ends = range(len(text), 0, -1)
    return next((text[:end] for end in ends if text[:end] in known), None)


def _by_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[bytes | str, int]:
    """Bytes -> id; special tokens by their spelling."""
    found: dict[bytes | str, int] = {}
    names = tokenizer.convert_ids_to_tokens(list(range(len(piece_bytes(tokenizer)))))
    for number, text in sorted(enumerate(piece_bytes(tokenizer)), key=lambda one: len(names[one[0]] or "")):
        if text is not None:
            found.setdefault(text, number)
    special = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return found | {token.content: number for number, token in special.items() if token.special}


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: printable ones as themselves, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
