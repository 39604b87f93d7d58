"""Draws a twin: relative errors over depth.

Knows matplotlib and what a twin is.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmjax.diagnosis.twin import Difference, Twin
from lmjax.files.filenames import no_math

PANELS = {
    "values": lambda role: role not in ("dy", "dx", "dw"),
    "gradients of inputs, dx": lambda role: role == "dx",
    "gradients of weights and second operands, dw": lambda role: role == "dw",
}
"""Title of each panel and the roles in it."""

_WHOLE, _OWN, _BOUND = "#1f4e79", "#e07a2f", "#c1121f"
_LEAST = 1e-8
"""Smaller relative errors are drawn as this."""
_MOST = 1e3
"""Larger ones are drawn as this."""


def draw_twin(twin: Twin, path: str | os.PathLike[str], title: str = "") -> None:
    """Draws the relative error of every tensor, from the first site to the last.

    Lines are errors as they accumulate, dots what a site does by itself. Gradients are computed
    from right to left, and stand where the first value of their site does.

    Args:
      twin: what to draw.
      path: output file.
      title: identifies the run.
    """
    values = [d for d in twin.differences if PANELS["values"](d.role)]
    names = [d.site for d in values]
    width = max(9.0, 0.09 * len(names))
    texts = f"{title}   step {twin.step}".strip(), f"{twin.precision}   against   {twin.reference}"
    heading = [line for text in texts for line in textwrap.wrap(text, int(width / 0.085))]
    height = 2.1 * len(PANELS) + 1.5 + 0.2 * len(heading)
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(PANELS), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, (name, holds) in zip(axes, PANELS.items(), strict=True):
        shown = [d for d in twin.differences if holds(d.role)]
        places = range(len(values)) if shown == values else [names.index(d.site) for d in shown]
        _panel(panel, name, shown, np.array(places), twin.bound)
    axes[0].set_ylim(_LEAST / 2, 2 * highest(twin))  # shared by all panels
    _label_depth(axes[-1], names)
    axes[0].legend(loc="lower right", ncols=3, fontsize=8, frameon=False, bbox_to_anchor=(1, 1))
    figure.suptitle(no_math("\n".join(heading)), x=0.01, y=1 - 0.1 / height, ha="left", va="top")
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.2 / width, bottom=0.95 / height, hspace=0.28,
        top=1 - (0.45 + 0.22 * len(heading)) / height,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def highest(twin: Twin) -> float:
    """The largest number that is drawn: an error, or the bound."""
    errors = (_drawn(twin.differences, what) for what in ("relative_error", "own_error"))
    return max(twin.bound, *(float(one.max(initial=0)) for one in errors))


def _drawn(differences: Sequence[Difference], what: str) -> np.ndarray:
    """Errors as they are drawn; an infinite one as the largest."""
    errors = np.array([getattr(d, what) for d in differences])
    return np.clip(np.nan_to_num(errors, nan=0, posinf=_MOST), _LEAST, _MOST)


def _panel(
    panel: Axes, name: str, shown: list[Difference], places: np.ndarray, bound: float
) -> None:
    order = np.argsort(places, kind="stable")
    error, own = (_drawn(shown, what) for what in ("relative_error", "own_error"))
    panel.plot(places[order], error[order], color=_WHOLE, linewidth=1, label="error")
    panel.plot(places, own, ".", color=_OWN, markersize=4, label="error of the site itself")
    panel.axhline(bound, color=_BOUND, linewidth=0.8, label="bound")
    over = own > bound
    panel.plot(places[over], own[over], "o", mfc="none", color=_BOUND, markersize=7)
    panel.set_yscale("log")
    panel.set_title(name, fontsize=9, loc="left")
    panel.set_ylabel("relative error", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(axis="y", linewidth=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _label_depth(panel: Axes, sites: list[str]) -> None:
    """Names the first site of each part at its place: a block, or what stands outside of them."""
    parts = ["/".join(site.split("/")[:2]) if "/" in site else site for site in sites]
    starts = [index for index, part in enumerate(parts) if part not in parts[:index]]
    panel.set_xticks(starts, [parts[index] for index in starts], rotation=45, ha="right")
    panel.set_xlim(-1, len(sites))
