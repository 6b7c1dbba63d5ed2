"""The figures of a study: arms side by side, routing heatmaps, the KV match beside the placebo's, learning curves.

From tables in memory to pictures in memory; `draw_all` lists them. Knows nothing of pages.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from kvdistill.core.arms import arm_recipe
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.ablations import draw_ablations
from kvdistill.stages.report.bars import draw_bars
from kvdistill.stages.report.canvas import (
    COLOURS,
    GRID,
    HATCHES,
    INK,
    SOFT,
    WIDTH,
    Picture,
    chinese_fonts,
    label,
    new_grid,
    percent_axis,
    render,
)
from kvdistill.stages.report.collect import Row, RunTables
from kvdistill.stages.report.cost import draw_cost_curves
from kvdistill.stages.report.curves import draw_curves
from kvdistill.stages.report.language import ENGLISH, Words
from kvdistill.stages.report.latents import draw_latent_costs, draw_passes
from kvdistill.stages.report.summary import reference_arm
from kvdistill.stages.report.text import amount

MATCH_FIGURES = ("r2", "centred_cosine", "retrieval_top1", "cosine")
RADAR_TASKS = (3, 12)  # fewer make no shape, more no readable one
RADAR_ARMS = 12
MAX_ROUTED = 12  # arms in a routing figure, the first ones
MAX_MATCHED = 40  # rows of the match figure; the table has all


def draw_all(recipe: Recipe, tables: RunTables, summary: Row, words: Words = ENGLISH) -> list[Picture]:
    """Every picture of the report, in the page's order; those without data carry the reason."""
    labels = words if words.language == "en" or chinese_fonts() else words.labels()
    nll = bool(summary["accuracy_near_zero"]) or summary["primary"] == "nll"
    figure = "nll" if nll else "accuracy"
    bars = "figures.comparison_with_error_bars"
    named, num_seeds = words(f"{bars}.{figure}"), len(tables.seeds)
    short = words(f"{bars}.nll_short") if nll else named
    reference = reference_arm(recipe)
    compared = [one[side] for one in summary["comparisons"] for side in ("arm", "baseline")]

    def picture(
        name: str, draw: Callable[[], Figure | str], caption: str = "caption", left: Sequence[str] = (), **values: Any
    ) -> Picture:
        said = words(f"figures.{name}.{caption}", **values)
        said += " " + words("figures.left_out", arms=words("page.comma").join(left)) if left else ""
        return render(name, words(f"figures.{name}.title", **values), said, draw)

    radar = not nll and RADAR_TASKS[0] <= len(summary["tasks"]) <= RADAR_TASKS[1]
    scores = {name: arm if figure == "accuracy" else arm["nll"] for name, arm in summary["arms"].items()}
    scored = [name for name, arm in summary["arms"].items() if np.isfinite(arm["mean"])]
    shown = sorted(scored, key=lambda name: name not in compared)[:RADAR_ARMS]
    alt = words("page.semicolon").join(f"{name} {amount(score, figure, words)}" for name, score in scores.items())

    def latent_pictures() -> list[Picture]:
        """Their alternative texts are the figures themselves."""
        drawn = {"latent_costs": draw_latent_costs, "latent_passes": draw_passes}
        made = [picture(name, partial(draw, summary, labels)) for name, draw in drawn.items()]
        return [replace(one, alt=f"{one.caption} {alt}") for one in made]

    return [
        render("comparison_with_error_bars", words(f"{bars}.title", figure=short),
               words(f"{bars}.caption", n=num_seeds, figure=named),
               lambda: draw_comparison(summary, figure, labels), alt=alt),
        picture("radar_over_tasks", lambda: draw_radar(summary, shown, reference, labels), reference=reference,
                left=[arm for arm in scored if arm not in shown])
        if radar else picture("radar_over_tasks", lambda: draw_task_bars(summary, figure, labels), "caption_bars"),
        *draw_curves({arm: tables.logs[arm] for arm in tables.arms}, words, labels, compared),
        picture("cost_curves", lambda: draw_cost_curves(summary, labels)),
        *(latent_pictures() if "latents" in summary else ()),
        *draw_ablations(recipe, summary, figure, words, labels),
        picture("cka_heatmap", lambda: draw_cka(tables.layers, labels)),
        picture("routing_by_task_heatmap", lambda: draw_routing(recipe, tables, "task", labels)),
        picture("routing_by_layer_heatmap", lambda: draw_routing(recipe, tables, "layer", labels)),
        picture("match_beside_placebo", lambda: draw_match(match_table(recipe, tables)[:MAX_MATCHED], labels)),
    ]  # fmt: skip


def draw_comparison(summary: Row, figure: str = "accuracy", words: Words = ENGLISH) -> Figure | str:
    """Arms as rows in recipe order; the macro mean, then each task."""
    return draw_bars(summary, {arm: label(arm) for arm in summary["arms"]}, figure, words)


def draw_radar(summary: Row, shown: Sequence[str], reference: str, words: Words = ENGLISH) -> Figure | str:
    """A panel per shown arm: its accuracy over tasks as a closed line, over the reference arm's as a grey surface."""
    if not shown:
        return words("reasons.no_mean", figure=words("labels.accuracy"))
    arms, tasks = summary["arms"], summary["tasks"]
    angles = np.linspace(0, 2 * np.pi, len(tasks) + 1)

    def around(arm: str) -> list[float]:
        shares = [arms[arm]["by_task"].get(task, {}).get("mean", np.nan) for task in tasks]
        return [*shares, shares[0]]

    figure, panels = new_grid(len(shown), height=2.75, subplot_kw={"projection": "polar"})
    for name, axes in zip([arm for arm in arms if arm in shown], panels, strict=True):
        index = list(arms).index(name)
        axes.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
        axes.set_theta_direction(-1)  # type: ignore[attr-defined]
        if reference in arms and reference != name and np.isfinite(arms[reference]["mean"]):
            axes.fill(angles, around(reference), facecolor="#cfcfcf", edgecolor=SOFT, linewidth=0.8, linestyle="--")
        axes.plot(angles, around(name), color=COLOURS[index % len(COLOURS)], marker="o", markersize=3.5)
        axes.set_title(label(name), loc="left", pad=16)
        axes.set_ylim(0, 1)
        axes.set_yticks([0.25, 0.5, 0.75, 1], ["", "50 %", "", "100 %"], fontsize=6.5, color=SOFT)
        axes.set_xticks(angles[:-1], [textwrap.fill(label(task, 16), 9) for task in tasks], fontsize=7.5)
        axes.tick_params(axis="x", pad=1)
        axes.spines["polar"].set_color(GRID)
    return figure


def draw_task_bars(summary: Row, figure: str, words: Words = ENGLISH) -> Figure | str:
    """Tasks side by side, a bar per arm: where there are too few tasks for a radar, or too many."""
    tasks = summary["tasks"]
    if len(tasks) < 2:
        return words("reasons.one_task")
    arms = {name: arm if figure == "accuracy" else arm["nll"] for name, arm in summary["arms"].items()}
    arms = {name: arm for name, arm in arms.items() if np.isfinite(arm["mean"])}
    if not arms:
        return words("reasons.no_mean", figure=words(f"labels.{'accuracy' if figure == 'accuracy' else 'nll'}"))
    drawn = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = drawn.subplots()
    width = 0.84 / len(arms)
    for index, (name, arm) in enumerate(arms.items()):
        found = [arm["by_task"].get(task) or {} for task in tasks]
        means, stds = ([one.get(key, np.nan) for one in found] for key in ("mean", "std"))
        places = np.arange(len(tasks)) - 0.42 + (index + 0.5) * width
        axes.bar(places, means, width * 0.9, yerr=np.nan_to_num(stds), facecolor="white", label=label(name),
                 edgecolor=COLOURS[index % len(COLOURS)], hatch=HATCHES[index % len(HATCHES)], linewidth=1,
                 error_kw={"ecolor": INK, "elinewidth": 1, "capsize": min(3.0, 40 * width / len(tasks))})  # fmt: skip
    axes.set_xticks(range(len(tasks)), [textwrap.fill(label(task, 20), 12) for task in tasks])
    axes.grid(axis="x", visible=False)
    if figure == "accuracy":
        axes.set_ylim(0, 1.05)
        percent_axis(axes)
    axes.set_ylabel(words("labels.accuracy" if figure == "accuracy" else "labels.nats_per_token"))
    drawn.legend(loc="outside lower center", ncols=5)
    return drawn


def draw_cka(layers: Mapping[str, Row], words: Words = ENGLISH) -> Figure | str:
    """A panel per teacher: student layers as rows, teacher layers as columns, the mapped ones framed."""
    if not layers:
        return words("reasons.no_cka")
    rows = max(len(found["similarity"]) for found in layers.values())
    figure, grid = new_grid(len(layers), columns=3, height=1.1 + min(0.26 * rows, 3))
    image = None
    for (teacher, found), axes in zip(layers.items(), grid, strict=True):
        cells = np.array(found["similarity"], dtype=float)
        image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set(title=label(teacher), xlabel=words("labels.teacher_layer"), ylabel=words("labels.student_layer"))
        for side, steps in ((axes.xaxis, cells.shape[1]), (axes.yaxis, cells.shape[0])):
            side.set_ticks(range(0, steps, -(-steps // 12)))
        for layer, sources in found["map"].items():
            for source, _ in sources:
                axes.plot(source, int(layer), "s", markersize=9, markerfacecolor="none", markeredgecolor=COLOURS[1])
    kind = words(f"labels.cka_{next(iter(layers.values()))['kind']}")
    figure.colorbar(image, ax=grid, label=words("labels.cka", kind=kind), shrink=0.9, pad=0.02)  # type: ignore[arg-type]
    return figure


def _mean(values: Iterable[float | None]) -> float:
    """Of those that are known; NaN where none is."""
    return float(np.mean([float(value) for value in values if value is not None] or [np.nan]))


def routing_tables(tables: RunTables, arm: str) -> tuple[list[str], dict[str, list[float]], dict[str, list[float]]]:
    """Teachers, and their mean late weights by task and by student layer; empty where nothing was logged."""
    late: list[Row] = []
    for rows in tables.logs[arm].values():
        routed = [row["routing"] for row in rows if row.get("routing")]
        late += routed[-max(1, len(routed) // 4) :] if routed else []
    by_task: dict[str, list[Mapping[str, float]]] = {}
    by_layer: dict[str, list[Mapping[str, float]]] = {}
    for entry in late:
        for task, weights in (entry.get("by_task") or {}).items():
            by_task.setdefault(task, []).append(weights)
        for layer, weights in enumerate(entry.get("by_layer") or []):
            by_layer.setdefault(str(layer), []).append(weights)
    means = [entry.get("mean") or {} for entry in late]
    everything = [*means, *(w for part in (by_task, by_layer) for entries in part.values() for w in entries)]
    teachers = sorted({t for weights in everything for t in weights})
    of_tasks, of_layers = (
        {key: [_mean(entry.get(t) for entry in part[key]) for t in teachers] for key in keys}
        for part, keys in ((by_task, sorted(by_task)), (by_layer, by_layer))
    )
    return teachers, of_tasks, of_layers


def draw_routing(
    recipe: Recipe, tables: RunTables, across: Literal["task", "layer"], words: Words = ENGLISH
) -> Figure | str:
    """Weights in the cells. By task a panel per task, arms as rows; by layer a panel per arm, teachers as rows.

    Only arms that match KV of several teachers; weights of other arms steer something else.
    """
    routed: dict[str, tuple[list[str], dict[str, list[float]]]] = {}
    for arm in tables.arms:
        if len(routed) == MAX_ROUTED:
            break
        teachers, by_task, by_layer = routing_tables(tables, arm)
        columns = by_task if across == "task" else by_layer
        if columns and len(teachers) > 1 and arm_recipe(recipe, arm).needs_kv:
            routed[arm] = (teachers, columns)
    if not routed:
        return words(f"reasons.no_routing_{across}")
    panels: dict[str, tuple[list[str], list[str], np.ndarray]] = {}  # title -> rows, columns, cells
    if across == "layer":
        for arm, (teachers, by_layer) in routed.items():
            panels[arm] = (teachers, list(by_layer), np.array(list(by_layer.values())).T)
    else:
        everybody = list(dict.fromkeys(teacher for teachers, _ in routed.values() for teacher in teachers))
        for task in sorted({task for _, by_task in routed.values() for task in by_task}):
            cells = np.full((len(routed), len(everybody)), np.nan)
            for row, (teachers, by_task) in enumerate(routed.values()):
                for teacher, weight in zip(teachers, by_task.get(task, []), strict=False):
                    cells[row, everybody.index(teacher)] = weight
            panels[task] = (list(routed), everybody, cells)
    rows, most = (max(cells.shape[side] for *_, cells in panels.values()) for side in (0, 1))
    per_row = 3 if most <= 5 else 2 if most <= 10 else 1
    figure, grid = new_grid(len(panels), columns=per_row, height=1.15 + 0.34 * rows)
    image = None
    for (title, (names, across_names, cells)), axes in zip(panels.items(), grid, strict=True):
        image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set_title(label(title))
        axes.set_xlabel(words("labels.teacher" if across == "task" else "labels.student_layer"))
        axes.set_xticks(range(len(across_names)), [label(name, 14) for name in across_names])
        axes.set_yticks(range(len(names)), [label(name, 16) for name in names])
        for (i, j), weight in np.ndenumerate(cells):
            text = f"{weight:.2f}" if np.isfinite(weight) else "–"
            axes.text(j, i, text, ha="center", va="center", color="white" if weight > 0.6 else INK,
                      fontsize=8.5 if most <= 16 else 6.5)  # fmt: skip
    figure.colorbar(image, ax=grid, label=words("labels.weight"), shrink=0.9, pad=0.02)  # type: ignore[arg-type]
    return figure


def match_table(recipe: Recipe, tables: RunTables) -> list[Row]:
    """Per arm and teacher the held-out KV match, mean over seeds, beside the placebo's.

    The placebo figure is the run's own (`placebo` beside `k` and `v` in match.json) or else the mean over the
    recipe's placebo arms with that teacher. [] if nothing was measured.
    """
    placebo_arms = [arm for arm in tables.arms if recipe.every_arm[arm].get("control") == "placebo"]
    found: dict[tuple[str, str], list[Row]] = {}
    for arm in tables.arms:
        for match in tables.matches[arm].values():
            for teacher, entry in match.items():
                if isinstance(entry, dict) and ("k" in entry or "v" in entry):
                    found.setdefault((arm, teacher), []).append(entry)
    rows = []
    for (arm, teacher), entries in found.items():
        own = [e["placebo"] for e in entries if isinstance(e.get("placebo"), dict)]
        others = [e for (other, t), es in found.items() if other in placebo_arms and t == teacher for e in es]
        row: Row = {"arm": arm, "teacher": teacher, "is_placebo": arm in placebo_arms}
        for part in ("k", "v"):
            for key in MATCH_FIGURES:
                mine, theirs = ([(e.get(part) or {}).get(key) for e in side] for side in (entries, own or others))
                row[f"{part}/{key}"] = _mean(mine)
                row[f"placebo/{part}/{key}"] = np.nan if row["is_placebo"] else _mean(theirs)
        rows.append(row)
    return rows


def draw_match(rows: Sequence[Row], words: Words = ENGLISH) -> Figure | str:
    """Dumbbells: filled the arm, hollow the placebo; circles keys, squares values; one panel per figure."""
    if not rows:
        return words("reasons.no_match")
    figure, grid = new_grid(len(MATCH_FIGURES), columns=4, height=1.3 + 0.42 * len(rows), sharey=True)
    several = len({row["teacher"] for row in rows}) > 1
    names = [label(f"{row['arm']} · {row['teacher']}" if several else row["arm"], 30) for row in rows]
    for key, axes in zip(MATCH_FIGURES, grid, strict=True):
        faded = 0.55 if key == "cosine" else 1.0
        axes.set_title(words(f"labels.{key}"), fontsize=8.5)
        for index, row in enumerate(rows):
            for part, marker, colour, shift in (("k", "o", COLOURS[0], -0.16), ("v", "s", COLOURS[1], 0.16)):
                x, reference = row[f"{part}/{key}"], row[f"placebo/{part}/{key}"]
                axes.plot([reference, x], [index + shift] * 2, color=colour, linewidth=1, alpha=0.6 * faded)
                axes.plot(reference, index + shift, marker, markerfacecolor="white", color=colour, alpha=faded)
                fill = "white" if row["is_placebo"] else colour
                axes.plot(x, index + shift, marker, color=colour, markerfacecolor=fill, alpha=faded)
        axes.axvline(0, color=GRID, linewidth=1.2, zorder=0)
        axes.margins(x=0.1)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.45, -0.55)
    shapes = [("keys", "o", COLOURS[0], COLOURS[0]), ("values", "s", COLOURS[1], COLOURS[1]),
              ("keys_placebo", "o", COLOURS[0], "white"), ("values_placebo", "s", COLOURS[1], "white")]  # fmt: skip
    handles = [
        grid[0].plot([], [], marker, linestyle="", color=colour, markerfacecolor=fill, label=words(f"labels.{key}"))[0]
        for key, marker, colour, fill in shapes
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure
