"""The page about a quantized run: what it cost, layer by layer, and a picture of weights and grid.

Knows no run: it is given numbers.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from lmjax.compression.quantize import Layer
from lmjax.compression.report import Measured

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#30363c;max-width:76rem;margin:2rem auto;
padding:0 1rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}
td,th{padding:.15rem 1.2rem .15rem 0;text-align:right;border-bottom:1px solid #e4e7ea}
td:first-child,th:first-child{text-align:left}img{max-width:100%}code{overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#16191c;color:#d5dade}img{background:#fff}
td,th{border-color:#333a40}}"""

_EXPLAINED = """Signal-to-noise ratios are in decibels: 10 log10 of the sum of squares of the exact
numbers over that of the errors, so that 6 dB are a bit. The second column is about weights, the
third about what the product makes of the calibration text; the last one says by how much the loss
on that text rises if this product alone is quantized. In the picture, each vertical line is
the error of a weight: from the weight to the number of the grid that it became."""


def write_page(
    path: Path, picture: Path, title: str, runs: dict[str, Measured], layers: Sequence[Layer]
) -> None:
    """Writes the page as one file.

    Args:
      path: of the page.
      picture: a PNG, which is put into it.
      title: its first line.
      runs: before and after, by name.
      layers: what became of each product.
    """
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    names = [field.name.replace("_", " ") for field in fields(Measured)]
    values = [
        [name, *(_cell(getattr(run, field.name)) for field in fields(Measured))]
        for name, run in runs.items()
    ]
    rows = [
        [x.path, x.format, _cell(x.weight_snr), _cell(x.output_snr), _cell(x.loss_alone)]
        for x in layers
    ]
    titles = ["product", "weights", "weights, dB", "output, dB", "alone, nats"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        _table(
            ["", *(run[0] for run in values)], zip(names, *(v[1:] for v in values), strict=True)
        ),
        f"<p>{_EXPLAINED}</p><img alt='error of each product' src='data:image/png;base64,{image}'>",
        _table(titles, rows),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    line = lambda tag, cells: "".join(f"<{tag}>{html.escape(cell)}" for cell in cells)
    body = "".join(f"<tr>{line('td', row)}" for row in rows)
    return f"<table><tr>{line('th', titles)}{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value == float("inf") else f"{value:.6g}"
    return "" if value is None else str(value)
