"""What the user sees while a run trains, and while anything else takes long.

A live bar in a terminal or a notebook; elsewhere (a log file, CI) one line every few seconds.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lmjax.console import stages
from lmjax.files.filenames import printable

SECONDS_BETWEEN_LINES = 10.0


class _Bar(Progress):
    """A bar that updates itself before each drawing."""

    look: Callable[[], None] = staticmethod(lambda: None)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The rendered bar."""
        self.look()
        return super().get_renderables()


class Reporter:
    """Shows the progress of a run; a context manager, silent if `enabled` is false."""

    def __init__(self, first_step: int, steps: int, *, enabled: bool = True):
        self._console = Console(stderr=True, highlight=False, emoji=False, quiet=not enabled)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._steps = steps
        self._on_their_way: deque[tuple[int, jax.Array]] = deque()
        self._metrics = ""
        self._stack = ExitStack()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar = _Bar(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (enabled and self._live),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=first_step, metrics="")
        self._bar.look = self._look

    def __enter__(self) -> Reporter:
        """Starts the bar."""
        if not self._bar.disable:
            self._stack.enter_context(stages.hidden())
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the bar and leaves it visible."""
        self._bar.stop()
        self._stack.close()

    def dispatched(self, step: int, loss: jax.Array) -> None:
        """Registers a step that devices may still be computing; the bar shows it once done.

        Args:
          step: its number.
          loss: its loss, ready when the step is done.
        """
        self._on_their_way.append((step, loss))
        self._look()

    def _look(self) -> None:
        """Advances the bar to the last completed step."""
        done = None
        with contextlib.suppress(IndexError):  # two threads may look
            while self._on_their_way[0][1].is_ready():  # type: ignore[attr-defined]
                done, _ = self._on_their_way.popleft()
        if done is not None:
            self._bar.update(self._task, completed=done)

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """A block between two steps, named by the bar."""
        self._bar.update(self._task, metrics=text)
        try:
            with stages.stage(text):
                yield
        finally:
            self._bar.update(self._task, metrics=self._metrics)

    def metrics(self, row: dict[str, Any]) -> None:
        """Shows the metrics of a logged step."""
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in row:
            text += f"  MFU {row['mfu']:.1%}"
        if "peak_memory_bytes" in row:
            text += f"  {row['peak_memory_bytes'] / 2**30:.2f} GiB"
        if row["loss_scale"] != 1.0 or row["skipped_steps"]:
            text += f"  scale {_power_of_two(row['loss_scale'])}"
        if row["skipped_steps"]:
            text += f"  {row['skipped_steps']} skipped"
        self._metrics = text
        self._bar.update(self._task, completed=row["step"], metrics=text)
        now = time.monotonic()
        if not self._live and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.note(f"step {row['step']}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        """Prints a permanent line."""
        self._console.print(printable(text), markup=False, soft_wrap=True)


def say(text: str, *, enabled: bool = True) -> None:
    """Prints a permanent line when no reporter is active."""
    Console(stderr=True, highlight=False, emoji=False, quiet=not enabled).print(
        printable(text), markup=False, soft_wrap=True
    )


def _power_of_two(scale: float) -> str:
    return f"2^{scale.hex().partition('p')[2].lstrip('+')}"


@contextmanager
def progress_over(label: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields `advance(steps)`.

    Shows a bar in a terminal or notebook, one line where the output is kept (log file, pipe), and
    nothing if not enabled.
    """
    console = Console(stderr=True, emoji=False)
    if not enabled:
        yield lambda steps: None
    elif console.is_terminal or console.is_jupyter:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with stages.hidden(), Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda steps: bar.advance(task, steps)
    else:
        print(f"lmjax: {label}", file=sys.stderr)
        yield lambda steps: None
