"""Plots telemetry: where numbers lie in their formats, and how that changes over a run.

Knows matplotlib, formats and the rows that `rows.py` makes.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmjax.files.filenames import no_math
from lmjax.precision.formats import Format
from lmjax.precision.quantizer import parse_quantizer

PANELS = {
    "weights": ("w",),
    "activations": ("x", "y"),
    "gradients of inputs": ("dx",),
    "weight gradients": ("dw",),
}
"""Title of each column and the roles in it, of which a site has at most one."""

_RANGE, _SUBNORMAL = "#c1121f", "#e07a2f"
_LEAST_SHARE = 1e-6
_LOW, _HIGH = -60, 20
_LEAST, _PANEL, _BAR, _BELOW = 8.5, 2.8, 1.0, 0.9
"""Inches: the least width, that of a panel, of the colours on the right; height below panels."""

Row = Mapping[str, Any]


def draw_exponents(row: Row, path: str | os.PathLike[str], title: str = "") -> None:
    """Draws a heat map of one watched step: sites by exponents, coloured by share.

    Elements left of the format's range became 0, those between the two marks on the left are
    subnormal, and those right of the range are saturated or infinite.

    Args:
      row: one row of `telemetry.jsonl`.
      path: output file.
      title: title that identifies the run.
    """
    sites, panels = _sites([row]), _panels([row])
    figure, axes = _grid(sites, panels, title or f"step {row['step']}")
    for panel, roles in zip(axes, panels.values(), strict=True):
        tensors = [_tensor(row, site, roles) for site in sites]
        shares = np.stack([_shares(tensor) for tensor in tensors])
        image = panel.imshow(
            np.where(shares > 0, shares, np.nan),
            aspect="auto",
            interpolation="nearest",
            cmap="Blues",
            norm=LogNorm(_LEAST_SHARE, 1),
            extent=(_LOW, _HIGH, len(sites) - 0.5, -0.5),
        )
        _mark_ranges(panel, tensors)
        panel.set_xticks(range(_LOW + 10, _HIGH, 20))
        panel.set_xlabel("exponent (base 2)")
    figure.colorbar(image, cax=_beside(figure), label="share of the tensor")
    marks = [
        Line2D([], [], color=_RANGE, label="smallest and largest number of the format"),
        Line2D([], [], color=_SUBNORMAL, label="smallest normal number"),
    ]
    figure.legend(handles=marks, loc="lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def draw_course(rows: Sequence[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws a heat map of the whole run: sites by steps, coloured by the share lost.

    Elements are lost if they became 0 or exceeded the largest number.

    Args:
      rows: the rows of `telemetry.jsonl`.
      path: output file.
      title: title that identifies the run.
    """
    sites, panels = _sites(rows), _panels(rows)
    figure, axes = _grid(sites, panels, title)
    steps = [row["step"] for row in rows]
    for panel, roles in zip(axes, panels.values(), strict=True):
        lost = np.full((len(sites), len(rows)), np.nan)
        for column, row in enumerate(rows):
            for index, site in enumerate(sites):
                tensor = _tensor(row, site, roles)
                if tensor:
                    lost[index, column] = tensor["underflow"] + tensor["overflow"]
        panel.set_facecolor("#eceff1")
        image = panel.imshow(
            np.where(np.isnan(lost), np.nan, np.maximum(lost, _LEAST_SHARE)),
            aspect="auto",
            interpolation="nearest",
            cmap="YlOrRd",
            norm=LogNorm(_LEAST_SHARE, 1),
        )
        shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 4)).round().astype(int))
        panel.set_xticks(shown, [str(steps[index]) for index in shown])
        panel.set_xlabel("step")
    figure.colorbar(
        image, cax=_beside(figure), label="share underflowed or overflowed", extend="min"
    )
    figure.savefig(path, dpi=110)


def _grid(sites: Sequence[str], panels: Iterable[str], title: str) -> tuple[Figure, Sequence[Axes]]:
    """Lays out panels by the lengths of names; an automatic layout would draw everything twice."""
    titles = list(panels)
    names = 0.2 + 0.062 * max(map(len, sites), default=0)
    width = max(names + _BAR + _PANEL * len(titles), _LEAST)
    # A policy may be longer than the picture is wide, without a space in it.
    heading = textwrap.wrap(title, int(width / 0.09), replace_whitespace=False)
    above = 0.45 + 0.2 * len(heading)
    height = _BELOW + 0.65 + 0.17 * len(sites) + above
    figure = Figure(figsize=(width, height))
    sides = {"left": names / width, "right": 1 - _BAR / width, "wspace": 0.05}
    ends = {"bottom": _BELOW / height, "top": 1 - above / height}
    axes = figure.subplots(1, len(titles), squeeze=False, gridspec_kw=sides | ends)[0]
    for panel, name in zip(axes, titles, strict=True):
        panel.set_title(name, fontsize=10)
        panel.tick_params(labelsize=7)
        panel.spines[:].set_visible(False)
        panel.set_yticks([])
    axes[0].set_yticks(range(len(sites)), list(sites))
    text = no_math("\n".join(heading))
    figure.suptitle(text, x=0.01, y=1 - 0.12 / height, ha="left", va="top", fontsize=11)
    return figure, axes


def _beside(figure: Figure) -> Axes:
    """Axes for the colour bar, right of the panels."""
    width = figure.get_figwidth()
    return figure.add_axes((1 - (_BAR - 0.15) / width, 0.3, 0.15 / width, 0.4))


def _sites(rows: Sequence[Row]) -> list[str]:
    """Every measured site, in the order of the model."""
    return list(dict.fromkeys(path.rsplit("/", 1)[0] for row in rows for path in row["tensors"]))


def _panels(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The `PANELS` that are not empty."""
    there = {path.rsplit("/", 1)[1] for row in rows for path in row["tensors"]}
    return {title: roles for title, roles in PANELS.items() if there & set(roles)}


def _tensor(row: Row, site: str, roles: Sequence[str]) -> Mapping[str, Any]:
    for role in roles:
        if f"{site}/{role}" in row["tensors"]:
            return row["tensors"][f"{site}/{role}"]
    return {}


def _shares(tensor: Mapping[str, Any]) -> np.ndarray:
    """Share of the elements with each exponent; the outermost bins include everything beyond."""
    shares = np.zeros(_HIGH - _LOW)
    for exponent, count in tensor.get("exponents", {}).items():
        shares[np.clip(int(exponent) - _LOW, 0, len(shares) - 1)] += count / tensor["size"]
    return shares


def _format(text: str) -> Format:
    return parse_quantizer(text).format


def _mark_ranges(panel: Axes, tensors: Sequence[Mapping[str, Any]]) -> None:
    """Draws short vertical lines at the ends of formats' ranges, if the panel includes them."""
    marks = []
    for index, tensor in enumerate(tensors):
        if tensor:
            number_format = _format(tensor["format"])
            marks += [
                (np.log2(number_format.smallest_subnormal), index, _RANGE),
                (np.log2(number_format.smallest_normal), index, _SUBNORMAL),
                (np.log2(number_format.largest_finite), index, _RANGE),
            ]
    shown = [mark for mark in marks if _LOW < mark[0] < _HIGH]
    if shown:
        exponents, rows, colors = zip(*shown, strict=True)
        middle = np.asarray(rows)
        panel.vlines(exponents, middle - 0.5, middle + 0.5, colors=colors, linewidth=1.2)
