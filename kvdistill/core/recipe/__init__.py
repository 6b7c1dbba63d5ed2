"""The recipe's types: what a study is made of, key by key. Reading and merging is in `config.py`.

    data        data                                    train    train, tune, evaluate, write, hardware
    models      teachers, student                       report   report, and what arms are matched by
    matching    capture, align, compress, fuse,         whole    an arm, and the recipe
                loss, latent

Every section is a frozen pydantic model that forbids unknown keys. Its docstrings and field descriptions
are the reference that `docs/recipe.md` and `kvdistill recipe` print. Knows no torch.
"""

from __future__ import annotations

from kvdistill.core.recipe.base import (
    ANSWER_RULES,
    FOLDER_NAME,
    MAX_EXAMPLES_SEEN,
    RESAMPLING,
    TIME_ALIASES,
    UNTRAINED,
    Control,
    Parity,
    Section,
    TimeMode,
)
from kvdistill.core.recipe.data import DataRecipe, TaskRecipe
from kvdistill.core.recipe.matching import (
    AlignRecipe,
    CaptureRecipe,
    CompressRecipe,
    FuseRecipe,
    LatentRecipe,
    LossRecipe,
)
from kvdistill.core.recipe.models import (
    LoraRecipe,
    ModelRecipe,
    OptimiserRecipe,
    ScratchRecipe,
    StudentRecipe,
    TeacherRecipe,
)
from kvdistill.core.recipe.report import ComparisonRecipe, CurvesRecipe, MatchRecipe, ParityRecipe, ReportRecipe
from kvdistill.core.recipe.train import EvaluateRecipe, HardwareRecipe, TrainRecipe, TuneRecipe, WriteRecipe
from kvdistill.core.recipe.whole import ArmRecipe, Recipe
