"""Arms as horizontal bars with whiskers and a mark per training run: the figure that other figures of arms share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvdistill.stages.report.canvas import COLOURS, HATCHES, INK, MARKERS, label, new_grid, percent_axis
from kvdistill.stages.report.collect import Row
from kvdistill.stages.report.language import ENGLISH, Words


def draw_bars(summary: Row, names: Mapping[str, str], figure: str, words: Words = ENGLISH) -> Figure | str:
    """A panel for the macro mean and one per task; a row per arm of `names` (arm -> what stands beside its bar)."""
    every, tasks = summary["arms"], summary["tasks"]
    arms = {arm: every[arm] if figure == "accuracy" else every[arm]["nll"] for arm in names}
    unit = words("labels.accuracy" if figure == "accuracy" else "labels.nats_per_token")
    panels = [None, *tasks] if len(tasks) > 1 else list(tasks)
    if not any(np.isfinite(found["mean"]) for found in arms.values()):
        return words("reasons.no_mean", figure="accuracy" if figure == "accuracy" else "NLL")
    columns = 2 if len(panels) in (2, 4) else 3
    height = 0.75 + 0.36 * len(arms)
    drawn, grid = new_grid(len(panels), columns=columns, height=height, sharey=True, sharex=True)
    for task, axes in zip(panels, grid, strict=True):
        axes.set_title(words("labels.mean_over_tasks") if task is None else label(task))
        axes.set_xlabel(unit)
        shown = [found if task is None else found["by_task"].get(task, {}) for found in arms.values()]
        for row, (arm, one) in enumerate(zip(arms, shown, strict=True)):
            _draw_arm(axes, row, one, 100 if figure == "accuracy" else 1, list(every).index(arm), words)
        _draw_runs(axes, [one.get("per_seed") or [] for one in shown])
        axes.set_yticks(range(len(arms)), list(names.values()))
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


def _draw_arm(axes: Axes, row: int, found: Row, scale: float, index: int, words: Words) -> None:
    """index: of the arm in the recipe, so that it looks the same in every figure."""
    mean, std = found.get("mean", np.nan), found.get("std", np.nan)
    if not np.isfinite(mean):
        axes.text(0, row, words("labels.not_evaluated"), va="center", fontsize=8, style="italic")
        return
    colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
    axes.barh(row, mean, height=0.62, facecolor="white", edgecolor=colour, hatch=hatch, linewidth=1)
    spread = std if np.isfinite(std) else 0.0
    if spread:
        axes.errorbar(mean, row, xerr=std, color=INK, capsize=3, linewidth=1.2, zorder=3)
    points = [p for p in found["per_seed"] if np.isfinite(p)]
    digits = 1 if scale == 100 else 2
    text = f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if np.isfinite(std) else "")
    axes.annotate(text, (max([mean + spread, *points]), row), xytext=(5, 0), textcoords="offset points",
                  va="center", fontsize=8)  # fmt: skip


def _draw_runs(axes: Axes, per_seed_of_rows: list[list[float]]) -> None:
    """A mark per training run, one shape per seed, beside each other on the row's bar."""
    num_seeds = max(map(len, per_seed_of_rows), default=0)
    for place in range(num_seeds):
        offset = (place - (num_seeds - 1) / 2) * 0.52 / max(num_seeds, 2)
        points = [(values[place], row + offset) for row, values in enumerate(per_seed_of_rows) if len(values) > place]
        axes.plot(*zip(*points, strict=True), MARKERS[place % len(MARKERS)], markersize=4, markerfacecolor="white",
                  linestyle="", markeredgecolor=INK, markeredgewidth=0.9, zorder=4)  # fmt: skip
