"""The parts that pictures are made of: colours, scales and their ticks, text, labels.

Everything is a string of SVG whose looks come from CSS classes: `ink`, `muted` and `name` for text;
`grid`, `axis`, `zero`, `lead` and `cross` for lines; `stroke0`, `fill0`, ... for what belongs to an
arm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

PALETTE = {
    "light": ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    "dark": ("#bbbbbb", "#4fa8e0", "#ff8a4c", "#3ccb9d", "#e6a0c8", "#9ad6f7", "#f2b84b"),
}
"""Okabe and Ito's colours, safe for the colour-blind; the first is the control's."""

WIDTH = 400
FONT = 11
CHARACTER = 0.56 * FONT
"""Width of an average character, for deciding how much room a label takes."""
LINE_HEIGHT = 13


@dataclass(frozen=True)
class Scale:
    """One axis.

    Attributes:
      low: the value at `start`.
      high: the value at `end`.
      start: in units of the picture.
      end: in units of the picture.
      ticks: marked values, and how they are written.
      bend: increasing; what makes the axis other than linear.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    bend: Callable[[float], float] = float

    def position(self, value: float) -> float:
        """Where a value lies, in units of the picture."""
        low, high = self.bend(self.low), self.bend(self.high)
        share = (self.bend(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def picture(title: str, height: float, parts: Sequence[str], clip: str = "") -> str:
    """The whole picture, to be written into a page as it is."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}" '
        f'font-size="{FONT}"><title>{escape(title)}</title>{clip}{"".join(parts)}</svg>'
    )


def text(
    x: float, y: float, content: str, kind: str, *, anchor: str = "start", whole: str = ""
) -> str:
    """A line of text; `whole` is what it was shortened from, shown to the pointer."""
    hover = f"<title>{escape(whole)}</title>" if whole != content and whole else ""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(content)}{hover}</text>"
    )


def rule(start: float, end: float, y: float, kind: str = "grid") -> str:
    """A horizontal line."""
    return f'<line class="{kind}" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def cross(x: float, y: float, color: int) -> str:
    """A cross in the colour of an arm: here it failed."""
    return (
        f'<path class="cross {color_classes(color)}" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'
    )


def color_classes(color: int, kind: str = "stroke") -> str:
    """The CSS classes that give a line (`stroke`) or an area (`fill`) its colour."""
    palette = len(PALETTE["light"])
    repeats = color >= palette
    # The control's colour is not reused.
    index = 1 + (color - palette) % (palette - 1) if repeats else color
    return f"{kind}{index}" + (" dashed" if repeats and kind == "stroke" else "")


def text_width(content: str) -> float:
    """Units that a text takes, about."""
    return len(content) * CHARACTER


def shortened(content: str, room: float) -> str:
    """The text, cut to fit into so many units."""
    most = max(4, int(room / CHARACTER))
    return content if len(content) <= most else content[: most - 1] + "…"


def spread(places: Sequence[float], low: float, high: float, apart: float) -> list[float]:
    """Moves sorted places as little as needed so that neighbours are `apart` and all in range."""
    if not places:
        return []
    apart = min(apart, (high - low) / max(1, len(places) - 1))
    moved = list(itertools.accumulate(places, lambda last, place: max(place, last + apart)))
    limit = high
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - apart
    return moved


def stretches(drawn: np.ndarray) -> list[list[int]]:
    """Indices of consecutive true elements."""
    indices = np.flatnonzero(drawn)
    cuts = np.flatnonzero(np.diff(indices) > 1) + 1
    return [list(map(int, part)) for part in np.split(indices, cuts) if part.size]


def ticks(
    low: float, high: float, powers_of_two: bool = False, most: int = 5
) -> tuple[tuple[float, str], ...]:
    """Round values between low and high, and how they are written."""
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= 0.999 * rough)
    if powers_of_two:
        step = max(1.0, math.ceil(rough))
    numbers = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step) + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += not math.isclose(step * 10**decimals, round(step * 10**decimals))
    written = (lambda v: f"2^{v:.0f}") if powers_of_two else (lambda v: f"{v:,.{decimals}f}")
    return tuple((value, written(value)) for value in numbers)


def powers_of_ten(margin: float, reach: float) -> tuple[tuple[float, str], ...]:
    """Zero, the margin, and its tenfolds on both sides; every second where they would crowd."""
    count = math.floor(math.log10(reach / margin) + 1e-9) + 1
    shown = [margin * 10.0**i for i in range(count)][:: 1 if count <= 3 else 2]
    sizes = [(size, f"{size:g}") for size in shown]
    return (
        *((-size, f"-{written}") for size, written in reversed(sizes)),
        (0.0, "0"),
        *sizes,
    )
