"""BIG-Bench Hard (Suzgun et al. 2022): 27 tasks, three worked examples each; the answer is what `the answer is` marks.

Kinds of answers: one of lettered options, one of two words, a number, closing brackets, a list of words. The targets of
three published rows are the text of a name that the options cut at its commas; they are compared as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kvdistill.core.quoting import quoted
from kvdistill.data.answers.latex import last_boxed
from kvdistill.data.answers.numbers import fold_width, leading_number, normalise_text, same_number
from kvdistill.data.sets.base import DataSet, Evaluation
from kvdistill.data.sets.letters import ALPHABET, read_label
from kvdistill.data.sets.published import Layout, Member, Published, RowDict
from kvdistill.data.sources import RawRow

_MARK = re.compile(r"\bthe answer is\b[ \t]*(?::\s*)?(?=(?P<answer>[^\n]{0,1000}))", re.IGNORECASE)
_NEXT_QUESTION = re.compile(r"\n[ \t]*Q:")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_AROUND = ' \t*`$"“”'


@dataclass(frozen=True)
class AnswerKind:
    """How answers of one kind are written. read: the answer that a text begins with, in normal form, or None."""

    name: str
    read: Callable[[str], str | None]

    def same(self, answer: str, gold: str) -> bool:
        found, wanted = self.read(answer), self.read(gold)
        if found is None or wanted is None:  # a gold answer that is no such thing is compared as text
            return found is wanted and normalise_text(answer) == normalise_text(gold)
        return same_number(found, wanted) if self.name == "number" else found == wanted


def _read_option(text: str) -> str | None:
    letter = read_label(text, ALPHABET[:18])
    return f"({letter})" if letter else None


def _one_of(*words: str) -> Callable[[str], str | None]:
    """The word that a text begins with, alone or before a punctuation mark; case does not count."""
    pattern = re.compile(rf"[\"'(*\s]*({'|'.join(words)})(?=\s*$|\s*[\"')*.,;:!])", re.IGNORECASE)

    def read(text: str) -> str | None:
        match = pattern.match(fold_width(text))
        return match[1].casefold() if match else None

    return read


def _read_brackets(text: str) -> str | None:
    """The brackets of a text that consists of them (quotes, commas and spaces between do not count), without spaces."""
    bare = re.sub(r"[\s\"'`,]", "", fold_width(text).strip(_AROUND).removesuffix("."))
    return bare if bare and not bare.strip("()[]{}<>") else None


def _read_words(text: str) -> str | None:
    """Words in their order, one space between; commas, case, quotes and brackets around all do not count."""
    text = fold_width(text).strip(_AROUND).removesuffix(".").strip("[]")
    words = [word.strip('"`*') for word in re.split(r"[\s,;]+", text.casefold())]
    bare = [word[1:-1] if len(word) > 2 and word[0] == word[-1] == "'" else word for word in words]
    return " ".join(word for word in bare if word) or None


OPTION = AnswerKind("option", _read_option)
NUMBER = AnswerKind("number", leading_number)
BRACKETS = AnswerKind("brackets", _read_brackets)
WORDS = AnswerKind("words", _read_words)
YES_NO = AnswerKind("yes or no", _one_of("yes", "no"))
TRUE_FALSE = AnswerKind("true or false", _one_of("true", "false"))
VALIDITY = AnswerKind("valid or invalid", _one_of("valid", "invalid"))

# The tasks of each kind, by the names of their files, which are also the hub's configurations.
_NAMES = (
    (TRUE_FALSE, "boolean_expressions"),
    (YES_NO, "causal_judgement navigate sports_understanding web_of_lies"),
    (
        OPTION,
        """
        date_understanding disambiguation_qa geometric_shapes hyperbaton logical_deduction_five_objects
        logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation penguins_in_a_table
        reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks temporal_sequences
        tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects
        tracking_shuffled_objects_three_objects
        """,
    ),
    (BRACKETS, "dyck_languages"),
    (VALIDITY, "formal_fallacies"),
    (NUMBER, "multistep_arithmetic_two object_counting"),
    (WORDS, "word_sorting"),
)
KINDS: Mapping[str, AnswerKind] = dict(sorted((name, kind) for kind, names in _NAMES for name in names.split()))


def read_columns(member: Member, row: RawRow) -> RowDict:
    """Columns `input` and `target`. DataError for a target of another kind than the task's, or not offered."""
    asked, target = row.published("input"), row.gold("target")
    kind = kind_of(member)
    gold = kind.read(target)
    if kind is OPTION and gold is not None and gold not in asked:
        raise row.error(f"the gold answer {quoted(target)} is not among the options", fix="mend it")
    if kind is not OPTION and gold is None:
        raise row.error(f"the gold answer {quoted(target)} is not of the kind: {kind.name}", fix="mend it")
    return {"input": asked, "target": target}


def unpack(row: RawRow) -> Iterable[RawRow]:
    """The examples of a task's file, which is one object; a file of rows as it is."""
    examples = row.columns.get("examples")
    if examples is None:
        return (row,)
    if not isinstance(examples, list) or not all(isinstance(example, Mapping) for example in examples) or not examples:
        raise row.error(
            f"`examples` is {quoted(examples)}, not a list of objects",
            fix="give a task's file as BIG-Bench Hard has it",
        )
    return [RawRow(example, f"{row.place} (example {n})", n) for n, example in enumerate(examples, start=1)]


def kind_of(member: Member) -> AnswerKind:
    return KINDS[member.local]


def extract(member: Member, completion: str) -> str | None:
    """What stands behind the first `the answer is` that an answer of the task's kind follows, in normal form.

    Where none follows any, the rest of the first one's line as it is.
    """
    text = _NEXT_QUESTION.split(fold_width(completion), maxsplit=1)[0]
    first: str | None = None
    for match in _MARK.finditer(text):
        line = _BOLD.sub(r"\1", match["answer"])
        answer = (last_boxed(line) or line).lstrip(_AROUND).rstrip(f"{_AROUND}.")
        if (found := kind_of(member).read(answer)) is not None:
            return found
        first = first or answer.strip(":,") or None
    return first


_DATA = Published(
    name="bbh",
    hub="SaylorTwift/bbh",
    layouts=tuple(
        Layout(test=path)
        for path in ("bbh/bbh/{}.json", "bbh/{}.json", "bbh/{}/test.parquet", "BIG-Bench-Hard/bbh/{}.json")
    ),
    members=tuple(Member(f"bbh_{name}", f"bbh/cot_fewshot/{name}.yaml", name, name) for name in KINDS),
    columns=read_columns,
    unpack=unpack,
)
BBH = DataSet(
    evaluation=Evaluation(
        title="BIG-Bench Hard",
        data=_DATA,
        num_fewshot=3,
        native="generation",
        fewshot_from="definition",
        question=lambda row: str(row["input"]),
        gold=lambda member, row: str(row["target"]),
        extract=extract,
        same=lambda member, answer, gold: kind_of(member).same(answer, gold),
        published_gold=lambda member, row: f"So the answer is {row['target']}.",
    )
)
