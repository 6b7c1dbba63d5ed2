"""The capture stage: each teacher runs once over the texts; what the arms need of it goes to the store.

Reads the run's data and one teacher; writes `store/targets-SPLIT-TEACHER-HASH/`. A killed capture goes on at the
next shard; a finished one is recognised by its identity. Knows nothing of students beyond which layers they match.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvdistill.arms.costs import pass_flops
from kvdistill.arms.teacher import Teacher
from kvdistill.arms.teacher_pass import run_teacher
from kvdistill.core.errors import ModelError
from kvdistill.core.files import open_tensors
from kvdistill.core.layout import store_root
from kvdistill.core.progress import Progress, silent
from kvdistill.core.runtime import DTYPES
from kvdistill.core.stopping import give_in, put_off
from kvdistill.core.targets import ChannelMeans, TeacherTargets
from kvdistill.models import describe_model, find_rotary
from kvdistill.models.generate import right_padded
from kvdistill.store.packed import pack_targets
from kvdistill.store.shards import StoreWriter

SHARD_BYTES = 256 << 20


def capture(teacher: Teacher, progress: Progress = silent) -> None:
    """Capture a teacher on train and val. Returns at once where that is done; online teachers leave val only."""
    root, online = store_root(teacher.experiment.run), teacher.experiment.recipe.capture.source == "online"
    model = functools.cache(teacher.load)
    for split in ("val",) if online else ("train", "val"):
        with StoreWriter(root, f"targets-{split}", teacher.stored_as, teacher.target_identity(split)) as writer:
            if not writer.complete:
                with put_off():
                    _capture_split(teacher, split, writer, model(), progress)


def _capture_split(
    teacher: Teacher, split: str, writer: StoreWriter, model: PreTrainedModel, progress: Progress
) -> None:
    """Shard after shard, from the first that is not there. Asked to end, it does after the shard it is at."""
    recipe, examples, layers = teacher.experiment.recipe.capture, teacher.examples(split), teacher.layers
    queries, scores, pad_id = teacher.queries, teacher.scores, teacher.tokenizer.pad_token_id
    longest = max((len(example.input_ids) for example in examples), default=1)
    means = _channel_means(teacher, writer, model)
    per_shard = examples_per_shard(model, longest, len(layers), teacher.top_k, recipe.dtype, queries, scores)
    for start in range(writer.num_shards * per_shard, len(examples), per_shard):
        part = examples[start : start + per_shard]
        batches: list[TeacherTargets] = []
        for first in range(0, len(part), recipe.batch_size):
            rows = part[first : first + recipe.batch_size]
            targets = run_teacher(
                model,
                right_padded([row.input_ids for row in rows], pad_id).to(model.device),
                right_padded([row.segments for row in rows], 0).to(model.device),
                layers=layers,
                dtype=recipe.dtype if means is None else "float32",  # then rounded when it is packed
                want_nll=True,
                top_k=teacher.top_k,
                queries=queries,
                scores=scores,
            )
            batches.append(targets.to("cpu"))
            progress(f"capture {teacher.stored_as} {split}", start + first + len(rows), len(examples))
        packed = pack_targets(batches, DTYPES[recipe.dtype], means)
        _refuse_broken(packed, teacher, split, start)
        writer.add(packed)
        give_in()
    sizes = [(len(example.input_ids), example.num_prompt_tokens) for example in examples]
    extra: dict[str, Any] = {"flops": pass_flops(teacher, sizes, stops=False)}
    if queries:  # how each layer attends, read off a run on one text: a resumed capture needs no other
        ids, segments = (torch.tensor([x]).to(model.device) for x in (examples[0].input_ids, examples[0].segments))
        kv = run_teacher(model, ids, segments, layers=layers, dtype="float32", want_nll=False, queries=True).kv
        if kv is not None:
            extra |= {"scaling": kv.scaling and list(kv.scaling), "rules": [rule.as_json() for rule in kv.rules]}
    rope = "none" if not layers or find_rotary(model) is None else "unrotated"
    writer.finish({"layers": layers, "rope": rope, "examples": len(examples), "split": split, **extra})


def _refuse_broken(packed: dict[str, Tensor], teacher: Teacher, split: str, start: int) -> None:
    """ModelError where a teacher gave NaN or infinities, before they are stored and a student is taught by them."""
    what = {"kv": "keys or values", "queries": "queries", "scores": "attention", "nll": "NLL", "topk_logprob": "logits"}
    recipe = teacher.experiment.recipe.capture
    for name in [name for name in what if name in packed]:
        rows = packed[name].flatten(1) if packed[name].ndim > 1 else packed[name][:, None]
        bad = (~torch.isfinite(rows)).any(1).nonzero()
        if not len(bad):
            continue
        offsets = packed["offsets"]
        row = int(bad[0]) if name == "nll" else int(torch.searchsorted(offsets, bad[0], right=True)) - 1
        narrow = name in ("kv", "queries") and recipe.dtype == "float16"
        raise ModelError(
            f"this teacher gives NaN or infinity as {what[name]} of text {start + row} of {split}",
            place=teacher.place,
            fix="set capture.dtype: bfloat16 (float16 ends at 65,504), or look at its weights"
            if narrow
            else "look at its weights and its dtype (float16 ends at 65,504)",
        )


def _channel_means(teacher: Teacher, writer: StoreWriter, model: PreTrainedModel) -> ChannelMeans | None:
    """Those of the shards that a killed capture left, so that all shards have the same; else made now."""
    if writer.num_shards:
        first = open_tensors(writer.folder / "shard-00000.safetensors")
        return ChannelMeans(first["kv_mean"], first.get("queries_mean")) if "kv_mean" in first else None
    return teacher.channel_means(model)


def examples_per_shard(
    model: torch.nn.Module,
    longest: int,
    num_layers: int,
    top_k: int,
    dtype: str,
    queries: bool = False,
    scores: bool = False,
) -> int:
    """How many examples make a shard of about SHARD_BYTES; the same for the same texts, so that a resume fits.

    longest: tokens of the longest example.
    """
    shape = describe_model(model)
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    per_layer = 2 * shape.num_kv_heads * shape.head_size * size
    per_layer += shape.num_heads * shape.head_size * size if queries else 0
    per_layer += 3 * shape.num_kv_heads * 4 if scores else 0
    per_token = num_layers * per_layer + top_k * 8 + 1
    return max(1, SHARD_BYTES // max(1, per_token * longest))
