"""What an arm brings together, in sizes: layers, heads, tokens, the space they meet in, parameters, bytes on disk.

Counts what the batches say: how many student tokens have something behind them, and what is lost between tokenizers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvdistill.align.time import segment_report
from kvdistill.align.tokens import token_coverage
from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import Batch, BatchMaker
from kvdistill.core.files import read_json
from kvdistill.core.segments import SEGMENT_NAMES


def shape_figures(arm: Arm, num_batches: int) -> dict[str, Any]:
    """Sizes of the student and each teacher, and what the first batches of training hold."""
    maker, recipe = arm.batches("train"), arm.recipe
    numbers = first_batches(arm, num_batches)
    batches = [arm.load(maker, one) for one in numbers]
    lengths = torch.cat([batch.mask_BT.sum(1) for batch in batches])
    used = {"layers_used": arm.distiller.student_layers, "tokens": float(lengths.double().mean())}
    return {
        "texts": len(lengths),
        "student": {**_sizes(arm.experiment.student_shape), **used},
        "meeting": {
            "space": recipe.align.match_in,
            "keys": recipe.align.keys,
            "time": recipe.align.time,
            "layers": recipe.align.layers,
            "kv_compression": recipe.compress.kv_compression,
            "kv_on": recipe.loss.kv_on,
        },
        "teachers": {name: _teacher(arm, name, maker, numbers, batches) for name in recipe.teachers},
    }


def first_batches(arm: Arm, num_batches: int) -> list[list[int]]:
    """The examples of the first batches of training (round again where there are fewer)."""
    size, order = arm.recipe.train.batch_size, arm.training_order(num_batches)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _teacher(arm: Arm, name: str, maker: BatchMaker, numbers: list[list[int]], batches: list[Batch]) -> dict[str, Any]:
    aligner, teacher = arm.distiller.aligner(name), arm.teachers[name]
    targets = [batch.targets[name] for batch in batches]
    text = maker.texts.get(name)
    in_student = arm.recipe.align.match_in == "student"
    missing: Counter[str] = Counter()  # texts with a segment on one side only
    for target, batch in zip(targets, batches, strict=True):
        missing.update(segment_report(target.segments_BS, batch.segments_BT))
    capture = arm.experiment.recipe.capture
    captured: dict[str, Any] = {
        "source": capture.source,
        "dtype": capture.dtype,
        "layers": teacher.layers,
        "queries": teacher.queries,
        "scores": teacher.scores,
        "logits_top_k": teacher.top_k,
    }
    if not arm.runs_online:  # over all tokens of its training texts
        shards = read_json(teacher.target_folder("train") / "manifest.json")["shards"]
        num_bytes = sum(shard["bytes"] for shard in shards)
        num_tokens = sum(len(example.input_ids) for example in teacher.examples("train"))
        captured |= {"bytes": num_bytes, "tokens": num_tokens, "bytes_per_token": num_bytes / max(1, num_tokens)}
    found: dict[str, Any] = {
        **_sizes(teacher.shape),
        "tokens": float(torch.cat([(target.segments_BS > 0).sum(1) for target in targets]).double().mean()),
        "own_tokens": text is not None,
        "one_text": text is None or text.own is not None,
        "channels": aligner.student_heads[0] * aligner.student_heads[1] if in_student else aligner.proj_k.num_out,
        "layer_map": {
            layer: [[m, round(share, 6)] for m, share in row]
            for layer, row in zip(aligner.student_layers, aligner.sources_by_layer, strict=True)
        },
        "captured": captured,
        "taught": _taught([(batch.segments_BT, batch.kv_masks[name]) for batch in batches]),
        "segments": {what: count for what, count in missing.items() if count},
    }
    if text is not None and text.own is not None and arm.recipe.control != "placebo":
        found["lost"] = _lost(text, numbers)
    return found


def _sizes(shape: Any) -> dict[str, Any]:
    return {
        "family": shape.family,
        "kind": shape.kind,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "rotary": shape.has_rope,
        "vocabulary": shape.vocab_size,
        "parameters": shape.num_parameters,
    }


def _taught(sides: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Share of the student's tokens that take part in the KV term: by segment, and of all. Layers count alike."""
    names = {"all": None, **SEGMENT_NAMES}
    total, taught = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for segments_BT, mask in sides:
        share_BT = mask.double() if mask.ndim == 2 else mask.double().mean(0)
        for name, code in names.items():
            here_BT = segments_BT > 0 if code is None else segments_BT == code
            total[name] += float(here_BT.sum())
            taught[name] += float((share_BT * here_BT).sum())
    return {name: taught[name] / total[name] if total[name] else None for name in names}


def _lost(text: Any, batches: list[list[int]]) -> dict[str, float]:
    """Where tokenizers differ: what of the text the teacher's tokens do not tell, and the reverse."""
    sums = torch.zeros(6, dtype=torch.float64)
    for numbers in batches:
        sides = [text.spans(i) for i in numbers], [text.student_spans(i) for i in numbers]
        (theirs, their_roles), (mine, my_roles) = (
            [pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True)] for rows in sides
        )
        coverage = token_coverage(theirs, mine, their_roles.long(), my_roles.long())
        sums += torch.stack([part.double().sum() for part in coverage])
    mine, lost, theirs, unread, tokens, empty = sums.tolist()
    return {
        "characters_lost": lost / max(1.0, mine),
        "characters_unread": unread / max(1.0, theirs),
        "tokens_empty": empty / max(1.0, tokens),
    }


def parameter_figures(arm: Arm) -> dict[str, Any]:
    """Numbers in the student and in each teacher's maps: learned, and saved with them but fixed."""
    trained = sum(p.numel() for p in arm.distiller.student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in arm.distiller.student.parameters())
    teachers: dict[str, Any] = {}
    for name in arm.recipe.teachers:
        aligner = arm.distiller.aligner(name)
        names = ("proj_k", "proj_v", "proj_q", "adapter_k", "adapter_v")
        present = {what: module for what in names if (module := getattr(aligner, what, None)) is not None}
        teachers[name] = {
            "parameters": sum(m.num_parameters for m in present.values()),
            "fixed": sum(m.num_fixed for m in present.values()),
            "trained": sum(p.numel() for p in aligner.parameters() if p.requires_grad),
            "modules": {
                what: {"kind": type(m).__name__, "parameters": m.num_parameters, "fixed": m.num_fixed}
                for what, m in present.items()
            },
        }
    return {
        "student": {"parameters": total, "trained": trained},
        "teachers": teachers,
    }
