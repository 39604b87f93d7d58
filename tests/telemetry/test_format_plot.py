"""The picture of the formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lmjax.telemetry import format_plot


def test_small_formats_show_every_positive_number() -> None:
    axes = Figure().add_subplot()
    format_plot._draw_line(axes, 0, format_plot.as_format("e2m1"))
    lines = [c for c in axes.collections if isinstance(c, LineCollection)]
    drawn = sorted(2.0 ** segment[0][0] for c in lines for segment in c.get_segments())
    np.testing.assert_allclose(drawn, [0.5, 1, 1.5, 2, 3, 4, 6])


def test_picture_is_written_for_any_mixture_of_formats(tmp_path: Path) -> None:
    for names in (["e2m1"], ["bf16"], format_plot.DEFAULT_FORMATS):
        path = tmp_path / f"{len(names)}.png"
        format_plot.draw_number_lines(path, names)
        assert path.read_bytes().startswith(b"\x89PNG")
