"""One progress bar on stderr. The only file of the room that knows rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lmjax.console import stages


@contextlib.contextmanager
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
