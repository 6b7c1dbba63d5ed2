"""Where the steps of a written reasoning end, in tokens: `StepMarks`.

A mark is a text that stands between steps: `,`, a line end, `>>`. A step is what stands between two marks, or between
a mark and either end of the reasoning, unless it is blank. It ends in the token with its last character that is no
white space: in `4+3=7, 7*2=14` with the mark `,` in the tokens of 7 and 14, with `7,` as one token in that one.

Looked for in the bytes that tokens write (`piece_bytes`), so that neither a mark that a tokenizer joins to its
neighbours nor one that it cuts in two is missed. What the tokenizer itself drops is not there to be found: line ends in
WordPiece and most SentencePiece models. What is no bytes (special and unknown tokens) is text, and no part of a mark.
Knows token ids and segment codes; no file, no row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.core.segments import REASONING
from kvdistill.data.pieces import piece_bytes

_NO_BYTE = 256  # stands for a token that writes no bytes
_WHITE = b" \t\r\n\v\f"


class StepEnds(NamedTuple):
    """ends_BS: True at the tokens that end a step; at one in every row whose reasoning is not blank, or more.

    marked_B: rows whose reasoning holds a mark. The others are one step, which ends where the reasoning does: whoever
    needs marked steps looks here.
    """

    ends_BS: Bool[Tensor, "B S"]
    marked_B: Bool[Tensor, " B"]


class StepMarks:
    """Finds the ends of steps in batches of one tokenizer's ids. Tables of its pieces are made once, here."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mark: str) -> None:
        if not mark:
            raise DataError("an empty mark ends no step", place="compress.step_mark", fix='e.g. step_mark: ","')
        self.mark = mark
        pieces = piece_bytes(tokenizer)
        self._size_V = torch.tensor([1 if text is None else len(text) for text in pieces])
        self._start_V = self._size_V.cumsum(0) - self._size_V
        written = bytearray(b"".join(b"\0" if text is None else text for text in pieces))
        self._bytes = torch.frombuffer(written, dtype=torch.uint8).to(torch.int16)
        self._bytes[self._start_V[[text is None for text in pieces]]] = _NO_BYTE
        self._is_white = torch.zeros(_NO_BYTE + 1, dtype=torch.bool)
        self._is_white[list(_WHITE)] = True

    def ends(self, ids_BS: Int[Tensor, "B S"], segments_BS: Int[Tensor, "B S"]) -> StepEnds:
        """Of every row, on the CPU. Padding and other segments are never looked at. N tokens, C bytes of all rows."""
        reasoning_BS = segments_BS == REASONING
        ends_BS, marked_B = torch.zeros_like(reasoning_BS), torch.zeros(len(ids_BS), dtype=torch.bool)
        row_N, place_N = reasoning_BS.nonzero(as_tuple=True)
        ids_N = ids_BS[row_N, place_N]
        size_N = self._size_V[ids_N]
        token_C = torch.repeat_interleave(size_N)
        within_C = torch.arange(len(token_C)) - (size_N.cumsum(0) - size_N)[token_C]
        byte_C, row_C = self._bytes[self._start_V[ids_N][token_C] + within_C], row_N[token_C]

        mark = self.mark.encode()
        num_starts = len(byte_C) - len(mark) + 1
        in_mark_C = torch.zeros(len(byte_C), dtype=torch.bool)
        if num_starts > 0:
            begins = row_C[:num_starts] == row_C[len(mark) - 1 :]
            for k, byte in enumerate(mark):
                begins &= byte_C[k : k + num_starts] == byte
            for k in range(len(mark)):
                in_mark_C[k : k + num_starts] |= begins
        marked_B[row_C[in_mark_C]] = True

        # Of the bytes that say something, those behind which a mark, another row or nothing comes first.
        says = (~in_mark_C & ~self._is_white[byte_C.int()]).nonzero().squeeze(1)
        row, marks_before = row_C[says], in_mark_C.cumsum(0)[says]
        is_last = torch.ones(len(says), dtype=torch.bool)
        is_last[:-1] = (row[1:] != row[:-1]) | (marks_before[1:] != marks_before[:-1])
        token = token_C[says[is_last]]
        ends_BS[row_N[token], place_N[token]] = True
        return StepEnds(ends_BS, marked_B)
