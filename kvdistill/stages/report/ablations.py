"""Ablations: arms that differ in one setting and in nothing else, found in the recipe; and their figures.

Nobody has to say which arms belong together: two arms are set against each other where their complete recipes are
equal but for one key (or the two weights of keys and values). Controls and arms without KV are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats as distributions

from kvdistill.core.arms import arm_recipe
from kvdistill.core.files import sha256_of
from kvdistill.core.recipe import Recipe
from kvdistill.stages.report.bars import draw_bars
from kvdistill.stages.report.canvas import COLOURS, INK, MARKERS, WIDTH, Picture, label, new_grid, render
from kvdistill.stages.report.collect import Row
from kvdistill.stages.report.language import ENGLISH, Words

LAYERS = ("loss.distill_layers",)
KEYS_AND_VALUES = ("loss.k_weight", "loss.v_weight")
MAX_SETTINGS = 12
_CONTROLS = ("placebo", "control")
_INTERVAL = 0.95  # of a standard deviation


@dataclass(frozen=True)
class Ablation:
    """Arms that agree in everything but `keys`: arm -> the values that it gives them."""

    keys: tuple[str, ...]
    arms: Mapping[str, tuple[Any, ...]]


def find_ablations(recipe: Recipe) -> list[Ablation]:
    """Every group of arms that differ in one key alone, or in the weights of keys and values alone; of those whose keys
    and values are matched, to a teacher's or to those of their own reasoning."""
    settings: dict[str, Row] = {}
    for arm in recipe.arms:
        made = arm_recipe(recipe, arm)
        flat = dict(leaves(made.model_dump(mode="json")))
        if (made.needs_kv or made.learns_from_itself) and not any(
            flat.get(key) not in (None, False) for key in _CONTROLS
        ):
            settings[arm] = flat
    every = sorted({key for flat in settings.values() for key in flat})
    varying = [key for key in every if len({sha256_of(flat.get(key)) for flat in settings.values()}) > 1]
    axes = [KEYS_AND_VALUES, *[(key,) for key in varying if key not in KEYS_AND_VALUES]]
    found = []
    for keys in axes:
        groups: dict[str, dict[str, tuple[Any, ...]]] = {}
        for arm, flat in settings.items():
            others = sha256_of([flat.get(key) for key in varying if key not in keys])
            groups.setdefault(others, {})[arm] = tuple(flat.get(key) for key in keys)
        found += [Ablation(keys, arms) for arms in groups.values() if len({sha256_of(v) for v in arms.values()}) > 1]
    return found


def leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """An arm's settings by dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict) and not before:  # a section; what is deeper is one value
            yield from leaves(value, f"{key}.")
        else:
            yield f"{before}{key}", value


def draw_ablations(recipe: Recipe, summary: Row, figure: str, words: Words, labels: Words) -> list[Picture]:
    """The four figures. figure: accuracy or nll. words: of the page; labels: inside figures."""
    found = find_ablations(recipe)
    named = words(f"figures.comparison_with_error_bars.{'accuracy' if figure == 'accuracy' else 'nll_short'}")
    layers = [one for one in found if one.keys == LAYERS]
    weights = [one for one in found if one.keys == KEYS_AND_VALUES]
    others = [one for one in found if one.keys not in (LAYERS, KEYS_AND_VALUES)]
    made = {arm: arm_recipe(recipe, arm) for arm in recipe.arms}
    alike = {made[arm].reasoning for one in weights for arm in one.arms}  # written beside written, latent beside latent
    untaught = [name for name, arm in made.items() if not (arm.teachers or arm.learns_from_itself)]
    plain = [name for name in untaught if made[name].reasoning in alike][:1]
    left = words("page.comma").join(one.keys[0] for one in others[MAX_SETTINGS:])
    more = " " + words("figures.left_out", arms=left) if left else ""

    def picture(name: str, draw: Callable[[], Figure | str], more: str = "") -> Picture:
        title, caption = (words(f"figures.{name}.{part}", figure=named) for part in ("title", "caption"))
        return render(name, title, caption + more, draw)

    return [
        picture("ablation_layers_heatmap", lambda: draw_heatmaps(summary, layers, figure, labels, "no_layers")),
        picture("kv_ablation", lambda: draw_keys_and_values(summary, weights, plain, figure, labels)),
        picture("ablation_settings_heatmap",
                lambda: draw_heatmaps(summary, others[:MAX_SETTINGS], figure, labels, "no_settings"), more),
        picture("ablation_alignment_stability", lambda: draw_spread(summary, figure, labels)),
    ]  # fmt: skip


def draw_heatmaps(
    summary: Row, ablations: list[Ablation], figure: str, words: Words = ENGLISH, reason: str = "no_settings"
) -> Figure | str:
    """A panel per ablation, one on the other: a row per arm, columns the mean over tasks and each task."""
    if not ablations:
        return words(f"reasons.{reason}")
    tasks, scale = summary["tasks"], 100 if figure == "accuracy" else 1
    heights = [0.3 * len(one.arms) + 0.35 for one in ablations]
    drawn = Figure(figsize=(WIDTH, sum(heights) + 0.6 + 0.25 * len(heights)), layout="constrained")
    grid = drawn.subplots(len(ablations), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
    cells_of = [_cells(summary, one, figure) for one in ablations]
    known = np.concatenate([mean.ravel() for mean, _ in cells_of])
    known = known[np.isfinite(known)]
    low, high = (0.0, 1.0) if figure == "accuracy" else (known.min(), known.max()) if len(known) else (0.0, 1.0)
    colours = "Blues" if figure == "accuracy" else "Blues_r"  # dark is good
    for one, (means, stds), axes in zip(ablations, cells_of, grid, strict=True):
        axes.imshow(means, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axes.grid(False)
        axes.set_title(", ".join(one.keys))
        names = [f"{label(_shown(values), 22)} · {label(arm, 18)}" for arm, values in one.arms.items()]
        axes.set_yticks(range(len(names)), names)
        columns = [words("labels.mean"), *[label(task, 14) for task in tasks]]
        axes.set_xticks(range(len(columns)), columns if axes is grid[-1] else [""] * len(columns))
        for (i, j), mean in np.ndenumerate(means):
            dark = np.isfinite(mean) and (mean - low) / max(high - low, 1e-12) > 0.6
            dark = dark if figure == "accuracy" else np.isfinite(mean) and (mean - low) / max(high - low, 1e-12) < 0.4
            axes.text(j, i, _amount(mean, float(stds[i, j]), scale), ha="center", va="center", fontsize=8,
                      color="white" if dark else INK)  # fmt: skip
        axes.axvline(0.5, color="white", linewidth=3)
    return drawn


def _cells(summary: Row, ablation: Ablation, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over seeds: [arms, 1 + tasks], the mean over tasks first."""
    rows = []
    for arm in ablation.arms:
        found = summary["arms"][arm] if figure == "accuracy" else summary["arms"][arm]["nll"]
        cells = [found, *[found["by_task"].get(task, {}) for task in summary["tasks"]]]
        rows.append([[cell.get(key, np.nan) for key in ("mean", "std")] for cell in cells])
    both = np.array(rows, dtype=float)
    return both[..., 0], both[..., 1]


def _amount(mean: float, std: float, scale: int) -> str:
    if not np.isfinite(mean):
        return "–"
    digits = 1 if scale == 100 else 2
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if np.isfinite(std) else "")


def _shown(values: tuple[Any, ...]) -> str:
    [value] = values
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw_keys_and_values(
    summary: Row, ablations: list[Ablation], plain: list[str], figure: str, words: Words = ENGLISH
) -> Figure | str:
    """Bars of the arms that weigh keys and values differently, after an arm without teacher."""
    if not ablations:
        return words("reasons.no_kv")
    names = {arm: f"{words('labels.no_teacher')} · {label(arm, 18)}" for arm in plain}
    for one in ablations:
        for arm, (k, v) in one.arms.items():
            kind = "both" if k == v else "keys_only" if not v else "values_only" if not k else ""
            said = words(f"labels.{kind}") if kind else words("labels.weights", k=k, v=v)
            names[arm] = f"{said} · {label(arm, 18)}"
    return draw_bars(summary, names, figure, words)


def draw_spread(summary: Row, figure: str, words: Words = ENGLISH) -> Figure | str:
    """Left each run's distance from its arm's mean, right the standard deviation with its interval."""
    arms = {name: arm if figure == "accuracy" else arm["nll"] for name, arm in summary["arms"].items()}
    arms = {name: arm for name, arm in arms.items() if np.isfinite(arm["std"])}
    if not arms:
        return words("reasons.one_seed")
    scale, unit = (100, words("labels.points")) if figure == "accuracy" else (1, words("labels.nats"))
    drawn, (left, right) = new_grid(2, columns=2, height=1.0 + 0.3 * len(arms), sharey=True)
    for row, (name, found) in enumerate(arms.items()):
        colour = COLOURS[list(summary["arms"]).index(name) % len(COLOURS)]
        for place, value in enumerate(found["per_seed"]):
            left.plot(scale * (value - found["mean"]), row, MARKERS[place % len(MARKERS)], markersize=5,
                      markerfacecolor="white", markeredgecolor=INK)  # fmt: skip
        _draw_std(right, row, scale * found["std"], int(np.isfinite(found["per_seed"]).sum()), colour)
    left.axvline(0, color=INK, linewidth=0.8, zorder=0)
    left.set_xlabel(f"{words('labels.each_seed')} ({unit})")
    right.set_xlabel(f"{words('labels.std_seeds')} ({unit})")
    right.set_xlim(left=0, right=4 * scale * max(found["std"] for found in arms.values()) or None)
    left.set_yticks(range(len(arms)), [label(name) for name in arms])
    left.set_ylim(len(arms) - 0.45, -0.55)
    return drawn


def _draw_std(axes: Axes, row: int, std: float, n: int, colour: str) -> None:
    """The estimate and the interval sqrt((n - 1) s^2 / chi2) that normal runs give it."""
    tails = distributions.chi2.ppf([(1 + _INTERVAL) / 2, (1 - _INTERVAL) / 2], n - 1)
    low, high = std * np.sqrt((n - 1) / tails)
    axes.plot([low, high], [row, row], color=colour, linewidth=1.6)
    axes.plot(std, row, "o", color=colour)
    axes.annotate(f"{std:.3g}", (std, row), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7.5)
