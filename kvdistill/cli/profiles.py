"""What `profile-alignment` and `map-layers` print."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from kvdistill.cli.columns import WIDTH, in_columns, shortened, wrapped
from kvdistill.core.quoting import printable

_PARTS = {
    "reading": "read targets, maps",
    "teacher_forward": "teachers' forward",
    "student_forward": "student's forward",
    "teacher_alignment": "align teachers",
    "projection": "project student",
    "loss": "losses, routing",
    "backward": "backward",
    "update": "clip, update",
}
_STAGES = {
    "teacher, as captured": "captured",
    "after time and layer map": "mapped",
    "target": "target",
    "student": "student",
    "source": "projected",
}
_SIZES = {
    "family": "{family}",
    "layers": "{num_layers}",
    "KV heads x size": "{num_kv_heads} x {head_size}",
    "queries": "{num_heads}",
    "rotary": "{turns}",
    "pieces": "{vocabulary:,}",
    "tokens": "{tokens:.1f}",
}
_SPACES = {"teacher": "each teacher's space", "student": "the student's space", "shared": "a space shared by all"}
_CONTROLS = {
    "placebo": ", on mismatched texts",
    "untrained": ", with random weights",
    "shuffled": ", tokens permuted",
    "noise": ", noise in their place",
}


def profile_lines(profiles: Mapping[str, Any]) -> list[str]:
    """profile-alignment: the arms one after another."""
    lines: list[str] = []
    for name, profile in profiles.items():
        control = _CONTROLS.get(profile["control"], "")
        teachers = ", ".join(printable(teacher) for teacher in profile["teachers"])
        threads = f", {profile['threads']} thread" + ("" if profile["threads"] == 1 else "s")
        threads = threads if profile["device"] == "cpu" else ""
        head = f"{printable(name)} "
        lines += [""] if lines else []
        lines.append(head + "─" * max(0, WIDTH - len(head)))
        lines.append(f"taught by {teachers}{control}; seed {profile['seed']}, on {profile['device']}{threads}")
        for part in (_shapes, _costs, _step, _shares, _match, _numbers):
            lines += part(profile)
    return lines


# -- sizes --------------------------------------------------------------------------------------------


def _shapes(profile: Mapping[str, Any]) -> list[str]:
    shapes = profile["shapes"]
    student, meeting = shapes["student"], shapes["meeting"]
    rows = [["", *_SIZES, "reads"]]
    for name, shape in {"student": student, **shapes["teachers"]}.items():
        reads = "its own tokens"
        if shape is not student:
            reads = "own tokens" if shape["own_tokens"] else "the same tokens"
            reads = reads if shape["one_text"] else "own chains"
        turns = "yes" if shape["rotary"] else "no"
        rows.append([shortened(name), *(form.format(**shape, turns=turns) for form in _SIZES.values()), reads])
    lines = ["sizes (tokens: per text)", *in_columns(rows, left=2)]
    keys = "" if meeting["keys"] == "unrotated" else ", keys rotated"
    channels = {name: teacher["channels"] for name, teacher in shapes["teachers"].items()}
    widths = ", ".join(f"{n} ({printable(name)})" for name, n in channels.items())
    if len({*channels.values()}) == 1:
        widths = str(next(iter(channels.values())))
    lines += wrapped(f"meet in {_SPACES[meeting['space']]}{keys}; channels: {widths}; time: {meeting['time']}")
    for name, teacher in shapes["teachers"].items():
        pairs = []  # shares only where there are several
        for layer, sources in teacher["layer_map"].items():
            said = " + ".join(f"{m}" if len(sources) == 1 else f"{m} ({share:.0%})" for m, share in sources)
            pairs.append(f"{layer}←{said}")
        lines += wrapped(f"{printable(name)}: layers by {meeting['layers']}, student←teacher: {', '.join(pairs)}")
    lines += _taught(shapes)
    return lines


def _taught(shapes: Mapping[str, Any]) -> list[str]:
    """Student tokens that take part, by segment; what is lost between tokenizers; segments that are not there."""
    rows = [["tokens that take part", "all", "prompt", "reasoning", "answer"]]
    two_tokenizers = any("lost" in teacher for teacher in shapes["teachers"].values())
    rows[0] += ["student's text lost", "teacher's unread"] if two_tokenizers else []
    notes = []
    for name, teacher in shapes["teachers"].items():
        taught, lost = teacher["taught"], teacher.get("lost") or {}
        rows.append([shortened(name), *(_share(taught[part]) for part in ("all", "prompt", "reasoning", "answer"))])
        if two_tokenizers:
            rows[-1] += [_share(lost.get("characters_lost")), _share(lost.get("characters_unread"))]
        for what, count in teacher["segments"].items():
            segment, _, side = what.partition("_missing_in_")
            notes += wrapped(
                f"{printable(name)}: {count} of {shapes['texts']} texts have {segment} that the {side} lacks"
            )
    return [*in_columns(rows, left=1), *notes]


# -- costs --------------------------------------------------------------------------------------------


def _costs(profile: Mapping[str, Any]) -> list[str]:
    found, shapes = profile["parameters"], profile["shapes"]
    student = found["student"]
    rows = [["parameters", "all", "trained", "fixed", "kind", "captured", "per token"]]
    rows.append(["student", f"{student['parameters']:,}", f"{student['trained']:,}", "", "", "", ""])
    for name, teacher in found["teachers"].items():
        captured = shapes["teachers"][name]["captured"]
        parts = ["keys, values"]
        parts += [what for what in ("queries", "scores") if captured[what]]
        parts += [f"top {captured['logits_top_k']}"] if captured["logits_top_k"] else []
        per_token = captured.get("bytes_per_token")
        rows.append(
            [
                f"maps, {shortened(name)}",
                f"{teacher['parameters']:,}",
                f"{teacher['trained']:,}",
                f"{teacher['fixed']:,}",
                teacher["modules"]["proj_k"]["kind"].removesuffix("Projector"),
                ", ".join(parts),
                "online" if per_token is None else f"{_bytes(per_token)} ({captured['dtype']})",
            ]
        )
    return ["parameters and store", *in_columns(rows, left=1, words=(4, 5))]


def _step(profile: Mapping[str, Any]) -> list[str]:
    step = profile["step"]
    whole, plain = step["whole_ms"], step["cross_entropy_ms"]
    parts = {name: ms for name, ms in step["parts_ms"].items() if name != "teacher_forward" or ms > 0.01}
    total = sum(parts.values())
    rows = [["part", "ms", ""]]
    rows += [[_PARTS[name], _ms(ms), "█" * round(30 * ms / total) if total else ""] for name, ms in parts.items()]
    lines = [f"a step of {step['batch_size']} texts, median of {step['steps']}", *in_columns(rows, left=1, words=(2,))]
    fastest, plain_fastest = step["fastest_ms"], step["cross_entropy_fastest_ms"]
    lines.append(
        f"  whole {_ms(whole)} ms (fastest {_ms(fastest)}), on cross-entropy alone {_ms(plain)} ms "
        f"(fastest {_ms(plain_fastest)}): {step['ratio']:.2f} times"
    )
    lines += wrapped(
        f"memory {_bytes(step['peak_bytes'])}, on cross-entropy alone {_bytes(step['cross_entropy_peak_bytes'])}: "
        f"{step['memory_ratio']:.2f} times ({step['memory']})"
    )
    return lines


def _shares(profile: Mapping[str, Any]) -> list[str]:
    """Each term's gradient on the student, and the weight that follows from it."""
    found = profile["numbers"]["shares"]
    rows = [["term", "norm", "share", "cosine with ce"]]
    for name, term in found["terms"].items():
        rows.append([shortened(name, 28), _largest(term["norm"]), _share(term["share"])])
        rows[-1].append("–" if term["cosine"] is None else f"{term['cosine']:.2f}")
    total = sum(term["norm"] or 0.0 for name, term in found["terms"].items() if "/" not in name)
    notes = []
    if found["clipped_to"] and total > found["clipped_to"]:
        notes.append(f"clipped together to {found['clipped_to']:g}, so that the terms with large shares decide")
    if found["proposed"] is not None:
        notes.append(
            f"loss.kv_weight is {found['kv_weight']:g}; with {found['proposed']:g} the gradient of keys and values "
            f"would have {found['wanted']:g} times the norm of cross-entropy's, here at the start (shares move: "
            "log.jsonl has them for every logged step)"
        )
    return ["gradient on the student, before clipping", *in_columns(rows, left=1), *wrapped(*notes)]


# -- match --------------------------------------------------------------------------------------------


def _match(profile: Mapping[str, Any]) -> list[str]:
    match = profile["match"]
    if "skipped" in match:
        return ["match figures", f"  left out: {match['skipped']}"]
    rows = [["", "", "R²", "centred", "found", "chance", "cosine", "R²*", "found*", "cosine*"]]
    for name, teacher in match["teachers"].items():
        for side, what in (("k", "keys"), ("v", "values")):
            for when, said in (("start", "start"), ("linear", "linear")):
                mine, other = (teacher[texts][when][side] for texts in ("matched", "mismatched"))
                figures = [mine["r2"], mine["centred_cosine"], *(mine[f"retrieval_{x}"] for x in ("top1", "chance"))]
                figures += [mine["cosine"], other["r2"], other["retrieval_top1"], other["cosine"]]
                first = f"{shortened(name)}, {what}" if when == "start" else ""
                shown = ["–" if x is None else f"{x:.2f}" if x > -100 else f"{x:.0f}" for x in figures]
                rows.append([first, said, *shown])
    head = f"match on {match['texts']} held-out texts, student untrained (linear: fitted on {match['fit_texts']} texts)"
    hows: dict[str, list[str]] = {}
    for name, teacher in match["teachers"].items():
        hows.setdefault(teacher["linear"], []).append(printable(name))
    everyone = len(hows) == 1
    notes = [f"linear{'' if everyone else ' for ' + ', '.join(names)}: {how}" for how, names in hows.items()]
    notes.append("centred: cosine around the means; found: retrieval, the nearest is its own")
    notes.append("* with mismatched texts, fitted and measured on them: so much needs no common text")
    return [head, *in_columns(rows, left=2), *wrapped(*notes)]


# -- numbers ------------------------------------------------------------------------------------------


def _numbers(profile: Mapping[str, Any]) -> list[str]:
    numbers = profile["numbers"]
    rows: list[list[str]] = [["stage", "of", "largest", "of fp16", "where", "min std", "dead", "zero", "NaN, inf"]]
    merged: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for row in numbers["stages"]:
        merged.setdefault((row["stage"], row["teacher"]), []).append(row)
    for (stage, of), found in merged.items():  # keys, values, queries: the largest of them, the sum of what is counted
        worst = max(found, key=lambda row: row["largest"])
        stds = [row["smallest_std"] for row in found if row["smallest_std"] is not None]
        what = {"k": "keys", "v": "values", "q": "queries"}[worst["what"]]
        where = f"{what}, layer {worst['largest_layer']}"
        rows.append([_STAGES[stage], shortened(of or ""), _largest(worst["largest"]), _of(worst["of_fp16"]), where])
        rows[-1] += [_largest(min(stds, default=None))]
        rows[-1] += [_or_dash(sum(row[key] for row in found)) for key in ("dead_channels", "zero_vectors")]
        rows[-1] += [_or_dash(sum(row["non_finite"] + row["non_finite_masked"] for row in found), ",")]
    for name, term in numbers["terms"].items():
        rows.append(["loss", shortened(name, 20), _largest(term["raw"]), *[""] * 5, _or_dash(term["non_finite"])])
    for row in numbers["gradients"]:
        of = "student" if row["teacher"] is None else f"maps, {shortened(row['teacher'], 12)}"
        rows.append(["gradient", of, _largest(row["largest"]), _of(row["of_fp16"])])
        rows[-1] += [shortened(row["largest_in"] or "", 18), *[""] * 3, _or_dash(row["non_finite"])]
    notes = [
        f"{printable(name)}: {count['empty']:,} of {count['tokens']:,} student tokens have nothing behind them"
        for name, count in numbers["empty"].items()
        if count["empty"]
    ]
    for (stage, whose), found in merged.items():
        if over := sorted({layer for row in found for layer in row["layers_over_fp16"]}):
            where = f"{_STAGES[stage]}, {printable(whose)}" if whose else _STAGES[stage]
            notes.append(f"fp16 would overflow in {where}: layers {', '.join(map(str, over))}")
    lines = [f"numbers, over {numbers['texts']} texts", *in_columns(rows, left=2, words=(4,)), *wrapped(*notes)]
    return [*lines, *textwrap.wrap(printable(numbers["says"]), WIDTH - 2, initial_indent="→ ", subsequent_indent="  ")]


# -- layers and alignment -----------------------------------------------------------------------------


def layer_lines(layers: Mapping[str, Any]) -> list[str]:
    """map-layers: per teacher what was measured, a row per student layer, and the files."""
    lines: list[str] = []
    for name, found in layers.items():
        lines.append(f"teacher {printable(name)}: {found['compared']} of {found['num_vectors']:,} tokens compared")
        rows = [["student", "teacher layers (share, CKA)", "most alike"]]
        for layer, sources in found["layer_map"].items():
            similarity = found["similarity"][int(layer)]
            said = ", ".join(f"{m} ({share:.0%}, {similarity[m]:.2f})" for m, share in sources)
            best = max(range(len(similarity)), key=similarity.__getitem__)
            rows.append([f"layer {layer}", said, f"{best} ({similarity[best]:.2f})"])
        lines += in_columns(rows, left=3)
        lines += wrapped(*map(printable, found.get("notes") or ()))
        lines += [f"  {printable(file)}" for file in (found["file"], *found["figures"])]
    return lines


def _or_dash(value: object, form: str = "") -> str:
    return format(value, form) if value else "–"


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f}%" if value in (0, 1) else f"{100 * value:.1f}%"


def _largest(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _of(share: float) -> str:
    if share < 1e-4:
        return "<0.01%"
    return f"{100 * share:.2g}%" if share < 1 else f"{share:.3g}x"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
