"""Charts as inline SVG: learning curves with seed bands, difference curves, the forest plot.

They are drawn 400 units wide, a phone's width, so that text stays readable there and grows on a
wider screen. Colours are CSS classes of the page that holds them, so that one picture serves light,
dark and print; lines are labelled where they end and told apart by more than colour.

Knows NumPy and `svg.py`; nothing about runs or statistics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from lmjax.ablation import svg


@dataclass(frozen=True)
class Series:
    """A line with a band around it; points where `y` is not finite are gaps.

    Attributes:
      name: written where the line ends.
      color: index of its colour; beyond the palette they repeat, dashed.
      x: f64[points], increasing.
      y: f64[points].
      low: lower end of the band, f64[points].
      high: upper end of the band, f64[points].
      ended: the line stops early because its values stopped being finite: marked by a cross.
    """

    name: str
    color: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ended: bool = False


@dataclass(frozen=True)
class ForestRow:
    """A row of the forest plot.

    Attributes:
      name: of the arm.
      color: index of its colour.
      points: the differences of the single seeds.
      mean: NaN where there is none.
      outer: ends of the thin line, the interval that leaves zero out or does not.
      inner: ends of the thick line, the interval that lies inside the margin or does not.
      note: written at the right end of the row.
      failed: marked by a cross where there is no mean.
    """

    name: str
    color: int
    points: Sequence[float]
    mean: float
    outer: tuple[float, float]
    inner: tuple[float, float]
    note: str
    failed: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y_range: tuple[float, float],
    height: int = 250,
    x_label: str = "step",
    margin: float | None = None,
    powers_of_two: bool = False,
    labels: bool = True,
) -> str:
    """Lines over steps.

    Args:
      title: drawn above, and what the picture is called by screen readers.
      series: each with a finite point.
      y_range: smallest and largest value shown; what lies beyond is cut off at the frame.
      height: of the picture, in units.
      x_label: name of the horizontal axis.
      margin: shades what lies between `-margin` and `margin` and draws zero.
      powers_of_two: the values are binary logarithms and are labelled as powers.
      labels: names each line where it ends; without, the title has to say what is drawn.
    """
    named = series if labels else ()
    room = max((svg.text_width(s.name) + 24 for s in named), default=8.0)
    room = min(room, 0.4 * svg.WIDTH)
    y_ticks = svg.ticks(*y_range, powers_of_two)
    left = svg.FONT + 10 + max(svg.text_width(written) for _, written in y_ticks)
    top, bottom = 30.0, height - 34.0
    x_high = max(float(s.x[-1]) for s in series)
    x = svg.Scale(0.0, x_high, left, svg.WIDTH - room, svg.ticks(0.0, x_high, most=4))
    y = svg.Scale(*y_range, bottom, top, y_ticks)
    frame = _Frame(title, x, y)
    parts = [frame.title(), frame.grid(), frame.x_axis(x_label)]
    if margin is not None:
        parts.append(frame.margin_rows(margin))
    parts += [frame.band(s) for s in series]
    parts += [frame.line(s) for s in series]
    parts.append(frame.labels(named))
    return svg.picture(title, height, parts, clip=frame.clip())


def forest(title: str, rows: Sequence[ForestRow], margin: float, unit: str) -> str:
    """Differences to the control with their intervals, one row an arm.

    Where the largest difference is far beyond the margin, the axis is logarithmic outside it.
    """
    ends = [end for row in rows for end in (*row.outer, *row.points) if math.isfinite(end)]
    reach = 1.1 * max([1.5 * margin, *map(abs, ends)])
    wide = reach > 25 * margin
    bend = (lambda value: math.asinh(2 * value / margin)) if wide else float
    marks = svg.powers_of_ten(margin, reach) if wide else svg.ticks(-reach, reach, most=5)
    row_height, top = 40, 46.0
    height = top + row_height * len(rows) + 40
    bottom = height - 40.0
    x = svg.Scale(-reach, reach, 12.0, svg.WIDTH - 12.0, marks, bend)
    frame = _Frame(title, x, svg.Scale(0.0, 1.0, bottom, top - 8, ()))
    parts = [
        frame.title(),
        frame.margin_columns(margin),
        frame.x_axis(f"difference ({unit}{', logarithmic beyond the margin' if wide else ''})"),
        svg.text(12, 36, "← better", "muted"),
        svg.text(svg.WIDTH - 12, 36, "worse →", "muted", anchor="end"),
    ]
    for number, row in enumerate(rows):
        parts.append(_forest_row(row, x, top + row_height * number + 12))
    return svg.picture(title, height, parts)


def _forest_row(row: ForestRow, x: svg.Scale, top: float) -> str:
    middle = top + 13
    name = svg.shortened(row.name, svg.WIDTH - 40 - svg.text_width(row.note))
    parts = [
        svg.text(12, top, name, "name", whole=row.name),
        svg.text(svg.WIDTH - 12, top, row.note, "ink", anchor="end"),
    ]
    color = svg.color_classes(row.color)
    for (low, high), width in ((row.outer, 1.5), (row.inner, 5)):
        if math.isfinite(low) and math.isfinite(high):
            parts.append(
                f'<line class="{color}" stroke-width="{width}" x1="{x.position(low):.1f}" '
                f'x2="{x.position(high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
            )
    for point in row.points:
        parts.append(
            f'<circle class="seed" cx="{x.position(point):.1f}" cy="{middle + 8:.1f}" r="2"/>'
        )
    if math.isfinite(row.mean):
        at = x.position(row.mean)
        parts.append(
            f'<path class="{svg.color_classes(row.color, "fill")} mean" '
            f'd="M{at:.1f} {middle - 5:.1f}l5 5l-5 5l-5 -5z"/>'
        )
    elif row.failed:
        parts.append(svg.cross(x.end - 6, middle, row.color))
    return "".join(parts)


class _Frame:
    """The parts of a picture that depend on both axes."""

    def __init__(self, title: str, x: svg.Scale, y: svg.Scale):
        self._title, self._x, self._y = title, x, y
        self._id = "clip-" + "".join(c if c.isalnum() else "-" for c in title)

    def clip(self) -> str:
        """The region that curves are cut off at."""
        return (
            f'<clipPath id="{escape(self._id)}"><rect x="{self._x.start:.1f}" '
            f'y="{self._y.end:.1f}" width="{self._x.end - self._x.start:.1f}" '
            f'height="{self._y.start - self._y.end:.1f}"/></clipPath>'
        )

    def title(self) -> str:
        return svg.text(0, 13, svg.shortened(self._title, svg.WIDTH), "name")

    def grid(self) -> str:
        lines = []
        for value, written in self._y.ticks:
            at = self._y.position(value)
            lines.append(svg.rule(self._x.start, self._x.end, at))
            lines.append(svg.text(self._x.start - 6, at + 4, written, "muted", anchor="end"))
        return "".join(lines)

    def x_axis(self, label: str) -> str:
        """The axis below, with its numbers and its label."""
        base = self._y.start
        parts = [svg.rule(self._x.start, self._x.end, base, "axis")]
        for value, written in self._x.ticks:
            at = self._x.position(value)
            parts.append(svg.text(at, base + 14, written, "muted", anchor="middle"))
        middle = (self._x.start + self._x.end) / 2
        parts.append(svg.text(middle, base + 29, label, "muted", anchor="middle"))
        return "".join(parts)

    def margin_rows(self, margin: float) -> str:
        """The band of differences along y that do not matter, and the line of none."""
        y, x = self._y, self._x
        top = y.position(min(margin, y.high))
        bottom = y.position(max(-margin, y.low))
        return (
            f'<rect class="margin" x="{x.start:.1f}" y="{top:.1f}" '
            f'width="{x.end - x.start:.1f}" height="{bottom - top:.1f}"/>'
            + svg.rule(x.start, x.end, y.position(0.0), "zero")
        )

    def margin_columns(self, margin: float) -> str:
        """The same along x."""
        x, y = self._x, self._y
        left, right, zero = x.position(-margin), x.position(margin), x.position(0.0)
        return (
            f'<rect class="margin" x="{left:.1f}" y="{y.end:.1f}" width="{right - left:.1f}" '
            f'height="{y.start - y.end:.1f}"/><line class="zero" x1="{zero:.1f}" '
            f'x2="{zero:.1f}" y1="{y.end:.1f}" y2="{y.start:.1f}"/>'
        )

    def _at(self, x: float, y: float) -> str:
        return f"{self._x.position(x):.1f} {self._clamped(y):.1f}"

    def _clamped(self, value: float) -> float:
        """Just outside the frame for values beyond it: cut off there, but without huge numbers."""
        return min(max(self._y.position(value), self._y.end - 50), self._y.start + 50)

    def band(self, series: Series) -> str:
        """The area between `low` and `high`, where both are finite."""
        drawn = np.isfinite(series.low) & np.isfinite(series.high)
        paths = []
        for run in svg.stretches(drawn):
            upper = [self._at(series.x[i], series.high[i]) for i in run]
            lower = [self._at(series.x[i], series.low[i]) for i in reversed(run)]
            paths.append("M" + "L".join([*upper, *lower]) + "z")
        return self._path("".join(paths), f"band {svg.color_classes(series.color, 'fill')}")

    def line(self, series: Series) -> str:
        """The curve, interrupted where it is not finite; a cross where a failed run ended."""
        drawn = np.isfinite(series.y)
        paths = []
        for run in svg.stretches(drawn):
            points = [self._at(series.x[i], series.y[i]) for i in run]
            paths.append("M" + "L".join(points if len(points) > 1 else points * 2))
        cross = ""
        if series.ended and drawn.any():
            last = int(np.flatnonzero(drawn)[-1])
            at = min(max(self._clamped(series.y[last]), self._y.end), self._y.start)
            cross = svg.cross(self._x.position(series.x[last]), at, series.color)
        return self._path("".join(paths), f"line {svg.color_classes(series.color)}") + cross

    def _path(self, d: str, classes: str) -> str:
        if not d:
            return ""
        return f'<path class="{classes}" clip-path="url(#{escape(self._id)})" d="{d}"/>'

    def labels(self, series: Sequence[Series]) -> str:
        """Names at the right, in the order in which the lines end, with a line leading to each."""
        ends = []
        for one in series:
            finite = np.flatnonzero(np.isfinite(one.y))
            at = self._clamped(one.y[finite[-1]]) if finite.size else self._y.end
            ends.append((min(max(at, self._y.end), self._y.start), one))
        ends.sort(key=lambda end: end[0])
        places = svg.spread([at for at, _ in ends], self._y.end, self._y.start, svg.LINE_HEIGHT)
        parts = []
        for (at, one), place in zip(ends, places, strict=True):
            start = self._x.end
            parts.append(
                f'<path class="lead" d="M{start + 2:.1f} {at:.1f}L{start + 8:.1f} {place:.1f}"/>'
                f'<path class="line {svg.color_classes(one.color)}" '
                f'd="M{start + 8:.1f} {place:.1f}h8"/>'
            )
            name = svg.shortened(one.name, svg.WIDTH - start - 20)
            parts.append(svg.text(start + 19, place + 4, name, "ink", whole=one.name))
        return "".join(parts)


def robust_range(series: Sequence[Series]) -> tuple[float, float]:
    """A range that shows 95% of the points, so that no start and no blow-up rules the axis.

    Lines that ended early are left out where others are there.
    """
    return _padded(_values([s for s in series if not s.ended] or series), 0.95)


def full_range(series: Sequence[Series]) -> tuple[float, float]:
    """A range that shows all points."""
    return _padded(_values(series), 1.0)


def _values(series: Sequence[Series]) -> np.ndarray:
    return np.concatenate([s.y[np.isfinite(s.y)] for s in series])


def _padded(values: np.ndarray, share: float) -> tuple[float, float]:
    low, high = float(values.min()), float(np.quantile(values, share))
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - pad, high + pad


def difference_range(series: Series, margin: float) -> tuple[float, float]:
    """A range symmetric about zero that shows the margin and nearly all of a difference curve."""
    values = np.abs(series.y[np.isfinite(series.y)])
    reach = max(1.5 * margin, 1.3 * float(np.quantile(values, 0.95)))
    return -reach, reach


def moves(series: Series) -> bool:
    """Whether there is anything to see in a curve of it."""
    values = series.y[np.isfinite(series.y)]
    return values.size > 0 and bool(np.ptp(values) > 0)


def binary_logarithm(series: Series) -> Series:
    """The series with its values as exponents of two; what is not positive is left out."""
    y, low, high = (
        np.log2(np.where(v > 0, v, np.nan)) for v in (series.y, series.low, series.high)
    )
    return dataclasses.replace(series, y=y, low=low, high=high)
