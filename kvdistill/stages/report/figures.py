"""The figures of a study: arms side by side, routing heatmaps, the KV match beside the placebo's, learning curves.

From tables in memory to pictures in memory; `draw_all` lists them. Knows nothing of pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.canvas import (
    COLOURS,
    GRID,
    HATCHES,
    INK,
    MARKERS,
    Picture,
    label,
    new_grid,
    percent_axis,
    render,
)
from kvdistill.stages.report.collect import Row, RunTables
from kvdistill.stages.report.cost import draw_cost_curves
from kvdistill.stages.report.curves import draw_curves

MATCH_FIGURES = (
    ("r2", "R²"),
    ("centred_cosine", "centred cosine"),
    ("retrieval_top1", "top-1 retrieval"),
    ("cosine", "raw cosine"),
)


def draw_all(recipe: Recipe, tables: RunTables, summary: Row) -> list[Picture]:
    """Every picture of the report, in the page's order; those without data carry the reason."""
    nll = bool(summary["accuracy_near_zero"]) or summary["primary"] == "nll"
    figure = "answer NLL (nats per answer token, lower is better)" if nll else "accuracy on held-out questions"
    seeds = f"{len(tables.seeds)} seed{'s' * (len(tables.seeds) > 1)}"
    return [
        render("comparison_with_error_bars", f"All arms: {figure.split(' (')[0]}",
               f"Bars: mean over {seeds} of the {figure}; whiskers ± one standard deviation; each mark is one training "
               "run, one shape per seed.", lambda: draw_comparison(summary, "nll" if nll else "accuracy")),
        *draw_curves({arm: tables.logs[arm] for arm in tables.arms}),
        render("cost_curves", "What it takes", "Mean over tasks on held-out questions against what training took, one "
               "point for each budget. Lines are means over seeds, bands ± one standard deviation; what runs share (a "
               "teacher's training, its passes) is divided among them.", lambda: draw_cost_curves(summary)),
        render("routing_by_task_heatmap", "Who teaches what", "Mean weight of each teacher per task over the last "
               "quarter of the logged steps and all seeds.", lambda: draw_routing(tables, "task")),
        render("routing_by_layer_heatmap", "Who teaches which layer", "Mean weight of each teacher per student layer "
               "over the last quarter of the logged steps and all seeds.", lambda: draw_routing(tables, "layer")),
        render("match_beside_placebo", "KV match beside the placebo’s", "Held-out text; R² against the "
               "channel means; raw cosine (faded) is no evidence. Filled: the arm; hollow: the "
               "same figure for the placebo teacher (KV of a mismatched example). Means over seeds.",
               lambda: draw_match(match_table(recipe, tables))),
    ]  # fmt: skip


def draw_comparison(summary: Row, figure: str = "accuracy") -> Figure | str:
    """Arms as rows in recipe order; the macro mean, then each task."""
    arms, tasks = summary["arms"], summary["tasks"]

    def values(arm: str, task: str | None) -> Row:
        found = arms[arm] if figure == "accuracy" else arms[arm]["nll"]
        return found if task is None else found["by_task"].get(task, {})

    panels = [None, *tasks] if len(tasks) > 1 else list(tasks)
    if not any(np.isfinite(values(arm, None)["mean"]) for arm in arms):
        return f"no arm has a mean {figure}"
    columns = 2 if len(panels) in (2, 4) else 3
    height = 0.75 + 0.36 * len(arms)
    drawn, grid = new_grid(len(panels), columns=columns, height=height, sharey=True, sharex=True)
    for task, axes in zip(panels, grid, strict=True):
        axes.set_title("mean over tasks" if task is None else label(task))
        axes.set_xlabel("accuracy" if figure == "accuracy" else "nats per answer token")
        for row, arm in enumerate(arms):
            _draw_arm(axes, row, values(arm, task), 100 if figure == "accuracy" else 1)
        axes.set_yticks(range(len(arms)), [label(arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
    if figure == "accuracy":
        grid[0].set_xlim(0, 1.36)  # room for the figures written beside the bars
        grid[0].set_xticks([0, 0.25, 0.5, 0.75, 1])
        percent_axis(grid[0], "x")
    else:
        grid[0].set_xlim(left=0)
        grid[0].margins(x=0.3)
    return drawn


def _draw_arm(axes: Axes, row: int, found: Row, scale: float) -> None:
    mean, std = found.get("mean", np.nan), found.get("std", np.nan)
    if not np.isfinite(mean):
        axes.text(0, row, "  not evaluated", va="center", fontsize=8, style="italic")
        return
    colour = COLOURS[row % len(COLOURS)]
    axes.barh(
        row, mean, height=0.62, facecolor="white", edgecolor=colour, hatch=HATCHES[row % len(HATCHES)], linewidth=1
    )
    spread = std if np.isfinite(std) else 0.0
    if spread:
        axes.errorbar(mean, row, xerr=std, color=INK, capsize=3, linewidth=1.2, zorder=3)
    points = [p for p in found["per_seed"] if np.isfinite(p)]
    for index, point in enumerate(found["per_seed"]):
        offset = (index - (len(found["per_seed"]) - 1) / 2) * 0.52 / max(len(found["per_seed"]), 2)
        axes.plot(point, row + offset, MARKERS[index % len(MARKERS)], markersize=4, markerfacecolor="white",
                  markeredgecolor=INK, markeredgewidth=0.9, zorder=4)  # fmt: skip
    digits = 1 if scale == 100 else 2
    text = f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if np.isfinite(std) else "")
    axes.annotate(text, (max([mean + spread, *points]), row), xytext=(5, 0), textcoords="offset points",
                  va="center", fontsize=8)  # fmt: skip


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


def draw_routing(tables: RunTables, across: Literal["task", "layer"]) -> Figure | str:
    """Teacher x task or student layer, weights in the cells; one panel per arm with several teachers."""
    panels = {}
    for arm in tables.arms:
        teachers, by_task, by_layer = routing_tables(tables, arm)
        columns = by_task if across == "task" else by_layer
        if columns and len(teachers) > 1:
            panels[arm] = (teachers, columns)
    if not panels:
        return f"no arm with several teachers logged routing weights by {across}"
    rows = max(len(teachers) for teachers, _ in panels.values())
    most = max(len(columns) for _, columns in panels.values())
    per_row = 3 if most <= 5 else 2 if most <= 10 else 1
    figure, grid = new_grid(len(panels), columns=per_row, height=1.15 + 0.42 * rows)
    image = None
    for (arm, (teachers, columns)), axes in zip(panels.items(), grid, strict=True):
        cells = np.array(list(columns.values())).T
        image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set_title(label(arm))
        axes.set_xlabel("task" if across == "task" else "student layer")
        axes.set_xticks(range(len(columns)), [label(name, 14) for name in columns])
        axes.set_yticks(range(len(teachers)), [label(name, 16) for name in teachers])
        for (i, j), weight in np.ndenumerate(cells):
            text = f"{weight:.2f}" if np.isfinite(weight) else "–"
            axes.text(j, i, text, ha="center", va="center", color="white" if weight > 0.6 else INK,
                      fontsize=8.5 if most <= 16 else 6.5)  # fmt: skip
    figure.colorbar(image, ax=grid, label="weight", shrink=0.9, pad=0.02)  # type: ignore[arg-type]
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
            for key, _ in MATCH_FIGURES:
                mine, theirs = ([(e.get(part) or {}).get(key) for e in side] for side in (entries, own or others))
                row[f"{part}/{key}"] = _mean(mine)
                row[f"placebo/{part}/{key}"] = np.nan if row["is_placebo"] else _mean(theirs)
        rows.append(row)
    return rows


def draw_match(rows: Sequence[Row]) -> Figure | str:
    """Dumbbells: filled the arm, hollow the placebo; circles keys, squares values; one panel per figure."""
    if not rows:
        return "no held-out KV match was measured (no arm has a KV term, or it was not evaluated yet)"
    figure, grid = new_grid(len(MATCH_FIGURES), columns=4, height=1.3 + 0.42 * len(rows), sharey=True)
    several = len({row["teacher"] for row in rows}) > 1
    names = [label(f"{row['arm']} · {row['teacher']}" if several else row["arm"], 30) for row in rows]
    for (key, title), axes in zip(MATCH_FIGURES, grid, strict=True):
        faded = 0.55 if key == "cosine" else 1.0
        axes.set_title(title, fontsize=8.5)
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
              ("keys, placebo", "o", COLOURS[0], "white"), ("values, placebo", "s", COLOURS[1], "white")]  # fmt: skip
    handles = [grid[0].plot([], [], marker, linestyle="", color=colour, markerfacecolor=fill, label=name)[0]
               for name, marker, colour, fill in shapes]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure
