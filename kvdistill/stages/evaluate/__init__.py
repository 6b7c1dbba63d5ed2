"""The evaluate stage, and public evaluations on any model.

    stage.py    a run's trained student on its own test split and on the recipe's evaluations
    command.py  `kvdistill evaluate MODEL --tasks …`
    suite.py    what both ask: names -> exams, chunk by chunk, records and results in one folder
    exams.py    what an exam is; harness.py lm-eval's definitions, plain.py our own prompts, own.py a run's test split
    lm.py       a Hugging Face model behind lm-eval's `LM`, greedy and metered
    records.py  the folder: identity, records, resuming; results.py scores and costs from them

lm-eval takes seconds to import, so what needs it is imported when it is first asked for.
"""

from __future__ import annotations

from typing import Any

from kvdistill.stages.evaluate.stage import answer, evaluate, test_examples

_LATER = {
    "MeteredLM": "kvdistill.stages.evaluate.lm",
    "SuiteOptions": "kvdistill.stages.evaluate.exams",
    "evaluate_model": "kvdistill.stages.evaluate.command",
    "evaluate_suite": "kvdistill.stages.evaluate.suite",
    "plan_suite": "kvdistill.stages.evaluate.suite",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)


__all__ = ["answer", "evaluate", "test_examples", *_LATER]
