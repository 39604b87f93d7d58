"""Draws what quantization did: the error of each layer, and one weight before and after.

Knows matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmjax.compression.quantize import QuantizedModel
from lmjax.precision.quantizer import parse_quantizer

_WEIGHTS, _OUTPUTS, _TEXT, _GRID = "#2a6f97", "#e07a2f", "#30363c", "#d9dde1"
_SHOWN = 96
"""Neighbours in one column of a weight that are drawn one by one."""

_MOST_LINES = 40
"""Numbers of a grid, beyond which its lines would merge."""


def draw_quantization(path: Path, made: QuantizedModel) -> None:
    """Draws signal-to-noise ratios by layer, and the worst layer's weights, grid and error."""
    layers = [layer for layer in made.layers if np.isfinite(layer.weight_snr)]
    height = 3.6 + 0.16 * len(layers)
    figure = Figure(figsize=(11.5, height), dpi=130, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.15))[0]
    _bars(left.subplots(), made)
    values, histogram = right.subplots(2, 1)
    _values(values, made)
    _histogram(histogram, made)
    figure.savefig(path)


def _bars(axes: Axes, made: QuantizedModel) -> None:
    layers = [layer for layer in made.layers if np.isfinite(layer.weight_snr)]
    rows = np.arange(len(layers))
    axes.barh(
        rows, [x.weight_snr for x in layers], 0.72, color=_WEIGHTS, alpha=0.35, label="weights"
    )
    outputs = [(i, x.output_snr) for i, x in enumerate(layers) if x.output_snr is not None]
    if outputs:
        axes.plot(
            [y for _, y in outputs],
            [i for i, _ in outputs],
            "o",
            color=_OUTPUTS,
            markersize=4,
            label="output on the calibration text",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.06), ncols=2, frameon=False)
    axes.set_yticks(rows, [x.path for x in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel("signal to noise, dB (6 dB is one bit)", fontsize=9, color=_TEXT)
    axes.set_title("Error of each product", loc="left", fontsize=11, color=_TEXT)
    _plain(axes)


def _values(axes: Axes, made: QuantizedModel) -> None:
    """Neighbours of one output of the worst layer, and where they were rounded to."""
    column = int(np.argmax(np.abs(made.before - made.after).max(axis=0)))
    before, after = made.before[:_SHOWN, column], made.after[:_SHOWN, column]
    block = next(parse_quantizer(x.format).block for x in made.layers if x.path == made.worst)
    for start in range(0, len(after), block or _SHOWN):
        grid = np.unique(after[start : start + (block or _SHOWN)])
        if len(grid) <= _MOST_LINES:
            end = min(start + (block or _SHOWN), len(after)) - 0.5
            axes.hlines(grid, start - 0.5, end, color=_GRID, linewidth=0.8, zorder=0)
    rows = np.arange(len(before))
    axes.vlines(rows, before, after, color=_OUTPUTS, linewidth=1.6, label="error")
    axes.plot(rows, before, ".", color=_WEIGHTS, markersize=4, label="weight")
    axes.set_title(
        f"{made.worst}: what weights of one output became",
        loc="left",
        fontsize=11,
        color=_TEXT,
    )
    axes.set_xlabel("input", fontsize=9, color=_TEXT)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    _plain(axes)


def _histogram(axes: Axes, made: QuantizedModel) -> None:
    error = (made.after - made.before).ravel()
    scale = np.sqrt(np.mean(made.before**2)) or 1.0
    span = 4 * scale
    bins = np.linspace(-span, span, 121).tolist()
    axes.hist(made.before.ravel(), bins, color=_WEIGHTS, alpha=0.4, density=True, label="weights")
    axes.hist(error, bins, color=_OUTPUTS, alpha=0.6, density=True, label="errors")
    axes.set_yscale("log")
    axes.set_title("All weights of the same product", loc="left", fontsize=11, color=_TEXT)
    axes.set_ylabel("density", fontsize=9, color=_TEXT)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0, colors=_TEXT, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
