"""What a run says about itself while it trains: `metrics.jsonl`, TensorBoard, and the curves.

Knows the file formats, tensorboardX and matplotlib; nothing about models or state.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lmjax import strict_json
from lmjax.console.decoration import decoration
from lmjax.files.background import Background
from lmjax.files.filenames import no_math, plain
from lmjax.runs.sinks import Sink

Row = Mapping[str, Any]

PATIENCE_SECONDS = 10.0
"""How long a checkpoint, or the end of a run, waits for rows that are on their way to the disk."""

SECONDS_BETWEEN_FLUSHES = 10.0
"""Of TensorBoard's files: each flush waits for the disk."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a killed process is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(strict_json.loads(line))
        except ValueError:
            break
    return rows


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard event files.

    A resumed run repeats the steps since its checkpoint; rows of those steps, left by the process
    that was stopped, are dropped first, so that each step stands in the file once. A context
    manager: what goes wrong in it must not cost the rows written so far.

    Rows are written in the background: a file system that hangs holds up neither training nor
    checkpoints. What goes wrong there is raised by the next call.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files; an error that is on its way already is the one to hear about."""
        with contextlib.suppress(*(() if error is None else (OSError,))):
            self.close()

    def write(self, row: Row) -> None:
        """Writes one row; `step` is required, everything else a number."""
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

        Waits for that, but not for ever; and where it has waited in vain, not again.
        """
        self._hangs = not self._background.drained(0 if self._hangs else PATIENCE_SECONDS)
        return not self._hangs

    def close(self) -> None:
        """Writes what is left; files that hang are left to the operating system."""
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
        """Does something with the event file; once that fails, there are no more events.

        The same numbers are in `metrics.jsonl`, whose failure is the one to stop for.
        """
        worked = False
        with decoration("TensorBoard's curves"):
            act()
            worked = True
        if not worked:
            self._events = None


class SilentWriter(MetricsWriter):
    """Takes rows and writes none: in the processes of a run that leave writing to the first one."""

    def __init__(self) -> None:
        pass

    def write(self, row: Row) -> None:
        """Does nothing."""

    def write_telemetry(self, row: Row) -> None:
        """Does nothing."""

    def flush(self) -> bool:
        """Nothing is on its way."""
        return True

    def close(self) -> None:
        """Does nothing."""


class _EventFile:
    """A TensorBoard file of scalars.

    It does without tensorboardX's own thread: when that has died of a full disk, its queue blocks.
    """

    def __init__(self, folder: Path, resumed_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        # A skipped step has an infinite gradient norm; the row says so, a warning need not.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, scalar
        # A path such as `s3:/events` would be taken for one in a store.
        self._writer = EventsWriter(str(plain(folder) / "events"), f".{resumed_step}")
        # Makes TensorBoard forget the steps that are repeated.
        again = resumed_step + 1
        self._writer.write_event(Event(step=again, file_version="brain.Event:2"))
        session = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=again, session_log=session))
        self.close = self._writer.close
        self._flushed = -SECONDS_BETWEEN_FLUSHES

    def add(self, scalars: Row, step: int) -> None:
        """Appends scalars of a step."""
        for name, value in scalars.items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._writer.flush()


def _reopened(path: Path, resumed_step: int) -> TextIO:
    """A file of rows, open for appending, without those of steps after the resumed one."""
    kept = [row for row in read_rows(path) if row["step"] <= resumed_step]
    replace_text(path, "".join(strict_json.dumps(row) + "\n" for row in kept))
    return path.open("a", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that at every moment it holds either the old text or the new.

    A process killed meanwhile leaves `partial(path)` behind, which the next one writes over.
    """
    temporary = partial(path)
    # Names of files may hold bytes that are no UTF-8, which would have no place in the text.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
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
    if lost:  # at the foot of the panel, where a run diverged
        foot = panel.get_xaxis_transform()
        panel.plot(
            lost, [0.02] * len(lost), "x", color="#b5412b", transform=foot, label="not finite"
        )
    panel.set_ylabel("loss (nats per token)")
    panel.legend(frameon=False)


def _column(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and is a finite number."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]
