"""Learning curves from `log.jsonl`: KV loss, task accuracy and the train/val gap over optimiser steps.

Reads rows in memory (`collect.read_log` reads the file) and draws. `LearningCurveTracker` writes such a file from any
training loop and draws from it. Knows nothing of records or statistics.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvdistill.core.files import write_bytes
from kvdistill.stages.report.canvas import GRID, Picture, label, line_style, new_grid, percent_axis, render
from kvdistill.stages.report.collect import Row, read_log
from kvdistill.stages.report.language import ENGLISH, Words

Logs = Mapping[str, Mapping[int, Sequence[Row]]]
Pick = Callable[[Row], Any]
MAX_ARMS = 8  # on one axis: more lines cannot be told apart
MAX_PANELS = 12


def val(key: str) -> Pick:
    return lambda row: (row.get("val") or {}).get(key)


def val_task(task: str) -> Pick:
    return lambda row: ((row.get("val") or {}).get("accuracy_by_task") or {}).get(task)


def train(key: str) -> Pick:
    """A training figure beside a validation point."""
    return lambda row: (row.get("train") or {}).get(key)


def train_kv(row: Row) -> float | None:
    """Mean raw KV term of a logged training step, over teachers, keys and values."""
    raw = [t.get("raw") for name, t in (row.get("terms") or {}).items() if name.startswith("kv/")]
    known = [r for r in raw if r is not None]
    return sum(known) / len(known) if known else None


def band(logs: Mapping[int, Sequence[Row]], pick: Pick) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that every seed has, and the figure's mean and standard deviation (0 for one seed) over seeds there."""
    series = []
    for rows in logs.values():
        points = [(row["step"], pick(row)) for row in rows]  # a step may have a training row and a validation row
        if known := {s: float(v) for s, v in points if v is not None and np.isfinite(v)}:
            series.append(known)
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if not steps:
        return np.array([]), np.array([]), np.array([])
    values = np.array([[points[s] for s in steps] for points in series])
    return np.array(steps), values.mean(0), values.std(0, ddof=1) if len(series) > 1 else np.zeros(len(steps))


def _draw_band(axes: Axes, logs: Mapping[int, Sequence[Row]], pick: Pick, style: dict[str, Any], **extra: Any) -> bool:
    steps, mean, std = band(logs, pick)
    if not len(steps):
        return False
    axes.plot(steps, mean, markevery=max(1, len(steps) // 8), **style, **extra)
    if std.any():
        axes.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
    return True


def _has(logs: Mapping[int, Sequence[Row]], pick: Pick) -> bool:
    return bool(len(band(logs, pick)[0]))


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))


def draw_dual_axis(logs: Logs, words: Words = ENGLISH) -> Figure | str:
    """One panel per arm: held-out KV loss (left, solid) and accuracy (right, dashed)."""
    arms = [arm for arm in logs if _has(logs[arm], val("accuracy"))]
    if not arms:
        return words("reasons.no_log")
    figure, panels = new_grid(len(arms), height=2.3)
    losses = np.concatenate([band(logs[arm], val("kv_loss"))[1] for arm in arms])
    limits = (losses.min() * 0.9, losses.max() * 1.1) if len(losses) and losses.max() > 0 else None
    loss_style, accuracy_style = line_style(0), line_style(1)
    for arm, axes in zip(arms, panels, strict=True):
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.grid(False)
        axes.set_title(label(arm))
        axes.set_xlabel(words("labels.step"))
        if _draw_band(axes, logs[arm], val("kv_loss"), loss_style) and limits:
            axes.set_ylim(*limits)
            axes.set_ylabel(words("labels.kv_loss_held_out"))
        else:
            axes.set_yticks([])
            axes.text(
                0.98, 0.04, words("labels.no_kv_term"), transform=axes.transAxes, ha="right", fontsize=8, style="italic"
            )
        _draw_band(right, logs[arm], val("accuracy"), accuracy_style)
        right.set_ylim(-0.02, 1.02)
        percent_axis(right)
        right.set_ylabel(words("labels.accuracy"))
        axes.yaxis.label.set_color(loss_style["color"])
        right.yaxis.label.set_color(accuracy_style["color"])
    styles = {"kv_loss_left": loss_style, "accuracy_right": accuracy_style}
    lines = [panels[0].plot([], [], label=words(f"labels.{key}"), **style)[0] for key, style in styles.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
    return figure


def draw_kv_loss(logs: Logs, words: Words = ENGLISH) -> Figure | str:
    """KV loss of every arm: training batches beside held-out examples."""
    panels = [(words("labels.training_batches"), train_kv), (words("labels.held_out_examples"), val("kv_loss"))]
    panels = [(title, pick) for title, pick in panels if any(_has(rows, pick) for rows in logs.values())]
    if not panels:
        return words("reasons.no_kv_loss")
    figure, grid = new_grid(len(panels), columns=2, height=3.4)
    for (title, pick), axes in zip(panels, grid, strict=True):
        axes.set(title=title, xlabel=words("labels.step"), ylabel=words("labels.kv_loss_raw"))
        for index, (arm, rows) in enumerate(logs.items()):
            _draw_band(axes, rows, pick, line_style(index), label=label(arm))
        lows = [line.get_ydata().min() for line in axes.get_lines()]  # type: ignore[union-attr]
        if lows and min(lows) > 0:
            axes.set_yscale("log")
            plain = FuncFormatter(lambda value, _: f"{value:g}")  # matplotlib's own writes powers as mathtext
            axes.yaxis.set_major_formatter(plain)
            if np.divide(*axes.get_ylim()[::-1]) < 20:  # a decade or so: ticks between the powers need their names too
                axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
                axes.yaxis.set_minor_formatter(plain)
            else:
                axes.yaxis.set_minor_formatter(NullFormatter())
    _legend_below(figure, max(grid, key=lambda axes: len(axes.get_lines())))
    return figure


def draw_task_accuracy(logs: Logs, words: Words = ENGLISH) -> Figure | str:
    """Validation accuracy over steps: macro mean, then one panel per task, one line per arm."""
    rows_of_all = [row for seeds in logs.values() for rows in seeds.values() for row in rows]
    tasks = sorted({t for row in rows_of_all for t in (row.get("val") or {}).get("accuracy_by_task") or {}})
    panels = [(words("labels.mean_over_tasks"), val("accuracy")), *[(label(task), val_task(task)) for task in tasks]]
    panels = [(title, pick) for title, pick in panels if any(_has(rows, pick) for rows in logs.values())]
    if not panels:
        return words("reasons.no_log")
    figure, grid = new_grid(len(panels), height=2.7, sharey=True)
    for (title, pick), axes in zip(panels, grid, strict=True):
        axes.set(title=title, xlabel=words("labels.step"), ylim=(-0.02, 1.02))
        for index, (arm, rows) in enumerate(logs.items()):
            _draw_band(axes, rows, pick, line_style(index), label=label(arm))
        percent_axis(axes)
    grid[0].set_ylabel(words("labels.validation_accuracy"))
    _legend_below(figure, grid[0])
    return figure


def draw_overfitting(logs: Logs, words: Words = ENGLISH) -> Figure | str:
    """Cross-entropy (CE) on training and held-out text, one panel per arm: the gap is the overfitting."""
    arms = [arm for arm in logs if _has(logs[arm], val("ce")) and _has(logs[arm], train("ce"))]
    if not arms:
        return words("reasons.no_train_ce")
    figure, panels = new_grid(len(arms), height=2.2, sharey=True)
    for arm, axes in zip(arms, panels, strict=True):
        axes.set(title=label(arm), xlabel=words("labels.step"))
        _draw_band(axes, logs[arm], train("ce"), line_style(0), label=words("labels.training_text"))
        _draw_band(axes, logs[arm], val("ce"), line_style(1), label=words("labels.held_out_text"))
    panels[0].set_ylabel(words("labels.ce"))
    _legend_below(figure, panels[0])
    return figure


def gap(row: Row) -> float | None:
    """Held-out minus training cross-entropy at a validation point."""
    held_out, trained = val("ce")(row), train("ce")(row)
    return None if held_out is None or trained is None else held_out - trained


def draw_compared(logs: Logs, words: Words = ENGLISH) -> Figure | str:
    """Validation accuracy and NLL, training cross-entropy and the gap to held-out text: all arms on one axis each."""
    panels: list[tuple[str, Pick]] = [
        ("labels.validation_accuracy", val("accuracy")),
        ("labels.nll_validation", val("nll")),
        ("labels.ce_training", train("ce")),
        ("labels.gap", gap),
    ]
    panels = [(title, pick) for title, pick in panels if any(_has(rows, pick) for rows in logs.values())]
    if not panels:
        return words("reasons.no_log")
    figure, grid = new_grid(len(panels), columns=2, height=2.9)
    for (title, pick), axes in zip(panels, grid, strict=True):
        axes.set(title=words(title), xlabel=words("labels.step"))
        for index, (arm, rows) in enumerate(logs.items()):
            _draw_band(axes, rows, pick, line_style(index), label=label(arm))
        if title == "labels.validation_accuracy":
            axes.set_ylim(-0.02, 1.02)
            percent_axis(axes)
        elif title == "labels.gap":
            axes.axhline(0, color=GRID, linewidth=1.2, zorder=0)
    _legend_below(figure, max(grid, key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def draw_curves(
    logs: Logs, words: Words = ENGLISH, labels: Words = ENGLISH, first: Sequence[str] = ()
) -> list[Picture]:
    """The five learning-curve figures of arms -> seeds -> log rows. words: of the page; labels: inside figures.

    first: arms that go before the others where not all fit on one axis.
    """
    figures: list[tuple[str, Callable[[Logs, Words], Figure | str], int]] = [
        ("learning_curves", draw_compared, MAX_ARMS),
        ("dual_axis_curve", draw_dual_axis, MAX_PANELS),
        ("kv_loss_curves", draw_kv_loss, MAX_ARMS),
        ("task_accuracy_curves", draw_task_accuracy, MAX_ARMS),
        ("overfitting_analysis", draw_overfitting, MAX_PANELS),
    ]
    pictures = []
    for name, draw, most in figures:
        chosen = sorted(logs, key=lambda arm: arm not in first)[:most]
        shown = {arm: logs[arm] for arm in logs if arm in chosen}
        title, caption = words(f"figures.{name}.title"), words(f"figures.{name}.caption")
        if left := [arm for arm in logs if arm not in shown]:
            caption += " " + words("figures.left_out", arms=words("page.comma").join(left))
        pictures.append(render(name, title, caption, partial(draw, shown, labels)))
    return pictures


class LearningCurveTracker:
    """Writes `log.jsonl` in output_dir, row by row, and draws the curves from it.

    Appends, so a resumed loop goes on where it stopped; of a step that is logged twice the later row counts.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / "log.jsonl"
        if self.path.is_file():  # a kill may have left half a line, which the next row must not be glued to
            whole = self.path.read_bytes()
            if not whole.endswith(b"\n"):
                write_bytes(self.path, whole[: whole.rfind(b"\n") + 1])

    def log_train(self, step: int, figures: Mapping[str, Any]) -> None:
        """One training step: `loss`, `lr`, `kv_loss`, `ce_loss` …; names ending in `_loss` become raw loss terms."""
        row: Row = {"step": int(step), "terms": {}}
        for name, value in figures.items():
            if name.endswith("_loss"):
                term = name.removesuffix("_loss")
                row["terms"]["kv/all" if term == "kv" else term] = {"raw": float(value)}
            else:
                row[name] = value
        self._append(row)

    def log_val(self, step: int, figures: Mapping[str, Any], train: Mapping[str, Any] | None = None) -> None:
        """One validation point. `kv_loss`, `ce`, `nll`, `accuracy`; any other `val_TASK` is that task's accuracy."""
        known: Row = {}
        tasks: dict[str, float] = dict(figures.get("accuracy_by_task") or {})
        for name, value in figures.items():
            short = name.removeprefix("val_")
            if short in ("kv_loss", "ce", "nll", "accuracy", "loss"):
                known[short] = value
            elif name.startswith("val_"):
                tasks[short] = value
        if tasks:
            known.setdefault("accuracy", sum(tasks.values()) / len(tasks))
        self._append({"step": int(step), "val": {**known, "accuracy_by_task": tasks}, "train": dict(train or {})})

    def plot_all_curves(self, name: str = "this run") -> list[Path]:
        """Draw what there is data for as PNG and SVG into output_dir/figures; returns the files written."""
        pictures = draw_curves({name: {0: read_log(self.path)}})
        return [file for picture in pictures for file in picture.save(self.output_dir / "figures")]

    def _append(self, row: Row) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
