"""Where a NaN would come from: every tensor between the teacher and the gradient, held against what a dtype can hold.

One pass over the first batches of training, stage by stage in the data's order:

    teacher's keys, values, queries, as captured -> after time and layer map -> standardised target
    student's keys, values, queries              -> projected source         -> loss per term -> gradients

so that the first stage with a non-finite value is where it came from. Repairs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvdistill.align import attention_sources, attention_targets
from kvdistill.align.channels import floored_std
from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import KV_SEGMENTS, Batch, in_segments, token_counts
from kvdistill.arms.shares import WANTED, gradient_shares, proposed_weight
from kvdistill.arms.teacher import Teacher
from kvdistill.core.kv import KV
from kvdistill.study.profile.shapes import first_batches

_CAPTURED = "teacher, as captured"
FP16_MAX = torch.finfo(torch.float16).max
BF16_MAX = torch.finfo(torch.bfloat16).max


class StageMeter:
    """What the tensors of one stage hold, over batches; a row of channels for each layer and token.

    Non-finite values are counted at tokens that take part and, apart from these, at slots that do not: 0 times NaN is
    NaN, so they must be finite too. Everything else is of tokens that take part. Sums are in fp64.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self._found = [_Layer(layer) for layer in self.layers]

    @torch.no_grad()
    def add_layers(self, x_LNC: Tensor | Sequence[Tensor], mask: Tensor) -> None:
        """[L, B, T, …] (or L times [B, T, …]); mask [B, T], or [L, B, T]."""
        for place, (one, x) in enumerate(zip(self._found, x_LNC, strict=True)):
            mask_N = (mask if mask.ndim == 2 else mask[place]).flatten()
            one.add(x.reshape(len(mask_N), -1), mask_N)

    def figures(self) -> dict[str, Any]:
        worst = max(self._found, key=lambda one: one.largest)
        known = [one.stds() for one in self._found if one.rows]
        return {
            "non_finite": sum(one.bad for one in self._found),
            "non_finite_masked": sum(one.bad_masked for one in self._found),
            "non_finite_layers": [one.layer for one in self._found if one.bad or one.bad_masked],
            "rows": sum(one.rows for one in self._found),
            "largest": worst.largest,
            "largest_layer": worst.layer,
            "of_fp16": worst.largest / FP16_MAX,
            "of_bf16": worst.largest / BF16_MAX,
            "layers_over_fp16": [one.layer for one in self._found if one.largest > FP16_MAX],
            "smallest_std": min((low for low, _, _ in known), default=None),
            "dead_channels": sum(dead for _, dead, _ in known),
            "channels": sum(channels for _, _, channels in known),
            "zero_vectors": sum(one.zero for one in self._found),
        }


@dataclass
class _Layer:
    """The same of one layer. sums: around which point, the sum of what is off it, the sum of its squares."""

    layer: int
    bad: int = 0
    bad_masked: int = 0
    zero: int = 0
    rows: int = 0
    largest: float = 0.0
    sums: tuple[Tensor, ...] = ()

    def add(self, x_NC: Tensor, mask_N: Tensor) -> None:
        finite_NC = x_NC.isfinite()
        bad_N = (~finite_NC).sum(1)
        self.bad += int(bad_N[mask_N].sum())
        self.bad_masked += int(bad_N[~mask_N].sum())
        real_NC = torch.where(finite_NC, x_NC, 0)[mask_N].double()
        if not real_NC.numel():
            return
        self.rows += len(real_NC)
        self.largest = max(self.largest, float(real_NC.abs().max()))
        self.zero += int((x_NC[mask_N] == 0).all(1).sum())
        around_C = self.sums[0] if self.sums else real_NC.mean(0)  # so that no large squares cancel
        off_NC = real_NC - around_C
        total_C, square_C = off_NC.sum(0), off_NC.square().sum(0)
        if self.sums:
            total_C, square_C = total_C + self.sums[1], square_C + self.sums[2]
        self.sums = (around_C, total_C, square_C)

    def stds(self) -> tuple[float, int, int]:
        """Smallest std of the live channels, how many are dead (`channels.floored_std`), and of how many."""
        around_C, total_C, square_C = self.sums
        shift_C = total_C / self.rows
        std_1C = (square_C / self.rows - shift_C.square()).clamp_min(0).sqrt()[None]
        is_dead_C = (floored_std((around_C + shift_C)[None], std_1C) != std_1C)[0]
        live = std_1C[0][~is_dead_C]
        return (float(live.min()) if len(live) else 0.0), int(is_dead_C.sum()), len(is_dead_C)


Meters = dict[tuple[str, str | None, str], StageMeter]  # (stage, teacher, what) -> meter, in the order of the data


def number_figures(arm: Arm, num_batches: int) -> dict[str, Any]:
    """{"stages": in order, "terms", "gradients", "shares", "empty", "first_non_finite", "says"}.

    stages: see `StageMeter.figures`. shares: `share_figures`.
    """
    meters: Meters = {}
    terms: dict[str, dict[str, Any]] = {}
    gradients: dict[str | None, dict[str, Any]] = {}
    shares: list[dict[str, dict[str, float | None]]] = []
    empty: dict[str, dict[str, int]] = {name: {"tokens": 0, "empty": 0} for name in arm.recipe.teachers}
    maker = arm.batches("train")
    for numbers in first_batches(arm, num_batches):
        batch = arm.load(maker, numbers)
        with torch.no_grad():
            _add_sides(meters, arm, batch)
        _add_step(terms, gradients, shares, arm, batch)
        wanted_BT = in_segments(batch.segments_BT, KV_SEGMENTS[arm.recipe.loss.kv_on])
        for name, count in empty.items():
            mask = batch.kv_masks[name]
            wanted = wanted_BT.expand_as(mask)
            count["tokens"] += int(wanted.sum())
            count["empty"] += int((wanted & ~mask).sum())
    rows = [{"stage": s, "teacher": of, "what": what, **one.figures()} for (s, of, what), one in meters.items()]
    steps = list(gradients.values())
    first = _first_non_finite(rows, terms, steps)
    if first is not None and first["stage"] in ("target", "source"):
        first = _in_what_was_fitted(arm, rows) or first  # a fit reads other texts than these
    return {
        "texts": num_batches * arm.recipe.train.batch_size,
        "stages": rows,
        "terms": terms,
        "gradients": steps,
        "shares": share_figures(arm, shares),
        "empty": empty,
        "first_non_finite": first,
        "says": first["says"] if first is not None else _nearest(rows + steps),
    }


def _add_sides(meters: Meters, arm: Arm, batch: Batch) -> None:
    """Both sides of a batch, stage by stage, in the order of the data."""

    def add(stage: str, of: str | None, tensors: Mapping[str, Any], mask: Tensor, layers: Sequence[int]) -> None:
        for what, x in tensors.items():
            if len(x):
                meters.setdefault((stage, of, what), StageMeter(layers)).add_layers(x, mask)

    distiller, compares = arm.distiller, arm.recipe.compares_attention
    student = arm.student_kv(distiller.student, batch)
    theirs = {name: arm.teacher_kv(batch, name) for name in arm.recipe.teachers}
    for name, kv in theirs.items():
        add(_CAPTURED, name, _token_major(kv), kv.mask_BT, kv.layers)
    layers, masks, maps = student.layers, batch.kv_masks, batch.maps
    for name, kv in theirs.items():
        mapped, _ = distiller.aligner(name).teacher_channels(kv, maps.get(name), standardise=False)
        add("after time and layer map", name, mapped._asdict(), masks[name], layers)
    for name, kv in theirs.items():
        aligner, mapping = distiller.aligner(name), maps.get(name)
        target: Any = aligner.targets(kv, mapping)[0] if not compares else None
        if compares:
            target = attention_targets(aligner, student, kv, mapping, distiller.rotation(name))
        add("target", name, target._asdict(), masks[name], layers)
    add("student", None, _token_major(student), batch.mask_BT, layers)
    for name, kv in theirs.items():
        aligner = distiller.aligner(name)
        source: Any = aligner.sources(student) if not compares else None
        if compares:
            source = attention_sources(aligner, student, kv, distiller.rotation(name))
        add("source", name, source._asdict(), masks[name], layers)


def _token_major(kv: KV) -> dict[str, list[Tensor]]:
    sides = {"k": kv.keys, "v": kv.values, "q": kv.queries}
    return {what: [x.transpose(1, 2) for x in side] for what, side in sides.items()}


def first_broken_target(teacher: Teacher) -> dict[str, Any] | None:
    """The first captured tensor of a teacher that is not finite: what, layer, example, count. Reads the whole store."""
    reader = teacher.targets("train" if teacher.experiment.recipe.capture.source == "store" else "val")
    for example in range(reader.num_examples):
        kv = reader.read([example], logits=False, scores=False).kv
        assert kv is not None
        for what, side in (("k", kv.keys), ("v", kv.values), ("q", kv.queries)):
            for layer, x in zip(kv.layers, side, strict=False):
                if bad := int((~x.isfinite()).sum()):
                    return {"what": what, "layer": layer, "example": example, "count": bad}
    return None


def _in_what_was_fitted(arm: Arm, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first aligner whose statistics or projectors are not finite; or rather what they were fitted to, if it is it.

    rows: of all stages.
    """
    for name in arm.recipe.teachers:
        state = arm.distiller.aligner(name).state_dict()
        broken = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
        if not broken:
            continue
        found = first_broken_target(arm.teachers[name])
        if found is not None:
            says = f"non-finite values begin in {_name({'stage': _CAPTURED, 'teacher': name, **found})}: "
            says += f"{found['count']:,} of them in layer {found['layer']} of example {found['example']}, "
            says += f"and so in the aligner ({', '.join(broken)})"
            return {"stage": _CAPTURED, "teacher": name, "what": found["what"], "says": says}
        students = _first_non_finite([row for row in rows if row["stage"] == "student"], {}, [])
        says = f"non-finite values begin in the aligner of teacher {name!r}: {', '.join(broken)}"
        return students or {"stage": "fit", "teacher": name, "what": broken[0], "says": says}
    return None


# -- one real step ------------------------------------------------------------------------------------


def _add_step(
    terms: dict[str, dict[str, Any]],
    gradients: dict[str | None, dict[str, Any]],
    shares: list[dict[str, dict[str, float | None]]],
    arm: Arm,
    batch: Batch,
) -> None:
    """Loss and gradients at the full KV weight (after the warm-up), of one micro-batch, unclipped.

    terms: the largest value of each loss term, and how often it is not finite. gradients: of the student (None) and of
    each teacher's projectors: the largest, whose it is, and what is not finite.
    """
    distiller = arm.distiller
    distiller.train().zero_grad(set_to_none=True)
    counts = token_counts(batch, arm.recipe).to(device=arm.device, dtype=torch.float32).clamp_min(1.0)
    with torch.autocast(arm.device.type, torch.bfloat16, enabled=arm.recipe.train.bf16):
        out = distiller(batch, counts, kv_weight=arm.recipe.loss.kv_weight)
    for name, (raw, _, entered) in out.terms.items():
        term = terms.setdefault(name, {"raw": 0.0, "weighted": 0.0, "non_finite": 0})
        values = {"raw": float(raw), "weighted": float(entered)}
        term["non_finite"] += not all(map(math.isfinite, values.values()))
        term |= {key: max(term[key], value) for key, value in values.items()}
    shares.append(gradient_shares(out.parts, [p for p in distiller.student.parameters() if p.requires_grad]))
    out.loss.backward()
    for name, parameter in distiller.named_parameters():
        if parameter.grad is None:
            continue
        first, _, rest = name.partition(".")  # aligners.0.proj_k.weight, student.model.…
        number, _, inner = rest.partition(".")
        teacher = arm.recipe.teachers[int(number)] if first == "aligners" else None
        row = gradients.setdefault(
            teacher,
            {"stage": "gradient", "teacher": teacher, "of_fp16": 0.0, "non_finite": 0}
            | {"largest": 0.0, "largest_in": None, "first_non_finite": None},
        )
        finite = parameter.grad.isfinite()
        bad = int((~finite).sum())
        row["non_finite"] += bad
        if bad and row["first_non_finite"] is None:
            row["first_non_finite"] = inner or rest
        largest = float(torch.where(finite, parameter.grad, 0).abs().max()) if parameter.grad.numel() else 0.0
        if largest >= row["largest"]:
            row |= {"largest": largest, "of_fp16": largest / FP16_MAX, "largest_in": inner or rest}
    distiller.eval().zero_grad(set_to_none=True)


def share_figures(arm: Arm, shares: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, Any]:
    """Each term's gradient on the student, a mean over batches, before clipping; the weight that is proposed for KV.

    {"terms": {ce, kv, kv/TEACHER, …: {"norm", "share", "cosine"}}, "kv_weight", "proposed", "wanted", "clipped_to"}
    """
    terms: dict[str, dict[str, float | None]] = {}
    for name in shares[0]:
        columns = {key: [one[name][key] for one in shares] for key in ("norm", "share", "cosine")}
        known = {key: [x for x in column if x is not None] for key, column in columns.items()}
        terms[name] = {key: sum(column) / len(column) if column else None for key, column in known.items()}
    weight = arm.recipe.loss.kv_weight
    return {
        "terms": terms,
        "kv_weight": weight,
        "proposed": proposed_weight(weight, terms),
        "wanted": WANTED,
        "clipped_to": arm.recipe.train.max_grad_norm,
    }


# -- in words -----------------------------------------------------------------------------------------

_WHAT = {"k": "keys", "v": "values", "q": "queries"}


def _name(row: Mapping[str, Any]) -> str:
    """A stage for people: `teacher 'one': keys as captured`."""
    of = f" of teacher {row['teacher']!r}" if row["teacher"] else ""
    if row["stage"] == "gradient":
        return f"the gradient of the projectors{of}" if row["teacher"] else "the student's gradient"
    what = _WHAT[row["what"]]
    return {
        _CAPTURED: f"the {what}{of}, as captured",
        "after time and layer map": f"the {what}{of} after the time and layer map",
        "target": f"the target {what}{of}",
        "student": f"the student's {what}",
        "source": f"the student's {what} projected for the space{of}",
    }[row["stage"]]


def _first_non_finite(
    rows: Sequence[Mapping[str, Any]], terms: Mapping[str, Mapping[str, Any]], gradients: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    for row in rows:
        bad, masked = row["non_finite"], row["non_finite_masked"]
        if bad or masked:
            where = "" if bad else " (all at slots that do not take part; 0 times NaN is NaN)"
            layers = ", ".join(map(str, row["non_finite_layers"]))
            says = f"non-finite values begin in {_name(row)}: {bad or masked:,} of them in layer {layers}{where}"
            return {"stage": row["stage"], "teacher": row["teacher"], "what": row["what"], "says": says}
    for name, term in terms.items():
        if term["non_finite"]:
            says = f"all that goes into the loss is finite; its term {name!r} is not"
            return {"stage": "loss", "teacher": None, "what": name, "says": says}
    for row in gradients:
        if row["non_finite"]:
            first = row["first_non_finite"]
            says = f"the loss is finite; {_name(row)} is not: {row['non_finite']:,} values, the first in {first}"
            return {"stage": "gradient", "teacher": row["teacher"], "what": first, "says": says}
    return None


def _nearest(rows: Sequence[Mapping[str, Any]]) -> str:
    row = max(rows, key=lambda one: one["largest"])
    where = f"layer {row['largest_layer']}" if "largest_layer" in row else row["largest_in"]
    says = f"no NaN found; the nearest to overflow: {_name(row)} reach {row['largest']:.4g} ({where}), "
    if row["stage"] == "gradient":
        says = says.replace(" reach ", " reaches ")
    share = row["of_fp16"]
    return says + (f"{100 * share:.2g}%" if share < 1 else f"{share:.3g} times") + " of what fp16 can hold"
