"""What a person sees while a run trains.

In a terminal or a notebook, a live bar; elsewhere (a log file, CI) one line every few seconds.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Shows the course of a run; a context manager, silent when `enabled` is false."""

    def __init__(self, first_step: int, steps: int, *, enabled: bool = True):
        self._console = Console(stderr=True, highlight=False, quiet=not enabled)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._steps = steps
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not (enabled and self._live),
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=first_step, metrics="compiling")

    def __enter__(self) -> Reporter:
        """Starts the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the bar where it is."""
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to a step whose metrics are not known yet."""
        self._bar.update(self._task, completed=step)

    def metrics(self, row: dict[str, Any]) -> None:
        """Shows the metrics of a logged step."""
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if row["loss_scale"] != 1.0 or row["skipped_steps"]:
            text += f"  scale {_power_of_two(row['loss_scale'])}"
        if row["skipped_steps"]:
            text += f"  {row['skipped_steps']} skipped"
        self._bar.update(self._task, metrics=text)
        now = time.monotonic()
        if not self._live and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.note(f"step {row['step']}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)


def say(text: str, *, enabled: bool = True) -> None:
    """Prints a line that stays, where no reporter is at work."""
    Console(stderr=True, highlight=False, quiet=not enabled).print(
        text, markup=False, soft_wrap=True
    )


def _power_of_two(scale: float) -> str:
    return f"2^{scale.hex().partition('p')[2].lstrip('+')}"
