"""Draws number formats: the positive numbers of each.

Knows matplotlib and `lmjax.precision.formats`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from lmjax.precision.formats import Format, as_format

DEFAULT_FORMATS = (
    *("f16", "e5m2", "e5m2fnuz", "e4m3", "e4m3fnuz", "e3m2", "e2m3", "e2m1", "int8", "int4"),
    *("tf32", "bf16", "e8m0"),
)

# Formats with more positive numbers than this are drawn as bars, because their ticks would merge.
_MOST_TICKS = 300
# Formats with more binades than this get a panel of their own, so as not to squeeze the others.
_WIDE_BINADES = 48

_NORMAL = "#2a6f97"
_SUBNORMAL = "#e07a2f"
_GRID = "#d9dde1"
_TEXT = "#30363c"


def draw_number_lines(
    path: str | os.PathLike[str], formats: Iterable[Format | str] = DEFAULT_FORMATS
) -> None:
    """Draws the positive numbers of each format on a logarithmic line and saves the figure.

    A bar spans the smallest to the largest number; its subnormal part, where precision runs out,
    has a different colour. Small formats show every number.

    Args:
      path: output file; the suffix determines its type (.png, .svg, .pdf).
      formats: formats or their names, from top to bottom; the widest go in a panel below.
    """
    rows = [as_format(format) for format in formats]
    wide = [format for format in rows if np.ptp(_ends(format)) > _WIDE_BINADES]
    panels = [panel for panel in ([f for f in rows if f not in wide], wide) if panel]
    heights = [len(panel) + 0.6 for panel in panels]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "text.color": _TEXT}):
        figure = Figure(figsize=(11.5, 1.0 + 0.5 * sum(heights)), dpi=150, layout="constrained")
        grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
        _legend(figure, grid[0, 0])
        figure.savefig(path)


def _ends(format: Format) -> tuple[float, float]:
    """Binary logarithms of the smallest and largest positive numbers."""
    return math.log2(format.smallest_subnormal), math.log2(format.largest_finite)


def _draw_panel(axes: Axes, rows: list[Format]) -> None:
    for position, format in enumerate(rows):
        _draw_line(axes, position, format)
    low = min(_ends(format)[0] for format in rows)
    high = max(_ends(format)[1] for format in rows)
    margin = 0.09 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{f.name}  {f.bits} bit" for f in rows], fontsize=9)
    step = next(step for step in (1, 4, 16, 64, 256) if (high - low) / step < 20)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:.0f}}}$"))
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.axvline(0.0, color=_TEXT, linewidth=0.8, alpha=0.5, zorder=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_TEXT)
    axes.spines[:].set_visible(False)


def _draw_line(axes: Axes, position: int, format: Format) -> None:
    smallest, largest = _ends(format)
    normal = math.log2(format.smallest_normal)
    for start, end, color in ((smallest, normal, _SUBNORMAL), (normal, largest, _NORMAL)):
        axes.barh(position, end - start, left=start, height=0.62, color=_pale(color))
    for value, number, side in (
        (smallest, format.smallest_subnormal, -1),
        (largest, format.largest_finite, 1),
    ):
        axes.annotate(
            f"{number:,.0f}" if 1 <= number < 1e5 and number % 1 == 0 else f"{number:.3g}",
            (value, position),
            xytext=(5 * side, 0),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            va="center",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    if format.largest_code <= _MOST_TICKS:
        _draw_numbers(axes, position, format)


def _pale(color: str) -> tuple[float, float, float]:
    """The colour mixed with white: opaque, so that grid lines do not show through."""
    red, green, blue = (0.75 + 0.25 * part for part in to_rgb(color))
    return red, green, blue


def _draw_numbers(axes: Axes, position: int, format: Format) -> None:
    numbers = format.values()[: format.largest_code + 1]
    numbers = numbers[numbers > 0]
    width = 1.2 if numbers.size < 32 else 0.6
    is_normal = numbers >= format.smallest_normal
    for part, color in ((numbers[~is_normal], _SUBNORMAL), (numbers[is_normal], _NORMAL)):
        axes.vlines(np.log2(part), position - 0.31, position + 0.31, colors=color, linewidth=width)


def _legend(figure: Figure, top: Axes) -> None:
    top.set_title("Positive numbers of each format", loc="left", fontsize=12)
    handles = [
        Patch(color=_NORMAL, label="normal"),
        Patch(color=_SUBNORMAL, label="subnormal: fewer digits"),
    ]
    figure.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=9)
