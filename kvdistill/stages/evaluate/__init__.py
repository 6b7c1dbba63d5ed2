"""The evaluate stage, and evaluations on any model: one loop, one generator, one record.

stage.py    a study's trained student on its run's test split and on the recipe's public evaluations
command.py  `kvdistill evaluate MODEL --tasks …`
suite.py    what both ask: names -> exams, chunk by chunk, records and results in one folder
exams.py    what an exam is, and prompts of our own; own.py a run's test split, harness.py lm-eval's definitions
lm.py       a Hugging Face model behind lm-eval's `LM`, greedy and metered
book.py     the folder: identity, records, resuming; scores and costs
"""

from __future__ import annotations

from kvdistill.stages.evaluate.stage import check_public, evaluate
from kvdistill.stages.evaluate.suite import SuiteOptions, evaluate_suite, plan_suite

__all__ = ["SuiteOptions", "check_public", "evaluate", "evaluate_suite", "plan_suite"]
