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
from itertools import chain
from typing import Any, final
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, models, pre_tokenizers
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


@final
class WordReader:
    """Texts to ids for one tokenizer, as `encode_plain` gives them."""

    def __init__(self, pattern: re.Pattern[str], words: _Words, added: tuple[str, ...]) -> None:
        self._find, self._words, self._added = pattern.findall, words, added

    def read(self, text: str, end: int = 0) -> tuple[list[int], int] | None:
        """The ids, and how many of them begin before character `end`; None: the tokenizer has to be asked."""
        if _NOT_PLAIN.search(text) or any(map(text.__contains__, self._added)):
            return None
        words = self._find(text)
        ids = list(chain.from_iterable(map(self._words.__getitem__, words)))
        if not end:
            return ids, 0
        after, place = 0, len(text)
        for word in reversed(words):
            if place <= end:
                break
            place -= len(word)
            after += len(self._words[word])
        # Some tokenizers do not count the space at a token's front, so what lies around a space is theirs to say.
        if place != end or text[end - 1].isspace():
            return None
        return ids, len(ids) - after


def find_reader(tokenizer: PreTrainedTokenizerFast) -> WordReader | None:
    """The reader for a tokenizer, None for one of another kind. What it learns is kept as long as the tokenizer is."""
    backend = tokenizer.backend_tokenizer
    pattern = _pattern_of(backend)
    if pattern is None or not _is_plain_bpe(backend.model):
        return None
    if tokenizer not in _LEARNED:
        _LEARNED[tokenizer] = _Words(backend.model)
    added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special)
    return WordReader(pattern, _LEARNED[tokenizer], added)


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


def _pattern_of(backend: Tokenizer) -> re.Pattern[str] | None:
    if backend.pre_tokenizer is None or (
        backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}
    ):
        return None
    state = _state(backend.pre_tokenizer)
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *cuts, letters = steps
    if letters["type"] != "ByteLevel" or letters["add_prefix_space"] or letters["use_regex"] == bool(cuts):
        return None
    if not cuts:
        return _PATTERNS[_GPT2]
    cut = cuts[0]
    if len(cuts) > 1 or cut["type"] != "Split" or cut["behavior"] != "Isolated" or cut["invert"]:
        return None
    return _PATTERNS.get(cut["pattern"].get("Regex", "-"))


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())


def _is_plain_bpe(model: Any) -> bool:
    if not isinstance(model, models.BPE) or model.dropout:
        return False
    return not (model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback)
