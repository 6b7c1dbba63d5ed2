"""What a completion answers, and whether that is right.

A task marks its answer, and only what stands after the first mark counts: never "the last number in the text".
The rules belong to the tasks; a task key that is not built in is a local file and follows `jsonl`'s rules, or the one
that its recipe names (`rule`, one of `sets.RULES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvdistill.data.answers.checker import Verdict
from kvdistill.data.answers.latex import compare_latex_pairs, same_latex
from kvdistill.data.sets import find_rules


@dataclass(frozen=True)
class Checked:
    """answer: as the task reads it, None where the completion marks none. verdict: `equal` is right."""

    answer: str | None
    verdict: Verdict

    @property
    def is_correct(self) -> bool:
        return self.verdict == "equal"


def extract_answer(task: str, completion: str, rule: str = "") -> str | None:
    """The marked answer of a generated text in the task's normal form, or None where nothing is marked."""
    return find_rules(task, rule).extract(completion)


def is_correct(task: str, completion: str, gold: str, rule: str = "") -> bool:
    """Whether the marked answer of `completion` equals `gold` under the task's own rule (numbers: exact decimals)."""
    return check_answers(task, [(completion, gold)], rule)[0].is_correct


def check_answers(task: str, pairs: Sequence[tuple[str, str]], rule: str = "") -> list[Checked]:
    """Many (completion, gold) of one task; of LaTeX answers also those on which there is no verdict are told apart."""
    rules = find_rules(task, rule)
    answers = [rules.extract(completion) for completion, _ in pairs]
    marked = [(answer, gold) for answer, (_, gold) in zip(answers, pairs, strict=True) if answer is not None]
    verdicts: list[Verdict]
    if rules.same is same_latex:
        verdicts = compare_latex_pairs(marked)
    else:
        verdicts = ["equal" if rules.same(answer, gold) else "different" for answer, gold in marked]
    found = iter(verdicts)
    return [Checked(answer, "different" if answer is None else next(found)) for answer in answers]


__all__ = ["Checked", "check_answers", "extract_answer", "is_correct"]
