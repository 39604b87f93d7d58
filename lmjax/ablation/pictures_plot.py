"""Charts of the report as inline SVG, drawn by matplotlib.

They are drawn 400 units wide, a phone's width, so that text stays readable there and grows on a
wider screen. Colours are CSS variables of the page that holds them, so that one picture serves
light, dark and print; lines are told apart by dashes too, and named in a legend of the page, where
names of any length and any characters fit.

Knows matplotlib and `Series` and `ForestRow`; nothing of runs.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lmjax.ablation.curves import Series
from lmjax.ablation.report_data import ForestRow

WIDTH = 400
COLORS = 7
"""Colours of the page's palette, `--c0` and so on; 0 is the control's."""
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2.5), (1.5, 2), (7, 2, 1.5, 2))

_INK, _MUTED, _RULE = "#fedcf0", "#fedcf1", "#fedcf2"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "ytick.left": False,
}


def look(number: int) -> tuple[int, tuple[float, ...]]:
    """Colour and dashes of an arm: the control is solid and alone in its colour."""
    turn, color = 0, number
    if number >= COLORS:
        turn, color = divmod(number - 1, COLORS - 1)
        color += 1
    return color, DASHES[(color + turn) % len(DASHES)]


def line_chart(
    name: str,
    series: Sequence[Series],
    *,
    height: int = 230,
    y_range: tuple[float, float] | None = None,
    margin: float | None = None,
    base_two: bool = False,
) -> str:
    """Lines over steps, each with a band; a cross ends a run that diverged.

    Args:
      name: what screen readers call the picture.
      series: those with no finite point are left out.
      height: of the picture, in units.
      y_range: what lies beyond is cut off; by default all is shown.
      margin: shades what lies between `-margin` and `margin` and draws zero.
      base_two: a logarithmic axis with powers of two.
    """

    def draw(axes: Any) -> None:
        """Bands, curves and crosses, over the margin."""
        if margin is not None:
            axes.axhspan(-margin, margin, color=_MUTED, alpha=0.15, linewidth=0)
            axes.axhline(0.0, color=_MUTED, linewidth=0.8)
        for one in series:
            color, dashes = look(one.color)
            drawn = _hex(color)
            axes.fill_between(one.x, one.low, one.high, color=drawn, alpha=0.2, linewidth=0)
            (line,) = axes.plot(one.x, one.y, color=drawn, linewidth=1.8)
            if dashes:
                line.set_dashes(dashes)
            for end in one.crosses:
                axes.plot(*end, "x", color=drawn, markersize=7, markeredgewidth=2.2)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
        if base_two:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"2^{math.log2(value):.0f}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        elif y_range is not None:
            axes.set_ylim(*y_range)

    return _picture(name, height, draw)


def forest(name: str, rows: Sequence[ForestRow], margin: float, unit: str) -> str:
    """Differences to the control with their intervals, one row an arm.

    Where the largest difference is far beyond the margin, the axis is logarithmic outside it.
    """
    ends = [end for row in rows for end in (*row.ends, *row.points) if math.isfinite(end)]
    reach = 1.1 * max([1.5 * margin, *map(abs, ends)])
    wide = reach > 25 * margin

    def draw(axes: Any) -> None:
        """A row for each arm: its points, its interval and its note."""
        axes.grid(visible=False)
        axes.axvspan(-margin, margin, color=_MUTED, alpha=0.15, linewidth=0)
        axes.axvline(0.0, color=_MUTED, linewidth=0.8)
        for number, row in enumerate(rows):
            _draw_row(axes, row, -number)
        if wide:
            axes.set_xscale("asinh", linear_width=margin / 2)
            axes.set_xticks([sign * mark for sign in (-1, 1) for mark in _marks(margin, reach)])
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, symmetric=True))
        axes.set_xlim(-reach, reach)
        axes.set_ylim(0.5 - len(rows), 0.95)
        axes.set_yticks([])
        beyond = ", logarithmic beyond the margin" if wide else ""
        axes.set_xlabel(f"difference ({unit}{beyond})")
        below = {"transform": axes.transAxes, "va": "bottom", "color": _MUTED}
        axes.text(0, 1, "← better", **below)
        axes.text(1, 1, "worse →", ha="right", **below)

    return _picture(name, 74 + 42 * len(rows), draw)


def _draw_row(axes: Any, row: ForestRow, at: float) -> None:
    """Name and note above, the interval below them, the seeds at the bottom."""
    color = _hex(look(row.color)[0])
    across = axes.get_yaxis_transform()
    room = 68 - len(row.note)
    label = row.name if len(row.name) <= room else row.name[: room - 1] + "…"
    axes.text(0, at + 0.42, label, transform=across, fontweight="bold", va="center")
    axes.text(1, at + 0.42, row.note, transform=across, ha="right", va="center")
    if all(map(math.isfinite, row.ends)):
        axes.plot(row.ends, (at, at), color=color, linewidth=3.5, solid_capstyle="butt")
    axes.plot(row.points, [at - 0.25] * len(row.points), "o", color=_MUTED, markersize=3)
    if math.isfinite(row.mean):
        axes.plot([row.mean], [at], "D", color=color, markersize=7)
    elif row.failed:
        axes.plot([0.985], [at], "x", transform=across, color=color, markersize=8, mew=2.5)


def _marks(margin: float, reach: float) -> list[float]:
    """Zero and powers of ten from about the margin to the end of the axis."""
    first, last = math.ceil(math.log10(2 * margin)), math.floor(math.log10(reach))
    step = 1 + (last - first) // 3
    return [0.0, *(10.0**power for power in range(last, first - 1, -step))]


def robust_range(series: Sequence[Series]) -> tuple[float, float]:
    """A range that shows 95% of the points, so that no start and no blow-up rules the axis.

    Lines that end in a cross are left out where others are there.
    """
    healthy = [one for one in series if not one.crosses] or series
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in healthy])
    low, high = float(values.min()), float(np.quantile(values, 0.95))
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - pad, high + pad


def difference_range(series: Series, margin: float) -> tuple[float, float]:
    """A range symmetric about zero that shows the margin and nearly all of a difference curve."""
    values = np.abs(series.y[np.isfinite(series.y)])
    reach = max(1.5 * margin, 1.3 * float(np.quantile(values, 0.95)))
    return -reach, reach


def _hex(color: int) -> str:
    """What stands for a colour of the page until the picture is text."""
    return f"#fedc{color:02x}"


def _picture(name: str, height: int, draw: Any) -> str:
    """The `<svg>` element of one pair of axes, without anything that points out of the page."""
    # The salt keeps the ids of pictures apart, and the same picture the same.
    with (
        matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}),
        warnings.catch_warnings(action="ignore", category=UserWarning),
    ):
        # Warned about are glyphs that matplotlib's font lacks; the reader's browser draws them.
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=layout)
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    body = text[text.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r"#fedc[0-9a-f]{2}", _variable, body)
    return f'<svg viewBox="0 0 {WIDTH} {height}">{body}'.rstrip()


def _variable(match: re.Match[str]) -> str:
    found = match.group()
    return f"var({_VARIABLES.get(found) or f'--c{int(found[-2:], 16)}'})"
