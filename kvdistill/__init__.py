"""kvdistill: teach a small language model by matching the key/value caches of bigger ones, and prove that it helped.

`kvdistill demo` runs the whole thing; `docs/design.md` draws the house. Importing this package is cheap: the
public names below load their module (and torch) when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "KV": "kvdistill.core.kv",
    "SparseMap": "kvdistill.core.maps",
    "KVDistillError": "kvdistill.core.errors",
    "Recipe": "kvdistill.core.recipe",
    "load_recipe": "kvdistill.core.config",
    "prepare": "kvdistill.study.verbs",
    "train": "kvdistill.study.verbs",
    "evaluate": "kvdistill.study.verbs",
    "report": "kvdistill.study.verbs",
    "capture_kv": "kvdistill.models",
    "rotate_keys": "kvdistill.models",
    "unrotate_keys": "kvdistill.models",
    "MapProjectionAligner": "kvdistill.align",
    "HeadwiseMapProjector": "kvdistill.align",
    "KVDimensionProjector": "kvdistill.align",
    "SegmentIdentifier": "kvdistill.align",
    "TimeWarper": "kvdistill.align",
    "CKALayerMapper": "kvdistill.align.layers",
    "MercatorKVLoss": "kvdistill.losses",
    "StructuralKVLoss": "kvdistill.losses",
    "LearningCurveTracker": "kvdistill.stages.report",
    "TrainingBudgetController": "kvdistill.arms.budget",
    "load_multi_task_dataset": "kvdistill.data",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from kvdistill.align import HeadwiseMapProjector as HeadwiseMapProjector
    from kvdistill.align import KVDimensionProjector as KVDimensionProjector
    from kvdistill.align import MapProjectionAligner as MapProjectionAligner
    from kvdistill.align import SegmentIdentifier as SegmentIdentifier
    from kvdistill.align import TimeWarper as TimeWarper
    from kvdistill.align.layers import CKALayerMapper as CKALayerMapper
    from kvdistill.arms.budget import TrainingBudgetController as TrainingBudgetController
    from kvdistill.core.config import load_recipe as load_recipe
    from kvdistill.core.errors import KVDistillError as KVDistillError
    from kvdistill.core.kv import KV as KV
    from kvdistill.core.maps import SparseMap as SparseMap
    from kvdistill.core.recipe import Recipe as Recipe
    from kvdistill.data import load_multi_task_dataset as load_multi_task_dataset
    from kvdistill.losses import MercatorKVLoss as MercatorKVLoss
    from kvdistill.losses import StructuralKVLoss as StructuralKVLoss
    from kvdistill.models import capture_kv as capture_kv
    from kvdistill.models import rotate_keys as rotate_keys
    from kvdistill.models import unrotate_keys as unrotate_keys
    from kvdistill.stages.report import LearningCurveTracker as LearningCurveTracker
    from kvdistill.study.verbs import evaluate as evaluate
    from kvdistill.study.verbs import prepare as prepare
    from kvdistill.study.verbs import report as report
    from kvdistill.study.verbs import train as train


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kvdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
