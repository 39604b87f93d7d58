"""What a run says about itself while it trains: `metrics.jsonl`, TensorBoard, and the curves.

Knows the file formats, tensorboardX and matplotlib; nothing about models or state.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

Row = Mapping[str, Any]


def strict_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: infinities and NaNs, which JSON lacks, become strings that `float` reads."""
    return json.dumps(_finite_or_text(value), indent=indent, allow_nan=False)


def _finite_or_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite_or_text(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_text(part) for part in value]
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
    that was stopped, are dropped first, so that each step stands in the file once. A context
    manager: what goes wrong in it must not cost the rows written so far.
    """

    def __init__(self, workdir: Path, resumed_step: int, *, telemetry: bool = False):
        from tensorboardX import SummaryWriter

        # A skipped step has an infinite gradient norm; the row says so, a warning need not.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        self._file = _reopened(workdir / "metrics.jsonl", resumed_step)
        self._telemetry = (
            _reopened(workdir / "telemetry.jsonl", resumed_step) if telemetry else None
        )
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def __enter__(self) -> MetricsWriter:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files."""
        self.close()

    def write(self, row: Row) -> None:
        """Writes one row; `step` is required, everything else a number."""
        self._file.write(strict_json(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def write_telemetry(self, row: Row) -> None:
        """Writes a row of `telemetry.jsonl`; what was lost also becomes TensorBoard scalars."""
        assert self._telemetry is not None
        self._telemetry.write(strict_json(row) + "\n")
        self._telemetry.flush()
        for path, tensor in row["tensors"].items():
            for name in ("underflow", "overflow"):
                self._events.add_scalar(f"{name}/{path}", tensor[name], row["step"])
        for path, update in row["updates"].items():
            self._events.add_scalar(f"unchanged/{path}", update["unchanged"], row["step"])

    def close(self) -> None:
        """Flushes everything to disk."""
        self._file.close()
        if self._telemetry is not None:
            self._telemetry.close()
        self._events.close()


def _reopened(path: Path, resumed_step: int) -> TextIO:
    """A file of rows, open for appending, without those of steps after the resumed one."""
    kept = [row for row in read_rows(path) if row["step"] <= resumed_step]
    replace_text(path, "".join(strict_json(row) + "\n" for row in kept))
    return path.open("a", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that at every moment it holds either the old text or the new.

    A process killed meanwhile leaves `partial(path)` behind, which the next one writes over.
    """
    temporary = partial(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def partial(path: Path) -> Path:
    """Where the new text of a file is written before it replaces the old."""
    return path.with_name(f".{path.name}.partial")


def draw_curves(rows: Iterable[Row], title: str, path: Path) -> None:
    """Draws loss, learning rate and any loss scale other than 1 over the steps, as a PNG."""
    from matplotlib.figure import Figure

    rows = list(rows)
    scaled = any(row.get("loss_scale", 1.0) != 1.0 for row in rows)
    figure = Figure(figsize=(8, 7 if scaled else 6), layout="constrained")
    panels = figure.subplots(2 + scaled, 1, sharex=True, height_ratios=[3, 1, 1][: 2 + scaled])
    _draw_loss(panels[0], rows)
    panels[0].set_title(title, fontsize=10, loc="left", wrap=True)
    panels[1].plot(*_column(rows, "learning_rate"), color="#4a4a4a", linewidth=1)
    panels[1].set_ylabel("learning rate")
    panels[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if scaled:
        steps, scales = _column(rows, "loss_scale")
        panels[2].step(steps, scales, color="#4a4a4a", linewidth=1, where="post")
        panels[2].set_yscale("log", base=2)
        panels[2].set_ylabel("loss scale")
    panels[-1].set_xlabel("step")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def _draw_loss(panel: Any, rows: list[Row]) -> None:
    panel.plot(*_column(rows, "loss"), color="#8fb3d9", linewidth=1, label="training")
    steps, losses = _column(rows, "eval_loss")
    panel.plot(steps, losses, color="#b5412b", marker="o", markersize=4, label="held out")
    if steps:
        panel.annotate(
            f"{losses[-1]:.4f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(0, 16),
            ha="right",
            color="#b5412b",
        )
    panel.set_ylabel("loss (nats per token)")
    panel.legend(frameon=False)


def _column(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and is a finite number."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]
