"""Rows through a tokenizer's chat template: what is asked is the user's message, reasoning and answer the assistant's.

The text is what `tokenizer.apply_chat_template(messages, tokenize=False)` gives, byte for byte, and the prompt is what
it gives without the answer and with `add_generation_prompt=True`, plus what the template puts between that and the
answer (Qwen3's empty thinking block). A template is rendered once with texts of our own; after that a row costs one
concatenation. The real rendering is looked at wherever a row might be treated otherwise: for a text longer than any
seen before, with white space at an end, or with a word the template itself mentions, and for every 64th row.
A template that changes the texts is refused: their segments could not be told apart. A reasoning that begins with a
`<think>` block goes as `reasoning_content` to a template that knows the word, and every such row is rendered for real.

Two things are settled here and nowhere else. The end of a turn is the template's own (`chat_tokenizer` makes it the
tokenizer's end-of-text, so that generation stops there); a template without one is followed by the tokenizer's. And a
template that writes today's date gets TODAY, or the same recipe would give other data tomorrow.
A template is its publisher's code: it is rendered in a process of its own, within limits of time and memory.
Knows no file and no task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerFast

from kvdistill.core.errors import DataError, KVDistillError
from kvdistill.data.limited import TIMEOUT, AbstractLimited, one_a_process
from kvdistill.data.problems import Frame, Piece, Row, read_thought, text_of
from kvdistill.data.tokenizers import with_end_token

TODAY = "26 Jul 2024"  # what Llama-3's own templates write where no clock is at hand
_DATE = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri",
         "%H": "12", "%M": "00", "%S": "00"}  # fmt: skip
_CLOCK = "".join(f".replace('{code}', '{value}')" for code, value in _DATE.items())
_STOPPED_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{ format{_CLOCK} }}}}{{%- endmacro -%}}"

# Two texts with what a template might change: every ASCII character, markup, line ends, double spaces, other scripts.
_ASKED = (
    'What IS <b>1st</b> & "2nd",  isn\'t it?\n\nPack my box with five dozen liquor jugs é中: SPHINX OF BLACK QUARTZ, '
    "JUDGE MY VOW.\t0123456789 !#$%()*+-./;=@[\\]^_`{|}~ Well?"
)
_ANSWERED = "It's <i>3rd</i> & 'NOT' \"4th\":\n\n  so\t| it  IS.\n#### 42"
_THOUGHT = "Three dozen are 36,\n\nand then 6 more."
_LOOK_EVERY = 64
_MARKUP = re.compile(r"[^\w\s]\S*\w\S*[^\w\s]").fullmatch  # <|im_start|>, [INST]; not an added word or line end
_PLAIN = "set data.template=plain, or use a tokenizer with another chat template"
Messages = list[dict[str, str]]

LIMIT_S = 10.0  # a rendering
MEMORY_BYTES = 2 << 30  # address space of the process that renders
_CHILD = Path(__file__).with_name("chat_child.py")


class TemplateFailed(Exception):
    """A chat template that raises, or that takes too long or too much memory."""


@final
class _Renderer(AbstractLimited):
    @property
    def program(self) -> Path:
        return _CHILD

    def not_started(self, reason: str) -> KVDistillError:
        fix = "leave the process 2 GB of memory, or set data.template=plain"
        return DataError(f"chat templates cannot be rendered: {reason}", place="data.template", fix=fix)


_RENDERER = _Renderer(LIMIT_S, MEMORY_BYTES)  # of this process
one_a_process(_RENDERER)


def render_messages(tokenizer: Any, messages: Messages, template: str, **options: Any) -> str:
    """What `tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)` gives, within
    LIMIT_S and MEMORY_BYTES. Raises TemplateFailed with the reason."""
    named = tokenizer.special_tokens_map.items()
    tokens = {name: [*map(str, token)] if isinstance(token, list) else str(token) for name, token in named}
    said = _RENDERER.ask({"messages": messages, "chat_template": template, "tokens": tokens, **options})
    if said == TIMEOUT:
        raise TemplateFailed(f"it takes more than {_RENDERER.limit_s:g} s")
    if said is None:
        raise TemplateFailed(f"it takes more than {MEMORY_BYTES >> 30} GB of memory")
    kind, text = said
    if kind == "error":
        raise TemplateFailed(text)
    return str(text)


def write_chat(row: Row, tokenizer: PreTrainedTokenizerFast, *, system_prompt: str | None = None) -> Row:
    """The row through the chat template of `tokenizer`; its completion is read by the same task as before.

    system_prompt: None leaves the template's own default. Raises DataError at `data.template` for a tokenizer without
    a template and for one that fails or changes the texts, at `data.system_prompt` for a system message that the
    template does not take.
    """
    return write_chat_rows([row], tokenizer, system_prompt=system_prompt)[0]


def write_chat_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, *, system_prompt: str | None = None
) -> list[Row]:
    """Every row, as `write_chat` does it."""
    assert all(row.frame is None for row in rows), "a row went through a chat template before"
    writers, template = _WRITERS.setdefault(tokenizer, {}), tokenizer.chat_template
    key = (template if isinstance(template, str) else repr(template), system_prompt, tokenizer.eos_token)
    if key not in writers:
        writers[key] = _Writer(tokenizer, system_prompt)
    writer, written = writers[key], []
    for row in rows:
        user = row.user or row.prompt
        reasoning = row.reasoning.lstrip()
        if writer.takes_thoughts and (thought := read_thought(reasoning)) is not None:
            written.append(writer.thinking_row(row, user, *thought, tokenizer))
            continue
        answer = row.answer if reasoning else row.answer.lstrip()
        content = reasoning + answer
        longest, writer.written = max(len(user), len(content)), writer.written + 1
        if (
            longest > writer.longest
            or writer.written % _LOOK_EVERY == 1
            or user != user.strip()
            or content != content.rstrip()
            or any(map(f"{user}\n{content}".__contains__, writer.words))
        ):
            user, content = writer.real_texts(row, user, content, tokenizer)
            answer = content.removeprefix(reasoning)
            writer.longest = max(longest, writer.longest)
        if reasoning:
            reasoning = writer.frame.lead + reasoning
        else:
            answer = writer.frame.lead + answer
        prompt = f"{writer.opening}{user}{writer.middle}"
        written.append(Row(row.problem, row.style, prompt, reasoning, answer, user, writer.frame))
    return written


def chat_messages(row: Row, *, system_prompt: str | None = None) -> Messages:
    """The conversation of a row, plain or rendered: system (where one is set), user, assistant."""
    system = row.frame.system if row.frame is not None else system_prompt
    return _conversation(row.user or row.prompt, row.completion.lstrip(), system)


def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer whose end-of-text is what ends a turn in its chat template; the same one where it is already.

    Added tokens that the template writes between the messages count as special in it, so that no data can write them.
    Same pieces, same ids, same rendering.
    """
    look = _Look(tokenizer, None)
    end, names = look.end, {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    around = look.opening + look.generation + look.tail
    loose = {token for token, special in names.items() if not special and token in around and _MARKUP(token)}
    if end == tokenizer.eos_token and not loose:
        return tokenizer
    settled = with_end_token(tokenizer, end, special=loose)
    if _Look(settled, None).rendered != look.rendered:  # the template writes `eos_token` where it ends no turn
        source = tokenizer.get_chat_template()
        settled.chat_template = f"{{%- set eos_token = {tokenizer.eos_token!r} -%}}" + source
    assert _Look(settled, None).rendered == look.rendered
    return settled


class _Look:
    """A conversation of our own through the template, taken apart."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system: str | None) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template",
                place="data.template",
                fix="set data.template=plain, or use the tokenizer of a chat model (Qwen2.5, Llama-3 Instruct)",
            )
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:
            raise _altered(f"the tokenizer's chat templates cannot be used ({_reason(error)})") from error
        self.template = _STOPPED_CLOCK + source if "strftime_now" in source else source
        try:
            self.rendered, prompt = _render(tokenizer, self.template, _ASKED, _ANSWERED, system)
        except TemplateFailed as error:
            raise _not_rendered(tokenizer, self.template, system, error) from error
        if self.rendered.count(_ASKED) != 1 or self.rendered.count(_ANSWERED) != 1 or prompt.count(_ASKED) != 1:
            raise _altered("the chat template changes the texts it is given")
        if not self.rendered.startswith(prompt):
            raise _altered(
                f"the chat template's prompt ends in {prompt[-40:]!r}, which is not how it begins a written answer"
            )
        self.opening, self.generation = prompt.split(_ASKED)
        before, self.tail = self.rendered.split(_ANSWERED)
        self.inserted = before.removeprefix(prompt)
        if system is not None and system.strip() not in self.opening + self.generation:
            raise _no_system("the chat template leaves the system message out")
        self.end, self.closing, self.trailing = _end_of_turn(tokenizer, self.tail)


class _Writer:
    """One template with one system message. Holds no tokenizer, so that the table of writers keeps none alive."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, system: str | None) -> None:
        for token in tokenizer.added_tokens_decoder.values():
            if system is not None and token.special and str(token) in system:
                raise DataError(
                    f"the special token {str(token)!r} stands in the system message",
                    place="data.system_prompt",
                    fix="take it out: the chat template writes the special tokens",
                )
        look = _Look(tokenizer, system)
        # Spaces right before the answer go with it, as in the plain template: byte-level tokenizers keep a space with
        # the word after it.
        inserted = look.inserted.rstrip(" ")
        self.opening, self.middle = look.opening, look.generation + inserted
        self.generation, self.tail, self.template = look.generation, look.tail, look.template
        self.frame = Frame(
            opening=_pieces(tokenizer, self.opening),
            middle=_pieces(tokenizer, self.middle),
            closing=_pieces(tokenizer, look.closing, end=look.end),
            lead=look.inserted.removeprefix(inserted),
            trailing=look.trailing,
            system=system,
        )
        # The strings that the template's code mentions: a text that holds one may be treated in its own way.
        tokens = jinja2.Environment().lexer.tokenize(self.template.removeprefix(_STOPPED_CLOCK))
        words = {str(token.value).strip() for token in tokens if token.type == "string"}
        self.words = tuple(sorted(word for word in words if len(word) > 1 and word not in _ASKED + _ANSWERED))
        self.written, self.longest = 0, len(_ANSWERED)
        # Whether the template has a place of its own for what is thought and not said.
        self.takes_thoughts = "reasoning_content" in self.template
        self._thinking: tuple[Frame, str, str] | None = None  # frame, and what stands before and after a thought

    def thinking_row(self, row: Row, user: str, thought: str, said: str, tokenizer: PreTrainedTokenizerFast) -> Row:
        """The row whose thought goes where the template writes `reasoning_content`: to the completion's beginning.

        The prompt then ends where generation begins, without the empty block that stands before an answer alone.
        """
        if self._thinking is None:
            self._thinking = self._look_at_thoughts(tokenizer)
        frame, before, after = self._thinking
        said = f"{said} " if said else ""
        content = said + row.answer.lstrip()
        whole, prompt = self._render_thought(tokenizer, user, thought, content)
        asked = prompt.removeprefix(self.opening).removesuffix(self.generation)
        if whole != f"{prompt}{before}{thought}{after}{content}{self.tail}" or asked.strip() != user.strip():
            raise _altered("the chat template changes the texts of this problem, which has a <think> block", row)
        reasoning = f"{before}{thought}{after}{said.rstrip()}"
        return Row(row.problem, row.style, prompt, reasoning, content[len(said.rstrip()) :], asked, frame)

    def _render_thought(
        self, tokenizer: PreTrainedTokenizerFast, user: str, thought: str, content: str
    ) -> tuple[str, str]:
        messages = _conversation(user, content, self.frame.system)
        messages[-1]["reasoning_content"] = thought
        try:
            whole = render_messages(tokenizer, messages, self.template, add_generation_prompt=False)
            return whole, render_messages(tokenizer, messages[:-1], self.template, add_generation_prompt=True)
        except TemplateFailed as error:
            raise _altered(f"the chat template fails ({_reason(error)})") from error

    def _look_at_thoughts(self, tokenizer: PreTrainedTokenizerFast) -> tuple[Frame, str, str]:
        whole, prompt = self._render_thought(tokenizer, "Well?", _THOUGHT, "#### 42")
        after_prompt = whole.removeprefix(prompt)
        before, found, rest = after_prompt.partition(_THOUGHT)
        after, answered, tail = rest.partition("#### 42")
        if not (found and answered and whole.startswith(prompt) and tail == self.tail):
            raise _altered("the chat template does not keep a <think> block as it is given")
        special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t) in before + after]
        if special:
            raise _altered(
                f"the chat template marks thoughts by the special token {special[0]!r}, which no text can write"
            )
        frame = replace(self.frame, middle=_pieces(tokenizer, self.generation), lead="")
        return frame, before, after

    def real_texts(self, row: Row, user: str, content: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
        """User's text and answer as the real rendering has them: it may have taken white space off their ends."""
        try:
            whole, prompt = _render(tokenizer, self.template, user, content, self.frame.system)
        except TemplateFailed as error:
            raise _altered(f"the chat template fails ({_reason(error)})", row) from error
        if whole.startswith(self.opening) and whole.endswith(self.tail):
            body = whole[len(self.opening) : len(whole) - len(self.tail)]
            for length in range(len(content), len(content.rstrip()) - 1, -1):
                asked = body.removesuffix(self.middle + self.frame.lead + content[:length])
                same = asked != body and asked.strip() == user.strip()
                if same and prompt == self.opening + asked + self.generation:
                    return asked, content[:length]
        raise _altered("the chat template changes the texts of this problem", row)


# No tokenizer is kept alive by its writers; a template that is exchanged on a tokenizer gets a writer of its own.
_WRITERS: WeakKeyDictionary[Any, dict[tuple[Any, ...], _Writer]] = WeakKeyDictionary()


def _conversation(user: str, content: str, system: str | None) -> Messages:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": content}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _render(
    tokenizer: PreTrainedTokenizerFast, template: str, user: str, content: str, system: str | None
) -> tuple[str, str]:
    """The whole conversation, and it without the answer but with what makes the model begin one."""
    messages = _conversation(user, content, system)
    whole, prompt = (
        render_messages(tokenizer, asked, template, add_generation_prompt=begins)
        for asked, begins in ((messages, False), (messages[:-1], True))
    )
    return whole, prompt


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, tail: str) -> tuple[str, str, str]:
    """The token that ends an answer, the text up to and with it, and the rest of what the template writes after it.

    The tokenizer's end-of-text where the template writes it there; else the first special token, else an added token
    right there. Where there is none the tokenizer's end-of-text follows, and white space before it is left out.
    """
    end = tokenizer.eos_token
    if end is None or end not in tail:
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        first = [token for token, special in added.items()
                 if (token in tail if special else tail.lstrip().startswith(token) and _MARKUP(token))]  # fmt: skip
        if not first:
            if end is None:
                raise _altered("neither the chat template nor the tokenizer has a token that ends an answer")
            return end, tail.rstrip() + end, ""
        end = min(first, key=lambda token: (not added[token], tail.index(token), -len(token)))
    stop = tail.index(end) + len(end)
    return end, tail[:stop], tail[stop:]


def _pieces(tokenizer: PreTrainedTokenizerFast, text: str, *, end: str = "") -> tuple[Piece, ...]:
    """`text` cut at its special tokens, as the tokenizer finds them (some take the white space beside them along)."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if end:
        special |= {number: end for number, token in tokenizer.added_tokens_decoder.items() if str(token) == end}
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    pieces: list[Piece] = []
    done = 0
    for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        token = special.get(number)
        if token is None or token not in text[start:stop]:  # an unknown character has the id of a special token too
            continue
        if start > done:
            pieces.append(Piece(text[done:start]))
        pieces.append(Piece(text[start:stop], token))
        done = stop
    if done < len(text):
        pieces.append(Piece(text[done:]))
    assert text_of(tuple(pieces)) == text
    return tuple(pieces)


def _not_rendered(tokenizer: PreTrainedTokenizerFast, template: str, system: str | None, error: Exception) -> DataError:
    reason = _reason(error)
    if system is not None and "it takes" not in reason:
        try:
            _render(tokenizer, template, _ASKED, _ANSWERED, None)
        except TemplateFailed:
            pass  # it fails without the system message too, so that is not the reason
        else:
            return _no_system(f"the chat template takes no system message ({reason})")
    return _altered(f"the chat template fails ({reason})")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:120]


def _no_system(what: str) -> DataError:
    return DataError(what, place="data.system_prompt", fix="unset data.system_prompt, or use another chat template")


def _altered(what: str, row: Row | None = None) -> DataError:
    where = "" if row is None else f": {row.problem.task} / {row.problem.id}"
    return DataError(what + where, place="data.template", fix=_PLAIN)
