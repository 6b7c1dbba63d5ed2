"""The fixed texts of page, figures and headline: one table per language (`en.toml`, `zh.toml`), one key per text.

`words("verdict.score", arm=…)` fills a text in. A text that counts something is a pair: for n = 1, and for others.
What other parts write in English sentences (why a comparison is refused, notes, the method) has no key: `message`
finds it by its form among a language's `[[message]]` entries, and leaves what it does not know as it is.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

LANGUAGES = ("en", "zh")
_PLACE = re.compile(r"\\\{(\w+)\\\}")  # a {name} after re.escape


class Words:
    """Texts of one language by dotted key. Texts may hold HTML where only the page shows them (`html`)."""

    def __init__(
        self, language: str, texts: Mapping[str, str | list[str]], messages: list[dict[str, str]] | None = None
    ) -> None:
        self.language, self.texts, self._messages = language, dict(texts), messages or []

    def __call__(self, key: str, **values: Any) -> str:
        """The text with its values. Raises KeyError for a key that is not in the table."""
        return self._text(key, values).format(**values)

    def html(self, key: str, **values: Any) -> Markup:
        """The text as HTML: its own marks stay, values are escaped."""
        return Markup(self._text(key, values)).format(**values)

    def get(self, key: str, default: str = "") -> str:
        """The bare text, or `default` where there is none: for keys made of names that may be anybody's."""
        text = self.texts.get(key, default)
        return text if isinstance(text, str) else default

    def message(self, english: str) -> str:
        """A sentence that another part wrote in English, in this language; its parts `{rest…}` are looked up too, of
        `{each…}` what stands between commas."""

        def part(name: str, value: str) -> str:
            if name.startswith("each"):
                return self("page.comma").join(map(self.message, value.split(", ")))
            return self.message(value) if name.startswith("rest") else value

        for form, text in self._forms:
            if found := form.fullmatch(english):
                return text.format(**{name: part(name, value) for name, value in found.groupdict().items()})
        return english

    def labels(self) -> Words:
        """English ones for figures, where no font has this language's letters; why one is missing stays page text."""
        reasons = {key: text for key, text in self.texts.items() if key.startswith("reasons.")}
        return Words("en", {**ENGLISH.texts, **reasons})

    def _text(self, key: str, values: Mapping[str, Any]) -> str:
        text = self.texts[key]
        return text if isinstance(text, str) else text[values["n"] != 1]

    @cached_property
    def _forms(self) -> list[tuple[re.Pattern[str], str]]:
        # a number; sentences; all else ends with its sentence
        kinds = {"n": r"[\d,]+", **dict.fromkeys(("rest", "rest_a", "rest_b"), ".+?")}

        def place(name: re.Match[str]) -> str:
            return f"(?P<{name[1]}>{kinds.get(name[1], '(?:(?!; ).)+?')})"

        forms = [(_PLACE.sub(place, re.escape(m["english"])), m["text"]) for m in self._messages]
        return [(re.compile(form, re.DOTALL), text) for form, text in forms]


def words_of(language: str) -> Words:
    """The table of a language. Raises FileNotFoundError where there is none."""
    table = tomllib.loads((Path(__file__).parent / f"{language}.toml").read_text(encoding="utf-8"))
    messages = table.pop("message", [])
    return Words(language, dict(_flat(table)), messages)


def _flat(table: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        pairs += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [(f"{before}{key}", value)]
    return pairs


ENGLISH = words_of("en")
