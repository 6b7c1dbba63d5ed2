"""A command's result, in words for the terminal: tables of at most 100 columns, text from data made harmless first.

Knows the results of `kvdistill.study`'s functions and of `evaluate MODEL`, which are plain data; no torch.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kvdistill.core.quoting import printable

WIDTH = 100
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


def as_text(result: Mapping[str, Any]) -> str:
    """A short table for a study, the tables of what else is in it, and a line per other entry."""
    lines: list[str] = []
    summary = result.get("summary") or {}
    arms = summary.get("arms") or {}
    if arms:
        lines += _arm_lines(arms, summary.get("primary", "accuracy"))
        lines += [f"  {printable(line)}" for line in summary.get("not_asked") or []]
    shown = {
        "data": _data_table,
        "leaks": _leak_lines,
        "evaluations": evaluation_table,
        "layers": layer_lines,
        "profiles": profile_lines,
        "expanded": expanded_lines,
        "studies": study_lines,
    }
    for key, as_lines in shown.items():
        lines += as_lines(result[key]) if key in result else []
    for key, value in result.items():
        if key in ("summary", *shown):
            continue
        name = key.replace("_", " ")
        if isinstance(value, list):
            lines += [f"{name}:", *(f"  {printable(item)}" for item in value)]
        elif isinstance(value, Mapping):
            lines += [f"{name}:"] if value else []
            lines += [f"  {printable(inner)}: {printable(item)}" for inner, item in value.items()]
        else:
            lines.append(f"{name}: {printable(value)}")
    return "\n".join(lines + _verdict_lines(summary))


def _verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the page says of the declared comparisons, in the same figure: one by one, and last what it leads with."""
    lines: list[str] = []
    if summary.get("comparisons") and not (summary.get("declared") or {}).get("time"):
        lines += _said("when these comparisons were declared is not known: declared.json is not in the run folder")
    for row in summary.get("comparisons") or []:
        if row.get("verdict"):
            said = f"{row['arm']} against {row['baseline']}: {row.get('sentence') or row['verdict']}"
            reasons = "; ".join(row.get("refused") or ())
            said += f" ({reasons})" if reasons and reasons not in said else ""
            other = row.get("parity", "steps") != "steps" and not row.get("refused")
            said += f" (at equal {row['at_equal']})" if other else ""
            said += " (after the results)" if row.get("after_results") else ""
            said += f"; {row['caution']}" if row.get("caution") else ""
            lines += _said(printable(said))
    for sentence in (summary.get("curves") or {}).get("sentences") or []:
        lines += _said(printable(sentence))
    if summary.get("headline"):
        lines += textwrap.wrap(printable(summary["headline"]), WIDTH)
    return lines


def _arm_lines(arms: Mapping[str, Any], primary: str) -> list[str]:
    """The figure that verdicts are about first: a study whose primary figure is NLL may have no right answer yet."""
    rows = [["", "accuracy, %", "NLL, answer", "NLL, reasoning"]]
    for name, arm in arms.items():
        row = [printable(name), f"{_points(arm.get('mean'))} ± {_points(arm.get('std'))}"]
        for figure in ("nll", "nll_reasoning"):
            found = arm.get(figure) or {}
            known = isinstance(found.get("mean"), int | float)
            spread = f" ± {found['std']:.3f}" if known and isinstance(found.get("std"), int | float) else ""
            row.append(f"{found['mean']:.3f}{spread}" if known else "–")
        rows.append(row)
    order = [0, 1, 2, 3] if primary == "accuracy" else [0, 2, 3, 1]
    order = [i for i in order if i != 3 or any(row[3] != "–" for row in rows[1:])]
    return _table([[row[i] for i in order] for row in rows], left=1)


# -- recipes: arms and their cost, and studies side by side --------------------------------------------


def expanded_lines(found: Mapping[str, Any]) -> list[str]:
    """Arms with what they change, then what each costs for one seed, and all of them for all seeds."""
    arms, seeds = found["arms"], len(found["seeds"])
    lines = [f"{printable(found['name'])}: {len(arms)} arms, {seeds} seed{'s' if seeds != 1 else ''}"]
    for name, arm in arms.items():
        said = ", ".join(f"{key}: {_plain(value)}" for key, value in arm["changes"].items())
        said += f"{'; ' if said else ''}steps matched to {arm['match']}" if arm["match"] else ""
        said = (said or "the recipe as it is") + (" (by report.curves)" if arm["derived"] else "")
        lines += _said(f"{printable(name)}: {printable(said)}")
    columns = {"steps": "steps", "data": "problems", "tokens": "tokens", "student_flops": "student FLOPs"}
    columns |= {"total_flops": "all FLOPs", "amortised_flops": "amortised"}
    shown = [key for key in columns if any(arm[key] is not None for arm in arms.values())]
    rows = [["one seed", *(columns[key] for key in shown)]]
    for name, arm in arms.items():
        mark = "≤ " if arm.get("at_most") else "~ " if arm.get("estimated") else ""
        rows.append([_short(name, 28), *(_cost(key, arm[key], mark) for key in shown)])
    sums = ["all runs"]
    for key in shown:
        each = [arm[key] for arm in arms.values()]
        whole = None if None in each or key == "total_flops" else seeds * sum(each)
        sums.append(_cost(key, whole, ""))
    lines += ["", *_table([*rows, sums], left=1)]
    if (student := found["student"]) is not None:
        part = "" if student["trained"] == student["parameters"] else f", {student['trained']:,} of them trained"
        lines += _said(f"student: {student['parameters']:,} parameters{part}")
    return lines + _said(printable(f"cost: {found['basis']}"), *(printable(note) for note in found["notes"]))


def study_lines(found: Mapping[str, Any]) -> list[str]:
    """One row a study and arm, after what tells the studies apart."""
    rows = [["study", "arm", "accuracy, %", "NLL, answer"]]
    lines = []
    for name, study in found.items():
        said = ", ".join(f"{key}: {_plain(value)}" for key, value in study["differs"].items())
        lines += _said(printable(f"{name}: {said or 'differs in nothing'}"))
        for number, (arm, figures) in enumerate(study["arms"].items()):
            nll = figures["nll"]
            spread = "–" if nll["mean"] is None else f"{nll['mean']:.3f} ± {nll['std'] or 0:.3f}"
            accuracy = f"{_points(figures['mean'])} ± {_points(figures['std'])}"
            rows.append([_short(name, 28) if not number else "", _short(arm, 28), accuracy, spread])
    return [*lines, "", *_table(rows, left=2)]


def _plain(value: object) -> str:
    """A recipe's value in one line, as YAML would have it."""
    return json.dumps(value, ensure_ascii=False).replace('"', "") if not isinstance(value, str) else value


def _cost(key: str, value: float | None, mark: str) -> str:
    return "–" if value is None else mark + (f"{value:.3g}" if key.endswith("flops") else f"{value:,.0f}")


# -- data, and leaks in it ----------------------------------------------------------------------------

_SPLITS = ("train", "val", "test", "teach")
_SHOWN_PAIRS = 10


def _data_table(data: Mapping[str, Any]) -> list[str]:
    """Rows by task, style and split; what was left out; what teachers read that the student does not; fingerprint."""
    rows = [
        [task, style, *(n.get(s, 0) for s in _SPLITS)] for task, st in data["table"].items() for style, n in st.items()
    ]
    total = ["", "all", *(sum(row[2 + i] for row in rows) for i in range(len(_SPLITS)))]
    lines = _table(
        [["task", "style", *_SPLITS], *([printable(cell) for cell in row] for row in [*rows, total])], left=2
    )
    for what, words in (
        ("too_long", "longer than data.max_length"),
        ("dropped", "leaks, taken out of training"),
        ("replaced", "longer than data.max_length, the next problem in place of each"),
    ):
        left_out = {task: sum(n.get(what, 0) for n in splits.values()) for task, splits in data["tasks"].items()}
        if any(left_out.values()):
            named = ", ".join(f"{printable(task)} {number}" for task, number in left_out.items() if number)
            lines.append(f"left out, {words}: {named}")
    for name, found in data.get("teachers", {}).items():
        own, lost = found["tokenizer"], found["lost"]
        reads = [f"own tokenizer ({own['size']:,} pieces)"] if own else []
        reads += ["own chains"] if found["own_chains"] else []
        line = f"teacher {printable(name)}: {', '.join(reads)}"
        if lost:
            line += f"; of the student's text {_points(lost['characters']).strip()} % of the characters and "
            line += f"{_points(lost['tokens']).strip()} % of the tokens have nothing behind them"
            line += f" ({lost['examples']:,} whole examples)" if lost["examples"] else ""
        lines.append(line)
    if seeds := data.get("seeds"):
        lines.append(f"training problems of its own has each seed, of as many: {', '.join(seeds)}")
    for task, found in data.get("noticed", {}).items():
        if unused := found["unused_columns"]:
            lines.append(f"{printable(task)}: columns that nothing is made of: {', '.join(map(printable, unused))}")
        if number := found.get("numbers_with_words"):
            lines.append(
                f"{printable(task)}: {number:,} answers are a number with words ({printable(found['one_of_them'])}), "
                "compared as text; `answer: number` reads the number"
            )
    for task, styles in data.get("examples", {}).items():
        for style, row in styles.items():
            lines.append(f"one {printable(task)} row, style {printable(style)}, as a model reads it:")
            for part in ("prompt", "reasoning", "answer"):
                for number, line in enumerate(row[part].splitlines() or [""]):
                    lines.append(f"  {part if not number else '':<9} |{_begun(printable(line), WIDTH - 13)}")
    return [*lines, f"fingerprint: {data['fingerprint']['all']}"]


def _leak_lines(leaks: Mapping[str, Any]) -> list[str]:
    """What was held against what, the counts, and the first pairs with both texts."""
    learned = sum(leaks["problems"].get(split, 0) for split in ("train", "teach", "val"))
    against = ", ".join(f"{printable(name)} {count:,}" for name, count in leaks["held_against"]["evaluations"].items())
    lines = [
        f"held {learned:,} problems that are learned from against val, test" + (f" and {against}" if against else "")
    ]
    if leaks["evaluations_not_at_hand"]:
        lines.append(f"not held against (not at hand): {', '.join(leaks['evaluations_not_at_hand'])}")
    for pair in leaks["leaks"][:_SHOWN_PAIRS]:
        for place, text in ((pair["first"], pair["question"]), (pair["second"], pair["other"])):
            where = " / ".join(printable(place[part]) for part in ("split", "task", "id"))
            text = _begun(" ".join(text.split()), 100)
            lines.append(f"  {pair['kind']:<5} {pair['similarity']:.2f}  {where}: {text}")
    if leaks["num_pairs_found"] > _SHOWN_PAIRS:
        lines.append(f"  … {leaks['num_pairs_found'] - _SHOWN_PAIRS:,} more pairs in the report")
    lines += [f"pairs, {kind}: {number:,}" for kind, number in leaks["pairs_by_kind"].items()]
    dropped = sum(sum(tasks.values()) for tasks in leaks["dropped"].values())
    if dropped:
        lines.append(f"taken out of what is learned from: {dropped:,} problems")
    if leaks["num_variants"]:
        lines.append(f"the same sentences with other numbers (no leak): {leaks['num_variants']:,} pairs")
    for seed, found in leaks.get("seeds", {}).items():
        out = sum(sum(tasks.values()) for tasks in found["dropped"].values())
        taken = f", {out:,} problems taken out" if out else ""
        lines.append(
            f"problems of seed {seed}: {found['num_pairs_found']:,} pairs{taken}, leaks left {found['num_leaks']:,}"
        )
    lines.append(f"leaks left: {leaks['num_leaks']:,}")
    return lines


# -- evaluations --------------------------------------------------------------------------------------

_HEADER = ("evaluation", "asked", "n", "score", "lm-eval", "in", "out", "passes", "s", "cut", "lost")
_WIDEST_NAME = 15
_LEGEND = (
    "score: percent by our answer rules ± standard error; lm-eval: its own metric, percent",
    "in, out: tokens; passes: forward passes; s: seconds; each per question",
    "cut: questions whose prompt did not fit; lost: characters that the tokenizer cannot write",
)


def evaluation_table(results: Mapping[str, Any]) -> list[str]:
    """Lines: a row per evaluation (and per member where one of them is the score), the macro average, what to know."""
    rows: list[Sequence[str]] = [_HEADER]
    notes: list[str] = []
    for name, found in results["evaluations"].items():
        rows.append(_row(name, found))
        members = found.get("members") or {}
        if found.get("scored_by"):
            rows += [_row(f" {member}", figures) for member, figures in members.items()]
            notes.append(f"{name} is scored by {found['scored_by']}")
        elif len(members) > 1:
            notes.append(f"{name}: mean over the questions of {len(members)} members (each in results.json)")
        notes += [f"{name}: {note}" for note in found.get("notes", ())]
        if not found["complete"]:
            notes.append(f"{name}: not finished, and not in the average")
    macro, counted = results["macro_average"], results["in_macro_average"]
    if macro is not None:
        rows.append((f"mean of {len(counted)}", "", "", _percent(macro), *[""] * (len(_HEADER) - 4)))
    return [*_table(rows, left=2, indent=""), *(printable(note) for note in notes), *_LEGEND]


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    name = _begun(name, _WIDEST_NAME)
    if found.get("score") is None:
        return (name, "", str(found["questions"]), *["–"] * (len(_HEADER) - 3))
    shots = found["style"].removeprefix("fewshot-")
    asked = f"{shots}-shot" if shots.isdecimal() else found["style"]
    seconds = found["seconds"]
    return (
        name,
        f"{asked} {'choice' if found['mode'] == 'likelihood' else 'text'}",
        f"{found['questions']}",
        f"{_percent(found['score'])}±{_percent(found['stderr'])}",
        _percent(found["metrics"].get(found["metric"])),
        *("–" if found[key] is None else f"{found[key]:.0f}" for key in ("tokens_in", "tokens_out", "forward_passes")),
        "–" if seconds is None else f"{seconds:.2f}" if seconds >= 0.01 else f"{seconds:.4f}",
        _percent(found["truncated"], 0),
        _percent(found["unspelled"], 0),
    )


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}" + ("%" if digits == 0 else "")


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
        lines += _table(rows, left=3)
        lines += _said(*map(printable, found.get("notes") or ()))
        lines += [f"  {printable(file)}" for file in (found["file"], *found["figures"])]
    return lines


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
        rows.append([_short(name), *(form.format(**shape, turns=turns) for form in _SIZES.values()), reads])
    lines = ["sizes (tokens: per text)", *_table(rows, left=2)]
    keys = "" if meeting["keys"] == "unrotated" else ", keys rotated"
    channels = {name: teacher["channels"] for name, teacher in shapes["teachers"].items()}
    widths = ", ".join(f"{n} ({printable(name)})" for name, n in channels.items())
    if len({*channels.values()}) == 1:
        widths = str(next(iter(channels.values())))
    lines += _said(f"meet in {_SPACES[meeting['space']]}{keys}; channels: {widths}; time: {meeting['time']}")
    for name, teacher in shapes["teachers"].items():
        pairs = []  # shares only where there are several
        for layer, sources in teacher["layer_map"].items():
            said = " + ".join(f"{m}" if len(sources) == 1 else f"{m} ({share:.0%})" for m, share in sources)
            pairs.append(f"{layer}←{said}")
        lines += _said(f"{printable(name)}: layers by {meeting['layers']}, student←teacher: {', '.join(pairs)}")
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
        rows.append([_short(name), *(_share(taught[part]) for part in ("all", "prompt", "reasoning", "answer"))])
        if two_tokenizers:
            rows[-1] += [_share(lost.get("characters_lost")), _share(lost.get("characters_unread"))]
        for what, count in teacher["segments"].items():
            segment, _, side = what.partition("_missing_in_")
            notes += _said(
                f"{printable(name)}: {count} of {shapes['texts']} texts have {segment} that the {side} lacks"
            )
    return [*_table(rows, left=1), *notes]


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
                f"maps, {_short(name)}",
                f"{teacher['parameters']:,}",
                f"{teacher['trained']:,}",
                f"{teacher['fixed']:,}",
                teacher["modules"]["proj_k"]["kind"].removesuffix("Projector"),
                ", ".join(parts),
                "online" if per_token is None else f"{_bytes(per_token)} ({captured['dtype']})",
            ]
        )
    return ["parameters and store", *_table(rows, left=1, words=(4, 5))]


def _step(profile: Mapping[str, Any]) -> list[str]:
    step = profile["step"]
    whole, plain = step["whole_ms"], step["cross_entropy_ms"]
    parts = {name: ms for name, ms in step["parts_ms"].items() if name != "teacher_forward" or ms > 0.01}
    total = sum(parts.values())
    rows = [["part", "ms", ""]]
    rows += [[_PARTS[name], _ms(ms), "█" * round(30 * ms / total) if total else ""] for name, ms in parts.items()]
    lines = [f"a step of {step['batch_size']} texts, median of {step['steps']}", *_table(rows, left=1, words=(2,))]
    fastest, plain_fastest = step["fastest_ms"], step["cross_entropy_fastest_ms"]
    lines.append(
        f"  whole {_ms(whole)} ms (fastest {_ms(fastest)}), on cross-entropy alone {_ms(plain)} ms "
        f"(fastest {_ms(plain_fastest)}): {step['ratio']:.2f} times"
    )
    lines += _said(
        f"memory {_bytes(step['peak_bytes'])}, on cross-entropy alone {_bytes(step['cross_entropy_peak_bytes'])}: "
        f"{step['memory_ratio']:.2f} times ({step['memory']})"
    )
    return lines


def _shares(profile: Mapping[str, Any]) -> list[str]:
    """Each term's gradient on the student, and the weight that follows from it."""
    found = profile["numbers"]["shares"]
    rows = [["term", "norm", "share", "cosine with ce"]]
    for name, term in found["terms"].items():
        rows.append([_short(name, 28), _largest(term["norm"]), _share(term["share"])])
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
    return ["gradient on the student, before clipping", *_table(rows, left=1), *_said(*notes)]


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
                first = f"{_short(name)}, {what}" if when == "start" else ""
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
    return [head, *_table(rows, left=2), *_said(*notes)]


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
        rows.append([_STAGES[stage], _short(of or ""), _largest(worst["largest"]), _of(worst["of_fp16"]), where])
        rows[-1] += [_largest(min(stds, default=None))]
        rows[-1] += [_or_dash(sum(row[key] for row in found)) for key in ("dead_channels", "zero_vectors")]
        rows[-1] += [_or_dash(sum(row["non_finite"] + row["non_finite_masked"] for row in found), ",")]
    for name, term in numbers["terms"].items():
        rows.append(["loss", _short(name, 20), _largest(term["raw"]), *[""] * 5, _or_dash(term["non_finite"])])
    for row in numbers["gradients"]:
        of = "student" if row["teacher"] is None else f"maps, {_short(row['teacher'], 12)}"
        rows.append(["gradient", of, _largest(row["largest"]), _of(row["of_fp16"])])
        rows[-1] += [_short(row["largest_in"] or "", 18), *[""] * 3, _or_dash(row["non_finite"])]
    notes = [
        f"{printable(name)}: {count['empty']:,} of {count['tokens']:,} student tokens have nothing behind them"
        for name, count in numbers["empty"].items()
        if count["empty"]
    ]
    for (stage, whose), found in merged.items():
        if over := sorted({layer for row in found for layer in row["layers_over_fp16"]}):
            where = f"{_STAGES[stage]}, {printable(whose)}" if whose else _STAGES[stage]
            notes.append(f"fp16 would overflow in {where}: layers {', '.join(map(str, over))}")
    lines = [f"numbers, over {numbers['texts']} texts", *_table(rows, left=2, words=(4,)), *_said(*notes)]
    return [*lines, *textwrap.wrap(printable(numbers["says"]), WIDTH - 2, initial_indent="→ ", subsequent_indent="  ")]


# -- words and figures --------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]], left: int, words: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """Columns side by side: the first `left` and those of `words` to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    said_last = any(row[last][:1].isalpha() for row in rows[1:])
    is_word = [i < left or i in words or (i == last and said_last) for i in range(len(widths))]
    lines = []
    for row in rows:
        cells = zip(row, widths, is_word, strict=True)
        lines.append(indent + "  ".join(c.ljust(w) if word else c.rjust(w) for c, w, word in cells).rstrip())
    return lines


def _said(*notes: str) -> list[str]:
    wrapped = (textwrap.wrap(note, WIDTH - 2, initial_indent="  ", subsequent_indent="    ") for note in notes)
    return [line for lines in wrapped for line in lines]


def _short(name: str, length: int = 16) -> str:
    name = printable(name)
    return name if len(name) <= length else "…" + name[1 - length :]


def _begun(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _or_dash(value: object, form: str = "") -> str:
    return format(value, form) if value else "–"


def _points(value: object) -> str:
    return f"{100 * value:5.1f}" if isinstance(value, int | float) else "    –"


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
