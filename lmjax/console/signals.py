"""Stopping a run on request: SIGINT and SIGTERM ask for a checkpoint and a clean exit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from lmjax.console import interrupts, stages


class StopRequest:
    """A context manager in which the first SIGINT or SIGTERM only requests a stop.

    A line acknowledges it at once and says what will happen. A second signal ends a command at
    once, even while its main thread compiles; in a process that is not a command (a notebook, a
    script) it has its usual effect. Python allows handlers only in the main thread; elsewhere
    nothing changes.

    Args:
      promise: what the first signal leads to.
      at_once: called before a second signal ends the process.

    Attributes:
      received: the name of the first signal; None if there was none.
      promise: as above; may change during the run.
    """

    SIGNALS = interrupts.SIGNALS

    def __init__(
        self,
        promise: str = "stopping after the next step, with a checkpoint",
        at_once: Callable[[], None] | None = None,
    ) -> None:
        self.received: str | None = None
        self.promise = promise
        self._at_once = at_once
        self._say: Callable[[str], None] = interrupts.say
        self._previous: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StopRequest:
        """Installs the handlers."""
        if interrupts.watching():
            self._stack.enter_context(interrupts.listen(self._heard))
            if self._at_once is not None:
                self._stack.enter_context(interrupts.cleaning_up(self._at_once))
        elif threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the previous handlers."""
        self._stack.close()
        self._give_back()

    @contextmanager
    def acknowledged_by(self, say: Callable[[str], None]) -> Iterator[None]:
        """A block in which `say` prints the acknowledgement, for example beside a live bar."""
        before, self._say = self._say, say
        try:
            yield
        finally:
            self._say = before

    def _heard(self, number: int) -> None:
        """Handles a command's signal, in a separate thread."""
        if self.received is not None:
            interrupts.leave(number)
        self.received = signal.Signals(number).name
        self._acknowledge()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._give_back()
        # Do not print here: the main thread may be in the middle of printing.
        threading.Thread(target=self._acknowledge, daemon=True).start()

    def _acknowledge(self) -> None:
        again = "press Ctrl-C again" if self.received == "SIGINT" else "send it again"
        doing = stages.current()
        while_ = f" while {doing}" if doing else ""
        self._say(f"{self.received}{while_}: {self.promise}; {again} to stop at once")

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
