"""The only package that knows transformers' model internals: load, describe, capture q/k/v, rotate, run a teacher."""

from kvdistill.models.capture import KVCapture, capture_kv
from kvdistill.models.describe import (
    ModelShape,
    batch_geometry,
    capture_flops,
    describe_config,
    describe_model,
    forward_flops,
)
from kvdistill.models.forward import EMPTY_LOGPROB, teacher_forward
from kvdistill.models.load import (
    add_lora,
    check_model_exists,
    fingerprint_model,
    load_model,
    merge_lora,
    model_config,
    require_causal,
)
from kvdistill.models.probe import Probe, Verdict, probe_config, probe_model
from kvdistill.models.rope import rotary_only, rotate_keys, unrotate_keys
from kvdistill.models.structure import (
    auto_class,
    find_backbone,
    find_rotary,
    model_kind,
    model_name,
    positions_from_mask,
    unwrap_model,
)

__all__ = [
    "EMPTY_LOGPROB",
    "KVCapture",
    "ModelShape",
    "Probe",
    "Verdict",
    "add_lora",
    "auto_class",
    "batch_geometry",
    "capture_flops",
    "capture_kv",
    "check_model_exists",
    "describe_config",
    "describe_model",
    "find_backbone",
    "find_rotary",
    "fingerprint_model",
    "forward_flops",
    "load_model",
    "merge_lora",
    "model_config",
    "model_kind",
    "model_name",
    "positions_from_mask",
    "probe_config",
    "probe_model",
    "require_causal",
    "rotary_only",
    "rotate_keys",
    "teacher_forward",
    "unrotate_keys",
    "unwrap_model",
]
