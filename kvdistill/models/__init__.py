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
from kvdistill.models.forward import EMPTY_LOGPROB, head_at, teacher_forward
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
