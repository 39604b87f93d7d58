"""What a run reports while it trains: `metrics.jsonl`, TensorBoard and the curves.

Knows the file formats, tensorboardX and Matplotlib, but no models or state.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lmjax import strict_json
from lmjax.console.decoration import decoration
from lmjax.files.background import Background
from lmjax.files.filenames import no_math, plain
from lmjax.runs.sinks import Sink

Row = Mapping[str, Any]

PATIENCE_SECONDS = 10.0
"""How long a checkpoint, or the end of a run, waits for pending rows."""

SECONDS_BETWEEN_FLUSHES = 10.0
"""For TensorBoard files: each flush waits for the disk."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without a last line truncated by a killed process."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(strict_json.loads(line))
        except ValueError:
            break
    return rows


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard event files.

    A resumed run repeats the steps since its checkpoint; rows of those steps, left by the stopped
    process, are dropped first, so each step occurs once. Use it as a context manager, so that an
    error inside does not lose the rows written so far.

    Rows are written in the background: a file system that hangs delays neither training nor
    checkpoints. The next call raises errors of writing.
    """

    def __init__(
        self,
        workdir: Path,
        resumed_step: int,
        *,
        telemetry: bool = False,
        sinks: Sequence[Sink] = (),
    ):
        self._sinks = sinks
        self._file = _reopened(workdir / "metrics.jsonl", resumed_step)
        self._telemetry = (
            _reopened(workdir / "telemetry.jsonl", resumed_step) if telemetry else None
        )
        self._events: _EventFile | None = None

        def open_events() -> None:
            self._events = _EventFile(workdir / "tensorboard", resumed_step)

        self._show(open_events)
        self._background = Background()
        self._hangs = False

    def __enter__(self) -> MetricsWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes the files; an exception already being raised takes precedence."""
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self.close()

    def write(self, row: Row) -> None:
        """Writes one row; `step` is required, all other values are numbers."""
        self._background.submit(lambda: self._append(self._file, row))
        scalars = {name: value for name, value in row.items() if name != "step"}
        self._background.submit(lambda: self._add_event(scalars, row["step"]))
        for sink in self._sinks:
            sink.log(scalars, row["step"])

    def write_telemetry(self, row: Row) -> None:
        """Writes a row of `telemetry.jsonl`; what was lost also becomes TensorBoard scalars."""
        assert self._telemetry is not None
        file = self._telemetry
        self._background.submit(lambda: self._append(file, row))
        scalars = {
            f"{name}/{path}": tensor[name]
            for path, tensor in row["tensors"].items()
            for name in ("underflow", "overflow")
        }
        scalars |= {
            f"unchanged/{path}": update["unchanged"] for path, update in row["updates"].items()
        }
        self._background.submit(lambda: self._add_event(scalars, row["step"]))

    def flush(self) -> bool:
        """Whether all rows are in their files.

        Waits for a limited time; after a timeout, later calls do not wait again.
        """
        self._hangs = not self._background.drained(0 if self._hangs else PATIENCE_SECONDS)
        return not self._hangs

    def close(self) -> None:
        """Writes the remaining rows; files that hang are left to the operating system."""
        try:
            self._background.submit(self._close)
            self.flush()
        finally:
            self._background.stop()
            for sink in self._sinks:
                sink.close()

    def _append(self, file: TextIO, row: Row) -> None:
        file.write(strict_json.dumps(row) + "\n")
        file.flush()

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            if self._telemetry is not None:
                stack.callback(self._telemetry.close)
            if self._events is not None:
                self._show(self._events.close)

    def _add_event(self, scalars: Row, step: int) -> None:
        events = self._events
        if events is not None:
            self._show(lambda: events.add(scalars, step))

    def _show(self, act: Callable[[], None]) -> None:
        """Applies a function to the event file; after a failure, no more events are written.

        `metrics.jsonl` has the same numbers, and only its failure stops a run.
        """
        worked = False
        with decoration("TensorBoard's curves"):
            act()
            worked = True
        if not worked:
            self._events = None


class SilentWriter(MetricsWriter):
    """Accepts rows and discards them, in processes that leave writing to the first one."""

    def __init__(self) -> None:
        pass

    def write(self, row: Row) -> None:
        """Does nothing."""

    def write_telemetry(self, row: Row) -> None:
        """Does nothing."""

    def flush(self) -> bool:
        """Nothing is pending."""
        return True

    def close(self) -> None:
        """Does nothing."""


class _EventFile:
    """A TensorBoard file of scalars.

    It avoids tensorboardX's own thread, whose queue blocks once a full disk has killed it.
    """

    def __init__(self, folder: Path, resumed_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        # A skipped step has an infinite gradient norm; the row shows it without a warning.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, scalar
        # A path such as `s3:/events` would be read as a store URL.
        self._writer = EventsWriter(str(plain(folder) / "events"), f".{resumed_step}")
        # Makes TensorBoard forget the repeated steps.
        again = resumed_step + 1
        self._writer.write_event(Event(step=again, file_version="brain.Event:2"))
        session = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=again, session_log=session))
        self.close = self._writer.close
        self._flushed = -SECONDS_BETWEEN_FLUSHES

    def add(self, scalars: Row, step: int) -> None:
        """Appends the scalars of a step."""
        for name, value in scalars.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._writer.flush()


def _reopened(path: Path, resumed_step: int) -> TextIO:
    """Opens a file of rows for appending, without the steps after the resumed one."""
    kept = [row for row in read_rows(path) if row["step"] <= resumed_step]
    replace_text(path, "".join(strict_json.dumps(row) + "\n" for row in kept))
    return path.open("a", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Replaces a file atomically: it holds either the old text or the new.

    A process killed meanwhile leaves `partial(path)` behind, which the next one overwrites.
    """
    temporary = partial(path)
    # File names may hold bytes that are not UTF-8, which the text cannot represent.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def partial(path: Path) -> Path:
    """Where the new text of a file is written before it replaces the old."""
    return path.with_name(f".{path.name}.partial")


def draw_curves(rows: Iterable[Row], title: str, path: Path) -> None:
    """Plots loss, learning rate and any loss scale other than 1 over the steps, as a PNG."""
    from matplotlib.figure import Figure

    rows = list(rows)
    scaled = any(row.get("loss_scale", 1.0) != 1.0 for row in rows)
    figure = Figure(figsize=(8, 7 if scaled else 6), layout="constrained")
    panels = figure.subplots(2 + scaled, 1, sharex=True, height_ratios=[3, 1, 1][: 2 + scaled])
    _draw_loss(panels[0], rows)
    panels[0].set_title(no_math(title), fontsize=10, loc="left", wrap=True)
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
    lost = [row["step"] for row in rows if isinstance(row.get("loss"), str)]
    if lost:  # mark diverged steps at the bottom of the panel
        foot = panel.get_xaxis_transform()
        panel.plot(
            lost, [0.02] * len(lost), "x", color="#b5412b", transform=foot, label="not finite"
        )
    panel.set_ylabel("loss (nats per token)")
    panel.legend(frameon=False)


def _column(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where logged and finite."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]
