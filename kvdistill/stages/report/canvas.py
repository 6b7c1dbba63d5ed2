"""The look of every figure: sizes, colours that survive grey and colour blindness, and saving to PNG and SVG.

Figures are made without pyplot, so nothing global is left behind. Knows nothing of what is drawn.
"""

from __future__ import annotations

import gc
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from kvdistill.core.files import write_bytes
from kvdistill.stages.report.text import make_visible

WIDTH = 9.0  # inches, a page's width
INK, SOFT, GRID = "#1c1c1c", "#6b6b6b", "#dddddd"
# Okabe & Ito's palette without its yellow, which vanishes on white; then a grey and a brown
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444", "#8B5E3C")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
HATCHES = ("", "////", "..", "xxx", "\\\\\\\\", "---", "o", "+++", "|||", "*")
_CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")
_CJK_FILE = re.compile(r"(NotoSansCJK-|SourceHanSansSC-)Regular|wqy-zenhei|simhei", re.IGNORECASE)


@dataclass(frozen=True)
class Picture:
    """A figure as bytes, or (`svg` empty) the reason why it was not drawn.

    alt: what it shows, for whoever does not see it; empty: the caption says it.
    """

    name: str
    title: str
    caption: str
    svg: bytes = b""
    png: bytes = b""
    reason: str = ""
    alt: str = ""

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.svg and NAME.png; what was not drawn is removed, since an older picture would contradict it."""
        written = []
        for kind, content in (("svg", self.svg), ("png", self.png)):
            path = folder / f"{self.name}.{kind}"
            if content:
                write_bytes(path, content)
                written.append(path)
            else:
                path.unlink(missing_ok=True)
        return written


@contextmanager
def figure_rules() -> Iterator[None]:
    """Our look inside, the caller's outside. A glyph that no font has is drawn as a box, without a warning."""
    rules: Any = {
        "font.family": ["DejaVu Sans", *chinese_fonts()],
        "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8.5,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": SOFT,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
        "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.linewidth": 0.8, "hatch.linewidth": 0.5,
        "lines.linewidth": 1.5, "lines.markersize": 4.5, "legend.frameon": False, "figure.facecolor": "white",
        "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "kvdistill", "figure.dpi": 150,
        "axes.titley": 1.0,  # where it comes to stand anyway, without being looked for
    }  # fmt: skip
    finding, collects = logging.getLogger("matplotlib.font_manager"), gc.isenabled()
    before = finding.level
    with matplotlib.rc_context(rules), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        finding.setLevel(logging.ERROR)  # a font without a bold weight is no news
        gc.disable()  # it would look through a figure's many small objects again and again
        try:
            yield
        finally:
            finding.setLevel(before)
            if collects:
                gc.enable()


@cache
def chinese_fonts() -> tuple[str, ...]:
    """Names of the fonts here that have Chinese characters, the best first; () where there are none.

    Matplotlib remembers what was installed when it was first used; fonts that came later are looked for on the disk.
    """
    manager = font_manager.fontManager
    if not set(_CJK) & set(manager.get_font_names()):
        for path in sorted(font_manager.findSystemFonts()):
            if _CJK_FILE.search(path):
                manager.addfont(path)
    there = set(manager.get_font_names())
    return tuple(name for name in _CJK if name in there)


def new_grid(num_panels: int, *, columns: int = 3, height: float = 2.4, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of at most `columns` panels a row, each `height` inches; only as many axes as asked for."""
    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for spare in axes[num_panels:]:
        spare.remove()
    return figure, axes[:num_panels]


def render(name: str, title: str, caption: str, draw: Callable[[], Figure | str], alt: str = "") -> Picture:
    """Draw under our rules and save twice; `draw` returns the reason instead when there is nothing to draw."""
    with figure_rules():
        drawn = draw()
        if isinstance(drawn, str):
            return Picture(name, title, caption, reason=drawn)
        if engine := drawn.get_layout_engine():  # lay out once; savefig would do it, and a draw to nowhere, per file
            engine.execute(drawn)
            drawn.set_layout_engine("none")
        return Picture(name, title, caption, *printed(drawn), alt=alt)


def printed(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as SVG and as PNG, without date and maker."""
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # type: ignore[dict-item]
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return svg.getvalue(), png.getvalue()


def small_png(png: bytes) -> bytes:
    """The picture with at most 64 colours: a figure of lines and flat areas looks the same at a third of the bytes."""
    picture, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def label(text: object, limit: int = 26) -> str:
    """A name as it may stand in a figure: one line, nothing hidden, not too long."""
    shown = make_visible(str(text), keep="")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the index-th arm: any two differ in more than colour."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def percent_axis(axes: Axes, which: str = "y") -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
