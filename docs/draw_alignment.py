"""The figures of `docs/alignment.md`, drawn by the package's own code on small inputs made here.

    python docs/draw_alignment.py           writes docs/images/alignment-*.svg
    python docs/draw_alignment.py FOLDER    writes them there

Nothing is measured on real models and nothing is trained: each figure shows what one axis of the alignment does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvdistill.align.heads import AbstractHeadProjector, HeadwiseMapProjector, make_projector, spread_heads
from kvdistill.align.layers import cka_map, layer_map
from kvdistill.align.ridge import RidgeFit
from kvdistill.align.shared import SharedSpaceFit
from kvdistill.align.time import time_map
from kvdistill.align.tokens import token_coverage, token_map
from kvdistill.compress import kept_tokens, rkv_scores
from kvdistill.core.cka import CKAAccumulator
from kvdistill.core.kv import KV
from kvdistill.core.recipe import LossRecipe
from kvdistill.core.segments import ANSWER, END, PROMPT, REASONING, START, TEXT, UNKNOWN
from kvdistill.losses import DISTANCES, KV_DISTANCES, QKV, answer_attention, build_distance
from kvdistill.models.rope import rotate_keys, unrotate_keys
from kvdistill.stages.report.canvas import COLOURS, HATCHES, INK, LINES, MARKERS, SOFT, figure_rules

IMAGES = Path(__file__).resolve().parent / "images"
WIDTH = 8.0  # inches: at 700 pixels a 9-point letter is still 11 high
SEGMENT_LOOK = {PROMPT: ("p", COLOURS[0], ""), REASONING: ("r", COLOURS[1], "////"), ANSWER: ("a", COLOURS[2], "..")}
EMPTY = {"facecolor": "white", "edgecolor": SOFT, "linestyle": (0, (2, 2)), "linewidth": 0.9}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of docs/alignment.md.")
    parser.add_argument("folder", nargs="?", type=Path, default=IMAGES, help="where they go (docs/images)")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    with figure_rules():
        for name, draw in FIGURES.items():
            with (folder / f"alignment-{name}.svg").open("wb") as file:
                FigureCanvasSVG(draw()).print_svg(file, metadata={"Date": None, "Creator": None})


# -- panels --------------------------------------------------------------------------------------------


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()


def _cells(axes: Axes, cells: Tensor, title: str, *, low: float = 0.0, high: float = 1.0, numbers: bool = False) -> Any:
    """A small matrix, first row on top, dark is large; vectors, so that it stays sharp."""
    mesh = axes.pcolormesh(cells.numpy(), cmap="Blues", vmin=low, vmax=high, edgecolors="white", linewidth=0.4)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_title(title)
    for side in axes.spines.values():
        side.set_visible(True)
    if numbers:
        for i, j in (cells > 0.005).nonzero().tolist():
            axes.text(j + 0.5, i + 0.5, f"{cells[i, j]:.2g}".removeprefix("0"), ha="center", va="center",
                      fontsize=8.5, color="white" if cells[i, j] > 0.6 * high else INK)  # fmt: skip
    return mesh


def _number_axes(axes: Axes, cells: Tensor, across: str, down: str) -> None:
    for axis, number in ((axes.yaxis, cells.shape[0]), (axes.xaxis, cells.shape[1])):
        axis.set_ticks([i + 0.5 for i in range(number)], [str(i) for i in range(number)])
    axes.set_xlabel(across)
    axes.set_ylabel(down)


def _line(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number], "linestyle": LINES[number]}


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _codes(prompt: int, reasoning: int, answer: int) -> Tensor:
    return torch.tensor([[PROMPT] * prompt + [REASONING] * reasoning + [ANSWER] * answer])


# -- overview ------------------------------------------------------------------------------------------


def _overview_stages() -> list[tuple[str, str, Tensor]]:
    """The first channel of every layer and head (rows) at every token (columns), after each step, and how it came."""
    M, G, E, L, H, D = 6, 3, 6, 3, 2, 4
    source, target = _codes(3, 7, 2), _codes(2, 4, 2)
    place = torch.arange(12.0) / 11 * 6
    phase = torch.rand(M, G, 1, E, generator=_random(0)) * 1.5 + 0.7 * torch.arange(M)[:, None, None, None]
    k_BMGSE = torch.sin(place[:, None] + phase)[None]
    k_BMGTE = time_map("segment", source, target).apply(k_BMGSE, 3)
    k_BLGTE = layer_map("ratio", M, L).apply(k_BMGTE, 1)
    projector = HeadwiseMapProjector(G, E, H, D, L)
    with torch.no_grad():
        k_LBTI = k_BLGTE.permute(1, 0, 3, 2, 4).flatten(3)
        k_BLHTD = projector(k_LBTI).unflatten(3, (H, D)).permute(1, 0, 3, 2, 4)
    names, hows = ("k_BMGSE", "k_BMGTE", "k_BLGTE", "k_BLHTD"), ("", "time", "layers", "heads")
    steps = zip(names, hows, (k_BMGSE, k_BMGTE, k_BLGTE, k_BLHTD), strict=True)
    return [(name, how, x[0, ..., 0].flatten(0, 1)) for name, how, x in steps]


def draw_overview() -> Figure:
    stages = _overview_stages()
    most, figure = len(stages[0][2]), Figure(figsize=(WIDTH, 4.2), layout="constrained")
    grid = figure.subplots(1, 7, width_ratios=[12, 4, 8, 4, 8, 4, 8], squeeze=False)[0]
    words = ("6 layers × 3 heads\n12 tokens, size 6", "6 × 3 heads\n8 tokens, size 6", "3 layers × 3 heads\n8 tokens",
             "3 × 2 heads\n8 tokens, size 4")  # fmt: skip
    meets = ("as captured,\nunrotated", "", "match_in: teacher\nmeets here", "match_in: student\nmeets here")
    for number, ((name, how, cells), said, met) in enumerate(zip(stages, words, meets, strict=True)):
        axes, spare = grid[2 * number], (most - len(cells)) / 2
        _cells(axes, cells, "", low=-1.3, high=1.3)
        num_heads = 2 if number == 3 else 3
        axes.hlines(range(0, len(cells) + 1, num_heads), 0, cells.shape[1], color=INK, linewidth=0.8)
        axes.set_ylim(most - spare + 2, -spare - 5)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.text(0, -0.5, said, fontsize=8.5, va="bottom")
        axes.text(0, -3.1, name, fontweight="bold", va="bottom")
        axes.text(0, len(cells) + 0.6, met, fontsize=8.5, va="top", style="italic")
        if number:
            between = grid[2 * number - 1]
            between.set_axis_off()
            between.annotate("", (1, 0.5), (0, 0.5), xycoords="axes fraction",
                             arrowprops={"arrowstyle": "-|>", "color": INK})  # fmt: skip
            between.text(0.5, 0.54, how, ha="center", va="bottom", fontweight="bold", transform=between.transAxes)
    return figure


# -- tokens --------------------------------------------------------------------------------------------

_Tokens = list[tuple[str, float, float, int]]  # shown, start, end in characters of the text, role


def _spans(tokens: _Tokens) -> tuple[Tensor, Tensor]:
    return torch.tensor([[t[1:3] for t in tokens]]), torch.tensor([[t[3] for t in tokens]])


def _cut(*pieces: str) -> _Tokens:
    found: _Tokens = []
    for piece in pieces:
        start = found[-1][2] if found else 0.0
        found.append((piece.replace(" ", "␣"), start, start + len(piece), TEXT))
    return found


def _byte_tokens() -> _Tokens:
    """12+30=42, 个: the last character cut into two of its three bytes and one."""
    cut, place = _cut("1", "2+", "3", "0", "=4", "2", ", "), 10 + 2 / 3
    return [("<s>", 0, 0, START), *cut, ("个 ⅔", 10, place, TEXT), ("个 ⅓", place, 11, TEXT), ("</s>", 0, 0, END)]


def draw_tokens() -> Figure:
    student = _byte_tokens()
    whole = [*_cut("12", "+", "30", "=", "42", ",", " 个"), ("</s>", 0.0, 0.0, END)]
    unknown = [("[CLS]", 0.0, 0.0, START), *_cut("12", "+", "30", "=", "42", ","), ("[UNK]", 10.0, 11.0, UNKNOWN),
               ("[SEP]", 0.0, 0.0, END)]  # fmt: skip
    figure, grid = _panels(1, 2, 4.5)
    sides_said = ((grid[0], whole, "teacher writes all"), (grid[1], unknown, "teacher cannot write 个"))
    for axes, teacher, title in sides_said:
        sides = [x for pair in zip(_spans(teacher), _spans(student), strict=True) for x in pair]
        mapping, coverage = token_map(*sides), token_coverage(*sides)
        dense = mapping.to_dense()[0]
        lost, total = coverage.lost_characters_B.item(), coverage.target_characters_B.item()
        _cells(axes, dense, f"{title}: {lost:.0f} of {total:.0f} characters lost", numbers=True)
        axes.set_xticks([j + 0.5 for j in range(len(teacher))], [t[0] for t in teacher], rotation=50, ha="right")
        axes.set_yticks([i + 0.5 for i in range(len(student))], [t[0] for t in student])
        axes.set_xlabel("teacher's tokens of “12+30=42, 个”")
        for i in (~mapping.mask()[0]).nonzero().flatten().tolist():
            axes.add_patch(Rectangle((0, i), dense.shape[1], 1, facecolor="none", edgecolor=SOFT, hatch="////", lw=0))
            axes.text(dense.shape[1] / 2, i + 0.5, " empty: not taught ", ha="center", va="center", fontsize=8.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    grid[0].set_ylabel("student's tokens")
    return figure


# -- time ----------------------------------------------------------------------------------------------


def _time_panel(axes: Axes, title: str, mode: str, source: Tensor, target: Tensor, **options: Any) -> None:
    mapping = time_map(mode, source, target, **options)
    dense, live = mapping.to_dense()[0], mapping.mask()[0]
    width = max(source.shape[1], target.shape[1]) - 1
    places = [[width / 2 - (n - 1) / 2 + i for i in range(n)] for n in (source.shape[1], target.shape[1])]
    for i, j in (dense > 0).nonzero().tolist():
        colour = SEGMENT_LOOK[int(target[0, i])][1]
        axes.plot([places[0][j], places[1][i]], [1, 0], color=colour, lw=0.5 + 2.5 * float(dense[i, j]), zorder=1)
    read = dense.sum(0) > 0
    for row, codes, used in ((0, source[0], read), (1, target[0], live)):
        for i, code in enumerate(codes.tolist()):
            letter, colour, _ = SEGMENT_LOOK[code]
            box = {"facecolor": colour, "edgecolor": colour} if used[i] else EMPTY
            axes.add_patch(Rectangle((places[row][i] - 0.4, 0.92 - row), 0.8, 0.16, zorder=2, **box))
            axes.text(places[row][i], 1 - row, letter, ha="center", va="center", fontsize=8.5, zorder=3,
                      color="white" if used[i] else INK)  # fmt: skip
    axes.set_title(title)
    axes.set_xlim(-0.7, width + 0.7)
    axes.set_ylim(-0.2, 1.2)
    axes.set_yticks([0, 1], ["student", "teacher"])
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_time() -> Figure:
    source, target = _codes(3, 10, 2), _codes(3, 6, 2)
    figure, grid = _panels(4, 2, 6.4)
    _time_panel(grid[0], "index", "index", source, target)
    _time_panel(grid[1], "pad: one text, the same tokens", "pad", target, target)
    _time_panel(grid[2], "proportional", "proportional", source, target)
    _time_panel(grid[3], "segment", "segment", source, target)
    _time_panel(grid[4], "segment, segment_ratio {reasoning: 0.5}", "segment", source, target, ratio={"reasoning": 0.5})
    _time_panel(grid[5], "segment, smoothness {reasoning: 1}", "segment", source, target, smoothness={"reasoning": 1.0})
    _time_panel(grid[6], "segment, the teacher has no reasoning", "segment", _codes(5, 0, 3), target)
    _time_panel(grid[7], "segment, the student has no reasoning", "segment", source, _codes(5, 0, 3))
    return figure


# -- layers --------------------------------------------------------------------------------------------


def _layer_similarity(M: int, L: int) -> Tensor:
    """CKA of features that drift from layer to layer; the student's layers 2 and 3 stand the wrong way round."""
    random = _random(3)
    drift_MNC = torch.randn(M, 300, 12, generator=random).cumsum(0) + torch.randn(300, 12, generator=random)
    places = torch.tensor([0, 1, 5, 3, 6])[:L]
    own_LND = drift_MNC[places] @ torch.randn(L, 12, 10, generator=random)
    found = CKAAccumulator()
    found.update(drift_MNC, own_LND + 2.0 * torch.randn(own_LND.shape, generator=random))
    return found.matrix()


def draw_layers() -> Figure:
    M, L = 7, 5
    similarity = _layer_similarity(M, L)
    panels = {mode: layer_map(mode, M, L).to_dense() for mode in ("ratio", "interpolate", "terminal")} | {
        "cka: the similarities": similarity,
        "cka, cka_top_k 2": cka_map(similarity, 2).to_dense(),
        "… with cka_monotone": cka_map(similarity, 2, True).to_dense(),
    }
    figure, grid = _panels(2, 3, 4.6)
    for axes, (title, cells) in zip(grid, panels.items(), strict=True):
        mesh = _cells(axes, cells.clamp_min(0), title, numbers=True)
        _number_axes(axes, cells, "teacher layer", "student layer")
    figure.colorbar(mesh, ax=grid, label="weight (similarity)", shrink=0.7, pad=0.02)
    return figure


# -- heads and size ------------------------------------------------------------------------------------


def _weight_panel(axes: Axes, projector: AbstractHeadProjector, title: str) -> None:
    with torch.no_grad():
        cells = projector.to_flat()[0][0].abs()
    _cells(axes, cells / cells.max(), title)
    axes.hlines(range(0, projector.num_in + 1, projector.in_size), 0, projector.num_out, color=INK, linewidth=0.9)
    axes.vlines(range(0, projector.num_out + 1, projector.out_size), 0, projector.num_in, color=INK, linewidth=0.9)
    middle = [(h + 0.5) * projector.out_size for h in range(projector.out_heads)]
    axes.set_xticks(middle, [f"out {h}" for h in range(projector.out_heads)])
    axes.set_yticks([(h + 0.5) * projector.in_size for h in range(projector.in_heads)],
                    [f"in {h}" for h in range(projector.in_heads)])  # fmt: skip
    axes.tick_params(length=0)


def draw_heads() -> Figure:
    ends = (3, 5, 2, 4)
    figure, grid = _panels(2, 3, 4.9)
    for axes, (h, g) in zip(grid, ((3, 2), (2, 3)), strict=False):
        cells = spread_heads(h, g)
        _cells(axes, cells, f"heads {h} → {g}, spread", numbers=True)
        _number_axes(axes, cells, "outgoing head", "incoming head")
    _weight_panel(grid[2], make_projector("flat", ends, seed=1), "flat")
    _weight_panel(grid[3], make_projector("flat", ends, rank=1, seed=1), "flat, rank 1")
    _weight_panel(grid[4], make_projector("structured", ends, init="xavier", seed=1), "structured")
    per_head = make_projector("structured", ends, init="xavier", per_head=True, seed=1)
    _weight_panel(grid[5], per_head, "structured, per_head")
    return figure


def draw_init() -> Figure:
    """3 heads of 4 into 2 heads of 4; ridge: fitted on tokens whose outgoing heads are 0.7 · one, 0.3 · another."""
    ends, random = (3, 4, 2, 4), _random(5)
    x_1NI = torch.randn(1, 400, 12, generator=random)
    heads = torch.tensor([[0.7, 0.0], [0.3, 0.3], [0.0, 0.7]])
    y_1NO = x_1NI @ torch.kron(heads, torch.eye(4)) + 0.2 * torch.randn(1, 400, 8, generator=random)
    figure, grid = _panels(1, 5, 2.6)
    for axes, init in zip(grid, ("xavier", "orthogonal", "identity", "uniform", "ridge"), strict=True):
        projector = make_projector("flat", ends, init=init, seed=2)
        if init == "ridge":
            _fit(projector, x_1NI, y_1NO)
        _weight_panel(axes, projector, init)
    return figure


def _fit(projector: AbstractHeadProjector, x_1NI: Tensor, y_1NO: Tensor) -> None:
    fit = RidgeFit(x_1NI.shape[2], y_1NO.shape[2])
    fit.update(projector.regressors(x_1NI), y_1NO, torch.ones(x_1NI.shape[:2], dtype=torch.bool))
    weight, bias = fit.solve(1e-2)
    projector.set_flat(weight.float(), bias.float())


def _true_maps(x_NI: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    full, size, mixer = (torch.randn(s, generator=random) for s in ((12, 8), (4, 4), (3, 2)))
    made = {
        "any linear map": x_NI @ full,
        "mixer ⊗ size": x_NI @ torch.kron(mixer, size),
        "linear in x / |x|": torch.nn.functional.rms_norm(x_NI, x_NI.shape[1:]) @ full,
    }
    return {name: y / y.std() + 0.1 * torch.randn(y.shape, generator=random) for name, y in made.items()}


def draw_projections() -> Figure:
    """Held-out R² of the closed-form fit, handed to each kind of projector, where the truth is of three kinds."""
    random, ends = _random(7), (3, 4, 2, 4)
    x_NI = torch.randn(4000, 12, generator=random) * (0.8 * torch.randn(4000, 1, generator=random)).exp()
    kinds: dict[str, dict[str, Any]] = {
        "flat": {"projection": "flat"},
        "flat, rank 4": {"projection": "flat", "rank": 4},
        "structured": {"projection": "structured"},
        "structured, per_head": {"projection": "structured", "per_head": True},
        "elastic": {"projection": "elastic", "hidden": 16},
    }
    figure, grid = _panels(1, 3, 2.7, sharey=True)
    for axes, (name, y_NO) in zip(grid, _true_maps(x_NI, random).items(), strict=True):
        for row, options in enumerate(kinds.values()):
            projector = make_projector(ends=ends, **options)
            _fit(projector, x_NI[None, :2000], y_NO[None, :2000])
            with torch.no_grad():
                left = (y_NO[2000:] - projector(x_NI[None, 2000:])[0]).square().sum()
            r2 = 1 - float(left / (y_NO[2000:] - y_NO[2000:].mean(0)).square().sum())
            axes.barh(row, r2, height=0.62, facecolor="white", edgecolor=COLOURS[row], hatch=HATCHES[row], linewidth=1)
            axes.text(max(r2, 0) + 0.03, row, f"{r2:.2f}", va="center")
        axes.set_title(name)
        axes.set_xlim(0, 1.25)
        axes.set_xlabel("held-out R²")
        axes.set_xticks([0, 0.5, 1])
        axes.grid(axis="y", visible=False)
    grid[0].set_yticks(range(len(kinds)), list(kinds))
    grid[0].set_ylim(len(kinds) - 0.5, -0.5)
    return figure


# -- positions -----------------------------------------------------------------------------------------


def _model(rope: dict[str, Any]) -> LlamaForCausalLM:
    """One layer, one head of 64, one word: all that is used of it is its rotary module."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=4, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, max_position_embeddings=2048, rope_parameters=rope))  # fmt: skip


def _same_key_everywhere(num_tokens: int) -> KV:
    key = torch.randn(1, 1, 1, 64, generator=_random(11)).expand(1, 1, num_tokens, 64)
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    return KV((key,), (key,), mask, torch.arange(num_tokens)[None], "unrotated")


_ROPES: dict[str, dict[str, Any]] = {
    "base 10,000": {"rope_type": "default", "rope_theta": 1e4},
    "base 500,000": {"rope_type": "default", "rope_theta": 5e5},
    "base 10,000, linear × 4": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}


def draw_positions() -> Figure:
    kv, (figure, (left, right)) = _same_key_everywhere(129), _panels(1, 2, 3.1)
    for number, (name, rope) in enumerate(_ROPES.items()):
        model = _model(rope)
        rotated = rotate_keys(kv, model)
        k_TD, style = rotated.keys[0][0, 0], _line(number)
        left.plot(torch.cosine_similarity(k_TD, k_TD[:1], dim=-1), label=name, **style)
        gaps = list(range(2, 65, 2))
        right.plot(gaps, _error_of_averaging(rotated, model, gaps), label=name, **style)
        again = unrotate_keys(rotated, model).keys[0][0, 0]
    left.plot(torch.cosine_similarity(again, again[:1], dim=-1), label="unrotated", **_line(3))
    right.plot(gaps, [0.0] * len(gaps), **_line(3))
    left.set_title("one key at two places: cosine")
    left.set_xlabel("tokens between the places")
    left.set_ylim(0, 1.08)
    right.set_title("their mean, taken rotated: relative error")
    right.set_xlabel("tokens between the two that are averaged")
    left.legend(loc="lower left", ncols=2, columnspacing=1.0, handlelength=2.4)
    return figure


def _error_of_averaging(rotated: KV, model: LlamaForCausalLM, gaps: Sequence[int]) -> list[float]:
    """The mean of a key at place 0 and at place `gap`, seen as a key half way between, beside the key itself."""
    wanted = unrotate_keys(rotated, model).keys[0][0, 0, 0]
    errors = []
    for gap in gaps:
        mean_D = (rotated.keys[0][..., 0, :] + rotated.keys[0][..., gap, :]) / 2
        here = KV(
            (mean_D[:, :, None],), (mean_D[:, :, None],), rotated.mask_BT[:, :1], torch.tensor([[gap // 2]]), "rotated"
        )
        found = unrotate_keys(here, model).keys[0][0, 0, 0]
        errors.append(float((found - wanted).norm() / wanted.norm()))
    return errors


# -- shared space --------------------------------------------------------------------------------------


def _two_models(num_tokens: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Channels of an encoder (7) and a decoder (4) that both hold the same two things and some of their own."""
    made = _random(seed)
    angle = torch.linspace(0.4, 5.9, num_tokens)
    common = torch.stack([angle.cos() * (1 + 0.2 * angle), angle.sin() * (1 + 0.2 * angle)], 1)
    fixed, channels = _random(13), {}
    for name, size, loud in (("encoder", 7, 1.5), ("decoder", 4, 1.0)):
        mix = torch.randn(2, size, generator=fixed)
        own = loud * torch.randn(1, size, generator=fixed)
        noise = torch.randn(num_tokens, 1, generator=made) * own + 0.15 * torch.randn(num_tokens, size, generator=made)
        channels[name] = (common @ mix + noise + 2)[None, None]
    return channels, torch.ones(1, num_tokens, dtype=torch.bool)


def draw_shared() -> Figure:
    fitted_on, mask = _two_models(400, 0)
    shown, shown_mask = _two_models(48, 1)
    figure, grid = _panels(1, 4, 2.6)
    _pairs_panel(grid[0], {name: x[0, 0, :, :2] for name, x in shown.items()}, "two channels of each")
    for axes, method in zip(grid[1:], ("gcca", "procrustes", "trained"), strict=True):
        fit = SharedSpaceFit({name: x.shape[-1] for name, x in fitted_on.items()}, 1, 2, method)
        fit.update(fitted_on, mask)
        space = fit.solve(1e-2)
        r = space.agreement(shown, shown_mask).mean_correlation
        points = {name: space.project(name, x)[0, 0] for name, x in shown.items()}
        _pairs_panel(axes, points, f"{method}: r = {r:.2f}")
    grid[0].legend(loc="upper left", handletextpad=0.1, borderaxespad=0.1, fontsize=8.5)
    return figure


def _pairs_panel(axes: Axes, points: dict[str, Tensor], title: str) -> None:
    first, second = points.values()
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        axes.plot([a[0], b[0]], [a[1], b[1]], color=SOFT, linewidth=0.5, zorder=1)
    for number, (name, x) in enumerate(points.items()):
        axes.scatter(x[:, 0], x[:, 1], s=16, marker=MARKERS[number], facecolor="white" if number else COLOURS[0],
                     edgecolor=COLOURS[number], linewidth=1, zorder=2, label=name)  # fmt: skip
    axes.set_title(title)
    axes.margins(0.1)
    axes.set_xticks([])
    axes.set_yticks([])


# -- compression ---------------------------------------------------------------------------------------


def _repeating_text() -> tuple[Tensor, Tensor, Tensor]:
    """Segments, keys and queries of a text whose reasoning says one thing six times over; the answer asks for two."""
    segments, random = _codes(3, 16, 3), _random(17)
    keys = torch.nn.functional.normalize(torch.randn(1, 1, 22, 24, generator=random), dim=-1) * 24**0.5
    keys[:, :, 8:14] = keys[:, :, 8:9] + 0.1 * torch.randn(1, 1, 6, 24, generator=random)
    queries = torch.randn(1, 1, 22, 24, generator=random)
    queries[:, :, 19:] += 0.6 * (keys[:, :, 5:6] + keys[:, :, 16:17])
    return segments, keys, queries


def draw_compression() -> Figure:
    segments, keys, queries = _repeating_text()
    scores = rkv_scores(queries, keys, segments)
    figure, (top, bottom) = _panels(2, 1, 4.6, height_ratios=[3.2, 1.4])
    rows = ("full", "right", "crop", "uniform", "random", "r-kv", "none")
    for row, mode in enumerate(rows):
        kept = kept_tokens(mode, segments, 6, scores=scores if mode == "r-kv" else None, keys_B=[4])[0]
        for place, (code, stays) in enumerate(zip(segments[0].tolist(), kept.tolist(), strict=True)):
            letter, colour, _ = SEGMENT_LOOK[code]
            look = {"facecolor": colour, "edgecolor": colour} if stays else EMPTY
            top.add_patch(Rectangle((place - 0.42, row - 0.38), 0.84, 0.76, **look))
            top.text(place, row, letter, ha="center", va="center", color="white" if stays else SOFT, fontsize=8.5)
    top.set_yticks(range(len(rows)), rows)
    top.set_ylim(len(rows) - 0.5, -0.5)
    top.set_title("kept tokens (filled), keep: 6")
    reasoning = range(3, 19)
    for number, (name, values) in enumerate((("importance I", scores[0, 0, 0]), ("redundancy R", scores[0, 1, 0]))):
        places = [p - 0.2 + 0.4 * number for p in reasoning]
        bottom.bar(places, values[3:19].tolist(), width=0.4, label=name, facecolor="white",
                   edgecolor=COLOURS[3 + 2 * number], hatch=HATCHES[1 + number], linewidth=1)  # fmt: skip
    bottom.set_title("r-kv: the two parts of the score (tokens 8 to 13 say the same)")
    bottom.set_ylim(0, 0.28)
    bottom.legend(loc="upper right", ncols=2)
    for axes in (top, bottom):
        axes.set_xlim(-0.6, 21.6)
        axes.grid(False)
    top.set_xticks([])
    bottom.set_xticks(range(22))
    bottom.set_xlabel("token")
    return figure


# -- losses --------------------------------------------------------------------------------------------


def draw_losses() -> Figure:
    figure, (angle, length) = _panels(1, 2, 3.0, sharey=True)
    target = torch.nn.functional.normalize(torch.randn(1, 32, generator=_random(19)), dim=1) * 32**0.5
    other = torch.randn(1, 32, generator=_random(20))
    other = torch.nn.functional.normalize(other - (other @ target.T) / 32 * target, dim=1) * 32**0.5
    degrees, factors = torch.linspace(0, 180, 37), torch.linspace(0.05, 3, 60)
    turned = target * degrees.deg2rad().cos()[:, None] + other * degrees.deg2rad().sin()[:, None]
    for number, kind in enumerate(KV_DISTANCES):
        distance, style = build_distance(LossRecipe(kind=kind)), _line(number)  # type: ignore[arg-type]
        angle.plot(degrees, distance(turned, target.expand_as(turned)), label=kind, **style)
        stretched = factors[:, None] * target
        length.plot(factors, distance(stretched, target.expand_as(stretched)), label=kind, **style)
    angle.set_title("turned away from the target")
    angle.set_xlabel("angle in degrees, same length")
    angle.set_xticks([0, 45, 90, 135, 180])
    length.set_title("longer or shorter than the target")
    length.set_xlabel("length over the target's, same direction")
    angle.set_ylabel("distance")
    angle.legend(loc="upper left")
    return figure


def _attention_sides() -> QKV:
    random = _random(23)
    q, k, v = (torch.randn(1, 1, 24, heads, 16, generator=random) for heads in (4, 2, 2))
    return QKV(q, k, v)


def _changes(x: QKV) -> dict[str, QKV]:
    """What is done to a copy of the target, which is then compared with it."""
    turn = torch.linalg.qr(torch.randn(16, 16, generator=_random(29)))[0]
    swap = torch.arange(24)
    swap[[8, 15]] = swap[[15, 8]]
    return {
        "k × 2, v × 2": QKV(x.q, 2 * x.k, 2 * x.v),
        "one vector added\nto all keys": QKV(x.q, x.k + torch.randn(16, generator=_random(31)), x.v),
        "q and k turned\nalike": QKV(x.q @ turn, x.k @ turn, x.v),
        "v turned": QKV(x.q, x.k, x.v @ turn),
        "two tokens\nswapped": QKV(x.q, x.k[:, :, swap], x.v[:, :, swap]),
    }


def _distance_of(kind: str, source: QKV, target: QKV) -> float:
    distance, mask = build_distance(LossRecipe(kind=kind)), torch.ones(1, 24, dtype=torch.bool)  # type: ignore[arg-type]
    if distance.needs_queries:
        return float(distance(source, target, mask).mean())
    extra = (mask,) if distance.needs_mask else ()
    pairs = [(source.k, target.k), (source.v, target.v)]
    return float(sum(distance(s.flatten(3), t.flatten(3), *extra).mean() for s, t in pairs))


def draw_sees() -> Figure:
    """Every loss, keys' and values' terms added, for five changes; rows in shades of their own largest value."""
    target, kinds = _attention_sides(), list(DISTANCES)
    changes = _changes(target)
    values = torch.tensor([[_distance_of(kind, source, target) for source in changes.values()] for kind in kinds])
    values = torch.where(values.abs() < 1e-4, 0.0, values)
    figure, (axes,) = _panels(1, 1, 3.6)
    shades = values / values.amax(1, keepdim=True)
    _cells(axes, shades, "")
    for i, j in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        axes.text(j + 0.5, i + 0.5, f"{values[i, j]:.2g}", ha="center", va="center",
                  color="white" if shades[i, j] > 0.6 else INK)  # fmt: skip
    axes.set_xticks([j + 0.5 for j in range(len(changes))], list(changes))
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
    axes.tick_params(length=0)
    return figure


def draw_weights() -> Figure:
    segments, keys, queries = _repeating_text()
    q_LBTQD, k_LBTHD = (x.transpose(1, 2)[None] for x in (queries, keys))
    weights = answer_attention(q_LBTQD, k_LBTHD, segments == ANSWER, segments > 0)[0, 0]
    figure, (axes,) = _panels(1, 1, 2.2)
    for place, (code, weight) in enumerate(zip(segments[0].tolist(), weights.tolist(), strict=True)):
        letter, colour, hatch = SEGMENT_LOOK[code]
        axes.bar(place, weight, facecolor="white", edgecolor=colour, hatch=hatch, linewidth=1)
        axes.text(place, weight + 0.1, letter, ha="center", fontsize=9)
    axes.axhline(1, color=INK, linestyle=LINES[1], linewidth=1, label="attention_weighted: false")
    axes.legend(loc="upper right", bbox_to_anchor=(0.7, 1.0))
    axes.set_ylabel("weight in the KV loss")
    axes.set_xlabel("token (p prompt, r reasoning, a answer)")
    axes.set_xticks(range(22))
    axes.margins(x=0.01, y=0.15)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": draw_overview,
    "tokens": draw_tokens,
    "time": draw_time,
    "layers": draw_layers,
    "heads": draw_heads,
    "init": draw_init,
    "projections": draw_projections,
    "positions": draw_positions,
    "shared": draw_shared,
    "compression": draw_compression,
    "losses": draw_losses,
    "sees": draw_sees,
    "weights": draw_weights,
}

if __name__ == "__main__":
    main()
