"""What all sections share: `Section` itself, the kinds of values with their bounds, names that several use."""

from __future__ import annotations

import os
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _usable_path(path: str) -> str:
    """A path that a file system can take: no NUL, and no name in it longer than 255 bytes."""
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character")
    whole = os.fsencode(path)
    if len(whole) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in whole.split(b"/")):
        raise ValueError(f"too long for a path ({MAX_PATH_BYTES} bytes, {MAX_NAME_BYTES} for each name in it)")
    return path


MAX_PATH_BYTES, MAX_NAME_BYTES = 4000, 255
MAX_EXAMPLES_SEEN = 10**9  # by one training, repetitions counted: their order is one list of numbers
# teachers and arms have folders of their names: no way out of the run folder, and room for what is put around a name
FOLDER_NAME = r"^\w[\w.+@-]{0,63}$"
# Bounds are far above what anybody trains, and far below what hangs a machine before it can say anything.
Count = Annotated[int, Field(ge=0, le=10**8)]  # of problems, texts, steps
Positive = Annotated[int, Field(gt=0, le=10**8)]
Size = Annotated[int, Field(gt=0, le=2**17)]  # of a model's parts, in channels
Batch = Annotated[int, Field(gt=0, le=2**16)]
Tokens = Annotated[int, Field(gt=0, le=2**20)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, le=1)]
Segment = Literal["prompt", "reasoning", "answer"]
Parity = Literal["steps", "student_flops", "total_flops", "data"]
NonNegative = Annotated[float, Field(ge=0, le=1e39)]
AboveZero = Annotated[float, Field(gt=0, le=1e39)]
PathText = Annotated[str, AfterValidator(_usable_path)]
AnswerRule = Literal["value", "number", "fraction", "latex", "yes-no", "letter", "exact-match"]
ANSWER_RULES = get_args(AnswerRule)
TimeMode = Literal["index", "pad", "proportional", "segment"]
Control = Literal["placebo", "untrained", "shuffled", "noise"]
UNTRAINED = "~untrained"  # behind a teacher's name, which cannot hold this sign: the same with random weights
RESAMPLING = ("proportional", "segment")  # the time modes that average neighbouring tokens
TIME_ALIASES = {"truncate": "index", "soft": "segment"}  # align.time, in the original's words
