"""What an arm brings together, in sizes: layers, heads, tokens, the space they meet in, parameters, bytes on disk.

Counts what the batches say: how many student tokens have something behind them, and what is lost between tokenizers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdistill.align.time import segment_report
from kvdistill.align.tokens import token_coverage
from kvdistill.arms.batches import BatchMaker
from kvdistill.arms.pairing import captured_top_k, captures_queries, captures_scores, needed_layers, pair
from kvdistill.arms.sources import teacher_recipe
from kvdistill.arms.targets import target_identity
from kvdistill.arms.texts import read_examples
from kvdistill.core.files import read_json
from kvdistill.core.layout import store_root
from kvdistill.core.segments import SEGMENT_NAMES
from kvdistill.models.generate import right_padded
from kvdistill.store.shards import find_store
from kvdistill.study.profile.setting import Setting


def shape_figures(setting: Setting, num_batches: int) -> dict[str, Any]:
    """Sizes of the student and each teacher, and what the first batches of training hold."""
    arm, recipe = setting.arm, setting.recipe
    maker = setting.maker("train")
    batches = [(numbers, setting.load(maker, numbers)) for numbers in setting.training_numbers(num_batches)]
    student = pair(recipe, setting.run, arm, arm.teachers[0]).student
    lengths = torch.cat([(batch["segments"] > 0).sum(1) for _, batch in batches])
    return {
        "texts": len(lengths),
        "student": {**_sizes(student), "layers_used": setting.distiller.student_layers, "tokens": _mean(lengths)},
        "meeting": {
            "space": arm.align.match_in,
            "keys": arm.align.keys,
            "time": arm.align.time,
            "layers": arm.align.layers,
            "kv_compression": arm.compress.kv_compression,
            "kv_on": arm.loss.kv_on,
        },
        "teachers": {name: _teacher(setting, name, maker, batches) for name in arm.teachers},
    }


def _teacher(setting: Setting, name: str, maker: BatchMaker, batches: list[Any]) -> dict[str, Any]:
    recipe, run, aligner = setting.recipe, setting.run, setting.aligner(name)
    sizes = pair(recipe, run, setting.arm, name).teacher
    targets = [batch["targets"][name] for _, batch in batches]
    lengths = torch.cat([(target.segments_BS > 0).sum(1) for target in targets])
    text = maker.texts.get(name)
    projector = aligner.proj_k
    width = projector.num_in if setting.arm.align.match_in == "student" else projector.num_out
    if setting.arm.align.match_in == "student":
        width = aligner.student_heads[0] * aligner.student_heads[1]
    found: dict[str, Any] = {
        **_sizes(sizes),
        "tokens": _mean(lengths),
        "own_tokens": text is not None,
        "one_text": text is None or text.own is not None,
        "channels": width,
        "layer_map": {
            layer: [[m, round(share, 6)] for m, share in row]
            for layer, row in zip(aligner.student_layers, aligner.sources_by_layer, strict=True)
        },
        "captured": _captured(setting, name),
        "taught": _taught([(batch["segments"], batch["kv_masks"][name]) for _, batch in batches]),
        "segments": _missing_segments(
            [(t.segments_BS, b["segments"]) for t, (_, b) in zip(targets, batches, strict=True)]
        ),
    }
    if text is not None and text.own is not None and not setting.arm.placebo:
        found["lost"] = _lost(text, [numbers for numbers, _ in batches])
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


def _mean(lengths: Tensor) -> float:
    return float(lengths.double().mean())


def _captured(setting: Setting, name: str) -> dict[str, Any]:
    """What of the teacher is captured; in the store: its bytes, over all tokens of its training texts."""
    recipe, run = setting.recipe, setting.run
    found: dict[str, Any] = {
        "source": recipe.capture.source,
        "dtype": recipe.capture.dtype,
        "layers": needed_layers(recipe, run, name),
        "queries": captures_queries(recipe, name),
        "scores": captures_scores(recipe, name),
        "logits_top_k": captured_top_k(recipe, name),
    }
    if setting.is_online:
        return found
    identity = target_identity(recipe, run, name, "train")
    folder = find_store(store_root(run), "targets-train", name, identity, make="kvdistill capture RECIPE")
    num_bytes = sum(shard["bytes"] for shard in read_json(folder / "manifest.json")["shards"])
    examples = read_examples(recipe, run, "train", teacher_recipe(recipe, name))
    num_tokens = sum(len(example.input_ids) for example in examples)
    return found | {"bytes": num_bytes, "tokens": num_tokens, "bytes_per_token": num_bytes / max(1, num_tokens)}


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


def _missing_segments(sides: list[tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Texts with a segment on one side only."""
    total: dict[str, int] = {}
    for theirs_BS, mine_BT in sides:
        for what, count in segment_report(theirs_BS, mine_BT).items():
            total[what] = total.get(what, 0) + count
    return {what: count for what, count in total.items() if count}


def _lost(text: Any, batches: list[list[int]]) -> dict[str, float]:
    """Where tokenizers differ: what of the text the teacher's tokens do not tell, and the reverse."""
    sums = torch.zeros(6, dtype=torch.float64)
    for numbers in batches:
        sides = []
        for rows in ([text.spans(i) for i in numbers], [text.student_spans(i) for i in numbers]):
            roles = right_padded([row[1].tolist() for row in rows], 0)
            spans = torch.zeros(*roles.shape, 2)
            for place, (row, _) in zip(spans, rows, strict=True):
                place[: len(row)] = row
            sides.append((spans, roles))
        (theirs, their_roles), (mine, my_roles) = sides
        coverage = token_coverage(theirs, mine, their_roles, my_roles)
        sums += torch.stack([part.double().sum() for part in coverage])
    mine, lost, theirs, unread, tokens, empty = sums.tolist()
    return {
        "characters_lost": lost / max(1.0, mine),
        "characters_unread": unread / max(1.0, theirs),
        "tokens_empty": empty / max(1.0, tokens),
    }


def parameter_figures(setting: Setting) -> dict[str, Any]:
    """Numbers in the student and in each teacher's maps: learned, and saved with them but fixed."""
    trained = sum(p.numel() for p in setting.distiller.student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in setting.distiller.student.parameters())
    return {
        "student": {"parameters": total, "trained": trained},
        "teachers": {name: _projectors(setting, name) for name in setting.arm.teachers},
    }


def _projectors(setting: Setting, name: str) -> dict[str, Any]:
    aligner = setting.aligner(name)
    modules = {what: getattr(aligner, what, None) for what in ("proj_k", "proj_v", "proj_q", "adapter_k", "adapter_v")}
    present = {what: module for what, module in modules.items() if module is not None}
    return {
        "parameters": sum(m.num_parameters for m in present.values()),
        "fixed": sum(m.num_fixed for m in present.values()),
        "trained": sum(p.numel() for p in aligner.parameters() if p.requires_grad),
        "modules": {
            what: {"kind": type(m).__name__, "parameters": m.num_parameters, "fixed": m.num_fixed}
            for what, m in present.items()
        },
    }
