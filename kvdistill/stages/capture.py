"""The capture stage: each teacher runs once over the texts; what the arms need of it goes to the store.

Reads the run's data and one teacher; writes `store/targets-SPLIT-TEACHER-HASH/`. A killed capture goes on at the
next shard; a finished one is recognised by its identity. Knows nothing of students beyond which layers they match.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvdistill.arms.pairing import captured_top_k, captures_queries, captures_scores, needed_layers
from kvdistill.arms.running import load_teacher, run_teacher
from kvdistill.arms.sources import teacher_recipe
from kvdistill.arms.targets import target_identity
from kvdistill.arms.texts import load_teacher_tokenizer, read_examples
from kvdistill.core.layout import folder_lock, store_root
from kvdistill.core.progress import Progress, silent
from kvdistill.core.recipe import Recipe
from kvdistill.core.runtime import DTYPES, pick_device
from kvdistill.core.targets import TeacherTargets
from kvdistill.data.encode import Example
from kvdistill.models.generate import right_padded
from kvdistill.store.packed import pack_targets
from kvdistill.store.shards import StoreWriter

SHARD_BYTES = 256 << 20


def capture(recipe: Recipe, run: Path, name: str, progress: Progress = silent) -> None:
    """Capture teacher `name` on train and val. Returns at once where that is done, or where teachers run online."""
    splits = ("train", "val") if recipe.capture.source == "store" else ("val",)
    writers = [
        (split, StoreWriter(store_root(run), f"targets-{split}", name, target_identity(recipe, run, name, split)))
        for split in splits
    ]
    todo = [(split, writer) for split, writer in writers if not writer.complete]
    if not todo:
        return
    model = load_teacher(recipe, run, name, pick_device(recipe.hardware.device))
    for split, writer in todo:
        with folder_lock(writer.folder, wait=True):
            _capture_split(recipe, run, name, split, writer, model, progress)


def _capture_split(recipe, run, name, split, writer, model, progress) -> None:  # type: ignore[no-untyped-def]
    teacher = teacher_recipe(recipe, name)
    examples = read_examples(recipe, run, split, teacher)
    layers, top_k = needed_layers(recipe, run, name), captured_top_k(recipe, name)
    queries, scores = captures_queries(recipe, name), captures_scores(recipe, name)
    pad_id = load_teacher_tokenizer(run, teacher).pad_token_id
    per_shard = examples_per_shard(examples, model, len(layers), top_k, recipe.capture.dtype, queries, scores)
    for start in range(writer.num_shards * per_shard, len(examples), per_shard):
        part = examples[start : start + per_shard]
        batches: list[TeacherTargets] = []
        for first in range(0, len(part), recipe.capture.batch_size):
            rows = part[first : first + recipe.capture.batch_size]
            ids_BS = right_padded([row.input_ids for row in rows], pad_id).to(model.device)
            segments_BS = right_padded([row.segments for row in rows], 0).to(model.device)
            targets = run_teacher(
                model,
                ids_BS,
                segments_BS,
                layers=layers,
                dtype=recipe.capture.dtype,
                want_nll=True,
                top_k=top_k,
                queries=queries,
                scores=scores,
            )
            batches.append(targets.to("cpu"))
            progress(f"capture {name} {split}", start + first + len(rows), len(examples))
        writer.add(pack_targets(batches, DTYPES[recipe.capture.dtype]))
    extra = {"scaling": _scaling(model, examples[:1], layers, queries)} if queries else {}
    rope = "none" if not layers or batches_rope(model) is None else "unrotated"
    writer.finish({"layers": layers, "rope": rope, "examples": len(examples), "split": split, **extra})


def _scaling(model: PreTrainedModel, first: Sequence[Example], layers: list[int], queries: bool) -> list[float] | None:
    """What each layer multiplies q.k with, read off a run on one text: a capture that is resumed needs no other."""
    ids, segments = (torch.tensor([x]).to(model.device) for x in (first[0].input_ids, first[0].segments))
    kv = run_teacher(model, ids, segments, layers=layers, dtype="float32", want_nll=False, queries=queries).kv
    return None if kv is None or kv.scaling is None else list(kv.scaling)


def batches_rope(model: torch.nn.Module) -> object | None:
    """The model's rotary module, if it has one."""
    from kvdistill.models.structure import find_rotary

    return find_rotary(model)


def examples_per_shard(
    examples: Sequence[Example],
    model: torch.nn.Module,
    num_layers: int,
    top_k: int,
    dtype: str,
    queries: bool = False,
    scores: bool = False,
) -> int:
    """How many examples make a shard of about SHARD_BYTES; the same for the same texts, so that a resume fits."""
    from kvdistill.models import describe_model

    shape = describe_model(model)
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    per_layer = 2 * shape.num_kv_heads * shape.head_size * size
    per_layer += shape.num_heads * shape.head_size * size if queries else 0
    per_layer += 3 * shape.num_kv_heads * 4 if scores else 0
    per_token = num_layers * per_layer + top_k * 8 + 1
    longest = max((len(example.input_ids) for example in examples), default=1)
    return max(1, SHARD_BYTES // max(1, per_token * longest))
