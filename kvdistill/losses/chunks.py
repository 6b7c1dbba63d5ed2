"""Where two tokenizations of one text may be compared: the chunks between neighbouring boundaries that both have.

At the beginning of a chunk both models have read the same text, and over the chunk both write the same text, each in
tokens of its own. Knows spans and roles, no tokenizer and no logits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

from kvdistill.core.segments import END, TEXT, UNKNOWN

_PER_CHARACTER = 1024  # boundaries closer than this are one: fractions of a character are rounded far into a text


@dataclass(frozen=True)
class TextChunks:
    """C chunks of a batch: of example `row`, its first and last tokens on either side (columns of theirs, mine).

    ids_BS: the teacher's own tokens. written_VL, folds_V: how its pieces are told in the student's, and which of the
    student's count as which (`data/pieces.py`).
    """

    row_C: Int[Tensor, " C"]
    theirs_C2: Int[Tensor, "C 2"]
    mine_C2: Int[Tensor, "C 2"]
    ids_BS: Int[Tensor, "B S"]
    written_VL: Int[Tensor, "V L"]
    folds_V: Int[Tensor, " W"]

    def to(self, device: torch.device | str) -> TextChunks:
        return TextChunks(**{one.name: getattr(self, one.name).to(device) for one in fields(self)})


def common_chunks(
    theirs_S2: Num[Tensor, "S 2"], their_roles_S: Int[Tensor, " S"],
    my_spans_T2: Num[Tensor, "T 2"], my_roles_T: Int[Tensor, " T"],
) -> Int[Tensor, "C 4"]:  # fmt: skip
    """Chunks of one text as [first of theirs, last of theirs, first of mine, last of mine], in order.

    A text token without characters begins the chunk behind it. A chunk with a stretch that a tokenizer cannot write
    (UNKNOWN) is left out. The first token that ends the text (END) on either side is one more chunk.
    """
    sides = []
    for spans, roles in ((theirs_S2, their_roles_S), (my_spans_T2, my_roles_T)):
        tokens = ((roles == TEXT) | (roles == UNKNOWN)).nonzero().squeeze(1)
        ends = (spans[tokens, 1].double() * _PER_CHARACTER).round().long()
        sides.append((tokens, ends, roles))
    both = torch.cat([ends.unique() for _, ends, _ in sides])
    values, counts = both.unique(return_counts=True)
    common, columns, good = values[counts == 2], [], torch.ones(int((counts == 2).sum()), dtype=torch.bool)
    for tokens, ends, roles in sides:
        last = torch.searchsorted(ends, common)
        first = torch.cat([last.new_zeros(min(1, len(last))), last[:-1] + 1])
        unknown = torch.cat([ends.new_zeros(1), (roles[tokens] == UNKNOWN).long().cumsum(0)])
        good &= unknown[last + 1] == unknown[first]
        columns += [tokens[first], tokens[last]]
    chunks = torch.stack(columns, dim=1)[good]
    ended = [(roles == END).nonzero() for _, _, roles in sides]
    if all(len(found) for found in ended):
        theirs, mine = (int(found[0]) for found in ended)
        chunks = torch.cat([chunks, chunks.new_tensor([[theirs, theirs, mine, mine]])])
    return chunks


def chunks_within(
    chunks_C4: Int[Tensor, "C 4"], theirs_S: Bool[Tensor, " S"], mine_T: Bool[Tensor, " T"]
) -> Int[Tensor, "_ 4"]:
    """The chunks of which every token is True on its side, and has one before it that predicts it."""
    keep = (chunks_C4[:, 0] > 0) & (chunks_C4[:, 2] > 0)
    for true, first, last in ((theirs_S, 0, 1), (mine_T, 2, 3)):
        so_far = torch.cat([chunks_C4.new_zeros(1), true.long().cumsum(0)])
        keep &= so_far[chunks_C4[:, last] + 1] - so_far[chunks_C4[:, first]] == (
            chunks_C4[:, last] - chunks_C4[:, first] + 1
        )
    return chunks_C4[keep]
