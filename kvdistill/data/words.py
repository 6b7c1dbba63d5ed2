"""Byte-level BPE of plain ASCII text from memory, word by word: several times as fast as the tokenizer itself.

Such a tokenizer cuts a text into words by a pattern and spells each word by itself, so the ids of a word that was seen
before are known. The cutting is done here, with the pattern in Python's form; what a word becomes is asked of the
tokenizer's own model. Only for patterns known here, and for texts in which Python and the tokenizer cannot differ:
printable ASCII, tabs and line ends, without an added token. Everything else is left to the tokenizer.
Knows no row and no template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CONTRACTIONS = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_REST = r" ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ""  # the one that is built into the library's ByteLevel
# The pattern as tokenizer.json has it -> the same in ASCII: Qwen2 and later, Llama-3, GPT-2.
_PATTERNS = {
    _TIKTOKEN % r"\p{N}": re.compile(rf"{_CONTRACTIONS}|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]|{_REST}"),
    _TIKTOKEN % r"\p{N}{1,3}": re.compile(rf"{_CONTRACTIONS}|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{{1,3}}|{_REST}"),
    _GPT2: re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"),
}
_NOT_PLAIN = re.compile(r"[^\t\n\r -~]")
_MOST_WORDS, _LONGEST_WORD = 100_000, 40  # what is remembered: some 20 MB


def read_known(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, int]]
) -> list[tuple[list[int], int] | None]:
    """Of each text its ids, as `encode_plain` gives them, and how many of them begin before a character of it.

    texts: with that character; 0 where it does not matter. None: the tokenizer has to be asked. What is learned of
    words is kept as long as the tokenizer is.
    """
    found: list[tuple[list[int], int] | None] = [None] * len(texts)
    find, words = find_cutter(tokenizer), _LEARNED.get(tokenizer)
    if find is None:
        return found
    if words is None:
        words = _LEARNED[tokenizer] = _Words(tokenizer.backend_tokenizer.model)
    added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special)
    for number, (text, end) in enumerate(texts):
        if _NOT_PLAIN.search(text) or any(map(text.__contains__, added)):
            continue
        cut = find(text)
        ids = list(chain.from_iterable(map(words.__getitem__, cut)))
        if not end:
            found[number] = ids, 0
            continue
        after, place = 0, len(text)
        for word in reversed(cut):
            if place <= end:
                break
            place -= len(word)
            after += len(words[word])
        # Some tokenizers do not count the space at a token's front, so what lies around a space is theirs to say.
        if place == end and not text[end - 1].isspace():
            found[number] = ids, len(ids) - after
    return found


class _Words(dict[str, list[int]]):
    """Word -> its ids, asked of the model at the first time."""

    def __init__(self, model: models.BPE) -> None:
        super().__init__()
        self._model = model
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._letters = {code: letters.pre_tokenize_str(chr(code))[0][0] for code in (9, 10, 13, *range(32, 127))}

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word.translate(self._letters))]
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


_LEARNED: WeakKeyDictionary[PreTrainedTokenizerFast, _Words] = WeakKeyDictionary()


def find_cutter(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[str]] | None:
    """What cuts a text into words as this tokenizer does; None for a tokenizer of another kind."""
    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not isinstance(model, models.BPE) or model.dropout or model.byte_fallback:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix or backend.pre_tokenizer is None:
        return None
    if backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}:
        return None
    state = _state(backend.pre_tokenizer)
    *cuts, letters = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if letters["type"] != "ByteLevel" or letters["add_prefix_space"] or letters["use_regex"] == bool(cuts):
        return None
    if not cuts:
        return _PATTERNS[_GPT2].findall
    cut = cuts[0]
    if len(cuts) > 1 or cut["type"] != "Split" or cut["behavior"] != "Isolated" or cut["invert"]:
        return None
    pattern = _PATTERNS.get(cut["pattern"].get("Regex", "-"))
    return None if pattern is None else pattern.findall


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())
