"""The answer rules that a user's own rows may follow (`answer:` of a task), by name: those of the built-in tasks."""

from __future__ import annotations

import re

from kvdistill.core.recipe import ANSWER_RULES
from kvdistill.data.problems import ANSWER_MARK
from kvdistill.data.sets.arc_challenge import ARC_CHALLENGE
from kvdistill.data.sets.base import Task
from kvdistill.data.sets.gsm8k import GSM8K
from kvdistill.data.sets.hotpotqa import HOTPOTQA
from kvdistill.data.sets.math import MATH
from kvdistill.data.sets.math23k import MATH23K
from kvdistill.data.sets.strategyqa import STRATEGYQA

_OF = {
    "number": GSM8K,
    "fraction": MATH23K,
    "latex": MATH,
    "yes-no": STRATEGYQA,
    "letter": ARC_CHALLENGE,
    "exact-match": HOTPOTQA,
}
RULES: dict[str, Task] = {name: one.task for name, one in _OF.items() if one.task is not None}
_SHAPES = {"yes-no": re.compile("yes|no"), "letter": re.compile("[A-Z]")}  # of gold answers, where any text is compared
assert {"value", *RULES} == {*ANSWER_RULES}, "the recipe's words and the rules are the same"


def read_gold(rule: str, answer: str) -> str | None:
    """A gold answer as the rule reads it: `68 (pictures)` and 68.0 are the number 68; None where it is none by it."""
    task, shape = RULES[rule], _SHAPES.get(rule)
    read = task.extract(f"{ANSWER_MARK} {answer}")
    is_one = read is not None and task.same(read, read) and (shape is None or shape.fullmatch(read))
    return read if is_one else None
