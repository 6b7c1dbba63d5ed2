"""Text to token ids with a segment code per token (codes of `kvdistill.core.targets`).

Prompt and completion are tokenized apart and joined: the prompt's ids are then the ids that generation starts
from, by construction, whatever the tokenizer would merge across the boundary. Inside the completion the
tokenizer's character offsets tell reasoning from answer; a token across that boundary belongs to the segment in
which it starts. Beginning-of-text (where the tokenizer has one) counts as prompt, end-of-text as answer.

A row that went through a chat template is cut at the template's own special tokens, and what stands between them is
tokenized by itself, as the tokenizer does it with the whole text. So words in the data that look like special tokens
are plain text in both templates: no text of a problem can end a turn. The template says where a text begins and ends;
nothing is put around it.

Most texts are read from memory by `words.py`, the others by the tokenizer. Knows no file; padding is the collator's.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, product
from weakref import WeakKeyDictionary

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.core.segments import ANSWER, PROMPT, REASONING
from kvdistill.data.leaks import question_hash
from kvdistill.data.problems import Frame, Piece, Problem, Row, text_of
from kvdistill.data.tokenizers import encode_plain
from kvdistill.data.words import WordReader, find_reader

_CHUNK = 500  # rows; what the tokenizer knows of a token takes a hundred bytes, its id eight
_ANCHOR = "\n"


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row. `answer` is the gold answer, `prompt` the text that generation starts from.

    input_ids, segments: one entry a token, no padding. doc_hash: of the folded question, the same in every style;
    prompt_hash: of the exact prompt text.
    """

    task: str
    id: str
    style: str
    prompt: str
    answer: str
    input_ids: list[int]
    segments: list[int]
    doc_hash: str
    prompt_hash: str
    reasoning: str = ""
    language: str = "en"
    question: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        return self.segments.count(PROMPT)

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: self.num_prompt_tokens]


def encode_row(tokenizer: PreTrainedTokenizerFast, row: Row) -> Example:
    """One row; see `encode_rows`."""
    return encode_rows(tokenizer, [row])[0]


def encode_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], *, spell_answers: bool = True
) -> list[Example]:
    """All rows, batched through the tokenizer, in order.

    spell_answers: whoever is to write them must be able to; who only reads them need not.
    Raises DataError for a tokenizer without an end-of-text token or without character offsets, for one whose
    end-of-text does not end the turns of a chat template, and for a gold answer that the tokenizer cannot spell.
    """
    if not rows:
        return []
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise DataError(
            "the tokenizer has no end-of-text token or no character offsets",
            place="data.tokenizer",
            fix="load it with kvdistill.data.tokenizers.load_tokenizer",
        )
    plans = {key: plan_of(tokenizer, frame) for key, frame in {id(row.frame): row.frame for row in rows}.items()}
    unk = tokenizer.unk_token_id if spell_answers and tokenizer.unk_token_id != tokenizer.eos_token_id else None
    reader = find_reader(tokenizer)
    examples: list[Example] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = [(plans[id(row.frame)], row) for row in rows[start : start + _CHUNK]]
        texts = list(chain.from_iterable(plan.texts(row) for plan, row in chunk))
        found = _read(tokenizer, reader, texts)
        pairs = zip(chunk, found[::2], found[1::2], strict=True)
        examples += [_join(plan, row, asked, answered, unk) for (plan, row), asked, answered in pairs]
    return examples


def texts_of(row: Row) -> list[str]:
    """What of a row is tokenized as plain text, stretch by stretch: the pieces that a trimmed tokenizer must keep."""
    if row.frame is None:
        return [row.prompt, row.completion]
    cut = _cut(row.frame)
    return [*cut.constants, *cut.fill(row)]


# -- rows -> examples ----------------------------------------------------------------------------------

_Text = tuple[str, int]  # a text, and a character of it
_Found = tuple[list[int], int]  # its ids, and how many of them begin before that character


def _read(tokenizer: PreTrainedTokenizerFast, reader: WordReader | None, texts: Sequence[_Text]) -> list[_Found]:
    """Every text as plain text: from memory where that can be, and the others through the tokenizer at once."""
    found = [reader.read(text, end) if reader else None for text, end in texts]
    others = [number for number, known in enumerate(found) if known is None]
    for number, encoding in zip(others, encode_plain(tokenizer, [texts[n][0] for n in others]), strict=True):
        end = texts[number][1]
        found[number] = encoding.ids, _tokens_before(encoding, end) if end else 0
    return [known for known in found if known is not None]


def _tokens_before(encoding: Encoding, end: int) -> int:
    """How many tokens start before character `end`."""
    token = encoding.char_to_token(end)
    here, before = (encoding.token_to_chars(token), encoding.token_to_chars(token - 1)) if token else (None, None)
    if token and here and before and here[0] == end > before[0]:
        return token
    return bisect_left(encoding.offsets, end, key=lambda offset: offset[0])  # makes a list of all tokens: slower


def _join(plan: Plan, row: Row, asked: _Found, completion: _Found, unk: int | None) -> Example:
    prompt_ids = [*plan.head, *_after_anchor(row, asked[0], plan.user_anchor), *plan.middle]
    ids = _after_anchor(row, completion[0], plan.completion_anchor)
    num_reasoning = completion[1] - len(plan.completion_anchor) if row.reasoning else 0
    problem = row.problem
    if unk is not None and unk in ids[num_reasoning:]:
        raise DataError(
            f"the tokenizer cannot spell the answer {problem.answer!r} of {problem.task} / {problem.id}",
            place="data.tokenizer",
            fix="use a byte-level tokenizer (Qwen, Llama-3, GPT-2) or `characters`",
        )
    num_answer = len(ids) - num_reasoning + len(plan.tail)
    return Example(
        task=problem.task,
        id=problem.id,
        style=row.style,
        prompt=row.prompt,
        answer=problem.answer,
        input_ids=[*prompt_ids, *ids, *plan.tail],
        segments=[PROMPT] * len(prompt_ids) + [REASONING] * num_reasoning + [ANSWER] * num_answer,
        doc_hash=question_hash(problem.question),
        prompt_hash=hashlib.sha256(row.prompt.encode()).hexdigest()[:32],
        reasoning=problem.reasoning,
        language=problem.language,
        question=problem.question,
    )


def _after_anchor(row: Row, ids: list[int], anchor: list[int]) -> list[int]:
    if not anchor:
        return ids
    if ids[: len(anchor)] != anchor:
        raise DataError(
            f"{row.problem.task} / {row.problem.id} begins with a line end that the tokenizer joins to the one before",
            place="data.tokenizer",
            fix="take the line end out, or set data.template=plain",
        )
    return ids[len(anchor) :]


# -- what is the same for all rows of a template -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cut:
    """A frame cut at its special tokens. before, after: the plain text on either side of the user's text; ending:
    what follows the completion. head, middle, tail: pieces before, between and after those two stretches. num_: of
    characters of the frame before and after the user's text."""

    head: tuple[Piece, ...]
    before: str
    after: str
    middle: tuple[Piece, ...]
    ending: str
    tail: tuple[Piece, ...]
    num_opening: int
    num_middle: int

    @property
    def constants(self) -> list[str]:
        return [piece.text for piece in (*self.head, *self.middle, *self.tail) if not piece.token]

    def fill(self, row: Row) -> tuple[str, str]:
        """The two stretches that differ from row to row."""
        assert row.frame is not None
        user = row.prompt[self.num_opening : len(row.prompt) - self.num_middle]
        return f"{self.before}{user}{self.after}", row.completion + self.ending


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows of one frame become ids: head, the stretch with the user's text, middle, completion, tail.

    A plain row is asked by its whole prompt, between beginning- and end-of-text. anchors: ids of a line end behind
    which the stretch is tokenized, for tokenizers that put a space in front of whatever they are given; empty: none.
    """

    head: list[int]
    middle: list[int]
    tail: list[int]
    cut: _Cut | None = None
    user_anchor: list[int] = field(default_factory=list)
    completion_anchor: list[int] = field(default_factory=list)

    def texts(self, row: Row) -> tuple[_Text, _Text]:
        """What is asked, and the completion with the character at which its answer begins."""
        asked, completion = (row.prompt, row.completion) if self.cut is None else self.cut.fill(row)
        end = len(row.reasoning)
        if self.user_anchor:
            asked = _ANCHOR + asked
        if self.completion_anchor:
            completion, end = _ANCHOR + completion, end and end + len(_ANCHOR)
        return (asked, 0), (completion, end)

    def shared(self, row: Row) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the problem's own words stand in the two texts: [start, end) in each, without the space around them.

        What a template writes around them, and how many spaces it leaves, differs from tokenizer to tokenizer.
        """
        (asked, _), (completion, _) = self.texts(row)
        start = len(_ANCHOR) if self.user_anchor else 0
        end = len(asked)
        if self.cut is not None:
            start, end = start + len(self.cut.before), end - len(self.cut.after)
        first = len(_ANCHOR) if self.completion_anchor else 0
        last = first + len(row.completion)
        return _without_space(asked, start, end), _without_space(completion, first, last)


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    words = text[start:end]
    return start + len(words) - len(words.lstrip()), start + len(words.rstrip())


@lru_cache(maxsize=16)
def _cut(frame: Frame) -> _Cut:
    head, before = _split_last(frame.opening)
    after, middle = _split_first(frame.middle)
    ending, tail = _split_first(frame.closing)
    lengths = len(text_of(frame.opening)), len(text_of(frame.middle))
    return _Cut(head, before, after, middle, ending, tail, *lengths)


def _split_first(pieces: tuple[Piece, ...]) -> tuple[str, tuple[Piece, ...]]:
    plain = bool(pieces) and not pieces[0].token
    return (pieces[0].text, pieces[1:]) if plain else ("", pieces)


def _split_last(pieces: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], str]:
    plain = bool(pieces) and not pieces[-1].token
    return (pieces[:-1], pieces[-1].text) if plain else (pieces, "")


_PLANS: WeakKeyDictionary[PreTrainedTokenizerFast, dict[tuple[Frame | None, int | None, int], Plan]] = (
    WeakKeyDictionary()
)


def plan_of(tokenizer: PreTrainedTokenizerFast, frame: Frame | None) -> Plan:
    """How rows of this frame (None: plain rows) become ids; made once for each tokenizer and frame."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plans = _PLANS.setdefault(tokenizer, {})
    key = (frame, bos, eos)
    if key not in plans:
        plain = Plan([] if bos is None else [bos], [], [eos])
        plans[key] = plain if frame is None else _plan_frame(tokenizer, frame)
    return plans[key]


def _plan_frame(tokenizer: PreTrainedTokenizerFast, frame: Frame) -> Plan:
    """The plan whose ids are those of the whole text, tokenized at once with its special tokens."""
    end = frame.closing[-1].token
    if tokenizer.eos_token != end:
        raise DataError(
            f"{end!r} ends a turn in the chat template, but the tokenizer's end-of-text is {tokenizer.eos_token!r}",
            place="data.tokenizer",
            fix="use kvdistill.data.chat.chat_tokenizer(tokenizer), whose end-of-text is the template's",
        )
    for after_token, after_text in product((False, True), repeat=2):
        plan = _plan_with(tokenizer, frame, after_token=after_token, after_text=after_text)
        if _gives_the_same(tokenizer, plan, frame):
            return plan
    raise DataError(
        "the tokenizer reads the chat template's text otherwise when it is cut at its special tokens",
        place="data.template",
        fix="set data.template=plain, or use a byte-level tokenizer (Qwen, Llama-3)",
    )


def _plan_with(tokenizer: PreTrainedTokenizerFast, frame: Frame, *, after_token: bool, after_text: bool) -> Plan:
    """after_token, after_text: whether a stretch behind a special token, or behind other text, needs an anchor."""
    cut, vocabulary = _cut(frame), tokenizer.added_tokens_encoder
    anchor = encode_plain(tokenizer, [_ANCHOR])[0].ids

    def ids_of(pieces: tuple[Piece, ...], *, first: bool = False) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if piece.token:
                ids.append(vocabulary[piece.token])
            elif after_token and not (first and number == 0):
                [found] = encode_plain(tokenizer, [_ANCHOR + piece.text])
                ids += found.ids[len(anchor) :] if found.ids[: len(anchor)] == anchor else found.ids
            else:
                ids += encode_plain(tokenizer, [piece.text])[0].ids
        return ids

    last = cut.middle[-1] if cut.middle else None
    behind_token = last is not None and bool(last.token)
    return Plan(
        head=ids_of(cut.head, first=True),
        middle=ids_of(cut.middle),
        tail=ids_of(cut.tail),
        cut=cut,
        user_anchor=anchor if after_token and cut.head else [],
        completion_anchor=anchor if (after_token if behind_token else after_text) else [],
    )


def _gives_the_same(tokenizer: PreTrainedTokenizerFast, plan: Plan, frame: Frame) -> bool:
    """Held against the tokenizer's own reading, on a text of ours: the prompt, and the whole where no token of it goes
    across the prompt's end (there the prompt's own ids count, as generation starts from them)."""

    def at_once(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]

    prompt = f"{text_of(frame.opening)}What is 1+1?{text_of(frame.middle)}"
    reasoning = frame.lead + "It is 2."
    row = Row(Problem("", "", "What is 1+1?", "", "2"), "cot", prompt, reasoning, " #### 2", frame=frame)
    asked, completion = _read(tokenizer, None, plan.texts(row))
    for (ids, _), anchor in ((asked, plan.user_anchor), (completion, plan.completion_anchor)):
        if ids[: len(anchor)] != anchor:
            return False
    example = _join(plan, row, asked, completion, None)
    if example.prompt_ids != at_once(prompt):
        return False
    whole = at_once(row.text)
    return whole[: len(example.prompt_ids)] != example.prompt_ids or whole == example.input_ids
