"""The same question twice: learned from and held out, exactly or nearly.

find.py     what is held against what, and the leaks that are found
near.py     the index that finds exact and near duplicates
wording.py  a question as its words and its numbers, and how alike two wordings are
"""

from __future__ import annotations

from kvdistill.data.leaks.find import (
    EVALUATION,
    HELD_OUT,
    LEARNED,
    Leak,
    LeakReport,
    Place,
    find_leaks,
    question_hash,
    refuse_leaks,
    shorten,
)
from kvdistill.data.leaks.near import NearIndex
from kvdistill.data.leaks.wording import fold_question

__all__ = [
    "EVALUATION",
    "HELD_OUT",
    "LEARNED",
    "Leak",
    "LeakReport",
    "NearIndex",
    "Place",
    "find_leaks",
    "fold_question",
    "question_hash",
    "refuse_leaks",
    "shorten",
]
