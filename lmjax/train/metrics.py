"""What a run says about itself while it trains: `metrics.jsonl`, TensorBoard, and the curves.

Knows the file formats, tensorboardX and matplotlib; nothing about models or state.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def strict_json(row: Row) -> str:
    """One line of strict JSON; infinities and NaNs, which JSON lacks, become strings."""
    return json.dumps({name: _finite_or_text(value) for name, value in row.items()})


def _finite_or_text(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a killed process is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard event files.

    A resumed run repeats the steps since its checkpoint; rows of those steps, left by the process
    that was stopped, are dropped first, so that each step stands in the file once.
    """

    def __init__(self, workdir: Path, resumed_step: int):
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] <= resumed_step]
        replace_text(path, "".join(strict_json(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None
        )

    def write(self, row: Row) -> None:
        """Writes one row; `step` is required, everything else a number."""
        self._file.write(strict_json(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes everything to disk."""
        self._file.close()
        self._events.close()


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that at every moment it holds either the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw_curves(rows: Iterable[Row], title: str, path: Path) -> None:
    """Draws loss (training and held-out) and learning rate over the steps into a PNG."""
    from matplotlib.figure import Figure

    rows = list(rows)
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps, losses = _column(rows, "loss")
    loss_axes.plot(steps, losses, color="#8fb3d9", linewidth=1, label="training")
    steps, losses = _column(rows, "eval_loss")
    loss_axes.plot(steps, losses, color="#b5412b", marker="o", markersize=4, label="held out")
    if steps:
        loss_axes.annotate(
            f"{losses[-1]:.4f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(-4, 10),
            ha="right",
            color="#b5412b",
        )
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.set_title(title, fontsize=10, loc="left", wrap=True)
    loss_axes.legend(frameon=False)
    steps, rates = _column(rows, "learning_rate")
    rate_axes.plot(steps, rates, color="#4a4a4a", linewidth=1)
    rate_axes.set_ylabel("learning rate")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_xlabel("step")
    for axes in (loss_axes, rate_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def _column(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and is a finite number."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]
