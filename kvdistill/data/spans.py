"""Which characters of a text each of its tokens stands for, in any fast tokenizer: `token_spans`.

A span is half open, [start, end), in characters of the text as it was given. The spans of one text are in order and
do not overlap, so that two tokenizers can be compared by how much text their tokens have in common. What the
tokenizers library reports is not quite that, so:

* Byte-level BPE (GPT-2, Qwen, Llama-3): the library gives each token of a cut character the whole character. Here a
  token gets its bytes: two of the three bytes of a Chinese character are two thirds of it. Where the tokenizer composes
  first (Qwen: NFC), the bytes of what was composed spread evenly over the characters it was composed of.
* Any other tokenizer: tokens that share a character divide it evenly (the jamo that BERT makes of a Hangul syllable,
  what SentencePiece writes for 1/2 in one character).
* SentencePiece: its mark for a space is the white space dropped before it, with whatever else was dropped there (the
  joiner inside an emoji). The mark in front of a text that begins with a word stands for nothing: an empty span.
* Combining marks and jamo that a normaliser composed or dropped belong to the token of the character before them.

Characters that a tokenizer drops (white space in WordPiece, control characters) are in no span. Tokens that are the
tokenizer's `unk` have the span of the text that it could not write. Knows tokenizers, not what spans are used for.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.data.tokenizers import encode_plain

_METASPACE, _BYTE_SPACE = "▁", "Ġ"


class TokenSpans(NamedTuple):
    """Of one text, an entry a token. ids: without special tokens.

    start, end: characters, fractions where a character is cut; ordered, disjoint, start == end for a token that stands
    for no character. is_unknown: the token says only that here was text which the tokenizer cannot write.
    """

    ids: list[int]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    is_unknown: NDArray[np.bool_]


def token_spans(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[TokenSpans]:
    """Ids and spans of every text, tokenized whole and as plain text in one call.

    Raises DataError for a tokenizer that is not a fast one: it does not know where in the text its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} is no fast tokenizer: it does not say which characters its tokens stand for",
            place="data.tokenizer",
            fix="use one with a tokenizer.json (kvdistill.data.tokenizers.load_tokenizer)",
        )
    kind = _kind_of(tokenizer)
    unknown = tokenizer.unk_token_id
    found: list[TokenSpans] = []
    for text, encoding in zip(texts, encode_plain(tokenizer, texts), strict=True):
        ids = encoding.ids
        spans = _spans_from_bytes(text, ids, kind)
        if spans is None:
            spans = _spans_from_offsets(text, encoding.tokens, encoding.offsets, kind.space)
        found.append(TokenSpans(ids, *spans, np.asarray(ids, dtype=np.int64) == (-1 if unknown is None else unknown)))
    return found


_Spans = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What matters of a tokenizer. space: how its pieces write a space. num_bytes: of each id's piece, None for a
    tokenizer that is not byte-level; prefixes: it puts a space in front of a text; composes: it makes the text NFC."""

    space: str
    num_bytes: NDArray[np.int64] | None = None
    prefixes: bool = False
    composes: bool = False


# -- byte-level tokenizers: pieces are bytes, so counting them is exact --------------------------------


def _spans_from_bytes(text: str, ids: list[int], kind: _Kind) -> _Spans | None:
    """None where the pieces are not, byte for byte, the text: the offsets have to be asked."""
    if kind.num_bytes is None:
        return None
    reached = np.concatenate([[0], kind.num_bytes[ids].cumsum()])
    places = _places_of_bytes(text, kind.composes)
    surplus = int(reached[-1]) - (len(places) - 1)
    if surplus != 0 and not (surplus == 1 and kind.prefixes):
        return None
    cuts = places[np.maximum(reached - surplus, 0)]
    return cuts[:-1], cuts[1:]


def _places_of_bytes(text: str, composes: bool) -> NDArray[np.float64]:
    """Where each UTF-8 byte begins, in characters, and after them where the text ends."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.float64)
    if composes and not unicodedata.is_normalized("NFC", text):
        begin, width, num_bytes = _composed_units(text)
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        begin, width = np.arange(len(text)), np.ones(len(text))
        num_bytes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    unit = np.repeat(np.arange(len(num_bytes)), num_bytes)
    within = np.arange(len(unit)) - (num_bytes.cumsum() - num_bytes)[unit]
    return np.append(begin[unit] + width[unit] * within / num_bytes[unit], float(len(text)))


def _composed_units(text: str) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """First character, number of characters, and bytes after composition: of characters that stay as they are, and of
    each run that is composed to something else (such a run begins where nothing composes with what is before it)."""
    units: list[tuple[int, int, int]] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and _continues(text[end]):
            end += 1
        run = text[start:end]
        composed = unicodedata.normalize("NFC", run)
        if composed == run:
            units += [(start + i, 1, len(character.encode())) for i, character in enumerate(run)]
        else:
            units.append((start, end - start, len(composed.encode())))
        start = end
    begin, width, num_bytes = np.array(units, dtype=np.int64).T
    return begin, width.astype(np.float64), num_bytes


def _continues(character: str) -> bool:
    """Whether it can be part of the character before it: combining marks, and vowels and finals of Hangul."""
    if character < "\u0300":
        return False
    return (
        unicodedata.category(character)[0] == "M"
        or "\u1160" <= character <= "\u11ff"
        or "\ud7b0" <= character < "\ud800"
    )


# -- the others: the library's offsets, mended ---------------------------------------------------------


def _spans_from_offsets(text: str, pieces: list[str], offsets: list[tuple[int, int]], space: str) -> _Spans:
    whole = _whole_characters(text, pieces, offsets, space)
    num_tokens_of = [0] * len(text)
    for first, last in whole:
        for place in range(first, last):
            num_tokens_of[place] += 1
    taken = [0] * len(text)
    start, end = np.zeros(len(whole)), np.zeros(len(whole))
    reached = 0.0
    for i, (first, last) in enumerate(whole):
        if first >= last:
            start[i] = end[i] = reached
            continue
        start[i] = max(reached, first + taken[first] / num_tokens_of[first])
        for place in range(first, last):
            taken[place] += 1
        reached = end[i] = max(start[i], last - 1 + taken[last - 1] / num_tokens_of[last - 1])
    return start, end


def _whole_characters(
    text: str, pieces: list[str], offsets: list[tuple[int, int]], space: str
) -> list[tuple[int, int]]:
    """Characters that each piece has a part in; empty for one that stands for nothing."""
    found: list[tuple[int, int]] = []
    reached = 0
    for i, (piece, (start, end)) in enumerate(zip(pieces, offsets, strict=True)):
        following = offsets[i + 1][0] if i + 1 < len(offsets) else len(text)
        if piece.startswith(space) and start < len(text):
            alone = not piece.strip(space)
            written = (text[start].isspace() or text[start] == space) and not (alone and following == start)
            if not written:  # the library gives the mark the character behind it: what it stands for is before that
                start, end = min(reached, start), start if alone else end
        if start < end:
            while end < following and _continues(text[end]):
                end += 1
        reached = max(reached, end)
        found.append((start, end))
    return found


# -- what kind of tokenizer it is ----------------------------------------------------------------------

_KINDS: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, _Kind]] = WeakKeyDictionary()


def _kind_of(tokenizer: PreTrainedTokenizerFast) -> _Kind:
    """Looked at once; again when tokens were added to it."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    size = backend.get_vocab_size(with_added_tokens=True)
    known = _KINDS.get(tokenizer)
    if known is None or known[0] != size:
        known = _KINDS[tokenizer] = size, _look_at(backend)
    return known[1]


def _look_at(backend: Tokenizer) -> _Kind:
    byte_level = [step for step in _steps(backend.pre_tokenizer, "pretokenizers") if step["type"] == "ByteLevel"]
    if not byte_level:
        return _Kind(_METASPACE)
    normalisers = [step["type"] for step in _steps(backend.normalizer, "normalizers")]
    model = backend.model
    plain = isinstance(model, models.BPE) and not (model.continuing_subword_prefix or model.end_of_word_suffix)
    if not plain or normalisers not in ([], ["NFC"]):
        return _Kind(_BYTE_SPACE)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    num_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for piece, number in vocabulary.items():
        num_bytes[number] = len(piece)  # in the alphabet of such a tokenizer a letter is a byte
    for number, added in backend.get_added_tokens_decoder().items():
        num_bytes[number] = len(added.content.encode())
    if model.unk_token and model.unk_token in vocabulary:
        num_bytes[vocabulary[model.unk_token]] = 1  # one for each byte that is not in the vocabulary
    return _Kind(_BYTE_SPACE, num_bytes, prefixes=byte_level[0]["add_prefix_space"], composes=bool(normalisers))


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer as a list of its steps."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]
